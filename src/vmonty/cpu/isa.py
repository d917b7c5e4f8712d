"""The instruction table: one row per opcode, from which the decoder, the translator and the tests are made.

A row is a line of text::

    [VEX.][NP.|66.|F3.|F2.][0F.|0F38.|0F3A.]OP[+][/REG][=MODRM]  NAME  OPERANDS  ATTRIBUTES

``+`` fills eight opcodes (register in the low three bits). ``/REG`` picks by modrm.reg, ``/REGm`` and ``/REGr`` by
memory or register form as well, ``=C1`` one whole modrm byte. Operands are Intel's opcode-map codes (SDM, "Key to
Abbreviations": E G V W H B M R U P Q N I J Z O L; X: memory with a vector as index), size letters b w d q v y z x
o(16) t(10) n(no access), or a number of bytes; ``=`` before an operand marks it written, ``+`` read and written,
nothing read.

Attributes: ``@class`` (how the translator treats it; copy without), ``r: w: u: m:`` flags read, written, undefined,
perhaps written (letters O S Z A P C), ``%feature`` (CPUID name, as in ``models``), ``lock`` (LOCK allowed), ``cl``
(reads rCX), ``wcx`` (writes rCX), ``d64`` (64-bit operand by default), ``f64`` (always 64-bit operand), ``i64``
(invalid in 64-bit mode), ``o64`` (only there), ``W0 W1 L0 L1`` (VEX bits demanded), ``trap`` (the host may raise an
exception that is the guest's), ``al`` (memory operand must be aligned), ``sse`` (works on MXCSR: traps as SSE does),
``y2 r2`` (AVX2 with 32-byte vectors, with a register operand).
"""

from __future__ import annotations

from dataclasses import dataclass

CLASSES = (
    "copy", "ud", "jcc", "jmp", "call", "jmpi", "calli", "ret", "loop", "push", "pop", "pushi", "pushm", "popm",
    "pushf", "popf", "leave", "lea", "nop", "string", "xlat", "sys", "sysend", "btm", "moffs", "df", "maskmov", "cli",
    "sti", "enter", "emms", "fpu", "gather", "masked",
)  # fmt: skip

FLAGS = {"C": 1, "P": 2, "A": 4, "Z": 8, "S": 16, "O": 32}

