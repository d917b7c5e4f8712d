from typing import Final

from vmonty.kvm.soft.vcpu_arch import VcpuArch

REFUSED: Final = 0
EXITED: Final = 1
USER_EXIT: Final = 2
USER_EXIT_AND_MORE: Final = 3

def reenter(arch: VcpuArch, thread: int) -> int: ...
