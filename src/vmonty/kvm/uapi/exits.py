"""Why KVM_RUN returned: linux/kvm.h, KVM_EXIT_*."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """kvm_run.exit_reason; the name is the header's without KVM_EXIT_."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    NMI = 16
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    IOAPIC_EOI = 26
    HYPERV = 27
    X86_RDMSR = 29
    X86_WRMSR = 30
    DIRTY_RING_FULL = 31
    AP_RESET_HOLD = 32
    X86_BUS_LOCK = 33
    XEN = 34
    NOTIFY = 37
    MEMORY_FAULT = 39
    TDX = 40
    SNP_REQ_CERTS = 43


# Details of some exits.
KVM_EXIT_HYPERCALL_LONG_MODE = 1
KVM_EXIT_HYPERV_HCALL = 2
KVM_EXIT_HYPERV_SYNDBG = 3
KVM_EXIT_HYPERV_SYNIC = 1
KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1
KVM_EXIT_XEN_HCALL = 1
