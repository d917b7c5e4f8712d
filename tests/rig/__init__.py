"""A rig with an ordinary kvm-amd: QEMU's TCG emulates SVM, so Linux's own KVM can be tested anywhere.

Debian's cloud kernel boots with the interpreter that runs this, its packages and our tree in an initramfs,
loads ``kvm.ko`` and ``kvm-amd.ko`` and runs one command. From the shell: ``python -m tests.rig --help``.
"""

from __future__ import annotations

from .machine import TIMEOUT_STATUS, Rig, RigError, RigResult

__all__ = ["TIMEOUT_STATUS", "Rig", "RigError", "RigResult"]