BASE = """
98      CBW     -
99      CWD     -
63      MOVSXD  =Gv,Ed  o64
63      ARPL    +Ew,Gw  @sys i64 w:Z
68      PUSH    Iz      @pushi d64
6A      PUSH    Ib      @pushi d64
69      IMUL    =Gv,Ev,Iz   w:OC u:SZAP
6B      IMUL    =Gv,Ev,Ib   w:OC u:SZAP
6C      INSB    -       @sys
6D      INSW    -       @sys
6E      OUTSB   -       @sys
6F      OUTSW   -       @sys
84      TEST    Eb,Gb   w:OSZPC u:A
85      TEST    Ev,Gv   w:OSZPC u:A
A8      TEST    Ib      w:OSZPC u:A
A9      TEST    Iz      w:OSZPC u:A
86      XCHG    +Eb,+Gb lock
87      XCHG    +Ev,+Gv lock
88      MOV     =Eb,Gb
89      MOV     =Ev,Gv
8A      MOV     =Gb,Eb
8B      MOV     =Gv,Ev
8C      MOV_FROM_SEG    =Ev     @sys
8D      LEA     =Gv,Mn  @lea
8E      MOV_TO_SEG      Ew      @sysend
8F/0    POP     =Ev     @popm d64
50+     PUSH    Zv      @push d64
58+     POP     =Zv     @pop d64
NP.90   NOP     -       @nop
66.90   NOP     -       @nop
F2.90   NOP     -       @nop
F3.90   PAUSE   -       @sys
9B      FWAIT   -       trap
9C      PUSHF   -       @pushf d64 r:OSZAPC
9D      POPF    -       @popf d64 w:OSZAPC
9E      SAHF    -       w:SZAPC %lahf-lm
9F      LAHF    -       r:SZAPC %lahf-lm
A0      MOV     Ob      @moffs
A1      MOV     Ov      @moffs
A2      MOV     =Ob     @moffs
A3      MOV     =Ov     @moffs
A4      MOVSB   -       @string
A5      MOVSW   -       @string
A6      CMPSB   -       @string m:OSZAPC
A7      CMPSW   -       @string m:OSZAPC
AA      STOSB   -       @string
AB      STOSW   -       @string
AC      LODSB   -       @string
AD      LODSW   -       @string
AE      SCASB   -       @string m:OSZAPC
AF      SCASW   -       @string m:OSZAPC
B0+     MOV     =Zb,Ib
B8+     MOV     =Zv,Iv
C2      RET     Iw      @ret f64
C3      RET     -       @ret f64
C6/0    MOV     =Eb,Ib
C7/0    MOV     =Ev,Iz
C8      ENTER   Iw,Ib   @sys d64
C9      LEAVE   -       @leave d64
CA      RETF    Iw      @sysend
CB      RETF    -       @sysend
CC      INT3    -       @sysend
CD      INT     Ib      @sysend
CE      INTO    -       @sysend i64 r:O
CF      IRET    -       @sysend w:OSZAPC
D7      XLAT    -       @xlat
E0      LOOPNE  Jb      @loop f64 r:Z
E1      LOOPE   Jb      @loop f64 r:Z
E2      LOOP    Jb      @loop f64
E3      JCXZ    Jb      @loop f64
E4      IN      Ib      @sysend
E5      IN      Ib      @sysend
E6      OUT     Ib      @sysend
E7      OUT     Ib      @sysend
EC      IN      -       @sysend
ED      IN      -       @sysend
EE      OUT     -       @sysend
EF      OUT     -       @sysend
E8      CALL    Jz      @call f64
E9      JMP     Jz      @jmp f64
EB      JMP     Jb      @jmp f64
F1      INT1    -       @sysend
F4      HLT     -       @sysend
F5      CMC     -       r:C w:C
F8      CLC     -       w:C
F9      STC     -       w:C
FA      CLI     -       @cli
FB      STI     -       @sysend
FC      CLD     -       @df
FD      STD     -       @df
F6/0    TEST    Eb,Ib   w:OSZPC u:A
F6/1    TEST    Eb,Ib   w:OSZPC u:A
F6/2    NOT     +Eb     lock
F6/3    NEG     +Eb     lock w:OSZAPC
F6/4    MUL     Eb      w:OC u:SZAP
F6/5    IMUL    Eb      w:OC u:SZAP
F6/6    DIV     Eb      u:OSZAPC trap
F6/7    IDIV    Eb      u:OSZAPC trap
F7/0    TEST    Ev,Iz   w:OSZPC u:A
F7/1    TEST    Ev,Iz   w:OSZPC u:A
F7/2    NOT     +Ev     lock
F7/3    NEG     +Ev     lock w:OSZAPC
F7/4    MUL     Ev      w:OC u:SZAP
F7/5    IMUL    Ev      w:OC u:SZAP
F7/6    DIV     Ev      u:OSZAPC trap
F7/7    IDIV    Ev      u:OSZAPC trap
FE/0    INC     +Eb     lock w:OSZAP
FE/1    DEC     +Eb     lock w:OSZAP
FF/0    INC     +Ev     lock w:OSZAP
FF/1    DEC     +Ev     lock w:OSZAP
FF/2    CALL    Ev      @calli f64
FF/3m   CALLF   Mn      @sysend
FF/4    JMP     Ev      @jmpi f64
FF/5m   JMPF    Mn      @sysend
FF/6    PUSH    Ev      @pushm d64
C4m     LES     Mn      @sysend i64
C5m     LDS     Mn      @sysend i64
06      PUSH_ES -       @sysend i64
07      POP_ES  -       @sysend i64
0E      PUSH_CS -       @sysend i64
16      PUSH_SS -       @sysend i64
17      POP_SS  -       @sysend i64
1E      PUSH_DS -       @sysend i64
1F      POP_DS  -       @sysend i64
27      DAA     -       @sys i64 r:AC w:SZAPC u:O
2F      DAS     -       @sys i64 r:AC w:SZAPC u:O
37      AAA     -       @sys i64 r:A w:AC u:OSZP
3F      AAS     -       @sys i64 r:A w:AC u:OSZP
60      PUSHA   -       @sys i64
61      POPA    -       @sys i64
62m     BOUND   Gv,Mn   @sys i64
9A      CALLF   Ap      @sysend i64
EA      JMPF    Ap      @sysend i64
D4      AAM     Ib      @sys i64 w:SZP u:OAC
D5      AAD     Ib      @sys i64 w:SZP u:OAC
D6      SALC    -       @sys i64 r:C
40+     INC     +Zv     i64 w:OSZAP
48+     DEC     +Zv     i64 w:OSZAP

0F.00/0     SLDT    =Ev     @sys
0F.00/1     STR     =Ev     @sys
0F.00/2     LLDT    Ew      @sysend
0F.00/3     LTR     Ew      @sysend
0F.00/4     VERR    Ew      @sys w:Z
0F.00/5     VERW    Ew      @sys w:Z
0F.01/0m    SGDT    Mn      @sys
0F.01/1m    SIDT    Mn      @sys
0F.01/2m    LGDT    Mn      @sys
0F.01/3m    LIDT    Mn      @sys
0F.01/4     SMSW    =Ev     @sys
0F.01/6     LMSW    Ew      @sysend
0F.01/7m    INVLPG  Mn      @sysend
NP.0F.01=C1 VMCALL  -       @sysend %vmx
NP.0F.01=C2 VMLAUNCH    -   @sysend %vmx w:OSZAPC
NP.0F.01=C3 VMRESUME    -   @sysend %vmx w:OSZAPC
NP.0F.01=C4 VMXOFF  -       @sysend %vmx w:OSZAPC
NP.0F.01=C8 MONITOR -       @sysend %monitor
NP.0F.01=C9 MWAIT   -       @sysend %monitor
NP.0F.01=CA CLAC    -       @sysend %smap
NP.0F.01=CB STAC    -       @sysend %smap
NP.0F.01=D0 XGETBV  -       @sys %xsave
NP.0F.01=D1 XSETBV  -       @sysend %xsave
0F.01=D8    VMRUN   -       @sysend %svm
0F.01=D9    VMMCALL -       @sysend %svm
0F.01=DA    VMLOAD  -       @sysend %svm
0F.01=DB    VMSAVE  -       @sysend %svm
0F.01=DC    STGI    -       @sysend %svm
0F.01=DD    CLGI    -       @sysend %svm
0F.01=DF    INVLPGA -       @sysend %svm
0F.01=F8    SWAPGS  -       @sys o64
0F.01=F9    RDTSCP  -       @sys %rdtscp
0F.02       LAR     +Gv,Ew  @sys w:Z
0F.03       LSL     +Gv,Ew  @sys w:Z
0F.05       SYSCALL -       @sysend %syscall
0F.06       CLTS    -       @sysend
0F.07       SYSRET  -       @sysend w:OSZAPC %syscall
0F.08       INVD    -       @sysend
0F.09       WBINVD  -       @sysend
0F.0B       UD2     -       @ud
0F.B9       UD1     Gv,Ev   @ud
0F.FF       UD0     Gv,Ev   @ud
0F.0D       PREFETCHW   En  @nop %3dnowprefetch
0F.18       PREFETCH    En  @nop
0F.19       NOP     En      @nop
0F.1A       NOP     En      @nop
0F.1B       NOP     En      @nop
0F.1C       NOP     En      @nop
0F.1D       NOP     En      @nop
0F.1E       NOP     En      @nop
0F.1F       NOP     En      @nop
0F.20       MOV_FROM_CR     =Rn     @sysend
0F.21       MOV_FROM_DR     =Rn     @sysend
0F.22       MOV_TO_CR       Rn      @sysend
0F.23       MOV_TO_DR       Rn      @sysend
0F.30       WRMSR   -       @sysend %msr
0F.31       RDTSC   -       @sys %tsc
0F.32       RDMSR   -       @sysend %msr
0F.33       RDPMC   -       @sysend
0F.34       SYSENTER    -   @sysend %sep
0F.35       SYSEXIT -       @sysend %sep
0F.A0       PUSH_FS -       @sysend d64
0F.A1       POP_FS  -       @sysend d64
0F.A2       CPUID   -       @sysend
0F.A8       PUSH_GS -       @sysend d64
0F.A9       POP_GS  -       @sysend d64
0F.AA       RSM     -       @ud
0F.A3       BT      Ev,Gv       @btm w:C u:OSAP
0F.AB       BTS     +Ev,Gv      @btm lock w:C u:OSAP
0F.B3       BTR     +Ev,Gv      @btm lock w:C u:OSAP
0F.BB       BTC     +Ev,Gv      @btm lock w:C u:OSAP
0F.BA/4     BT      Ev,Ib       w:C u:OSAP
0F.BA/5     BTS     +Ev,Ib      lock w:C u:OSAP
0F.BA/6     BTR     +Ev,Ib      lock w:C u:OSAP
0F.BA/7     BTC     +Ev,Ib      lock w:C u:OSAP
0F.A4       SHLD    +Ev,Gv,Ib   shift w:SZPC u:OA
0F.A5       SHLD    +Ev,Gv      cl m:OSZAPC
0F.AC       SHRD    +Ev,Gv,Ib   shift w:SZPC u:OA
0F.AD       SHRD    +Ev,Gv      cl m:OSZAPC
NP.0F.AE/0m FXSAVE  =M512       @fpu %fxsr
NP.0F.AE/1m FXRSTOR M512        @fpu %fxsr
NP.0F.AE/2m LDMXCSR Md          trap sse %sse
NP.0F.AE/3m STMXCSR =Md         sse %sse
VEX.NP.0F.AE/2m     VLDMXCSR Md     trap sse L0 %avx
VEX.NP.0F.AE/3m     VSTMXCSR =Md    sse L0 %avx
NP.0F.AE/4m XSAVE   Mn          @fpu %xsave
NP.0F.AE/5m XRSTOR  Mn          @fpu %xsave
NP.0F.AE/6m XSAVEOPT    Mn      @fpu %xsaveopt
NP.0F.AE/7m CLFLUSH M1 %clflush
66.0F.AE/7m CLFLUSHOPT  M1 %clflushopt
66.0F.AE/6m CLWB    M1 %clwb
NP.0F.AE/5r LFENCE  - %sse2
NP.0F.AE/6r MFENCE  - %sse2
NP.0F.AE/7r SFENCE  - %sse
F3.0F.AE/0r RDFSBASE    =Ry     @sys %fsgsbase o64
F3.0F.AE/1r RDGSBASE    =Ry     @sys %fsgsbase o64
F3.0F.AE/2r WRFSBASE    Ry      @sys %fsgsbase o64
F3.0F.AE/3r WRGSBASE    Ry      @sys %fsgsbase o64
0F.AF       IMUL    +Gv,Ev      w:OC u:SZAP
0F.B0       CMPXCHG +Eb,Gb      lock w:OSZAPC
0F.B1       CMPXCHG +Ev,Gv      lock w:OSZAPC
0F.B2m      LSS     Mn          @sysend
0F.B4m      LFS     Mn          @sysend
0F.B5m      LGS     Mn          @sysend
0F.B6       MOVZX   =Gv,Eb
0F.B7       MOVZX   =Gv,Ew
F3.0F.B8    POPCNT  =Gv,Ev      w:OSZAPC %popcnt
NP.0F.BC    BSF     +Gv,Ev      w:Z u:OSAPC
66.0F.BC    BSF     +Gv,Ev      w:Z u:OSAPC
F2.0F.BC    BSF     +Gv,Ev      w:Z u:OSAPC
F3.0F.BC    TZCNT   =Gv,Ev      w:ZC u:OSAP %bmi1
NP.0F.BD    BSR     +Gv,Ev      w:Z u:OSAPC
66.0F.BD    BSR     +Gv,Ev      w:Z u:OSAPC
F2.0F.BD    BSR     +Gv,Ev      w:Z u:OSAPC
F3.0F.BD    LZCNT   =Gv,Ev      w:ZC u:OSAP %abm
0F.BE       MOVSX   =Gv,Eb
0F.BF       MOVSX   =Gv,Ew
0F.C0       XADD    +Eb,+Gb     lock w:OSZAPC
0F.C1       XADD    +Ev,+Gv     lock w:OSZAPC
NP.0F.C3m   MOVNTI  =My,Gy %sse2
0F.C7/1m    CMPXCHG8B   +Mc     al lock cl w:Z %cx8
NP.0F.C7/6r RDRAND  =Rv         w:OSZAPC %rdrand
66.0F.C7/6r RDRAND  =Rv         w:OSZAPC %rdrand
NP.0F.C7/7r RDSEED  =Rv         w:OSZAPC %rdseed
66.0F.C7/7r RDSEED  =Rv         w:OSZAPC %rdseed
F3.0F.C7/7r RDPID   =Rq         @sys %rdpid
NP.0F.C7/6m VMPTRLD Mq          @sysend %vmx w:OSZAPC
66.0F.C7/6m VMCLEAR Mq          @sysend %vmx w:OSZAPC
F3.0F.C7/6m VMXON   Mq          @sysend %vmx w:OSZAPC
NP.0F.C7/7m VMPTRST =Mq         @sysend %vmx w:OSZAPC
NP.0F.78    VMREAD  =Eq,Gq      @sysend %vmx w:OSZAPC
NP.0F.79    VMWRITE Gq,Eq       @sysend %vmx w:OSZAPC
NP.0F.C7/3m XRSTORS Mn          @fpu %xsaves
NP.0F.C7/4m XSAVEC  Mn          @fpu %xsavec
NP.0F.C7/5m XSAVES  Mn          @fpu %xsaves
0F.C8+      BSWAP   +Zv
66.0F38.80m INVEPT  Gq,Mo       @sysend %vmx w:OSZAPC
66.0F38.81m INVVPID Gq,Mo       @sysend %vmx w:OSZAPC
66.0F38.82m INVPCID Gq,Mo       @sysend %invpcid
NP.0F38.F0m MOVBE   =Gv,Mv      %movbe
66.0F38.F0m MOVBE   =Gv,Mv      %movbe
NP.0F38.F1m MOVBE   =Mv,Gv      %movbe
66.0F38.F1m MOVBE   =Mv,Gv      %movbe
F2.0F38.F0  CRC32   +Gy,Eb      %sse4.2
F2.0F38.F1  CRC32   +Gy,Ev      %sse4.2
66.0F38.F6  ADCX    +Gy,Ey      r:C w:C %adx
F3.0F38.F6  ADOX    +Gy,Ey      r:O w:O %adx

VEX.NP.0F38.F2      ANDN    =Gy,By,Ey   L0 w:OSZC u:AP %bmi1
VEX.NP.0F38.F3/1    BLSR    =By,Ey      L0 w:OSZC u:AP %bmi1
VEX.NP.0F38.F3/2    BLSMSK  =By,Ey      L0 w:OSZC u:AP %bmi1
VEX.NP.0F38.F3/3    BLSI    =By,Ey      L0 w:OSZC u:AP %bmi1
VEX.NP.0F38.F5      BZHI    =Gy,Ey,By   L0 w:OSZC u:AP %bmi2
VEX.F3.0F38.F5      PEXT    =Gy,By,Ey   L0 %bmi2
VEX.F2.0F38.F5      PDEP    =Gy,By,Ey   L0 %bmi2
VEX.F2.0F38.F6      MULX    =Gy,=By,Ey  L0 %bmi2
VEX.NP.0F38.F7      BEXTR   =Gy,Ey,By   L0 w:OZC u:SAP %bmi1
VEX.66.0F38.F7      SHLX    =Gy,Ey,By   L0 %bmi2
VEX.F3.0F38.F7      SARX    =Gy,Ey,By   L0 %bmi2
VEX.F2.0F38.F7      SHRX    =Gy,Ey,By   L0 %bmi2
VEX.F2.0F3A.F0      RORX    =Gy,Ey,Ib   L0 %bmi2
"""

