"""Binary statistics of VMs and vCPUs: the file of KVM_GET_STATS_FD.

    header │ id, 48 bytes │ descriptors, 64 bytes each │ data, 64 bits each

Counters lie in private memory until a file is asked for, and from then on in the file's own pages, so that it is
always current and outlives what it tells of. Source: api.rst, KVM_GET_STATS_FD; names: arch/x86/kvm/x86.c.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import NamedTuple

from vmonty.kvm.uapi import flags
from vmonty.kvm.uapi.vm import kvm_stats_desc, kvm_stats_header

NAME_SIZE = 48
HALT_BUCKETS = 32


class Statistic(NamedTuple):
    """One statistic: *size* values of 64 bits, in its unit times 10 ** *exponent*."""

    name: str
    kind: int = flags.KVM_STATS_TYPE_CUMULATIVE
    unit: int = flags.KVM_STATS_UNIT_NONE
    exponent: int = 0
    size: int = 1


def _counters(names: str) -> tuple[Statistic, ...]:
    return tuple(Statistic(name) for name in names.split())


def _time(name: str) -> Statistic:
    return Statistic(name, unit=flags.KVM_STATS_UNIT_SECONDS, exponent=-9)


def _time_histogram(name: str) -> Statistic:
    return Statistic(name, flags.KVM_STATS_TYPE_LOG_HIST, flags.KVM_STATS_UNIT_SECONDS, -9, HALT_BUCKETS)


def _instant(name: str, unit: int = flags.KVM_STATS_UNIT_NONE) -> Statistic:
    return Statistic(name, flags.KVM_STATS_TYPE_INSTANT, unit)


VM_STATISTICS: tuple[Statistic, ...] = (
    *_counters("remote_tlb_flush remote_tlb_flush_requests"),
    *_counters("mmu_shadow_zapped mmu_pte_write mmu_pde_zapped mmu_flooded mmu_recycled mmu_cache_miss"),
    *(_instant(name) for name in ("mmu_unsync", "pages_4k", "pages_2m", "pages_1g", "nx_lpage_splits")),
    Statistic("max_mmu_rmap_size", flags.KVM_STATS_TYPE_PEAK),
    Statistic("max_mmu_page_hash_collisions", flags.KVM_STATS_TYPE_PEAK),
)
VCPU_STATISTICS: tuple[Statistic, ...] = (
    *_counters("halt_successful_poll halt_attempted_poll halt_poll_invalid halt_wakeup"),
    *(_time(name) for name in ("halt_poll_success_ns", "halt_poll_fail_ns", "halt_wait_ns")),
    *(_time_histogram(name) for name in ("halt_poll_success_hist", "halt_poll_fail_hist", "halt_wait_hist")),
    _instant("blocking", flags.KVM_STATS_UNIT_BOOLEAN),
    *_counters("pf_taken pf_fixed pf_emulate pf_spurious pf_fast pf_mmio_spte_created pf_guest tlb_flush invlpg"),
    *_counters("exits io_exits mmio_exits signal_exits irq_window_exits nmi_window_exits l1d_flush halt_exits"),
    *_counters("request_irq_exits irq_exits host_state_reload fpu_reload insn_emulation insn_emulation_fail"),
    *_counters("hypercalls irq_injections nmi_injections req_event nested_run directed_yield_attempted"),
    *_counters("directed_yield_successful preemption_reported preemption_other"),
    _instant("guest_mode", flags.KVM_STATS_UNIT_BOOLEAN),
    *_counters("notify_window_exits"),
)


def _index(table: tuple[Statistic, ...], name: str) -> int:
    """Which of the data's values is the (first) one of *name*."""
    at = 0
    for entry in table:
        if entry.name == name:
            return at
        at += entry.size
    raise KeyError(name)


