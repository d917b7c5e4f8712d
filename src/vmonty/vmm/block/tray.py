"""What lies in a drive for removable media; it outlives the machine, as a disc outlives a reset."""

from __future__ import annotations

from vmonty.base.record import Record
from vmonty.vmm.block.device import BlockDevice


class Tray(Record):
    """The tray holds *medium*, from the file *name*, or nothing; while it is *open* the drive cannot read it."""

    medium: BlockDevice | None = None
    open: bool = False
    name: str = ""

    @property
    def readable(self) -> BlockDevice | None:
        """What the drive reads."""
        return None if self.open else self.medium