# x87: the memory forms by opcode and /reg; register forms are all copied except what shows the environment.
X87 = """
D8/0m FADD Md|D8/1m FMUL Md|D8/2m FCOM Md|D8/3m FCOMP Md|D8/4m FSUB Md|D8/5m FSUBR Md|D8/6m FDIV Md|D8/7m FDIVR Md
D9/0m FLD Md|D9/2m FST =Md|D9/3m FSTP =Md|D9/4m FLDENV Mn @fpu|D9/5m FLDCW Mw|D9/6m FNSTENV Mn @fpu|D9/7m FNSTCW =Mw
DA/0m FIADD Md|DA/1m FIMUL Md|DA/2m FICOM Md|DA/3m FICOMP Md|DA/4m FISUB Md|DA/5m FISUBR Md|DA/6m FIDIV Md
DA/7m FIDIVR Md|DB/0m FILD Md|DB/1m FISTTP =Md %sse3|DB/2m FIST =Md|DB/3m FISTP =Md|DB/5m FLD Mt|DB/7m FSTP =Mt
DC/0m FADD Mq|DC/1m FMUL Mq|DC/2m FCOM Mq|DC/3m FCOMP Mq|DC/4m FSUB Mq|DC/5m FSUBR Mq|DC/6m FDIV Mq|DC/7m FDIVR Mq
DD/0m FLD Mq|DD/1m FISTTP =Mq %sse3|DD/2m FST =Mq|DD/3m FSTP =Mq|DD/4m FRSTOR Mn @fpu|DD/6m FNSAVE Mn @fpu
DD/7m FNSTSW =Mw|DE/0m FIADD Mw|DE/1m FIMUL Mw|DE/2m FICOM Mw|DE/3m FICOMP Mw|DE/4m FISUB Mw|DE/5m FISUBR Mw
DE/6m FIDIV Mw|DE/7m FIDIVR Mw|DF/0m FILD Mw|DF/1m FISTTP =Mw %sse3|DF/2m FIST =Mw|DF/3m FISTP =Mw|DF/4m FBLD Mt
DF/5m FILD Mq|DF/6m FBSTP =Mt|DF/7m FISTP =Mq
"""

