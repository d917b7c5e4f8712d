"""Drives whose media are changed while the guest runs, by name: ``cd0`` is the first CD-ROM drive."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from vmonty.base.errors import UsageError
from vmonty.vmm.block.device import BlockDevice


class Drive(Protocol):
    """What a drive can do with a medium; called while it carries no command out."""

    @property
    def locked(self) -> bool:
        """Does the guest keep the tray shut?"""
        ...

    def change(self, medium: BlockDevice | None) -> None:
        """Another medium, or none."""
        ...

    def request_eject(self) -> None:
        """Press its button: the guest may give the medium up."""
        ...


class Removable(NamedTuple):
    """A drive, and how to call something while it carries no command out."""

    drive: Drive
    exclusively: Callable[[Callable[[], None]], None]

    def change(self, name: str, medium: BlockDevice | None, *, force: bool = False) -> None:
        """Put *medium*, or nothing, into the drive *name*.

        Raises UsageError when the guest has locked the tray, unless *force*: it is asked to give the medium up then.
        """

        def act() -> None:
            if self.drive.locked and not force:
                self.drive.request_eject()
                raise UsageError(
                    f"the guest uses the medium in {name} and has locked its tray; "
                    "it was asked to give it up: try again, or use force"
                )
            self.drive.change(medium)

        self.exclusively(act)


def find(drives: Mapping[str, Removable], name: str) -> Removable:
    """The drive *name*. Raises UsageError when there is none."""
    if name not in drives:
        known = ", ".join(sorted(drives)) or "none"
        raise UsageError(f"there is no drive {name!r} for media; there are: {known}")
    return drives[name]
