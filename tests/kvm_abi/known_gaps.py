"""Where a KVM that the suite runs on is known to be wrong: each gap's tests are skips that say so.

A gap is keyed by what the provider says about itself. It is no excuse for a missing capability: tests that
need one ask for it.
"""

from __future__ import annotations

import re
from pathlib import Path

from vmonty.kvm import linux

PVM = "kvm_pvm"
PVM_ON_AMD = "kvm_pvm on AMD"
AMD_UNDER_TCG = "kvm_amd on an emulated CPU"

_STRING_IO_ORDER = "the emulator reads the port before it looks where to store"
_STRING_IO = "the emulator takes memory that it cannot read for a device's: no EFAULT"

# platform → gap → what the KVM does wrong
GAPS: dict[str, dict[str, str]] = {
    PVM: {
        "iopl": "CPL3 code with IOPL 3 gets #GP for IN and OUT: only the TSS's permission bitmap is looked at",
        "real-mode-idt-limit": "real mode is emulated, and the emulator does not look at IDTR's limit",
        "int3-cpl0": "CPL0 code is emulated, and the emulator does not know INT3",
        "iret-protected": "32-bit CPL0 code is emulated, and the emulator does not know IRETD",
        "int-n-cpl3": "INT n in CPL3 does not reach the guest's gate",
        "irq-window": "emulated code runs on to its next exit: the opening of the interrupt window is not noticed",
        "apic-isr": "an interrupt counts as ended when it is delivered: the local APIC never shows it in service, and"
        " level-triggered ones come again before the EOI",
        "io-exits": "the statistic io_exits stays 0: port accesses of emulated code are not counted",
        "tpr-access": "KVM_TPR_ACCESS_REPORTING is accepted and no access is ever reported",
        "tsc-offset": "the guest's TSC is the host's: neither MSR 0x10 nor KVM_VCPU_TSC_OFFSET moves it",
        "debug-cpl3": "single steps and breakpoints of CPL3 code become #DB of the guest or nothing, never Exit.DEBUG",
        "watchpoint": "CPL0 code is emulated, and the emulator does not look at watchpoints; in CPL3 they never exit",
        "sw-breakpoint": "INT3 is never Exit.DEBUG: emulated code cannot execute it, in CPL3 it is the guest's #BP",
        "memory-fault": "host memory of a slot that is gone reads as something else: KVM_RUN never fails with EFAULT",
        "legacy-paging": "a guest that is entered with 32-bit or PAE paging on ends in a triple fault at once",
        "cpuid-umip": "a guest without UMIP in its CPUID sets CR4.UMIP",
        "speculation-msrs": "IA32_SPEC_CTRL and IA32_PRED_CMD answer guests whose CPUID lacks them",
        "emulation-cpl3": "code of CPL3 that cannot be fetched is an internal error, as in CPL0",
        "string-io-order": _STRING_IO_ORDER,
        "debugctl-reserved": "IA32_DEBUGCTL takes reserved bits, and drops them",
        "set-tpr": "CPL0 code is emulated, and the emulator tells user space of no task priority",
        "async-pf": "CPL0 code is emulated, and the emulator waits for a page itself",
        "hypercall": "CPL0 code is emulated, and VMCALL and VMMCALL are patched and executed again for ever",
    },
    "kvm_amd": {"string-io-fault": _STRING_IO, "string-io-order": _STRING_IO_ORDER},
    "kvm_intel": {"string-io-fault": _STRING_IO, "string-io-order": _STRING_IO_ORDER},
    AMD_UNDER_TCG: {
        "pv-kick": "KVM_HC_KICK_CPU does not wake a vCPU that is halted with interrupts off (not understood yet)",
        "hw-breakpoint": "the emulated CPU does not stop at hardware breakpoints of a nested guest",
        "watchpoint": "the emulated CPU does not stop at watchpoints of a nested guest",
        "sti-shadow": "an exit in the interrupt shadow of STI, such as a tick of the rig's own timer, loses the shadow",
        "sw-breakpoint": "the emulated CPU does not intercept INT3 of a nested guest",
        "xsetbv-exit": "the emulated CPU does not intercept XSETBV of a nested guest",
        "cr8-reserved": "the emulated CPU takes a MOV CR8 of more than four bits, and keeps the low four",
        "gs-base-canonical": "the emulated CPU takes a KERNEL_GS_BASE that is not canonical",
        "string-io-fault": _STRING_IO,
        "string-io-order": _STRING_IO_ORDER,
        "lost-page-table": "with npt=0 a guest's page table whose memory is gone counts as one with nothing in it",
        "pae-paging-off": "a nested guest that switches PAE paging off and on again ends in a triple fault",
        "io-bitmap": "the emulated CPU takes a busy TSS for none: CPL3 code gets #GP for ports that are allowed",
    },
}

# AMD's processors have no CPUID faulting, by which that KVM takes CPL3's.
GAPS[PVM_ON_AMD] = GAPS[PVM] | {"cpuid-cpl3": "CPUID of CPL3 code is not intercepted: it shows the host's leaves"}

# Tests that the software KVM does not pass yet, by name (with the case where only that one fails), and why. They
# run, and are expected to fail: one that passes is a failure until it is struck off here.
SOFT_UNFINISHED: dict[str, str] = {
    "test_unemulatable_mmio_instruction_is_an_internal_error": "the processor itself emulates: it knows all of them",
    "test_emulation_failure_shows_the_instruction": "the processor itself emulates: it knows all of them",
}


def platform(provider_name: str) -> str:
    """What is under test: the provider's name, or for Linux's KVM its module and, where it matters, the CPU."""
    if provider_name != "linux":
        return provider_name
    module = linux.vendor_module() or "kvm"
    processor = Path("/proc/cpuinfo").read_text()
    if module == "kvm_amd" and re.search(r"model name\s*: QEMU TCG", processor):
        return AMD_UNDER_TCG
    if module == PVM and "AuthenticAMD" in processor:
        return PVM_ON_AMD
    return module


def why_skip(provider_name: str, gap: str) -> str | None:
    """What is wrong there, or None when this KVM does not have *gap*. KeyError for a gap that no KVM has."""
    if not any(gap in gaps for gaps in GAPS.values()):
        raise KeyError(f"no platform has a known gap {gap!r}")
    here = platform(provider_name)
    reason = GAPS.get(here, {}).get(gap)
    return None if reason is None else f"{here}: {reason}"