# Valid register forms of x87 as modrm bytes.
X87_REGISTER = {
    0xD8: [*range(0xC0, 0x100)],
    0xD9: [*range(0xC0, 0xD1), *range(0xD8, 0xE0), 0xE0, 0xE1, 0xE4, 0xE5, *range(0xE8, 0xEF), *range(0xF0, 0x100)],
    0xDA: [*range(0xC0, 0xE0), 0xE9],
    0xDB: [*range(0xC0, 0xE5), *range(0xE8, 0xF8)],
    0xDC: [*range(0xC0, 0x100)],
    0xDD: [*range(0xC0, 0xC8), *range(0xC8, 0xF0)],
    0xDE: [*range(0xC0, 0xD8), 0xD9, *range(0xE0, 0x100)],
    0xDF: [*range(0xC0, 0xE1), *range(0xE8, 0xF8)],
}
X87_FLAGS = {0xDA: {0: "r:C", 1: "r:Z", 2: "r:ZC", 3: "r:P"}, 0xDB: {0: "r:C", 1: "r:Z", 2: "r:ZC", 3: "r:P"}}

# SSE and AVX. Fields: prefixes, opcode, name, legacy operands (or -), VEX operands (or -), attributes.
# In VEX rows ``x`` is 16 or 32 bytes by VEX.L; rows with scalar memory ignore L.
VECTOR = """
NP 0F.10 MOVUPS =Vx,Wx =Vx,Wx
66 0F.10 MOVUPD =Vx,Wx =Vx,Wx
F3 0F.10 MOVSS +Vx,Wd +Vx,Hx,Wd
F2 0F.10 MOVSD +Vx,Wq +Vx,Hx,Wq
NP 0F.11 MOVUPS =Wx,Vx =Wx,Vx
66 0F.11 MOVUPD =Wx,Vx =Wx,Vx
F3 0F.11 MOVSS =Wd,Vx =Wd,Hx,Vx
F2 0F.11 MOVSD =Wq,Vx =Wq,Hx,Vx
NP 0F.12 MOVLPS +Vx,Wq =Vx,Hx,Wq L0
66 0F.12m MOVLPD +Vx,Mq =Vx,Hx,Mq L0
F3 0F.12 MOVSLDUP =Vx,Wx =Vx,Wx %sse3
F2 0F.12 MOVDDUP =Vx,Wq =Vx,Wk %sse3
NP 0F.13m MOVLPS =Mq,Vx =Mq,Vx L0
66 0F.13m MOVLPD =Mq,Vx =Mq,Vx L0
NP 0F.14 UNPCKLPS +Vx,Wx =Vx,Hx,Wx
66 0F.14 UNPCKLPD +Vx,Wx =Vx,Hx,Wx
NP 0F.15 UNPCKHPS +Vx,Wx =Vx,Hx,Wx
66 0F.15 UNPCKHPD +Vx,Wx =Vx,Hx,Wx
NP 0F.16 MOVHPS +Vx,Wq =Vx,Hx,Wq L0
66 0F.16m MOVHPD +Vx,Mq =Vx,Hx,Mq L0
F3 0F.16 MOVSHDUP =Vx,Wx =Vx,Wx %sse3
NP 0F.17m MOVHPS =Mq,Vx =Mq,Vx L0
66 0F.17m MOVHPD =Mq,Vx =Mq,Vx L0
NP 0F.28 MOVAPS =Vx,Wx =Vx,Wx al
66 0F.28 MOVAPD =Vx,Wx =Vx,Wx al
NP 0F.29 MOVAPS =Wx,Vx =Wx,Vx al
66 0F.29 MOVAPD =Wx,Vx =Wx,Vx al
NP 0F.2A CVTPI2PS +Vx,Qq -
66 0F.2A CVTPI2PD =Vx,Qq -
F3 0F.2A CVTSI2SS +Vx,Ey =Vx,Hx,Ey
F2 0F.2A CVTSI2SD +Vx,Ey =Vx,Hx,Ey
NP 0F.2Bm MOVNTPS =Mx,Vx =Mx,Vx al
66 0F.2Bm MOVNTPD =Mx,Vx =Mx,Vx al
NP 0F.2C CVTTPS2PI =Pq,Wq -
66 0F.2C CVTTPD2PI =Pq,Wx -
F3 0F.2C CVTTSS2SI =Gy,Wd =Gy,Wd
F2 0F.2C CVTTSD2SI =Gy,Wq =Gy,Wq
NP 0F.2D CVTPS2PI =Pq,Wq -
66 0F.2D CVTPD2PI =Pq,Wx -
F3 0F.2D CVTSS2SI =Gy,Wd =Gy,Wd
F2 0F.2D CVTSD2SI =Gy,Wq =Gy,Wq
NP 0F.2E UCOMISS Vx,Wd Vx,Wd w:OSZAPC
66 0F.2E UCOMISD Vx,Wq Vx,Wq w:OSZAPC
NP 0F.2F COMISS Vx,Wd Vx,Wd w:OSZAPC
66 0F.2F COMISD Vx,Wq Vx,Wq w:OSZAPC
NP 0F.50r MOVMSKPS =Gd,Ux =Gd,Ux
66 0F.50r MOVMSKPD =Gd,Ux =Gd,Ux
NP 0F.51 SQRTPS =Vx,Wx =Vx,Wx
66 0F.51 SQRTPD =Vx,Wx =Vx,Wx
F3 0F.51 SQRTSS +Vx,Wd =Vx,Hx,Wd
F2 0F.51 SQRTSD +Vx,Wq =Vx,Hx,Wq
NP 0F.52 RSQRTPS =Vx,Wx =Vx,Wx
F3 0F.52 RSQRTSS +Vx,Wd =Vx,Hx,Wd
NP 0F.53 RCPPS =Vx,Wx =Vx,Wx
F3 0F.53 RCPSS +Vx,Wd =Vx,Hx,Wd
NP 0F.54 ANDPS +Vx,Wx =Vx,Hx,Wx
66 0F.54 ANDPD +Vx,Wx =Vx,Hx,Wx
NP 0F.55 ANDNPS +Vx,Wx =Vx,Hx,Wx
66 0F.55 ANDNPD +Vx,Wx =Vx,Hx,Wx
NP 0F.56 ORPS +Vx,Wx =Vx,Hx,Wx
66 0F.56 ORPD +Vx,Wx =Vx,Hx,Wx
NP 0F.57 XORPS +Vx,Wx =Vx,Hx,Wx
66 0F.57 XORPD +Vx,Wx =Vx,Hx,Wx
NP 0F.5A CVTPS2PD =Vx,Wq =Vx,Wh
66 0F.5A CVTPD2PS =Vx,Wx =Vx,Wx
F3 0F.5A CVTSS2SD +Vx,Wd =Vx,Hx,Wd
F2 0F.5A CVTSD2SS +Vx,Wq =Vx,Hx,Wq
NP 0F.5B CVTDQ2PS =Vx,Wx =Vx,Wx
66 0F.5B CVTPS2DQ =Vx,Wx =Vx,Wx
F3 0F.5B CVTTPS2DQ =Vx,Wx =Vx,Wx
66 0F.6E MOVD =Vx,Ey =Vx,Ey L0
66 0F.6F MOVDQA =Vx,Wx =Vx,Wx al
F3 0F.6F MOVDQU =Vx,Wx =Vx,Wx
66 0F.70 PSHUFD =Vx,Wx,Ib =Vx,Wx,Ib
F3 0F.70 PSHUFHW =Vx,Wx,Ib =Vx,Wx,Ib
F2 0F.70 PSHUFLW =Vx,Wx,Ib =Vx,Wx,Ib
66 0F.7C HADDPD +Vx,Wx =Vx,Hx,Wx %sse3
F2 0F.7C HADDPS +Vx,Wx =Vx,Hx,Wx %sse3
66 0F.7D HSUBPD +Vx,Wx =Vx,Hx,Wx %sse3
F2 0F.7D HSUBPS +Vx,Wx =Vx,Hx,Wx %sse3
66 0F.7E MOVD =Ey,Vx =Ey,Vx L0
F3 0F.7E MOVQ =Vx,Wq =Vx,Wq L0
66 0F.7F MOVDQA =Wx,Vx =Wx,Vx al
F3 0F.7F MOVDQU =Wx,Vx =Wx,Vx
NP 0F.C2 CMPPS +Vx,Wx,Ib =Vx,Hx,Wx,Ib
66 0F.C2 CMPPD +Vx,Wx,Ib =Vx,Hx,Wx,Ib
F3 0F.C2 CMPSS +Vx,Wd,Ib =Vx,Hx,Wd,Ib
F2 0F.C2 CMPSD +Vx,Wq,Ib =Vx,Hx,Wq,Ib
66 0F.C4 PINSRW +Vx,E2,Ib =Vx,Hx,E2,Ib L0
66 0F.C5r PEXTRW =Gd,Ux,Ib =Gd,Ux,Ib L0
NP 0F.C6 SHUFPS +Vx,Wx,Ib =Vx,Hx,Wx,Ib
66 0F.C6 SHUFPD +Vx,Wx,Ib =Vx,Hx,Wx,Ib
66 0F.D0 ADDSUBPD +Vx,Wx =Vx,Hx,Wx %sse3
F2 0F.D0 ADDSUBPS +Vx,Wx =Vx,Hx,Wx %sse3
66 0F.D6 MOVQ =Wq,Vx =Wq,Vx L0
F3 0F.D6r MOVQ2DQ =Vx,Nq -
F2 0F.D6r MOVDQ2Q =Pq,Ux -
66 0F.D7r PMOVMSKB =Gd,Ux =Gd,Ux
F3 0F.E6 CVTDQ2PD =Vx,Wq =Vx,Wh
F2 0F.E6 CVTPD2DQ =Vx,Wx =Vx,Wx
66 0F.E6 CVTTPD2DQ =Vx,Wx =Vx,Wx
66 0F.E7m MOVNTDQ =Mx,Vx =Mx,Vx al
F2 0F.F0m LDDQU =Vx,Mx =Vx,Mx %sse3
66 0F.F7r MASKMOVDQU Vx,Ux Vx,Ux @maskmov L0
NP 0F.77 EMMS - - @emms %mmx
66 0F38.10 PBLENDVB +Vx,Wx - %sse4.1
66 0F38.14 BLENDVPS +Vx,Wx - %sse4.1
66 0F38.15 BLENDVPD +Vx,Wx - %sse4.1
66 0F38.17 PTEST Vx,Wx Vx,Wx w:OSZAPC %sse4.1
66 0F38.20 PMOVSXBW =Vx,Wq =Vx,Wh %sse4.1
66 0F38.21 PMOVSXBD =Vx,Wd =Vx,Wf %sse4.1
66 0F38.22 PMOVSXBQ =Vx,Ww =Vx,We %sse4.1
66 0F38.23 PMOVSXWD =Vx,Wq =Vx,Wh %sse4.1
66 0F38.24 PMOVSXWQ =Vx,Wd =Vx,Wf %sse4.1
66 0F38.25 PMOVSXDQ =Vx,Wq =Vx,Wh %sse4.1
66 0F38.2Am MOVNTDQA =Vx,Mx =Vx,Mx %sse4.1 al
66 0F38.30 PMOVZXBW =Vx,Wq =Vx,Wh %sse4.1
66 0F38.31 PMOVZXBD =Vx,Wd =Vx,Wf %sse4.1
66 0F38.32 PMOVZXBQ =Vx,Ww =Vx,We %sse4.1
66 0F38.33 PMOVZXWD =Vx,Wq =Vx,Wh %sse4.1
66 0F38.34 PMOVZXWQ =Vx,Wd =Vx,Wf %sse4.1
66 0F38.35 PMOVZXDQ =Vx,Wq =Vx,Wh %sse4.1
66 0F38.41 PHMINPOSUW =Vx,Wx =Vx,Wx L0 %sse4.1
66 0F38.DB AESIMC =Vx,Wx =Vx,Wx L0 %aes
66 0F38.DC AESENC +Vx,Wx =Vx,Hx,Wx L0 %aes
66 0F38.DD AESENCLAST +Vx,Wx =Vx,Hx,Wx L0 %aes
66 0F38.DE AESDEC +Vx,Wx =Vx,Hx,Wx L0 %aes
66 0F38.DF AESDECLAST +Vx,Wx =Vx,Hx,Wx L0 %aes
NP 0F38.C8 SHA1NEXTE +Vx,Wx - %sha-ni
NP 0F38.C9 SHA1MSG1 +Vx,Wx - %sha-ni
NP 0F38.CA SHA1MSG2 +Vx,Wx - %sha-ni
NP 0F38.CB SHA256RNDS2 +Vx,Wx - %sha-ni
NP 0F38.CC SHA256MSG1 +Vx,Wx - %sha-ni
NP 0F38.CD SHA256MSG2 +Vx,Wx - %sha-ni
NP 0F3A.CC SHA1RNDS4 +Vx,Wx,Ib - %sha-ni
66 0F3A.08 ROUNDPS =Vx,Wx,Ib =Vx,Wx,Ib %sse4.1
66 0F3A.09 ROUNDPD =Vx,Wx,Ib =Vx,Wx,Ib %sse4.1
66 0F3A.0A ROUNDSS +Vx,Wd,Ib =Vx,Hx,Wd,Ib %sse4.1
66 0F3A.0B ROUNDSD +Vx,Wq,Ib =Vx,Hx,Wq,Ib %sse4.1
66 0F3A.0C BLENDPS +Vx,Wx,Ib =Vx,Hx,Wx,Ib %sse4.1
66 0F3A.0D BLENDPD +Vx,Wx,Ib =Vx,Hx,Wx,Ib %sse4.1
66 0F3A.0E PBLENDW +Vx,Wx,Ib =Vx,Hx,Wx,Ib %sse4.1
66 0F3A.0F PALIGNR +Vx,Wx,Ib =Vx,Hx,Wx,Ib %ssse3
66 0F3A.14 PEXTRB =E1,Vx,Ib =E1,Vx,Ib L0 %sse4.1
66 0F3A.15 PEXTRW =E2,Vx,Ib =E2,Vx,Ib L0 %sse4.1
66 0F3A.16 PEXTRD =Ey,Vx,Ib =Ey,Vx,Ib L0 %sse4.1
66 0F3A.17 EXTRACTPS =E4,Vx,Ib =E4,Vx,Ib L0 %sse4.1
66 0F3A.20 PINSRB +Vx,E1,Ib =Vx,Hx,E1,Ib L0 %sse4.1
66 0F3A.21 INSERTPS +Vx,Wd,Ib =Vx,Hx,Wd,Ib L0 %sse4.1
66 0F3A.22 PINSRD +Vx,Ey,Ib =Vx,Hx,Ey,Ib L0 %sse4.1
66 0F3A.40 DPPS +Vx,Wx,Ib =Vx,Hx,Wx,Ib %sse4.1
66 0F3A.41 DPPD +Vx,Wx,Ib =Vx,Hx,Wx,Ib L0 %sse4.1
66 0F3A.42 MPSADBW +Vx,Wx,Ib =Vx,Hx,Wx,Ib %sse4.1
66 0F3A.44 PCLMULQDQ +Vx,Wx,Ib =Vx,Hx,Wx,Ib L0 %pclmulqdq
66 0F3A.60 PCMPESTRM Vx,Wx,Ib Vx,Wx,Ib L0 w:OSZAPC %sse4.2
66 0F3A.61 PCMPESTRI Vx,Wx,Ib Vx,Wx,Ib L0 w:OSZAPC wcx %sse4.2
66 0F3A.62 PCMPISTRM Vx,Wx,Ib Vx,Wx,Ib L0 w:OSZAPC %sse4.2
66 0F3A.63 PCMPISTRI Vx,Wx,Ib Vx,Wx,Ib L0 w:OSZAPC wcx %sse4.2
66 0F3A.DF AESKEYGENASSIST =Vx,Wx,Ib =Vx,Wx,Ib L0 %aes
66 0F38.0C VPERMILPS - =Vx,Hx,Wx W0 %avx
66 0F38.0D VPERMILPD - =Vx,Hx,Wx W0 %avx
66 0F38.0E VTESTPS - Vx,Wx W0 w:OSZAPC %avx
66 0F38.0F VTESTPD - Vx,Wx W0 w:OSZAPC %avx
66 0F38.13 VCVTPH2PS - =Vx,Wh W0 %f16c
66 0F38.16 VPERMPS - =Vx,Hx,Wx W0 L1 %avx2
66 0F38.18 VBROADCASTSS - =Vx,Wd W0 r2 %avx
66 0F38.19 VBROADCASTSD - =Vx,Wq W0 L1 r2 %avx
66 0F38.1Am VBROADCASTF128 - =Vx,Mo W0 L1 %avx
66 0F38.2Cm VMASKMOVPS - =Vx,Hx,Mx @masked W0 %avx
66 0F38.2Dm VMASKMOVPD - =Vx,Hx,Mx @masked W0 %avx
66 0F38.2Em VMASKMOVPS - +Mx,Hx,Vx @masked W0 %avx
66 0F38.2Fm VMASKMOVPD - +Mx,Hx,Vx @masked W0 %avx
66 0F38.36 VPERMD - =Vx,Hx,Wx W0 L1 %avx2
66 0F38.45 VPSRLV - =Vx,Hx,Wx %avx2
66 0F38.46 VPSRAVD - =Vx,Hx,Wx W0 %avx2
66 0F38.47 VPSLLV - =Vx,Hx,Wx %avx2
66 0F38.58 VPBROADCASTD - =Vx,Wd W0 %avx2
66 0F38.59 VPBROADCASTQ - =Vx,Wq W0 %avx2
66 0F38.5Am VBROADCASTI128 - =Vx,Mo W0 L1 %avx2
66 0F38.78 VPBROADCASTB - =Vx,W1 W0 %avx2
66 0F38.79 VPBROADCASTW - =Vx,Ww W0 %avx2
66 0F38.8Cm VPMASKMOV - =Vx,Hx,Mx @masked %avx2
66 0F38.8Em VPMASKMOV - +Mx,Hx,Vx @masked %avx2
66 0F38.90m VPGATHERD - +Vx,Xn,+Hx @gather %avx2
66 0F38.91m VPGATHERQ - +Vx,Xn,+Hx @gather %avx2
66 0F38.92m VGATHERDP - +Vx,Xn,+Hx @gather %avx2
66 0F38.93m VGATHERQP - +Vx,Xn,+Hx @gather %avx2
66 0F3A.00 VPERMQ - =Vx,Wx,Ib W1 L1 %avx2
66 0F3A.01 VPERMPD - =Vx,Wx,Ib W1 L1 %avx2
66 0F3A.02 VPBLENDD - =Vx,Hx,Wx,Ib W0 %avx2
66 0F3A.04 VPERMILPS - =Vx,Wx,Ib W0 %avx
66 0F3A.05 VPERMILPD - =Vx,Wx,Ib W0 %avx
66 0F3A.06 VPERM2F128 - =Vx,Hx,Wx,Ib W0 L1 %avx
66 0F3A.18 VINSERTF128 - =Vx,Hx,Wo,Ib W0 L1 %avx
66 0F3A.19 VEXTRACTF128 - =Wo,Vx,Ib W0 L1 %avx
66 0F3A.1D VCVTPS2PH - =Wh,Vx,Ib W0 %f16c
66 0F3A.38 VINSERTI128 - =Vx,Hx,Wo,Ib W0 L1 %avx2
66 0F3A.39 VEXTRACTI128 - =Wo,Vx,Ib W0 L1 %avx2
66 0F3A.46 VPERM2I128 - =Vx,Hx,Wx,Ib W0 L1 %avx2
66 0F3A.4A VBLENDVPS - =Vx,Hx,Wx,Lx W0 %avx
66 0F3A.4B VBLENDVPD - =Vx,Hx,Wx,Lx W0 %avx
66 0F3A.4C VPBLENDVB - =Vx,Hx,Wx,Lx W0 %avx
"""

