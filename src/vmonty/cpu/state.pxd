"""The state of one logical processor: the contract between the translator and the system side.

Layout rule: translated code keeps rbp = &state + 128, so the first 256 bytes are reachable by [rbp+disp8].
Everything translated code touches stands first; the rest is for compiled helpers.

Rules for helpers that translated code or the dispatcher may call:
  * ``noexcept nogil``, first argument ``CpuState *``, no libc, no floating point (modules are built with
    -mgeneral-regs-only: the guest's vector registers are live in the host's);
  * the guest's registers are all in ``gpr``, ``rip`` is the address of the instruction being executed,
    ``rflags`` is complete (arithmetic flags included);
  * return 0 (GO_ON) to go on after the instruction, else a LEAVE_* value: the block is left to the dispatcher,
    which looks at ``event`` (an exception to deliver), ``rip`` (changed), or ``exit`` (report to the caller of run()).
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    RAX = 0
    RCX = 1
    RDX = 2
    RBX = 3
    RSP = 4
    RBP = 5
    RSI = 6
    RDI = 7

cdef enum:
    ES = 0
    CS = 1
    SS = 2
    DS = 3
    FS = 4
    GS = 5

# RFLAGS
cdef enum:
    FLAG_CF = 0x1
    FLAG_PF = 0x4
    FLAG_AF = 0x10
    FLAG_ZF = 0x40
    FLAG_SF = 0x80
    FLAG_TF = 0x100
    FLAG_IF = 0x200
    FLAG_DF = 0x400
    FLAG_OF = 0x800
    FLAG_IOPL = 0x3000
    FLAG_NT = 0x4000
    FLAG_RF = 0x10000
    FLAG_VM = 0x20000
    FLAG_AC = 0x40000
    FLAG_VIF = 0x80000
    FLAG_VIP = 0x100000
    FLAG_ID = 0x200000
    ARITHMETIC_FLAGS = 0x8D5

# DR6: the new task's TSS has its T bit set
cdef enum:
    DR6_BT = 0x8000

# IA32_DEBUGCTL
cdef enum:
    DEBUGCTL_BTF = 2

# Control registers and EFER (bits below 2^31 only: larger constants are no C ints).
cdef enum:
    CR0_PE = 0x1
    CR0_MP = 0x2
    CR0_EM = 0x4
    CR0_TS = 0x8
    CR0_ET = 0x10
    CR0_NE = 0x20
    CR0_WP = 0x10000
    CR0_AM = 0x40000
    CR0_NW = 0x20000000
    CR0_CD = 0x40000000
    CR4_VME = 0x1
    CR4_PVI = 0x2
    CR4_TSD = 0x4
    CR4_DE = 0x8
    CR4_PSE = 0x10
    CR4_PAE = 0x20
    CR4_MCE = 0x40
    CR4_PGE = 0x80
    CR4_PCE = 0x100
    CR4_OSFXSR = 0x200
    CR4_OSXMMEXCPT = 0x400
    CR4_UMIP = 0x800
    CR4_LA57 = 0x1000
    CR4_VMXE = 0x2000
    CR4_FSGSBASE = 0x10000
    CR4_PCIDE = 0x20000
    CR4_OSXSAVE = 0x40000
    CR4_SMEP = 0x100000
    CR4_SMAP = 0x200000
    EFER_SCE = 0x1
    EFER_LME = 0x100
    EFER_LMA = 0x400
    EFER_NXE = 0x800
    EFER_SVME = 0x1000
    EFER_FFXSR = 0x4000

# CpuState.mode
cdef enum:
    MODE_REAL = 0
    MODE_VM86 = 1
    MODE_PROT16 = 2
    MODE_PROT32 = 3
    MODE_COMPAT16 = 4
    MODE_COMPAT32 = 5
    MODE_LONG64 = 6

# What a helper returns.
cdef enum:
    GO_ON = 0            # the instruction is done; rip is advanced by the translator (long straight-line path)
    LEAVE_EVENT = 1      # event is filled in; rip is still at the instruction that faulted
    LEAVE_JUMP = 2       # the instruction is done and has set rip itself (and perhaps mode, cpl, flags)
    LEAVE_EXIT = 3       # run() returns: exit.reason says why; rip is where the caller wants it
    LEAVE_RETRY = 4      # nothing done; execute the instruction again through the dispatcher
    LEAVE_NEXT = 5       # done; rip still at the instruction: the dispatcher adds its length and looks around
    LEAVE_PLAIN = 7      # translated code only: go on in a translation without grouped TLB checks
    LEAVE_CAREFUL = 6    # execute this one instruction in a careful block (page crossing write, MMIO, code write)

# CpuState.exit.reason: why run() returned.
cdef enum:
    EXIT_NONE = 0
    EXIT_HALT = 1
    EXIT_SHUTDOWN = 2    # triple fault
    EXIT_MMIO = 3        # exit.address, size, write, data; fill data on a read and run() again
    EXIT_PIO = 4         # exit.address = port, size, write, data, count
    EXIT_VM = 5          # VM exit to the caller: vmx/svm hold the information
    EXIT_RUN_FLAG = 6    # run was set to 0 by another thread
    EXIT_BUDGET = 7      # the instruction budget is used up
    EXIT_DEBUG = 8
    EXIT_INTERNAL = 9    # a defect of ours; exit.data tells which
    EXIT_HOST_FAULT = 10  # host memory that is gone: exit.address, a host address; rip is at the instruction

# Event.kind: VMX interruption types, so that injection fields map one to one.
cdef enum:
    EVENT_EXTERNAL = 0
    EVENT_NMI = 2
    EVENT_EXCEPTION = 3      # hardware exception
    EVENT_SOFT_INTERRUPT = 4  # INT n
    EVENT_PRIVILEGED = 5     # INT1
    EVENT_SOFT_EXCEPTION = 6  # INT3, INTO

# Interruptibility, with the bits of the VMCS field.
cdef enum:
    SHADOW_STI = 1
    SHADOW_MOV_SS = 2
    BLOCKED_SMI = 4
    BLOCKED_NMI = 8

# Access kinds for paging.translate and the TLB (bits).
cdef enum:
    ACCESS_READ = 0
    ACCESS_WRITE = 1
    ACCESS_EXEC = 2
    ACCESS_USER = 4          # CPL 3, explicit
    ACCESS_IMPLICIT = 8      # implicit supervisor access (descriptor tables, TSS): CPL ignored, SMAP ignores AC
    ACCESS_UNALIGNED = 16    # for read_linear and write_linear: never #AC

# Access-rights bits (VMX format of segment access rights).
cdef enum:
    AR_TYPE = 0xF
    AR_S = 0x10
    AR_DPL = 0x60
    AR_P = 0x80
    AR_AVL = 0x1000
    AR_L = 0x2000
    AR_DB = 0x4000
    AR_G = 0x8000
    AR_UNUSABLE = 0x10000

cdef enum:
    TLB_BITS = 10
    TLB_ENTRIES = 1024
    PAGE_SLOTS = 2048        # accesses in loops that remember where they were
    LARGE_ENTRIES = 64       # of the TLBs for large pages
    LARGE_BYTES = 2097152
    TLB_SETS = 3             # supervisor, user, supervisor with EFLAGS.AC under SMAP
    FETCH_BITS = 8
    FETCH_ENTRIES = 256
    JUMP_CACHE_BITS = 12
    JUMP_CACHE_ENTRIES = 4096
    MAX_REGIONS = 64
    MTRR_VARIABLE = 8
    MMIO_SLOTS = 128         # XRSTOR reads 104 parts
    SHADOW_STACK = 65536     # bytes of host stack for return prediction
    LOCAL_LOG = 512
    TABLE_ENTRIES = 64
    NESTED_ENTRIES = 512

# CpuState.local_count
cdef enum:
    LOCAL_TLB = 0
    LOCAL_FETCH = 1
    LOCAL_JUMP = 2


cdef struct Segment:
    uint64_t base
    uint32_t limit           # effective, in bytes; all ones for flat
    uint32_t access_rights   # VMX format; bit 16: unusable
    uint32_t selector
    uint32_t pad


cdef struct TableRegister:
    uint64_t base
    uint32_t limit
    uint32_t pad


cdef struct Event:
    uint32_t pending         # 1: deliver before the next instruction
    uint32_t kind
    uint32_t vector
    uint32_t has_error
    uint32_t error_code
    uint32_t instruction_length   # of INT n, INT3, INTO, INT1: pushed rip = rip + this
    uint64_t payload         # #PF: the linear address (goes to CR2 on delivery); #DB: DR6 bits
    uint64_t is_fault        # #DB of an instruction breakpoint or general detect: before the instruction


cdef struct Exit:
    uint32_t reason
    uint32_t size
    uint32_t write
    uint32_t count
    uint64_t address
    uint64_t data
    uint64_t instruction_length


cdef struct TlbEntry:
    uint64_t negated_tag     # minus the page's linear address; TLB_INVALID when empty
    uint64_t host            # where the page is in our address space


# A stretch of a large page: RAM all through, and for writes free of translated code.
cdef struct LargeEntry:
    uint64_t negated_tag     # minus the linear address of its first byte
    uint64_t last            # its length minus 1
    uint64_t host
    uint64_t pad


# Where one access of one block was last; minus the linear address of that page or stretch is in slot_tags.
cdef struct PageSlot:
    uint64_t host
    uint64_t last            # the greatest offset at which the access still fits
    uint64_t size            # of the access
    uint64_t delta           # host minus linear address
    uint64_t base            # strips: what its registers that stay the same come to, in the host
    uint64_t limit           # strips: how far its driver may go


cdef struct FetchEntry:
    uint64_t tag             # linear page address | 1 when valid
    uint64_t host
    uint64_t physical
    uint64_t is_global


# Paging-structure cache: the last table for 2 MiB of linear addresses, and the rights above it.
cdef struct TableEntry:
    uint64_t tag             # linear address of the 2 MiB | 1 when valid
    uint64_t host
    uint64_t physical
    uint64_t rights
    uint64_t no_execute


# What the second dimension gave for a guest-physical page.
cdef struct NestedEntry:
    uint64_t tag             # guest-physical page address | 1 when valid
    uint64_t host
    uint64_t size            # of the mapping
    uint32_t granted
    uint32_t pad


# A stretch of the bare processor's physical map.
cdef struct Region:
    uint64_t base
    uint64_t size
    uint64_t host
    uint32_t readonly
    uint32_t pad


cdef struct MmioSlot:        # one part, up to 8 bytes, of an access to device memory
    uint64_t address
    uint64_t data
    uint32_t size
    uint32_t pad


cdef struct AccessRecord:    # what an observer is told of
    uint64_t linear
    uint64_t physical
    uint32_t size
    uint32_t write
    uint32_t implicit        # of the processor itself: descriptor tables, task state
    uint32_t at              # where its bytes are in access_data


cdef struct CpuState:
    # ---- hot: rbp-128 .. rbp+127 -------------------------------------------------------------------
    uint64_t gpr[16]
    uint64_t rip
    uint64_t rflags          # arithmetic flags are in host EFLAGS while translated code runs
    uint32_t run             # polled; other threads write 0 to get the processor out of translated code
    uint32_t leave_code
    uint64_t leave_argument
    uint64_t host_rsp
    uint64_t index_mask      # pext mask of the TLB index
    uint64_t page_mask       # ~0xFFF
    uint64_t jump_mask       # pext mask of the jump cache index
    uint64_t shadow_top
    uint64_t temp[3]
    uint32_t epoch           # changes when mappings of non-global code may have changed
    uint32_t poll_pad
    uint64_t bit_mask_16     # 15
    uint64_t bit_mask_32     # 31
    uint64_t bit_mask_64     # 63
    uint8_t xsave[4096]      # guest x87/SSE/AVX, standard format, valid while not in run(); at offset 256: aligned
    # ---- translated code, by disp32 ----------------------------------------------------------------
    Segment segs[6]
    Segment ldtr
    Segment tr
    TableRegister gdtr
    TableRegister idtr
    uint32_t cpl
    uint32_t mode            # MODE_*; recomputed by mode_changed()
    uint32_t block_key       # what translations depend on: mode, cpl, TLB set, CR4 bits (see tlb.mode_changed)
    uint32_t tlb_set         # 0 supervisor, 1 user, 2 supervisor with AC
    # ---- control registers -------------------------------------------------------------------------
    uint64_t cr0
    uint64_t cr2
    uint64_t cr3
    uint64_t cr4
    uint64_t cr8
    uint64_t efer
    uint64_t xcr0
    uint64_t dr[8]
    # ---- model-specific registers ------------------------------------------------------------------
    uint64_t star
    uint64_t lstar
    uint64_t cstar
    uint64_t fmask
    uint64_t kernel_gs_base
    uint64_t sysenter_cs
    uint64_t sysenter_esp
    uint64_t sysenter_eip
    uint64_t pat
    uint64_t tsc_aux
    uint64_t apic_base
    uint64_t misc_enable
    uint64_t spec_ctrl
    uint64_t debugctl        # DEBUGCTL_BTF alone: there are no branch records
    uint64_t tsc_adjust
    uint64_t tsc_deadline
    uint64_t mtrr_def_type
    uint64_t mtrr_base[8]
    uint64_t mtrr_mask[8]
    uint64_t mtrr_fixed[11]
    uint64_t mcg_status
    uint64_t tsc_offset      # guest TSC = host TSC * tsc_multiplier / 2^48 + tsc_offset; a multiplier of 0 is 1
    uint64_t tsc_multiplier
    # ---- events ------------------------------------------------------------------------------------
    Event event              # to deliver now (exceptions raised by helpers; injected by VM entry)
    uint32_t interruptibility    # SHADOW_*, BLOCKED_*
    uint32_t activity        # 0 active, 1 hlt, 2 shutdown, 3 wait-for-SIPI
    uint32_t interrupt_line  # written by other threads: 1 while an interrupt controller asserts INTR
    uint32_t nmi_line        # written by other threads: 1 requests an NMI
    uint32_t init_line       # written by other threads: 1 requests INIT
    uint32_t startup_line    # written by other threads: 1 is a start-up IPI with startup_vector
    uint32_t startup_vector
    uint32_t interrupt_vector    # vector that INTR acknowledges with (bare processor; under VMX exits decide)
    uint32_t pending_debug   # DR6 bits of #DB that waits for the next boundary between instructions
    Exit exit
    MmioSlot mmio[128]       # what the current instruction has read so far
    MmioSlot mmio_writes[128]    # what it has written, for run()'s caller
    uint32_t mmio_count
    uint32_t mmio_at
    uint32_t mmio_writes_count
    uint32_t mmio_writes_at
    uint32_t emulated        # the instruction that host software had executed is done; what it wrote may wait there
    # Breakpoints, by number (bits 0-3); recomputed by debug_changed() when DR0 to DR3 or DR7 change.
    uint32_t breakpoints     # armed on instructions
    uint32_t watch           # on data
    uint32_t port_watch      # on ports (with CR4.DE)
    uint32_t watch_hits      # met by the current instruction
    uint32_t monitor_trap    # under VMX: 1 while the monitor trap flag is set, 2 when its exit is due
    uint32_t intercepts      # bits of block_key: instructions of translated code that may exit, see vmx_entry
    uint64_t timer           # a POSIX timer, see preemption
    uint64_t timer_due       # the TSC for which it is armed, may have passed; 0: it is not
    # Observers (see observe): off while observe is 0. Who observes runs single instructions.
    uint32_t exact_flags     # tests: no flag is dead, so that those pushed by a fault are the instructions' own
    uint32_t exact_pad
    uint32_t observe         # OBSERVE_*
    uint32_t observe_again   # the next instruction is a repeated string instruction that goes on
    void *observer           # observer_function of the observe module
    void *observer_object
    uint64_t observed_rip    # of the instruction whose accesses are kept
    uint64_t fetch_second    # host address of the page that its bytes reach into, or 0
    uint64_t step_next       # with BTF: where the instruction that is stepped does not trap
    uint32_t step_always     # it traps wherever it goes
    uint32_t step_pad
    uint64_t retired         # instructions that were completed while somebody observed
    uint32_t access_count
    uint32_t access_bytes
    uint32_t access_lost     # accesses that found no room
    uint32_t access_pad
    AccessRecord accesses[128]     # of the current instruction or event
    uint8_t access_data[8192]
    uint32_t timer_thread    # the thread that it signals; 0: there is none
    uint64_t watch_address[4]
    uint32_t watch_size[4]
    uint32_t watch_reads[4]
    # System side: the event being delivered (VMX interruption-information format, bit 31 valid), for double faults
    # and IDT-vectoring information; which kind of guest runs.
    uint32_t vectoring
    uint32_t vectoring_error
    uint32_t vectoring_length
    uint32_t guest_mode      # 0 bare processor or VMX root, 1 VMX non-root, 2 SVM guest
    # ---- memory ------------------------------------------------------------------------------------
    Region regions[64]
    uint32_t region_count
    uint32_t a20_off
    uint64_t physical_bits
    uint64_t linear_bits     # 57 where CPUID offers 5-level paging, else 48
    void *vmx                # opaque: filled by the system side
    void *svm
    void *models             # opaque: cpuid tables
    # System side: what the page walker reads besides the control registers.
    uint32_t nested          # second dimension: 0 none, 1 EPT, 2 NPT
    uint32_t direct          # physical addresses are addresses of this process (guest of host software); no Regions
    uint64_t nested_root     # EPTP or nCR3
    uint64_t pdpte[4]        # PAE paging: the registers loaded from CR3. SDM, "PDPTE Registers"
    # ---- translator --------------------------------------------------------------------------------
    void *translator         # codecache.CodeCache *
    uint64_t code_low        # host addresses of the executable mapping, for the trap handler
    uint64_t code_high
    uint64_t trap_exit       # stub that saves everything and leaves with LEAVE_TRAP
    uint64_t trap_rip        # host rip of the trap
    uint64_t trap_signal
    uint64_t trap_code
    uint64_t trap_address
    uint64_t trap_vector     # the exception behind the signal
    # What hosttraps needs to get out of a helper whose access to host memory failed.
    uint64_t guard_thread    # the thread that is in guarded code, 0: none
    void *guarded            # what that is about, where it is run_guarded's
    uint32_t stack_ready     # the caller of run_cpu has called prepare_thread, and nothing but it has run since
    uint64_t guard_rsp
    uint64_t slow_host_rip   # where translated code called tlb.memory_slow or careful_access; 0: it did not
    uint32_t slow_what
    uint32_t host_fault      # it has happened
    uint64_t lost_memory     # the address, odd, for host software whose guest exited for it; 0: none
    uint32_t keep_vectors    # the caller of run_cpu leaves vector registers alone after a VM exit, or calls put_vectors
    uint32_t vectors_live    # x87 and vector registers are the guest's; else xsave has them
    uint32_t host_mxcsr
    uint32_t host_fcw
    uint32_t in_vectors      # 1 while the guest's vector state is in the host's registers
    uint32_t careful         # 1 while a careful block runs
    uint64_t budget          # instructions to execute one by one; 0 = no limit
    uint64_t careful_physical[4]
    uint64_t careful_host[4]
    uint32_t careful_size[4]
    uint32_t careful_write[4]
    uint64_t careful_va[4]
    uint64_t careful_va2[4]
    uint64_t careful_physical2[4]
    uint32_t attention       # nonzero: the dispatcher asks the events module before every block
    uint32_t kick            # written by other threads together with run = 0: run() returns EXIT_RUN_FLAG
    uint32_t careful_count
    uint32_t careful_x87     # 1: careful_fsw and careful_fcw say whether the x87 store took place
    uint16_t careful_fsw
    uint16_t careful_fcw
    uint32_t careful_locked  # 1: the operand is where it belongs; the commit only tells an observer
    uint32_t careful_late    # 1: the x87 store's operand faults, if it is stored at all
    uint32_t code_page_written
    uint64_t shadow_base
    uint64_t shadow_size     # bytes, the guard page included: SHADOW_STACK, or less in tests
    uint64_t lookup_now      # the lookup stub of the current tlb_set
    uint32_t last_key        # block_key at the last dispatch
    uint32_t careful_next    # the next instruction goes through a careful block
    uint32_t in_run
    uint32_t exclusive       # this processor is alone, or waits until it is
    uint32_t parked          # in run(), but waiting for who is alone, or in an observer's code
    uint32_t code_queue_count    # pages with code that others wrote; guarded by codecache.processors_lock
    uint32_t code_queue_all      # the queue ran over: every page
    uint64_t code_queue[64]
    uint64_t branch_at           # where in the code cache is the branch that the dispatcher was left by; 0 for others
    uint64_t fresh_queue[8]      # pages that others began to translate code from; guarded as the other queue is
    uint32_t fresh_count         # may be more than there is room for
    uint32_t fresh_asked         # how many were ever queued,
    uint32_t fresh_seen          # and up to which of them this processor has looked
    uint32_t alignment           # alignment checking is in force; instructions run one by one then
    uint64_t host_generation     # changes when host software may have written guest memory
    uint32_t stop_events     # tests: leave run() with EXIT_DEBUG instead of delivering an event
    uint64_t features[8]     # instruction features offered (numbers of opcodes.FEATURES); 0 bits make #UD
    uint64_t slots[8]        # host addresses of grouped operands
    uint64_t statistics[16]
    uint8_t code_filter[4096]    # linear pages that were fetched from, hashed
    uint8_t link_filter[8192]    # those that a direct link from another page leads to, by the address's half
    uint8_t bounce[4][576]       # page-crossing accesses
    uint8_t host_xsave[64]
    uint64_t jump_negated[3][4096]   # by tlb_set: minus the guest rip, and the code for it
    uint64_t jump_code[3][4096]
    uint32_t jump_used[3]            # whether there may be anything in a set
    uint64_t slot_tags[2048]     # each belongs to one instruction of one block
    PageSlot page_slots[2048]
    LargeEntry large_read[3][64]
    LargeEntry large_write[3][64]
    uint32_t local_count[3]      # entries below in use; more than LOCAL_LOG: the log ran over
    uint16_t local_tlb[512]      # entries of tables that a load of CR3 drops: TLB set << 10 | index
    uint16_t local_fetch[512]    # user << 8 | index
    uint16_t local_jump[512]     # TLB set << 12 | index
    uint32_t page_slots_used
    uint32_t large_used          # something stands in large_read or large_write
    TableEntry tables[64]
    NestedEntry nested_pages[512]
    FetchEntry fetch[2][256]
    TlbEntry tlb_read[3][1024]
    TlbEntry tlb_write[3][1024]


# CpuState.observe, and what an observer_function is called for.
cdef enum:
    OBSERVE_INSTRUCTION = 1  # before it
    OBSERVE_MEMORY = 2
    OBSERVE_EVENT = 4
    OBSERVE_DONE = 8         # behind it, or behind an iteration of it
    OBSERVE_EXIT = 16

ctypedef void (*observer_function)(CpuState *, uint32_t) noexcept nogil


cdef inline bint is_register_canonical(CpuState *s, uint64_t va) noexcept nogil:
    """May it be a base, or in a register that holds an address? As wide as the processor can, whatever CR4.LA57 says;
    Intel's and AMD's processors agree in that.
    """
    return (va + ((<uint64_t> 1) << (s.linear_bits - 1))) >> s.linear_bits == 0


cdef inline bint is_canonical(CpuState *s, uint64_t va) noexcept nogil:
    """SDM, "Canonical Addressing": bits 63 to 47 are alike; to 56 with CR4.LA57."""
    cdef uint32_t top = 56 if s.cr4 & CR4_LA57 else 47
    return (va + ((<uint64_t> 1) << top)) >> (top + 1) == 0


cdef inline bint paging_enabled(CpuState *s) noexcept nogil:
    """CR0.PG."""
    return (s.cr0 >> 31) & 1


cdef inline void note_local(CpuState *s, int kind, uint16_t *log, uint32_t entry) noexcept nogil:
    """Remember an entry that a load of CR3 must drop."""
    cdef uint32_t n = s.local_count[kind]
    if n < LOCAL_LOG:
        log[n] = <uint16_t>entry
    if n <= LOCAL_LOG:
        s.local_count[kind] = n + 1


cdef inline bint misaligned(CpuState *s, uint64_t va, uint32_t size) noexcept nogil:
    """Is it an access for #AC? SDM, "Alignment Check Exception (#AC)", "Alignment Requirements by Data Type".

    Operands of more than 8 bytes have none, but for 80-bit numbers, far pointers, and the areas of FNSTENV and FNSAVE.
    """
    if s.alignment == 0:
        return False
    if size == 2 or size == 14 or size == 94:
        return va & 1 != 0
    if size == 4 or size == 6 or size == 28 or size == 108:
        return va & 3 != 0
    return (size == 8 or size == 10) and va & 7 != 0


cdef inline bint has_feature(CpuState *s, int number) noexcept nogil:
    """Whether the processor offers a feature, by its number in opcodes.FEATURES."""
    return (s.features[number >> 6] >> (number & 63)) & 1


cdef CpuState *state_new() noexcept nogil
# Take everything out of the TLBs for large pages, and out of what accesses remember.
cdef void forget_windows(CpuState *s) noexcept nogil
cdef void state_free(CpuState *s) noexcept nogil
cdef int raise_exception(CpuState *s, uint32_t vector) noexcept nogil
cdef int raise_error(CpuState *s, uint32_t vector, uint32_t error_code) noexcept nogil
cdef int raise_page_fault(CpuState *s, uint64_t address, uint32_t error_code) noexcept nogil
