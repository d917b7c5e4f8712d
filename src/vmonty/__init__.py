"""The full virtual machine, in Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmonty.vm import VM as VM

__version__ = "0.1.0"
__all__ = ["VM", "__version__"]


def __getattr__(name: str) -> object:
    # Only who asks for it pays for the machine's imports.
    if name == "VM":
        from vmonty.vm import VM

        return VM
    raise AttributeError(f"module 'vmonty' has no attribute {name!r}")