# What came with SSE, of the names above; the others without a feature of their own came with SSE2.
_SSE = """
MOVUPS MOVSS MOVLPS MOVHPS UNPCKLPS UNPCKHPS MOVAPS CVTPI2PS CVTSI2SS MOVNTPS CVTTPS2PI CVTTSS2SI CVTPS2PI CVTSS2SI
UCOMISS COMISS MOVMSKPS SQRTPS SQRTSS RSQRTPS RSQRTSS RCPPS RCPSS ANDPS ANDNPS ORPS XORPS ADDPS ADDSS MULPS MULSS
SUBPS SUBSS MINPS MINSS DIVPS DIVSS MAXPS MAXSS CMPPS CMPSS SHUFPS
"""
SSE = frozenset(_SSE.split())
# Instructions on MMX registers that came later. SDM, "CPUID Feature Flag" column of each.
_MMX_OF_SSE = """
PAVGB PAVGW PEXTRW PINSRW PMAXSW PMAXUB PMINSW PMINUB PMOVMSKB PMULHUW PSADBW PSHUFW MOVNTQ
"""
MMX_SINCE = dict.fromkeys(_MMX_OF_SSE.split(), "%sse") | {"PADDQ": "%sse2", "PSUBQ": "%sse2", "PMULUDQ": "%sse2"}

