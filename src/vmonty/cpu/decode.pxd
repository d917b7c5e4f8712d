"""The instruction decoder: C tables made from ``isa.ROWS`` and one function over bytes."""

from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

# OpRow.cls: the order of isa.CLASSES.
cdef enum:
    C_COPY
    C_UD
    C_JCC
    C_JMP
    C_CALL
    C_JMPI
    C_CALLI
    C_RET
    C_LOOP
    C_PUSH
    C_POP
    C_PUSHI
    C_PUSHM
    C_POPM
    C_PUSHF
    C_POPF
    C_LEAVE
    C_LEA
    C_NOP
    C_STRING
    C_XLAT
    C_SYS
    C_SYSEND
    C_BTM
    C_MOFFS
    C_DF
    C_MASKMOV
    C_CLI
    C_STI
    C_ENTER
    C_EMMS
    C_FPU
    C_GATHER
    C_MASKED

# OpRow.attributes
cdef enum:
    A_LOCK = 1
    A_CL = 2
    A_WCX = 4
    A_D64 = 8
    A_F64 = 16
    A_I64 = 32
    A_O64 = 64
    A_W0 = 128
    A_W1 = 256
    A_L0 = 512
    A_L1 = 1024
    A_TRAP = 2048
    A_ALIGN = 4096
    A_SHIFT = 8192
    A_MODRM = 16384
    A_VECTOR = 32768     # has an xmm, ymm or mmx operand
    A_X87 = 65536
    A_Y2 = 131072        # needs AVX2 for 32-byte vectors
    A_R2 = 262144        # needs AVX2 with a register operand
    A_SSE = 524288       # has an xmm or ymm operand, or MXCSR
    A_MEMORY = 1048576   # ModRM must name memory
    A_REGISTER = 2097152     # ModRM must name a register
    A_VVVV = 4194304     # uses VEX.vvvv
    A_VSIB = 8388608     # memory with a vector as index
    A_SIZED = 16777216   # 66 makes its operands 16 bits wide
    A_SIMPLE = 33554432  # decoded by _simple when no prefix but REX stands there
    A_MOVABLE = 67108864     # such a one means the same elsewhere if its registers do
    A_LOOSE = 134217728  # such a one with a memory operand means the same with another address of it

cdef enum:
    F_C = 1
    F_P = 2
    F_A = 4
    F_Z = 8
    F_S = 16
    F_O = 32
    F_ALL = 63

cdef enum:
    NO_REGISTER = -1
    RIP_BASE = 16

# OpRow.written: registers that a copied instruction may write.
cdef enum:
    W_RAX = 1                # without being named
    W_RCX = 2
    W_RDX = 4
    W_G = 8
    W_E = 16                 # if it is no memory operand
    W_B = 32
    W_G_BYTE = 64            # perhaps AH, CH, DH, BH
    W_E_BYTE = 128

# Bits of the guest registers that the same registers of the host hold (operands.host).
cdef enum:
    ITSELF = 0xFCD

# Insn.verbatim
cdef enum:
    VERBATIM = 1             # uses general registers only
    VERBATIM_SYSTEM = 2      # if the control registers let it

# decode(): what it returns besides a length
cdef enum:
    DECODE_TRUNCATED = 0
    DECODE_INVALID = -1
    DECODE_TOO_LONG = -2


cdef struct OpRow:
    uint8_t cls
    uint8_t operands
    uint8_t letter[4]
    uint8_t size[4]
    uint8_t access[4]
    uint8_t flags_read
    uint8_t flags_written
    uint8_t flags_undefined
    uint8_t flags_maybe
    int8_t prefix
    uint8_t feature
    uint32_t attributes
    # Numbers, from 1 on, of the operands that are looked for most; 0: there is none.
    uint8_t in_memory        # E W M Q: memory if ModRM names it
    uint8_t g                # G or Z: general register in modrm.reg or the opcode
    uint8_t e                # E or R: general register or memory in modrm.rm
    uint8_t b                # B: general register in VEX.vvvv
    uint8_t immediates       # bits of the operands that follow the instruction: I J O L A
    uint8_t in_opcode        # Z is the first operand
    uint8_t written          # W_...
    uint8_t constant         # bytes of the only I or J operand: of 4-byte operands, and << 4 of 8-byte ones


