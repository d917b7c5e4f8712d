"""What this host offers to virtual machines: the rows of ``vmonty doctor``."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from vmonty import kvm
from vmonty.base.cachedir import cache_root
from vmonty.base.errors import KvmError, KvmUnavailable
from vmonty.kvm.api import System
from vmonty.kvm.linux import DEVICE, cpu_flags, vendor_module
from vmonty.kvm.uapi import Cap
from vmonty.vmm import accel

# What a machine on KVM cannot do without.
NEEDED = (Cap.USER_MEMORY, Cap.IRQCHIP, Cap.PIT2, Cap.EXT_CPUID, Cap.SET_TSS_ADDR, Cap.MP_STATE)
# What makes it better.
WANTED = (Cap.IRQFD, Cap.IOEVENTFD, Cap.IMMEDIATE_EXIT, Cap.READONLY_MEM, Cap.SIGNAL_MSI, Cap.TSC_DEADLINE_TIMER)
LEAST_MEMORY, LEAST_DISK = 1 << 30, 2 << 30


class Verdict(Enum):
    """What a row means for running a VM."""

    OK = "ok"
    WARNING = "warning"
    MISSING = "missing"


@dataclass(frozen=True)
class Row:
    """One finding: *text* says what is there, *remedy* what to do when it is not; *data* is for scripts."""

    name: str
    verdict: Verdict
    text: str
    remedy: str = ""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All rows, and which accelerator ``auto`` takes (None: no VM can run)."""

    rows: list[Row]
    accelerator: str | None

    @property
    def usable(self) -> bool:
        """Whether a VM can run here."""
        return self.accelerator is not None


def examine() -> Report:
    """Look at everything. Nothing is changed; a VM is created for a moment to measure its speed."""
    rows = [processor(), virtualization(), nested_paging()]
    device = kvm_device()
    rows.append(device)
    needed: list[Row] = []
    if device.verdict is Verdict.OK:
        rows.append(kvm_module())
        with kvm.open("linux") as system:
            needed = [capabilities(system), kernel_speed(system)]
            rows += [needed[0], limits(system), needed[1]]
    if soft := "soft" in accel.ACCELERATORS:
        rows.append(software())
        soft = rows[-1].verdict is Verdict.OK
    rows += [tun(), vhost(), huge_pages(), memory(), disk()]
    # Capabilities may be worse than wished for, but kernel code must run at speed.
    hardware = bool(needed) and needed[0].verdict is not Verdict.MISSING and needed[1].verdict is Verdict.OK
    return Report(rows, "kvm" if hardware else "soft" if soft else None)


def processor() -> Row:
    """Model and instruction sets."""
    flags = cpu_flags()
    shown = [name for name in ("avx", "avx2", "fma", "bmi2", "avx512f") if name in flags]
    model = next(_values("/proc/cpuinfo", "model name"), platform.machine())
    text = f"{model}, {os.cpu_count()} processors, {' '.join(shown) or 'no AVX'}"
    if platform.machine() != "x86_64":
        return Row("processor", Verdict.MISSING, text, "vmonty runs x86-64 guests on x86-64 hosts")
    return Row("processor", Verdict.OK, text, data={"flags": sorted(flags)})


def virtualization() -> Row:
    """vmx or svm in the processor's flags."""
    flags = cpu_flags()
    kind = "vmx" if "vmx" in flags else "svm" if "svm" in flags else None
    if kind is None:
        return Row(
            "virtualization", Verdict.WARNING, "no vmx or svm flag",
            "switch VT-x or AMD-V on in the firmware; in a VM, enable nested virtualization on its host",
        )  # fmt: skip
    return Row("virtualization", Verdict.OK, kind, data={"kind": kind})


def nested_paging() -> Row:
    """EPT or NPT, as far as the flags show it."""
    flags = cpu_flags()
    kind = "ept" if "ept" in flags else "npt" if "npt" in flags else None
    if kind is None:
        return Row("nested paging", Verdict.WARNING, "no ept or npt flag", "without it KVM shadows page tables: slower")
    return Row("nested paging", Verdict.OK, kind, data={"kind": kind})


def _reason(error: KvmError) -> str:
    """What the error says without its remedy, which has a place of its own."""
    return error.strerror.partition(";")[0] if error.strerror else str(error)


def kvm_device() -> Row:
    """The device: there, permitted, and a KVM."""
    try:
        with kvm.open("linux") as system:
            version = system.api_version()
    except KvmUnavailable as error:
        return Row(DEVICE, Verdict.MISSING, _reason(error), error.remedy)
    return Row(DEVICE, Verdict.OK, f"API version {version}", data={"api_version": version})


def kvm_module() -> Row:
    """Which vendor module serves the device."""
    module = vendor_module()
    if module is None:
        return Row("module", Verdict.WARNING, "it does not show in /sys/module (built in?)")
    known = module in ("kvm_intel", "kvm_amd")
    return Row(
        "module", Verdict.OK if known else Verdict.WARNING, module,
        "" if known else "this is neither kvm_intel nor kvm_amd: expect gaps", {"module": module},
    )  # fmt: skip