ARITHMETIC = {0x51: "", 0x58: "ADD", 0x59: "MUL", 0x5C: "SUB", 0x5D: "MIN", 0x5E: "DIV", 0x5F: "MAX"}

# 66.0F integer operations with the plain three-operand VEX form; the MMX form exists for those without a star.
INTEGER = """
60 PUNPCKLBW 61 PUNPCKLWD 62 PUNPCKLDQ 63 PACKSSWB 64 PCMPGTB 65 PCMPGTW 66 PCMPGTD 67 PACKUSWB 68 PUNPCKHBW
69 PUNPCKHWD 6A PUNPCKHDQ 6B PACKSSDW 6C* PUNPCKLQDQ 6D* PUNPCKHQDQ 74 PCMPEQB 75 PCMPEQW 76 PCMPEQD D1! PSRLW
D2! PSRLD D3! PSRLQ D4 PADDQ D5 PMULLW D8 PSUBUSB D9 PSUBUSW DA PMINUB DB PAND DC PADDUSB DD PADDUSW DE PMAXUB
DF PANDN E0 PAVGB E1! PSRAW E2! PSRAD E3 PAVGW E4 PMULHUW E5 PMULHW E8 PSUBSB E9 PSUBSW EA PMINSW EB POR
EC PADDSB ED PADDSW EE PMAXSW EF PXOR F1! PSLLW F2! PSLLD F3! PSLLQ F4 PMULUDQ F5 PMADDWD F6 PSADBW F8 PSUBB
F9 PSUBW FA PSUBD FB PSUBQ FC PADDB FD PADDW FE PADDD
"""

