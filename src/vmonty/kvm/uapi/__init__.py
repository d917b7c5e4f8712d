"""The KVM ABI, declared: requests, structs, capabilities, exit reasons and flags of linux/kvm.h for x86.

One module per subject; the names are the headers'. A test compiles a C program against the system's
headers and compares every size, offset and number.
"""

from vmonty.kvm.uapi.caps import Cap
from vmonty.kvm.uapi.exits import Exit
from vmonty.kvm.uapi.ioctls import Ioctl, Requests

__all__ = ["Cap", "Exit", "Ioctl", "Requests"]
