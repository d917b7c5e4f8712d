"""What compiled code knows of a VM, its vCPUs and their local APICs: struct kvm_vcpu_arch and its like.

Exits that need no Python are handled from here, without the GIL. Who writes a field stands beside it; "vCPU" means
its own thread, inside an ioctl. Everything else that other threads may touch is atomic or guarded by the lock.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState
from vmonty.kvm.soft.plain_moves cimport PlainMove

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_cond_init(pthread_cond_t *condition, void *attributes)
    int pthread_cond_destroy(pthread_cond_t *condition)
    int pthread_cond_signal(pthread_cond_t *condition)
    int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)

cdef extern from * nogil:
    uint32_t fetch_or32 "__sync_fetch_and_or" (uint32_t *place, uint32_t bits) noexcept
    uint32_t fetch_and32 "__sync_fetch_and_and" (uint32_t *place, uint32_t bits) noexcept
    uint32_t load32 "__atomic_load_n" (uint32_t *place, int order) noexcept
    uint64_t load64 "__atomic_load_n" (uint64_t *place, int order) noexcept
    void store64 "__atomic_store_n" (uint64_t *place, uint64_t value, int order) noexcept
    bint swap64 "__sync_bool_compare_and_swap" (uint64_t *place, uint64_t old, uint64_t new) noexcept

cdef enum:
    SEQUENTIAL = 5

# KvmVcpuArch.requests
cdef enum:
    REQUEST_EVENT = 1        # KVM_REQ_EVENT: look whether an interrupt can be delivered
    REQUEST_HOST = 2         # anything else, which the Python side looks for: signals, flushes, NMIs, the scheduler

cdef enum:
    APIC_WORDS = 256         # the first KiB of the register page; nothing lies behind it
    APIC_LIMIT = 4096        # KVM_MAX_VCPU_IDS
    PORT_MAP_SIZE = 8192
    PORT_WINDOW_SIZE = 8
    PORT_WINDOW_RING = 4096
    PORT_CELLS = 4
    NO_PAGE = -1             # what no page number is
    MMIO_PAGES = 8           # as many are remembered of a vCPU's
    MSR_SLOTS = 1024         # open addressing; a power of two, more than twice as many as MSRs that are stored

cdef struct CpuidEntry:
    uint32_t function
    uint32_t index
    uint32_t significant     # the index counts
    uint32_t eax
    uint32_t ebx
    uint32_t ecx
    uint32_t edx

cdef struct MsrSlot:
    uint32_t index
    uint32_t used
    uint64_t value


cdef struct KvmLapic:
    # APIC_WORDS of them, at the beginning of a page of its own, which is the virtual-APIC page of kvm-intel: the
    # register at offset n is word n / 4. IRR, TMR: atomic, any thread; ISR: vCPU; TPR: vCPU, and its processor
    uint32_t *regs
    uint64_t icr             # in x2APIC mode one register of 64 bits. vCPU
    uint64_t apic_base       # chip lock
    # IA32_TSC_DEADLINE, 0 when disarmed, and the guest's TSC when the host's timer looks next, 0 for never. The vCPU
    # writes the first, then reads the second; the timer the other way round: so one of them sees the other's word.
    uint64_t tsc_deadline
    uint64_t armed_tsc
    uint32_t deadline_mode   # LVTT is in TSC-deadline mode. vCPU
    uint32_t vcpu_id
    KvmVcpuArch *vcpu        # NULL: a chip without a compiled vCPU (tests)
    KvmArch *kvm


cdef struct KvmVcpuArch:
    pthread_mutex_t lock
    pthread_cond_t wait_queue
    CpuState *running        # the processor, while the guest runs there. Lock
    uint32_t woken           # a wake-up that nobody has slept for yet. Lock
    uint32_t waiting         # Lock
    uint32_t requests        # Lock to write
    uint32_t fast            # exits may be handled without Python. vCPU
    uint32_t fast_msrs       # also those of MSRs: no filter is set. vCPU
    uint32_t tsc_scaled      # the guest's TSC is not the host's plus tsc_offset. vCPU
    uint32_t hv_timer        # kvm_can_use_hv_timer(): while the guest runs, the processor watches the deadline. vCPU
    uint32_t hv_timer_on     # ... and there is one, in the VMCS. vCPU
    uint32_t user_exit       # kvm_run says why to go back to user space. vCPU
    uint32_t may_reenter     # after such an exit KVM_RUN needs nothing of Python's. vCPU
    uint32_t reenter         # ... and nobody has touched the vCPU since. vCPU
    uint32_t input           # bytes of a port read that user space answers; the instruction is not done. vCPU
    PlainMove load           # the same of an MMIO read; its size is 0: none. vCPU
    uint64_t load_gpa
    uint64_t load_next       # rip behind it
    uint64_t mmio_gfns[8]    # pages that user space answered for, if the VM's generation is still this. vCPU
    uint64_t mmio_generation
    uint64_t apic_gfn        # where its APIC was and no slot, as of the next. vCPU
    uint64_t apic_generation
    uint32_t mmio_next       # whose place the next one takes
    uint32_t user_injects    # the PIC is user space's: KVM_INTERRUPT, interrupt windows
    int rung                 # the fd of a doorbell that Python answers; the store is done. -1: none. vCPU
    uint32_t pv_eoi          # the guest ends interrupts in memory, if Python tells it so
    uint32_t in_guest        # GIL
    uint32_t flush_requested    # of the TLB. GIL
    uint64_t runner          # the thread in KVM_RUN, 0 for none. GIL
    uint32_t tpr_threshold   # the guest's controls make it exit when its task priority falls below this class. vCPU
    uint32_t nmi_pending     # NMIs that wait, two at most. Lock to write
    uint32_t fast_nmi        # the vendor's run loop delivers them. Scheduler
    uint64_t cr8             # without a local APIC: the task priority, which kvm_run has, too. vCPU
    # The vendor's run loop, on the processor that holds the vCPU, NULL when none does; what it gave. Scheduler
    int64_t (*enter)(KvmVcpuArch *a) noexcept nogil
    int64_t outcome
    CpuState *processor
    uint64_t control_block   # VMCB
    uint32_t cpuid_count
    uint64_t tsc_offset
    uint64_t *counters       # stats.values. vCPU
    CpuidEntry *cpuid
    KvmLapic *apic           # NULL: user space has it
    KvmArch *kvm
    uint8_t *run             # struct kvm_run
    MsrSlot *msrs            # MSR_SLOTS of them


cdef struct KvmPortWindow:
    pthread_mutex_t lock
    uint32_t first           # the first port; never changes
    uint32_t reads           # a bit for each register that a read gives ``values`` of. Lock
    uint32_t idle            # a bit for each to which a write of that changes nothing. Lock
    uint32_t collects        # bytes written to the first register go to the ring. Lock
    uint32_t put             # how many ever went into it, and were taken out. Lock
    uint32_t taken
    int event                # an eventfd, told of the first byte in the ring; -1: none
    uint8_t values[8]
    uint8_t ring[4096]


# A port that is memory.
cdef struct KvmPortCell:
    uint32_t port            # these two never change
    uint32_t size            # bytes
    uint32_t value           # written by vCPUs and user space, with no lock
    uint32_t mask            # a write that changes no other bits is done by storing it; 0: no write is
    uint32_t hidden          # every access is an exit; once set it stays


# An ioeventfd in guest-physical memory; ``size`` 0 stands for any.
cdef struct KvmDoorbell:
    uint64_t gpa
    uint64_t datamatch
    uint32_t size
    uint32_t matches         # only writes of ``datamatch``
    uint32_t calls           # Python answers it, and may signal instead
    int fd


cdef struct KvmArch:
    uint64_t mmio_generation         # of memory slots and of what there is on the MMIO bus, from 1 on. GIL
    pthread_mutex_t doorbell_lock    # an eventfd stays open while it is held
    KvmDoorbell *doorbells   # in the order of registration. Lock
    uint32_t doorbell_count
    # Vectors of which the I/O APIC or user space may want to hear the EOI; once set they stay. Chip lock to write
    uint32_t eoi_vectors[8]
    uint32_t apics           # how many there are, and how many of them are in x2APIC mode. Chip lock to write
    uint32_t x2apics
    uint8_t *port_map        # a bit for each port where an in-kernel device may be; once set they stay
    KvmPortWindow *window    # NULL: none; once set it stays
    KvmPortCell *cells[4]    # filled from the first; once set they stay
    KvmLapic **apic_map      # by vCPU id, APIC_LIMIT of them; never taken back
