from vmonty.cpu.svm import Svm
from vmonty.kvm.soft.vcpu_arch import VcpuArch

def enter(svm: Svm, vmcb: int, arch: VcpuArch) -> int: ...
