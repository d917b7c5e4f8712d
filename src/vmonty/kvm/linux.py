"""Linux's KVM: /dev/kvm by ioctl and mmap."""

from __future__ import annotations

import errno
import mmap
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from vmonty.base import hostcall
from vmonty.base.errors import KvmUnavailable

if TYPE_CHECKING:
    from typing_extensions import Buffer

DEVICE = "/dev/kvm"


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The feature flags that the host's kernel shows for its first processor."""
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def vendor_module(modules: Path = Path("/sys/module")) -> str | None:
    """Which module serves /dev/kvm: kvm_intel, kvm_amd, another kvm_*, or None when none shows itself."""
    loaded = sorted(entry.name for entry in modules.glob("kvm_*"))
    for name in ("kvm_intel", "kvm_amd"):
        if name in loaded:
            return name
    return loaded[0] if loaded else None


class LinuxKvm:
    """The provider ``linux``: a KVM that the host's kernel offers at *device*."""

    name = "linux"

    def __init__(self, device: str = DEVICE) -> None:
        self.device = device

    def open(self) -> int:
        """Open the device. Raises KvmUnavailable: no device, no permission, module missing, busy."""
        try:
            fd = os.open(self.device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            code = error.errno or errno.EIO
            raise KvmUnavailable(code, f"open {self.device}", self.remedy(code, "open")) from error
        hostcall.install_kick()
        return fd

    def ioctl(self, fd: int, request: int, argument: int | Buffer | None) -> int:
        """One ioctl(2); see Provider.ioctl."""
        return hostcall.ioctl(fd, request, argument)

    def mmap(self, fd: int, size: int, offset: int = 0) -> memoryview:
        """mmap(2) of *fd*, shared; it is unmapped when the last view of it goes."""
        return memoryview(mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset))

    def close(self, fd: int) -> None:
        """close(2)."""
        os.close(fd)

    def kick(self, thread: int) -> None:
        """Send the kick signal, whose handler does nothing, to the thread: KVM_RUN ends with EINTR."""
        signal.pthread_kill(thread, hostcall.KICK_SIGNAL)

    def memory_written(self, address: int, size: int) -> None:
        """Nothing to do: a processor sees writes to the code that it runs."""

    def remedy(self, error: int, call: str) -> str:
        """Name the cure for errors that have one."""
        if call == "open":
            return self._open_remedy(error)
        match error:
            case errno.EBUSY if call == "KVM_CREATE_VM":
                return "another hypervisor holds the processor's virtualization (VirtualBox, VMware …); stop it"
            case errno.ENOTTY:
                return "this KVM does not know the request; a newer kernel may"
            case errno.ENOMEM:
                return "the host is out of memory; give the VM less, or free some"
            case _:
                return ""

    def _open_remedy(self, error: int) -> str:
        match error:
            case errno.EACCES | errno.EPERM:
                return (
                    "you may not open it: add yourself to its group (sudo usermod -aG kvm $USER, then log in again),"
                    f" or chmod 666 {self.device}"
                )
            case errno.ENOENT | errno.ENXIO | errno.ENODEV:
                flags = cpu_flags()
                module = "kvm_intel" if "vmx" in flags else "kvm_amd" if "svm" in flags else None
                if module is None:
                    return (
                        "this processor shows no virtualization (no vmx or svm flag: it is off in the firmware,"
                        " or this is a VM without nesting)"
                    )
                return f"load the module: sudo modprobe {module}"
            case errno.EBUSY:
                return "another hypervisor holds it; stop that first"
            case _:
                return ""
