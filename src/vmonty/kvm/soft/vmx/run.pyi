from vmonty.cpu.vmx import Vmx
from vmonty.kvm.soft.vcpu_arch import VcpuArch

def enter(vmx: Vmx, arch: VcpuArch) -> int: ...
