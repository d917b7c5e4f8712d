"""Disks: image formats behind one interface. ``open_image()`` opens a file, ``BlockDevice`` is what it gives."""

from vmonty.vmm.block.device import BlockDevice
from vmonty.vmm.block.image import open_image

__all__ = ["BlockDevice", "open_image"]
