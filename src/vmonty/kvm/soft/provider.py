"""The provider ``soft``: a table of file descriptors, each a real one with a KvmFile behind it."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmonty.base import hostcall
from vmonty.base.errors import KvmUnavailable
from vmonty.cpu import core
from vmonty.kvm.soft import modules
from vmonty.kvm.soft.files import KvmFile, anon_inode_getfd
from vmonty.kvm.soft.insight import Tracer, Translation, translate
from vmonty.kvm.soft.kvm_main import Kvm, KvmDevice, KvmVcpuFile
from vmonty.kvm.soft.port_window import PortCell, PortWindow

if TYPE_CHECKING:
    from typing_extensions import Buffer


class SoftKvm:
    """KVM in software, on the processor of vmonty.cpu."""

    name = "soft"
    # The vendor module that it insists on, with parameters; None: whichever is loaded.
    module: str | None = None

    def __init__(self) -> None:
        self._files: dict[int, KvmFile] = {}
        self._lock = threading.Lock()

    def open(self) -> int:
        """A new system file. Loads kvm_intel when no vendor module is; see modules.load()."""
        try:
            device = KvmDevice(self.install, modules.request(self.module))
            fd = anon_inode_getfd(device, "kvm", self.install)
        except RuntimeError as error:
            raise KvmUnavailable(errno.ENODEV, "open the software KVM", str(error)) from error
        except KvmUnavailable:
            raise
        except OSError as error:
            raise KvmUnavailable(error.errno or errno.EIO, "open the software KVM", error.strerror or "") from error
        hostcall.install_kick()
        return fd

    def install(self, file: KvmFile, fd: int) -> None:
        """fd_install(): *fd*, which nobody has yet, leads to *file*."""
        with self._lock:
            self._files[fd] = file

    def ioctl(self, fd: int, request: int, argument: int | Buffer | None) -> int:
        """One request; see Provider.ioctl."""
        file = self._files.get(fd)
        if file is None:
            return -errno.ENOTTY if _is_open(fd) else -errno.EBADF
        try:
            return file.ioctl(request & 0xFFFF_FFFF, argument)
        except OSError as error:
            return -(error.errno or errno.EIO)
        except MemoryError:
            return -errno.ENOMEM

    def vcpu_entry(self, fd: int) -> Callable[[], int]:
        """What ioctl() does for KVM_RUN of the vCPU behind *fd*, as long as that is open."""
        file = self._files[fd]
        assert isinstance(file, KvmVcpuFile)
        once = file.enter

        def enter() -> int:
            try:
                return once()
            except OSError as error:
                return -(error.errno or errno.EIO)
            except MemoryError:
                return -errno.ENOMEM

        return enter

    def mmap(self, fd: int, size: int, offset: int = 0) -> memoryview:
        """Map the memfd that the descriptor is: for a vCPU its kvm_run and rings."""
        mapping = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
        file = self._files.get(fd)
        if isinstance(file, KvmVcpuFile) and offset == 0:
            file.overlay_ring(hostcall.address_of(mapping), size)
        return memoryview(mapping)

    def close(self, fd: int) -> None:
        """Close the descriptor; what is behind it goes with its last one."""
        with self._lock:
            file = self._files.pop(fd, None)
        os.close(fd)
        if file is not None:
            file.release()

    def kick(self, thread: int) -> None:
        """What a signal does to a thread in KVM_RUN."""
        KvmVcpuFile.signal(thread)

    def memory_written(self, address: int, size: int) -> None:
        """Have all processors forget their translations of what lies there."""
        core.memory_written(address, size)

    def signal_irqfd(self, fd: int, eventfd: int) -> bool:
        """Raise the GSI of the VM behind *fd* that *eventfd* stands for, without the thread that waits for it."""
        vm = self._files[fd]
        assert isinstance(vm, Kvm)
        return vm.irqfds.signal(eventfd)

    def ring_at_once(self, fd: int, eventfd: int, at_once: Callable[[], bool]) -> None:
        """Have writes that would signal *eventfd* call *at_once* on the vCPU's thread, and signal if that is False."""
        vm = self._files[fd]
        assert isinstance(vm, Kvm)
        vm.ioeventfds.ring_at_once(eventfd, at_once)

    def port_window(self, fd: int, first: int) -> PortWindow | None:
        """Ports of the VM behind *fd* that it answers for; None when it has such a window already."""
        vm = self._files[fd]
        assert isinstance(vm, Kvm)
        window = PortWindow(first)
        return window if vm.irqs.arch.set_window(window) else None

    def port_cell(self, fd: int, port: int, size: int, value: int, mask: int) -> PortCell | None:
        """A port of the VM behind *fd* that is memory; None when it has as many as there can be."""
        vm = self._files[fd]
        assert isinstance(vm, Kvm)
        cell = PortCell(port, size, value, mask)
        return cell if vm.irqs.arch.add_cell(cell) else None

    def memory_unmapped(self, address: int, size: int) -> None:
        """The MMU notifiers of all VMs: call it before the memory goes away or becomes something else."""
        if (module := modules.loaded()) is not None:
            for vm in list(module.vm_list):
                vm.invalidate_range(address, address + size)

    # ---- what no ioctl tells ---------------------------------------------------------------------------------

    def trace(self, fd: int, tracer: Tracer | None) -> None:
        """Have *tracer* called, on the vCPU's thread, with each exit of the VM behind *fd*; None: no more."""
        vm = self._files[fd]
        assert isinstance(vm, Kvm)
        vm.tracer = tracer
        for vcpu in list(vm.vcpus.values()):
            vcpu.vendor.kick()

    def dump_control_block(self, fd: int) -> dict[str, int]:
        """The VMCS or VMCB of the vCPU behind *fd*, by field name; what the guest changed, as of its last exit."""
        vcpu = self._files[fd]
        assert isinstance(vcpu, KvmVcpuFile)
        return vcpu.vendor.dump()

    def translate(self, fd: int, gva: int) -> Translation:
        """Every step from a guest-virtual address of the vCPU behind *fd* to a host-physical one.

        Waits until the vCPU does not run.
        """
        vcpu = self._files[fd]
        assert isinstance(vcpu, KvmVcpuFile)
        with vcpu.mutex:
            vcpu.vcpu_load(brief=True)
            try:
                return translate(vcpu.kvm, vcpu, gva)
            finally:
                vcpu.vcpu_put()

    def remedy(self, error: int, call: str) -> str:
        """Name the cure for errors that have one."""
        if error == errno.ENOTTY:
            return "the software KVM does not know the request"
        return ""


class SoftSvm(SoftKvm):
    """The same on SVM with nested page tables."""

    name = "soft-svm"
    module = "kvm_amd"


class SoftSvmShadow(SoftKvm):
    """SVM with shadow page tables."""

    name = "soft-svm-shadow"
    module = "kvm_amd npt=0"


class SoftVmxRestricted(SoftKvm):
    """VMX with EPT, on which real mode is virtual-8086 mode."""

    name = "soft-vmx-restricted"
    module = "kvm_intel unrestricted_guest=0"


class SoftVmxShadow(SoftKvm):
    """VMX with shadow page tables."""

    name = "soft-vmx-shadow"
    module = "kvm_intel ept=0"


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