cdef struct Insn:
    uint64_t rip
    uint64_t immediate       # as encoded, zero-extended; branch displacements sign-extended
    int64_t displacement
    uint8_t bytes[16]        # at a multiple of eight
    uint16_t row
    uint8_t length
    uint8_t map
    uint8_t opcode
    uint8_t vex              # 1 when VEX encoded
    uint8_t pp               # 0 none, 1 66, 2 F3, 3 F2 as selected the row
    uint8_t prefix66
    uint8_t rep              # 0, 0xF3, 0xF2
    uint8_t lock
    uint8_t rex              # 0x40 | WRXB when a REX prefix stood there, else 0
    uint8_t w
    uint8_t l
    uint8_t vvvv
    uint8_t operand_size     # bytes
    uint8_t address_size     # bytes
    uint8_t modrm
    uint8_t mod
    uint8_t reg              # with REX.R
    uint8_t rm               # with REX.B
    uint8_t has_memory
    uint8_t scale            # shift count
    int8_t base
    int8_t index
    int8_t segment           # ES.. GS: the one that applies (with defaults)
    uint8_t segment_override
    uint8_t immediate_size   # bytes
    uint8_t memory_size      # bytes of the explicit memory operand
    uint8_t memory_access    # 1 read, 2 write, 3 both, 0 none
    uint8_t is4              # register of an L operand
    uint8_t fault            # interrupt vector instead of a body: 6 #UD, 13 #GP, 14 #PF on fetch
    uint8_t flags_needed     # liveness: flags live after the instruction
    uint8_t flags_in         # liveness: flags live before it
    uint8_t group            # number of the group that shares one TLB check, + 1; 0 none
    uint8_t leader           # this instruction makes the check
    uint8_t verbatim         # VERBATIM_...: means the same where it is copied to, as its registers are the host's
    uint8_t loose            # the same but for the address of its memory operand
    uint8_t simple           # _simple decoded it
    # What its row says, where it is asked for often.
    uint8_t cls
    uint8_t feature
    uint8_t written
    uint8_t reads            # flags whose values it uses, those it may leave unchanged included
    uint8_t kills            # flags that are overwritten whatever happens
    uint8_t shift_mask       # of a shift's count, which kills no flag if it is 0; of others 0
    int32_t group_offset     # of its operand from the lowest byte of the group


cdef OpRow ROW[2560]
# Bytes of an operand by its size letter and operand size >> 2 | W << 2 | L << 3.
cdef uint8_t OPERAND_BYTES[256][16]
# By ModRM, with 32- and 64-bit addresses: bytes of the displacement, and 8 if a SIB byte stands before it.
cdef uint8_t SHAPE[256]
cdef uint8_t PREFIX[256]     # 1 a legacy prefix, 2 REX in 64-bit mode
cdef uint16_t ROOT[2][4][256][4]
cdef uint16_t GROUP[512][72]

cdef int decode(uint8_t *code, int available, uint64_t rip, int code_size, Insn *i) noexcept nogil
cdef int glance(uint8_t *code, Insn *i) noexcept nogil
cdef int offered_feature(Insn *i, uint64_t *features, int code_size) noexcept nogil


cdef inline int offered(Insn *i, uint64_t *features, int code_size) noexcept nogil:
    """Whether a processor with these features has the instruction; makes LZCNT and TZCNT the older BSR and BSF."""
    return i.feature == 0 or offered_feature(i, features, code_size)


cdef inline void undecoded(Insn *i, int vector) noexcept nogil:
    """Make it an instruction of one byte that raises an exception."""
    i.row = 0
    i.cls = C_UD
    i.kills = 0
    i.verbatim = 0
    i.fault = vector
    i.length = 1


cdef inline int operand_bytes(Insn *i, int n) noexcept nogil:
    """Give the size of operand ``n`` in bytes; 0 for an address only."""
    return OPERAND_BYTES[ROW[i.row].size[n]][i.operand_size >> 2 | i.w << 2 | i.l << 3]