INTEGER_38 = """
00 PSHUFB 01 PHADDW 02 PHADDD 03 PHADDSW 04 PMADDUBSW 05 PHSUBW 06 PHSUBD 07 PHSUBSW 08 PSIGNB 09 PSIGNW
0A PSIGND 0B PMULHRSW 1C= PABSB 1D= PABSW 1E= PABSD 28* PMULDQ 29* PCMPEQQ 2B* PACKUSDW 37* PCMPGTQ 38* PMINSB
39* PMINSD 3A* PMINUW 3B* PMINUD 3C* PMAXSB 3D* PMAXSD 3E* PMAXUW 3F* PMAXUD 40* PMULLD
"""

VECTOR_SHIFTS = (
    (0x71, 2, "PSRLW", 1), (0x71, 4, "PSRAW", 1), (0x71, 6, "PSLLW", 1), (0x72, 2, "PSRLD", 1), (0x72, 4, "PSRAD", 1),
    (0x72, 6, "PSLLD", 1), (0x73, 2, "PSRLQ", 1), (0x73, 6, "PSLLQ", 1), (0x73, 3, "PSRLDQ", 0), (0x73, 7, "PSLLDQ", 0),
)  # fmt: skip

SHIFTS = ("ROL", "ROR", "RCL", "RCR", "SHL", "SHR", "SHL", "SAR")
ALU = ("ADD", "OR", "ADC", "SBB", "AND", "SUB", "XOR", "CMP")
CONDITIONS = ("O", "NO", "B", "AE", "E", "NE", "BE", "A", "S", "NS", "P", "NP", "L", "GE", "LE", "G")
CONDITION_FLAGS = ("O", "C", "Z", "ZC", "S", "P", "SO", "ZSO")


@dataclass(frozen=True)
class Operand:
    """One explicit operand: its opcode-map letter, size code, and access (1 read, 2 written, 3 both)."""

    letter: str
    size: str
    access: int


@dataclass(frozen=True)
class Row:
    """One instruction form."""

    vex: bool
    map: int  # 0 one-byte, 1 0F, 2 0F38, 3 0F3A
    opcode: int
    prefix: int  # -1 any, 0 none, 1 66, 2 F3, 3 F2
    reg: int  # -1 any
    form: str  # "" any, "m" memory, "r" register
    modrm: int  # -1 any, else the whole byte
    name: str
    operands: tuple[Operand, ...]
    cls: str = "copy"
    flags_read: int = 0
    flags_written: int = 0
    flags_undefined: int = 0
    flags_maybe: int = 0
    feature: str = ""
    attributes: frozenset[str] = frozenset()

    @property
    def has_modrm(self) -> bool:
        """Tell whether a modrm byte follows the opcode."""
        if self.reg >= 0 or self.modrm >= 0 or self.form or (0xD8 <= self.opcode <= 0xDF and self.map == 0):
            return True
        return any(o.letter in "EGVWMRUPQN" for o in self.operands)


def _flag_bits(letters: str) -> int:
    return sum(FLAGS[c] for c in letters)


def _operands(text: str) -> tuple[Operand, ...]:
    if text == "-":
        return ()
    result = []
    for item in text.split(","):
        access = {"=": 2, "+": 3}.get(item[0], 1)
        body = item.lstrip("=+")
        result.append(Operand(body[0], body[1:], access))
    return tuple(result)


def _row(spec: str, name: str, operands: str, *attributes: str) -> list[Row]:
    vex = spec.startswith("VEX.")
    parts = spec.removeprefix("VEX.").split(".")
    prefix = -1
    if parts[0] in ("NP", "66", "F3", "F2") and len(parts) > 1:
        prefix = ("NP", "66", "F3", "F2").index(parts.pop(0))
    opcode_map = 0
    if parts[0] in ("0F", "0F38", "0F3A") and len(parts) > 1:
        opcode_map = 1 + ("0F", "0F38", "0F3A").index(parts.pop(0))
    text = parts[0]
    reg, form, modrm, count = -1, "", -1, 1
    if text.endswith(("m", "r")):
        text, form = text[:-1], text[-1]
    if "=" in text:
        text, byte = text.split("=")
        modrm = int(byte, 16)
    if "/" in text:
        text, digit = text.split("/")
        reg = int(digit)
    if text.endswith("+"):
        text, count = text[:-1], 8
    values: dict[str, str] = {}
    cls, feature, rest = "copy", "", set()
    for a in attributes:
        if a[0] == "@":
            cls = a[1:]
        elif a[0] == "%":
            feature = a[1:]
        elif a[1:2] == ":":
            values[a[0]] = a[2:]
        else:
            rest.add(a)
    if cls not in CLASSES:
        raise ValueError(f"row {spec} {name}: unknown class {cls!r}")
    return [
        Row(
            vex, opcode_map, int(text, 16) + i, prefix, reg, form, modrm, name, _operands(operands), cls,
            _flag_bits(values.get("r", "")), _flag_bits(values.get("w", "")), _flag_bits(values.get("u", "")),
            _flag_bits(values.get("m", "")), feature, frozenset(rest),
        )
        for i in range(count)
    ]  # fmt: skip


