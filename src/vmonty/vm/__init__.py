"""The Python API: ``vmonty.VM`` and what goes with it. Documented with examples in docs/python-api.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmonty.vm.console import ConsoleEnded, ConsoleTimeout
    from vmonty.vm.machine import VM, Event, State
    from vmonty.vm.settings import Settings
    from vmonty.vmm.inspection import StateError
    from vmonty.vmm.outcome import Ending, Outcome

__all__ = [
    "VM", "ConsoleEnded", "ConsoleTimeout", "Ending", "Event", "Outcome", "Settings", "State", "StateError",
]  # fmt: skip

# The command line, which shares this package, starts without what only the API needs: a control socket, pydantic.
_HOMES = {
    "VM": "vmonty.vm.machine", "Event": "vmonty.vm.machine", "State": "vmonty.vm.machine",
    "ConsoleEnded": "vmonty.vm.console", "ConsoleTimeout": "vmonty.vm.console", "Settings": "vmonty.vm.settings",
    "StateError": "vmonty.vmm.inspection", "Ending": "vmonty.vmm.outcome", "Outcome": "vmonty.vmm.outcome",
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vmonty.vm' has no attribute {name!r}")
