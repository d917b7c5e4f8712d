"""Made by ``python -m vmonty.cpu.vmcb`` from the tables in vmcb.py; a test compares them."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    VMCB_INTERCEPT_CR = 0x000
    VMCB_INTERCEPT_DR = 0x004
    VMCB_INTERCEPT_EXCEPTIONS = 0x008
    VMCB_INTERCEPT_WORD3 = 0x00c
    VMCB_INTERCEPT_WORD4 = 0x010
    VMCB_INTERCEPT_WORD5 = 0x014
    VMCB_PAUSE_FILTER_THRESHOLD = 0x03c
    VMCB_PAUSE_FILTER_COUNT = 0x03e
    VMCB_IOPM_BASE_PA = 0x040
    VMCB_MSRPM_BASE_PA = 0x048
    VMCB_TSC_OFFSET = 0x050
    VMCB_ASID = 0x058
    VMCB_TLB_CONTROL = 0x05c
    VMCB_INT_CTL = 0x060
    VMCB_INT_VECTOR = 0x064
    VMCB_INT_STATE = 0x068
    VMCB_EXITCODE = 0x070
    VMCB_EXITINFO1 = 0x078
    VMCB_EXITINFO2 = 0x080
    VMCB_EXITINTINFO = 0x088
    VMCB_NP_ENABLE = 0x090
    VMCB_EVENTINJ = 0x0a8
    VMCB_N_CR3 = 0x0b0
    VMCB_VIRT_EXT = 0x0b8
    VMCB_CLEAN = 0x0c0
    VMCB_NRIP = 0x0c8
    VMCB_INSTRUCTION_BYTES = 0x0d0
    VMCB_ES_SELECTOR = 0x400
    VMCB_ES_ATTRIB = 0x402
    VMCB_ES_LIMIT = 0x404
    VMCB_ES_BASE = 0x408
    VMCB_CS_SELECTOR = 0x410
    VMCB_CS_ATTRIB = 0x412
    VMCB_CS_LIMIT = 0x414
    VMCB_CS_BASE = 0x418
    VMCB_SS_SELECTOR = 0x420
    VMCB_SS_ATTRIB = 0x422
    VMCB_SS_LIMIT = 0x424
    VMCB_SS_BASE = 0x428
    VMCB_DS_SELECTOR = 0x430
    VMCB_DS_ATTRIB = 0x432
    VMCB_DS_LIMIT = 0x434
    VMCB_DS_BASE = 0x438
    VMCB_FS_SELECTOR = 0x440
    VMCB_FS_ATTRIB = 0x442
    VMCB_FS_LIMIT = 0x444
    VMCB_FS_BASE = 0x448
    VMCB_GS_SELECTOR = 0x450
    VMCB_GS_ATTRIB = 0x452
    VMCB_GS_LIMIT = 0x454
    VMCB_GS_BASE = 0x458
    VMCB_GDTR_LIMIT = 0x464
    VMCB_GDTR_BASE = 0x468
    VMCB_LDTR_SELECTOR = 0x470
    VMCB_LDTR_ATTRIB = 0x472
    VMCB_LDTR_LIMIT = 0x474
    VMCB_LDTR_BASE = 0x478
    VMCB_IDTR_LIMIT = 0x484
    VMCB_IDTR_BASE = 0x488
    VMCB_TR_SELECTOR = 0x490
    VMCB_TR_ATTRIB = 0x492
    VMCB_TR_LIMIT = 0x494
    VMCB_TR_BASE = 0x498
    VMCB_CPL = 0x4cb
    VMCB_EFER = 0x4d0
    VMCB_CR4 = 0x548
    VMCB_CR3 = 0x550
    VMCB_CR0 = 0x558
    VMCB_DR7 = 0x560
    VMCB_DR6 = 0x568
    VMCB_RFLAGS = 0x570
    VMCB_RIP = 0x578
    VMCB_RSP = 0x5d8
    VMCB_RAX = 0x5f8
    VMCB_STAR = 0x600
    VMCB_LSTAR = 0x608
    VMCB_CSTAR = 0x610
    VMCB_SFMASK = 0x618
    VMCB_KERNEL_GS_BASE = 0x620
    VMCB_SYSENTER_CS = 0x628
    VMCB_SYSENTER_ESP = 0x630
    VMCB_SYSENTER_EIP = 0x638
    VMCB_CR2 = 0x640
    VMCB_G_PAT = 0x668
    VMCB_DBGCTL = 0x670
    VMCB_BR_FROM = 0x678
    VMCB_BR_TO = 0x680
    VMCB_LAST_EXCEPTION_FROM = 0x688
    VMCB_LAST_EXCEPTION_TO = 0x690

# Exit codes
cdef enum:
    SVM_READ_CR0 = 0x000
    SVM_WRITE_CR0 = 0x010
    SVM_READ_DR0 = 0x020
    SVM_WRITE_DR0 = 0x030
    SVM_EXCEPTION_DE = 0x040
    SVM_INTR = 0x060
    SVM_NMI = 0x061
    SVM_SMI = 0x062
    SVM_INIT = 0x063
    SVM_VINTR = 0x064
    SVM_CR0_SEL_WRITE = 0x065
    SVM_IDTR_READ = 0x066
    SVM_GDTR_READ = 0x067
    SVM_LDTR_READ = 0x068
    SVM_TR_READ = 0x069
    SVM_IDTR_WRITE = 0x06a
    SVM_GDTR_WRITE = 0x06b
    SVM_LDTR_WRITE = 0x06c
    SVM_TR_WRITE = 0x06d
    SVM_RDTSC = 0x06e
    SVM_RDPMC = 0x06f
    SVM_PUSHF = 0x070
    SVM_POPF = 0x071
    SVM_CPUID = 0x072
    SVM_RSM = 0x073
    SVM_IRET = 0x074
    SVM_SWINT = 0x075
    SVM_INVD = 0x076
    SVM_PAUSE = 0x077
    SVM_HLT = 0x078
    SVM_INVLPG = 0x079
    SVM_INVLPGA = 0x07a
    SVM_IOIO = 0x07b
    SVM_MSR = 0x07c
    SVM_TASK_SWITCH = 0x07d
    SVM_FERR_FREEZE = 0x07e
    SVM_SHUTDOWN = 0x07f
    SVM_VMRUN = 0x080
    SVM_VMMCALL = 0x081
    SVM_VMLOAD = 0x082
    SVM_VMSAVE = 0x083
    SVM_STGI = 0x084
    SVM_CLGI = 0x085
    SVM_SKINIT = 0x086
    SVM_RDTSCP = 0x087
    SVM_ICEBP = 0x088
    SVM_WBINVD = 0x089
    SVM_MONITOR = 0x08a
    SVM_MWAIT = 0x08b
    SVM_MWAIT_CONDITIONAL = 0x08c
    SVM_XSETBV = 0x08d
    SVM_RDPRU = 0x08e
    SVM_INVPCID = 0x0a2
    SVM_NPF = 0x400


cdef inline uint8_t get8(uint8_t *vmcb, uint32_t offset) noexcept nogil:
    return (<uint8_t *> (vmcb + offset))[0]


cdef inline void put8(uint8_t *vmcb, uint32_t offset, uint8_t value) noexcept nogil:
    (<uint8_t *> (vmcb + offset))[0] = value


cdef inline uint16_t get16(uint8_t *vmcb, uint32_t offset) noexcept nogil:
    return (<uint16_t *> (vmcb + offset))[0]


cdef inline void put16(uint8_t *vmcb, uint32_t offset, uint16_t value) noexcept nogil:
    (<uint16_t *> (vmcb + offset))[0] = value


cdef inline uint32_t get32(uint8_t *vmcb, uint32_t offset) noexcept nogil:
    return (<uint32_t *> (vmcb + offset))[0]


cdef inline void put32(uint8_t *vmcb, uint32_t offset, uint32_t value) noexcept nogil:
    (<uint32_t *> (vmcb + offset))[0] = value


cdef inline uint64_t get64(uint8_t *vmcb, uint32_t offset) noexcept nogil:
    return (<uint64_t *> (vmcb + offset))[0]


cdef inline void put64(uint8_t *vmcb, uint32_t offset, uint64_t value) noexcept nogil:
    (<uint64_t *> (vmcb + offset))[0] = value