def capabilities(system: System) -> Row:
    """How many capabilities there are, and which that matter are not."""
    found = system.capabilities()
    data = {"capabilities": {cap.name: value for cap, value in found.items()}}
    if lacking := [cap.name for cap in NEEDED if cap not in found]:
        return Row("capabilities", Verdict.MISSING, f"without {', '.join(lacking)}", "use a newer kernel", data)
    if lacking := [cap.name for cap in WANTED if cap not in found]:
        return Row(
            "capabilities", Verdict.WARNING, f"{len(found)}, without {', '.join(lacking)}", "use a newer kernel", data
        )
    return Row("capabilities", Verdict.OK, f"{len(found)}", data=data)


def limits(system: System) -> Row:
    """vCPUs and memory slots."""
    values = {
        "recommended_vcpus": system.check_extension(Cap.NR_VCPUS),
        "max_vcpus": system.check_extension(Cap.MAX_VCPUS),
        "memory_slots": system.check_extension(Cap.NR_MEMSLOTS),
    }
    text = "{max_vcpus} vCPUs ({recommended_vcpus} recommended), {memory_slots} memory slots".format(**values)
    return Row("limits", Verdict.OK, text, data=values)


def kernel_speed(system: System) -> Row:
    """How fast CPL 0 code runs: the difference between hardware and a KVM that emulates it."""
    try:
        mips = accel.measure_cpl0(system)
    except KvmError as error:
        return Row("kernel code", Verdict.MISSING, f"cannot be run: {error}", error.remedy)
    data = {"cpl0_mips": round(mips, 1)}
    text = f"CPL 0 runs at {mips:,.1f} MIPS"
    if mips < accel.LEAST_MIPS:
        return Row(
            "kernel code", Verdict.WARNING, f"{text}: emulated, too slow to boot an operating system",
            "auto will not choose this KVM; use a host whose KVM runs on vmx or svm", data,
        )  # fmt: skip
    return Row("kernel code", Verdict.OK, text, data=data)


def software() -> Row:
    """Our own KVM on our own CPU, which needs nothing of the host's kernel."""
    try:
        with kvm.open(accel.ACCELERATORS["soft"]) as system:
            mips = accel.measure_cpl0(system)
    except KvmError as error:
        return Row(
            "software CPU", Verdict.MISSING, f"cannot be run: {_reason(error)}", error.remedy or "build vmonty again"
        )
    return Row("software CPU", Verdict.OK, f"CPL 0 runs at {mips:,.1f} MIPS", data={"cpl0_mips": round(mips, 1)})


def tun() -> Row:
    """The device for tap networking."""
    return _device("/dev/net/tun", "tap networking", "sudo modprobe tun")


def vhost() -> Row:
    """The kernel's virtio-net back end."""
    return _device("/dev/vhost-net", "virtio-net in the host's kernel", "sudo modprobe vhost_net")


def _device(path: str, purpose: str, remedy: str) -> Row:
    if not Path(path).exists():
        return Row(path, Verdict.WARNING, f"not there: no {purpose}", remedy)
    if not os.access(path, os.R_OK | os.W_OK):
        return Row(path, Verdict.WARNING, f"no permission: no {purpose}", f"ask for read and write access to {path}")
    return Row(path, Verdict.OK, purpose)


def huge_pages() -> Row:
    """Transparent and reserved huge pages."""
    control = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    mode = control.read_text().partition("[")[2].partition("]")[0] if control.exists() else "never"
    reserved = int(next(_values("/proc/meminfo", "HugePages_Total"), "0"))
    data = {"shmem": mode, "reserved": reserved}
    text = f"transparent for shared memory: {mode}; reserved: {reserved}"
    if mode in ("never", "deny") and not reserved:
        return Row(
            "huge pages", Verdict.WARNING, text, "guests run a little slower without; "
            f"echo advise | sudo tee {control}", data,
        )  # fmt: skip
    return Row("huge pages", Verdict.OK, text, data=data)


def memory() -> Row:
    """Memory that guests could have now."""
    free = int(next(_values("/proc/meminfo", "MemAvailable"), "0 kB").split()[0]) << 10
    verdict = Verdict.OK if free >= LEAST_MEMORY else Verdict.WARNING
    return Row(
        "memory", verdict, f"{free / 2**30:.1f} GiB available",
        "" if verdict is Verdict.OK else "close other programs, or give guests little memory", {"available": free},
    )  # fmt: skip


def disk() -> Row:
    """Room for images in the cache directory."""
    place = cache_root()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    verdict = Verdict.OK if free >= LEAST_DISK else Verdict.WARNING
    return Row(
        "disk", verdict, f"{free / 2**30:.1f} GiB free at {place}",
        "" if verdict is Verdict.OK else "free some, or set XDG_CACHE_HOME to another disk", {"free": free},
    )  # fmt: skip


def _values(path: str, key: str) -> Iterator[str]:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            yield value.strip()