def _integer_rows() -> list[Row]:
    rows: list[Row] = []
    for i, name in enumerate(ALU):
        flags = ["w:OSZPC", "u:A"] if name in ("AND", "OR", "XOR") else ["w:OSZAPC"]
        if name in ("ADC", "SBB"):
            flags.append("r:C")
        d = "" if name == "CMP" else "+"
        lock = [] if name == "CMP" else ["lock"]
        for offset, operands in enumerate((f"{d}Eb,Gb", f"{d}Ev,Gv", f"{d}Gb,Eb", f"{d}Gv,Ev", "Ib", "Iz")):
            rows += _row(f"{i * 8 + offset:02X}", name, operands, *flags, *(lock if offset < 2 else []))
        rows += _row(f"80/{i}", name, f"{d}Eb,Ib", *flags, *lock)
        rows += _row(f"82/{i}", name, f"{d}Eb,Ib", "i64", *flags, *lock)
        rows += _row(f"81/{i}", name, f"{d}Ev,Iz", *flags, *lock)
        rows += _row(f"83/{i}", name, f"{d}Ev,Ib", *flags, *lock)
    for i, name in enumerate(SHIFTS):
        carry = ["r:C"] if name in ("RCL", "RCR") else []
        rotate = name in ("ROL", "ROR", "RCL", "RCR")
        one = ["w:OC"] if rotate else ["w:OSZPC", "u:A"]
        many = ["w:C", "u:O"] if rotate else ["w:SZPC", "u:OA"]
        maybe = ["m:OC"] if rotate else ["m:OSZAPC"]
        for letter, base in (("b", 0), ("v", 1)):
            rows += _row(f"{0xC0 + base:02X}/{i}", name, f"+E{letter},Ib", "shift", *many, *carry)
            rows += _row(f"{0xD0 + base:02X}/{i}", name, f"+E{letter}", *one, *carry)
            rows += _row(f"{0xD2 + base:02X}/{i}", name, f"+E{letter}", "cl", *maybe, *carry)
    for i, name in enumerate(CONDITIONS):
        flags = ["r:" + CONDITION_FLAGS[i >> 1]]
        rows += _row(f"{0x70 + i:02X}", "J" + name, "Jb", "@jcc", "f64", *flags)
        rows += _row(f"0F.{0x80 + i:02X}", "J" + name, "Jz", "@jcc", "f64", *flags)
        rows += _row(f"0F.{0x90 + i:02X}", "SET" + name, "=Eb", *flags)
        rows += _row(f"0F.{0x40 + i:02X}", "CMOV" + name, "+Gv,Ev", "%cmov", *flags)
    for i in range(1, 8):
        rows += _row(f"{0x90 + i:02X}", "XCHG", "+Zv")
    for line in BASE.strip().splitlines():
        if line.strip():
            rows += _row(*line.split())
    return rows


def _x87_rows() -> list[Row]:
    rows: list[Row] = []
    for item in X87.replace("\n", "|").split("|"):
        if item.strip():
            rows += _row(*item.split(), "trap")
    for opcode, forms in X87_REGISTER.items():
        for byte in forms:
            flags = [X87_FLAGS.get(opcode, {}).get((byte >> 3) & 7, "")]
            if opcode in (0xDB, 0xDF) and (byte >> 3) & 7 in (5, 6):
                flags = ["w:OSZAPC"]
            if any(flags):
                flags.append("%cmov")
            rows += _row(f"{opcode:02X}={byte:02X}", f"X87_{opcode:02X}{byte:02X}", "-", "trap", *filter(None, flags))
    return rows


def _vector_rows() -> list[Row]:
    rows: list[Row] = []

    def both(prefix: str, code: str, name: str, legacy: str, vex: str, *attributes: str) -> None:
        plain = [a for a in attributes if a not in ("W0", "W1", "L0", "L1")]
        if not any(a.startswith("%") for a in plain):
            plain.append("%sse" if name in SSE else "%sse2")
        if legacy != "-" or name == "EMMS":
            unaligned = "MOVU" in name or "STR" in name[-5:] or name in ("LDDQU", "MOVDQU")
            explicit = () if "al" in plain or unaligned else ("al",)
            rows.extend(_row(f"{prefix}.{code}", name, legacy, "trap", *explicit, *plain))
        if vex != "-" or name == "EMMS":
            features = [a for a in attributes if a in ("%avx", "%avx2", "%f16c", "%aes", "%pclmulqdq")]
            others = [a for a in attributes if not a.startswith("%")]
            if not features and (name[0] == "P" or name in ("MPSADBW", "MOVNTDQA")) and name != "PTEST":
                others.append("y2")
            vex_name = name if name.startswith("V") else ("VZERO" if name == "EMMS" else "V" + name)
            rows.extend(_row(f"VEX.{prefix}.{code}", vex_name, vex, "trap", *(features or ["%avx"]), *others))

    for line in VECTOR.strip().splitlines():
        prefix, code, name, legacy, vex, *attributes = line.split()
        both(prefix, code, name, legacy, vex, *attributes)
    for opcode, name in ARITHMETIC.items():
        if name:
            for prefix, suffix, size in (("NP", "PS", "x"), ("66", "PD", "x"), ("F3", "SS", "d"), ("F2", "SD", "q")):
                both(prefix, f"0F.{opcode:02X}", name + suffix, f"+Vx,W{size}", f"=Vx,Hx,W{size}")
    for text, code_map in ((INTEGER, "0F"), (INTEGER_38, "0F38")):
        words = text.split()
        for mark, name in zip(words[::2], words[1::2], strict=True):
            code, star = mark[:2], mark[2:]
            feature = "%sse2" if code_map == "0F" else ("%sse4.1" if star == "*" else "%ssse3")
            memory = "Wo" if star == "!" else "Wx"
            if star == "=":
                both("66", f"{code_map}.{code}", name, "=Vx,Wx", "=Vx,Wx", feature)
            else:
                both("66", f"{code_map}.{code}", name, "+Vx,Wx", f"=Vx,Hx,{memory}", feature)
            if star != "*":
                low_half = code_map == "0F" and code in ("60", "61", "62")
                rows += _row(f"NP.{code_map}.{code}", name, "+Pq,Qd" if low_half else "+Pq,Qq", "trap",
                             "%ssse3" if code_map == "0F38" else MMX_SINCE.get(name, "%mmx"))  # fmt: skip
    for opcode, reg, name, mmx in VECTOR_SHIFTS:
        rows += _row(f"66.0F.{opcode:02X}/{reg}r", name, "+Ux,Ib", "%sse2")
        rows += _row(f"VEX.66.0F.{opcode:02X}/{reg}r", "V" + name, "=Hx,Ux,Ib", "%avx", "y2")
        if mmx:
            rows += _row(f"NP.0F.{opcode:02X}/{reg}r", name, "+Nq,Ib", "%mmx")
    for spec, name, operands in (
        ("6E", "MOVD", "=Pq,Ey"), ("7E", "MOVD", "=Ey,Pq"), ("6F", "MOVQ", "=Pq,Qq"), ("7F", "MOVQ", "=Qq,Pq"),
        ("70", "PSHUFW", "=Pq,Qq,Ib"), ("C4", "PINSRW", "+Pq,E2,Ib"), ("C5r", "PEXTRW", "=Gd,Nq,Ib"),
        ("D7r", "PMOVMSKB", "=Gd,Nq"), ("E7m", "MOVNTQ", "=Mq,Pq"),
    ):  # fmt: skip
        rows += _row(f"NP.0F.{spec}", name, operands, "trap", MMX_SINCE.get(name, "%mmx"))
    rows += _row("NP.0F.F7r", "MASKMOVQ", "Pq,Nq", "@maskmov", "%sse")
    rows += _row("NP.0F3A.0F", "PALIGNR", "+Pq,Qq,Ib", "trap", "%ssse3")
    for name, opcode in (("VFMADDSUB", 6), ("VFMSUBADD", 7), ("VFMADD", 8), ("VFMSUB", 0xA), ("VFNMADD", 0xC),
                         ("VFNMSUB", 0xE)):  # fmt: skip
        for order, base in (("132", 0x90), ("213", 0xA0), ("231", 0xB0)):
            rows += _row(f"VEX.66.0F38.{base + opcode:02X}", name + order, "+Vx,Hx,Wx", "trap", "%fma")
            if opcode >= 8:
                rows += _row(f"VEX.66.0F38.{base + opcode + 1:02X}", name + order + "S", "+Vx,Hx,Wy", "trap", "%fma")
    return rows


ROWS: tuple[Row, ...] = tuple(_integer_rows() + _x87_rows() + _vector_rows())