# Indices into Statistics.values, for those that are counted here.
REMOTE_TLB_FLUSH, REMOTE_TLB_FLUSH_REQUESTS, PAGES_4K, PAGES_2M, PAGES_1G = (
    _index(VM_STATISTICS, name)
    for name in ("remote_tlb_flush", "remote_tlb_flush_requests", "pages_4k", "pages_2m", "pages_1g")
)
MMU_SHADOW_ZAPPED, MMU_PTE_WRITE, MMU_PDE_ZAPPED, MMU_RECYCLED, MMU_CACHE_MISS, MMU_UNSYNC, MAX_MMU_RMAP_SIZE = (
    _index(VM_STATISTICS, name)
    for name in (
        "mmu_shadow_zapped", "mmu_pte_write", "mmu_pde_zapped", "mmu_recycled", "mmu_cache_miss", "mmu_unsync",
        "max_mmu_rmap_size",
    )
)  # fmt: skip
HALT_WAKEUP, HALT_WAIT_NS, HALT_WAIT_HIST, BLOCKING = (
    _index(VCPU_STATISTICS, name) for name in ("halt_wakeup", "halt_wait_ns", "halt_wait_hist", "blocking")
)
PF_TAKEN, PF_FIXED, PF_EMULATE, PF_SPURIOUS, PF_GUEST, TLB_FLUSH, INVLPG = (
    _index(VCPU_STATISTICS, name)
    for name in ("pf_taken", "pf_fixed", "pf_emulate", "pf_spurious", "pf_guest", "tlb_flush", "invlpg")
)
PF_MMIO_SPTE_CREATED = _index(VCPU_STATISTICS, "pf_mmio_spte_created")
HOST_STATE_RELOAD, FPU_RELOAD, REQ_EVENT = (
    _index(VCPU_STATISTICS, name) for name in ("host_state_reload", "fpu_reload", "req_event")
)
EXITS, IO_EXITS, MMIO_EXITS, SIGNAL_EXITS, HALT_EXITS, IRQ_EXITS = (
    _index(VCPU_STATISTICS, f"{name}_exits".lstrip("_")) for name in ("", "io", "mmio", "signal", "halt", "irq")
)
IRQ_WINDOW_EXITS, NMI_WINDOW_EXITS, REQUEST_IRQ_EXITS = (
    _index(VCPU_STATISTICS, f"{name}_exits") for name in ("irq_window", "nmi_window", "request_irq")
)
HALT_ATTEMPTED_POLL, HALT_SUCCESSFUL_POLL, HALT_POLL_SUCCESS_NS, HALT_POLL_SUCCESS_HIST = (
    _index(VCPU_STATISTICS, f"halt_{name}")
    for name in ("attempted_poll", "successful_poll", "poll_success_ns", "poll_success_hist")
)
HALT_POLL_FAIL_NS, HALT_POLL_FAIL_HIST = (
    _index(VCPU_STATISTICS, name) for name in ("halt_poll_fail_ns", "halt_poll_fail_hist")
)
PREEMPTION_REPORTED, DIRECTED_YIELD_ATTEMPTED, DIRECTED_YIELD_SUCCESSFUL = (
    _index(VCPU_STATISTICS, name)
    for name in ("preemption_reported", "directed_yield_attempted", "directed_yield_successful")
)
INSN_EMULATION, INSN_EMULATION_FAIL, HYPERCALLS, IRQ_INJECTIONS, NMI_INJECTIONS = (
    _index(VCPU_STATISTICS, name)
    for name in ("insn_emulation", "insn_emulation_fail", "hypercalls", "irq_injections", "nmi_injections")
)


class Statistics:
    """The counters of *table*; ``values[EXITS] += 1`` counts. *name* is the file's id."""

    def __init__(self, table: tuple[Statistic, ...], name: str) -> None:
        self._table = table
        self._name = name
        self._size = 8 * sum(entry.size for entry in table)
        self._fd = -1
        self.values = memoryview(bytearray(self._size)).cast("Q")

    def get(self, name: str) -> int:
        """The (first) value of *name*."""
        return self.values[_index(self._table, name)]

    def open(self) -> int:
        """A new descriptor to read the statistics from. Nothing may count meanwhile."""
        if self._fd < 0:
            self._move_to_file()
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """No more files will be asked for; those that are open stay."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def waited(self, nanoseconds: int) -> None:
        """A halt has ended after *nanoseconds*."""
        self.values[HALT_WAKEUP] += 1
        self._time(HALT_WAIT_NS, HALT_WAIT_HIST, nanoseconds)

    def polled(self, nanoseconds: int, successful: bool) -> None:
        """A halt has polled for *nanoseconds*, and was *successful* if it needs no sleep."""
        values = self.values
        values[HALT_ATTEMPTED_POLL] += 1
        if successful:
            values[HALT_SUCCESSFUL_POLL] += 1
            self._time(HALT_POLL_SUCCESS_NS, HALT_POLL_SUCCESS_HIST, nanoseconds)
        else:
            self._time(HALT_POLL_FAIL_NS, HALT_POLL_FAIL_HIST, nanoseconds)

    def _time(self, total: int, histogram: int, nanoseconds: int) -> None:
        """Bucket n of a histogram begins at 2 ** (n - 1)."""
        self.values[total] += nanoseconds
        self.values[histogram + min(nanoseconds.bit_length(), HALT_BUCKETS - 1)] += 1

    def _move_to_file(self) -> None:
        head = self._head()
        fd = os.memfd_create(self._name, os.MFD_CLOEXEC)
        try:
            os.pwrite(fd, head + bytes(self.values), 0)
            pages = mmap.mmap(fd, len(head) + self._size)
        except BaseException:
            os.close(fd)
            raise
        self.values = memoryview(pages)[len(head) :].cast("Q")
        self._fd = fd

    def _head(self) -> bytes:
        """All before the data."""
        step = ctypes.sizeof(kvm_stats_desc) + NAME_SIZE
        id_offset = ctypes.sizeof(kvm_stats_header)
        header = kvm_stats_header(
            name_size=NAME_SIZE, num_desc=len(self._table), id_offset=id_offset, desc_offset=id_offset + NAME_SIZE,
            data_offset=id_offset + NAME_SIZE + step * len(self._table),
        )  # fmt: skip
        parts = [bytes(header), self._name.encode().ljust(NAME_SIZE, b"\0")]
        offset = 0
        for entry in self._table:
            descriptor = kvm_stats_desc(
                flags=entry.kind | entry.unit | flags.KVM_STATS_BASE_POW10,
                exponent=entry.exponent, size=entry.size, offset=offset,
            )  # fmt: skip
            parts += bytes(descriptor), entry.name.encode().ljust(NAME_SIZE, b"\0")
            offset += 8 * entry.size
        return b"".join(parts)
