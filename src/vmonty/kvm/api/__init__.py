"""The typed surface over the KVM ABI: System → Vm → Vcpu, Device. The only door that vmm uses.

    with kvm.open("linux") as system, system.create_vm() as vm:
        vm.set_user_memory_region(0, 0, Ram(1 << 20))
        with vm.create_vcpu() as vcpu:
            while (reason := vcpu.run()) is not Exit.HLT: ...

Whatever has no method here has the raw door: ``handle.ioctl(request, argument)``.
"""

from vmonty.kvm.api.device import Device
from vmonty.kvm.api.handle import Handle
from vmonty.kvm.api.lists import CpuidEntry
from vmonty.kvm.api.port_window import PortCell, PortWindow
from vmonty.kvm.api.provider import Provider
from vmonty.kvm.api.stats import Stats
from vmonty.kvm.api.system import System
from vmonty.kvm.api.vcpu import Vcpu
from vmonty.kvm.api.vm import Vm

__all__ = ["CpuidEntry", "Device", "Handle", "PortCell", "PortWindow", "Provider", "Stats", "System", "Vcpu", "Vm"]
