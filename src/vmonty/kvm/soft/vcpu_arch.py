"""A vCPU as compiled code and other threads see it: kicks, requests, sleep; its CPUID table.

Fenced: it holds raw pointers to the statistics, to kvm_run and to the local APIC. That is safe because the object
behind each is kept in the attribute beside it, and an APIC, once in a VM's map, lives as long as the map.
"""

from __future__ import annotations

import cython
from cython.cimports.libc.stdlib import calloc, free, realloc
from cython.cimports.libc.string import memset
from cython.cimports.vmonty.kvm.soft.fastpath import COUNT_REQ_EVENT
from cython.cimports.vmonty.kvm.soft.kvm_host import (
    APIC_LIMIT,
    MMIO_PAGES,
    NO_PAGE,
    PORT_CELLS,
    PORT_MAP_SIZE,
    REQUEST_EVENT,
    REQUEST_HOST,
    CpuidEntry,
    KvmDoorbell,
    load32,
    pthread_cond_destroy,
    pthread_cond_init,
    pthread_cond_signal,
    pthread_cond_wait,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from cython.cimports.vmonty.kvm.soft.vcpu_cpuid import kvm_cpuid

KVM_CPUID_FLAG_SIGNIFICANT_INDEX = 1


def kvm_vcpu_kick(a, requests):
    """Any thread, with or without the GIL."""
    pthread_mutex_lock(cython.address(a.lock))
    a.requests |= requests
    a.woken = 1
    if a.running != cython.NULL:
        a.running.interrupt_line = 1
        a.running.run = 0
    if a.waiting:
        pthread_cond_signal(cython.address(a.wait_queue))
    pthread_mutex_unlock(cython.address(a.lock))


def kvm_enter_guest_mode(a, s):
    """vcpu->mode = IN_GUEST_MODE. What was asked for before makes the guest leave at once."""
    pthread_mutex_lock(cython.address(a.lock))
    a.running = s
    s.interrupt_line = 1 if a.requests else 0
    if a.requests:
        s.run = 0
    pthread_mutex_unlock(cython.address(a.lock))


def kvm_leave_guest_mode(a):
    """vcpu->mode = OUTSIDE_GUEST_MODE: nobody touches the processor any more."""
    pthread_mutex_lock(cython.address(a.lock))
    a.running = cython.NULL
    pthread_mutex_unlock(cython.address(a.lock))


def kvm_take_requests(a, which):
    """kvm_check_request() of several."""
    taken: uint32_t
    if (load32(cython.address(a.requests), 5) & which) == 0:
        return 0
    pthread_mutex_lock(cython.address(a.lock))
    taken = a.requests & which
    a.requests &= ~which
    if taken & REQUEST_EVENT:
        a.counters[COUNT_REQ_EVENT] += 1
    pthread_mutex_unlock(cython.address(a.lock))
    return taken


def kvm_inject_nmi(a):
    """Any thread, which kicks the vCPU then."""
    pthread_mutex_lock(cython.address(a.lock))
    a.nmi_pending = min(a.nmi_pending + 1, cython.cast(uint32_t, 2))
    pthread_mutex_unlock(cython.address(a.lock))


def kvm_take_nmi(a):
    """It is injected."""
    pthread_mutex_lock(cython.address(a.lock))
    a.nmi_pending -= 1
    pthread_mutex_unlock(cython.address(a.lock))


def kvm_limit_nmi(a):
    """process_nmi(), while NMIs are blocked."""
    pthread_mutex_lock(cython.address(a.lock))
    a.nmi_pending = min(a.nmi_pending, cython.cast(uint32_t, 1))
    pthread_mutex_unlock(cython.address(a.lock))


@cython.cclass
class VmArch:
    """What the vCPUs of a VM share: who hears of EOIs, and where an IPI goes."""

    def __cinit__(self):
        memset(cython.address(self.k), 0, cython.sizeof(KvmArch))
        self._apics = []
        self._cells = []
        self.k.mmio_generation = 1
        self.k.apic_map = cython.cast(
            cython.pointer(cython.pointer(KvmLapic)), calloc(APIC_LIMIT, cython.sizeof(cython.p_void))
        )
        if self.k.apic_map == cython.NULL:
            raise MemoryError("no memory for a map of local APICs")
        self.k.port_map = cython.cast(cython.pointer(uint8_t), calloc(PORT_MAP_SIZE, 1))
        if self.k.port_map == cython.NULL:
            raise MemoryError("no memory for a map of ports")
        pthread_mutex_init(cython.address(self.k.doorbell_lock), cython.NULL)

    def __dealloc__(self):
        free(self.k.doorbells)
        pthread_mutex_destroy(cython.address(self.k.doorbell_lock))
        free(self.k.apic_map)
        free(self.k.port_map)

    def note_eoi_vector(self, vector: cython.uint) -> None:
        """From now on EOIs of *vector* go through ApicBus.eoi(). With the chip lock held."""
        self.k.eoi_vectors[(vector & 0xFF) >> 5] |= cython.cast(uint32_t, 1) << (vector & 31)

    def note_all_eois(self) -> None:
        """As note_eoi_vector() of each."""
        memset(cython.address(self.k.eoi_vectors), 0xFF, cython.sizeof(self.k.eoi_vectors))

    def note_ports(self, first: cython.ulonglong, count: cython.ulonglong) -> None:
        """An in-kernel device is at *count* ports, a wildcard at one: accesses are for the bus. Any thread."""
        port: uint64_t
        for port in range(first, min(first + max(count, 1), 0x10000)):
            self.k.port_map[port >> 3] |= 1 << (port & 7)

    def set_doorbells(self, bells: list) -> None:
        """All ioeventfds in memory: (address, size, datamatch or None, fd, whether Python answers) each. Any thread.

        None of those before is used any more when this returns. Raises MemoryError.
        """
        n: cython.int
        count: cython.int = len(bells)
        old: cython.pointer(KvmDoorbell)
        made: cython.pointer(KvmDoorbell) = cython.cast(
            cython.pointer(KvmDoorbell), calloc(count + 1, cython.sizeof(KvmDoorbell))
        )
        if made == cython.NULL:
            raise MemoryError("no memory for ioeventfds")
        for n in range(count):
            made[n].gpa, made[n].size, match, made[n].fd, made[n].calls = bells[n]
            made[n].matches = match is not None
            made[n].datamatch = match or 0
        pthread_mutex_lock(cython.address(self.k.doorbell_lock))
        old = self.k.doorbells
        self.k.doorbells = made
        self.k.doorbell_count = count
        pthread_mutex_unlock(cython.address(self.k.doorbell_lock))
        free(old)

    def set_window(self, window: PortWindow) -> bool:
        """Have it answer for its ports; False when the VM has one already. Any thread."""
        if self._window is not None:
            return False
        self._window = window
        self.k.window = cython.address(window.w)
        return True

    def add_cell(self, cell: PortCell) -> bool:
        """As set_window, for one port; False when the VM has PORT_CELLS already."""
        count: cython.int = len(self._cells)
        if count >= PORT_CELLS:
            return False
        self._cells.append(cell)
        self.k.cells[count] = cython.address(cell.c)
        return True

    @property
    def mmio_generation(self) -> int:
        """That of memory slots and of what there is on the MMIO bus."""
        return self.k.mmio_generation

    def mmio_changed(self) -> None:
        """Slots or bus have changed: what vCPUs remember is no longer true."""
        self.k.mmio_generation += 1

    def count_apics(self, apics: cython.uint, x2apics: cython.uint) -> None:
        """recalculate_apic_map(): how many there are, and how many are in x2APIC mode. With the chip lock held."""
        self.k.x2apics = 0  # for a moment no two numbers are equal
        self.k.apics = apics
        self.k.x2apics = x2apics

    def add_apic(self, apic, owner):
        if apic.vcpu_id >= APIC_LIMIT:
            raise ValueError("a vCPU id beyond KVM_MAX_VCPU_IDS")
        self._apics.append(owner)
        self.k.apic_map[apic.vcpu_id] = apic
        return 0


@cython.cclass
class VcpuArch:
    """The vCPU. Methods are for its own thread, but ``kick``."""

    def __cinit__(self, vm: VmArch):
        memset(cython.address(self.a), 0, cython.sizeof(KvmVcpuArch))
        pthread_mutex_init(cython.address(self.a.lock), cython.NULL)
        pthread_cond_init(cython.address(self.a.wait_queue), cython.NULL)
        self.a.rung = -1
        self.vm = vm
        self.a.kvm = cython.address(vm.k)

    def __dealloc__(self):
        free(self.a.cpuid)
        pthread_cond_destroy(cython.address(self.a.wait_queue))
        pthread_mutex_destroy(cython.address(self.a.lock))

    # ---- kicks and sleep -------------------------------------------------------------------------------------

    def kick(self) -> None:
        """kvm_vcpu_kick() with something for the Python side: out of guest mode, or awake. Any thread."""
        kvm_vcpu_kick(cython.address(self.a), REQUEST_HOST)

    def request_event(self) -> None:
        """KVM_REQ_EVENT and a kick: an interrupt is in the IRR. Any thread."""
        kvm_vcpu_kick(cython.address(self.a), REQUEST_EVENT)

    @property
    def nmi_pending(self) -> int:
        """How many NMIs wait."""
        return self.a.nmi_pending

    @nmi_pending.setter
    def nmi_pending(self, value: cython.uint) -> None:
        self.a.nmi_pending = value

    @property
    def fast_nmi(self) -> bool:
        """Whether NMIs are delivered without Python."""
        return self.a.fast_nmi != 0

    def inject_nmi(self) -> None:
        """One more, of which two wait at most. Any thread, which kicks the vCPU then."""
        kvm_inject_nmi(cython.address(self.a))

    def take_nmi(self) -> None:
        """It is injected."""
        kvm_take_nmi(cython.address(self.a))

    def limit_nmi(self) -> None:
        """NMIs are blocked: one waits at most."""
        kvm_limit_nmi(cython.address(self.a))

    def take_requests(self) -> None:
        """Whatever was asked for up to now is looked at next."""
        kvm_take_requests(cython.address(self.a), ~cython.cast(uint32_t, 0))

    def wait(self) -> None:
        """Sleep until a kick, or not at all if one came since the last wait. The GIL is released."""
        a: cython.pointer(KvmVcpuArch) = cython.address(self.a)
        with cython.nogil:
            pthread_mutex_lock(cython.address(a.lock))
            a.waiting = 1
            while not a.woken:
                pthread_cond_wait(cython.address(a.wait_queue), cython.address(a.lock))
            a.waiting = 0
            a.woken = 0
            pthread_mutex_unlock(cython.address(a.lock))

    # ---- what it works on ------------------------------------------------------------------------------------

    def set_counters(self, values: cython.ulonglong[::1]) -> None:
        """Where exits are counted."""
        self._counters = values
        self.a.counters = cython.cast(cython.pointer(uint64_t), cython.address(values[0]))

    def set_run_page(self, page: cython.uchar[::1]) -> None:
        """The kvm_run page."""
        self._page = page
        self.a.run = cython.address(page[0])

    def set_msrs(self, msrs: StoredMsrs) -> None:
        """The MSRs that are only kept."""
        self._msrs = msrs
        self.a.msrs = cython.address(msrs.slots[0])

    def set_tsc(self, offset: cython.ulonglong, scaled: cython.bint) -> None:
        """How the guest's TSC follows from the host's."""
        self.a.tsc_offset = offset
        self.a.tsc_scaled = scaled

    def allow_fast(
        self, exits: cython.bint, msrs: cython.bint, again: cython.bint, user_injects: cython.bint, pv_eoi: cython.bint
    ) -> None:
        """Which exits of the next run may be handled without Python, and whether *again* is for reentry.reenter()."""
        self.a.pv_eoi = pv_eoi
        self.a.fast = exits
        self.a.fast_msrs = msrs
        self.a.may_reenter = exits and again
        self.a.user_injects = user_injects

    def take_user_exit(self) -> bool:
        """Whether the last run ended with an exit for user space that is in kvm_run already."""
        found: cython.bint = self.a.user_exit != 0
        self.a.user_exit = 0
        self.a.reenter = found and self.a.may_reenter
        return found

    def take_rung(self) -> int:
        """The fd of the ioeventfd that the last run's store has rung, for Python to answer; -1: none."""
        found: cython.int = self.a.rung
        self.a.rung = -1
        return found

    def take_input(self) -> int:
        """How many bytes of a port read user space has answered, whose instruction is to be completed; 0: none."""
        found: cython.uint = self.a.input
        self.a.input = 0
        return found

    def take_load(self) -> tuple | None:
        """Address and size of an MMIO read user space has answered, whose instruction is to be done; None: none."""
        if self.a.load.size == 0:
            return None
        found: tuple = self.a.load_gpa, self.a.load.size
        self.a.load.size = 0
        return found

    def note_mmio(self, gpa: cython.ulonglong, generation: cython.ulonglong) -> None:
        """User space answers for the page of *gpa*, as was found in that *generation*: from now on at once."""
        k: cython.int
        if self.a.mmio_generation != generation:
            self.a.mmio_generation = generation
            for k in range(MMIO_PAGES):
                self.a.mmio_gfns[k] = NO_PAGE
        for k in range(MMIO_PAGES):
            if self.a.mmio_gfns[k] == gpa >> 12:
                return
        self.a.mmio_gfns[self.a.mmio_next % MMIO_PAGES] = gpa >> 12
        self.a.mmio_next += 1

    def note_apic(self, gpa: cython.ulonglong, generation: cython.ulonglong) -> None:
        """The page of *gpa* is the local APIC's: no slot is there, as was found in that *generation*."""
        self.a.apic_gfn = gpa >> 12
        self.a.apic_generation = generation

    def touched(self) -> None:
        """Something of the vCPU may have changed: the next run looks at everything."""
        self.a.reenter = 0

    def detach(self) -> None:
        """The vCPU leaves its processor."""
        self.a.enter = cython.NULL
        self.a.processor = cython.NULL
        self.seat = None
        self.cpu = None

    @property
    def runner(self) -> int:
        """The thread that is in KVM_RUN, by its ident; 0 for none."""
        return self.a.runner

    @runner.setter
    def runner(self, thread: cython.ulong) -> None:
        self.a.runner = thread

    @property
    def in_guest(self) -> bool:
        """Whether the guest may use its TLB."""
        return self.a.in_guest != 0

    @in_guest.setter
    def in_guest(self, value: cython.bint) -> None:
        self.a.in_guest = value

    @property
    def hv_timer(self) -> bool:
        """Whether the processor can watch the local APIC's deadline while the guest runs."""
        return self.a.hv_timer != 0

    @hv_timer.setter
    def hv_timer(self, value: cython.bint) -> None:
        self.a.hv_timer = value

    @property
    def tlb_flush_requested(self) -> bool:
        """KVM_REQ_TLB_FLUSH."""
        return self.a.flush_requested != 0

    @tlb_flush_requested.setter
    def tlb_flush_requested(self, value: cython.bint) -> None:
        self.a.flush_requested = value

    @property
    def cr8(self) -> int:
        """Without a local APIC: the task priority that kvm_run has."""
        return self.a.cr8

    @cr8.setter
    def cr8(self, value: cython.ulonglong) -> None:
        self.a.cr8 = value

    def set_cpuid(self, entries: list) -> None:
        """Take CPUID entries: (function, index, flags, eax, ebx, ecx, edx) each. Raises MemoryError."""
        k: cython.int
        count: cython.int = len(entries)
        table: cython.pointer(CpuidEntry) = cython.cast(
            cython.pointer(CpuidEntry), realloc(self.a.cpuid, (count + 1) * cython.sizeof(CpuidEntry))
        )
        if table == cython.NULL:
            raise MemoryError("no memory for CPUID entries")
        self.a.cpuid = table
        for k in range(count):
            table[k].function, table[k].index, flags, table[k].eax, table[k].ebx, table[k].ecx, table[k].edx = entries[
                k
            ]
            table[k].significant = flags & KVM_CPUID_FLAG_SIGNIFICANT_INDEX
        self.a.cpuid_count = count

    def cpuid(self, function: cython.uint, index: cython.uint) -> tuple:
        """EAX, EBX, ECX, EDX of a leaf, but for what depends on control registers."""
        out: cython.uint[4]
        kvm_cpuid(cython.address(self.a), function, index, cython.address(out[0]))
        return out[0], out[1], out[2], out[3]
