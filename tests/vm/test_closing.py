"""The end of a build: each disk is closed, whatever the others do."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from vmonty.base.errors import BlockError
from vmonty.vm.build import Build
from vmonty.vm.plan import Plan
from vmonty.vmm.hotplug import Addition, HotPlug


class Closable:
    """Notes that it was closed, and may fail then."""

    def __init__(self, name: str, closed: list[str], *, fails: bool) -> None:
        self._name, self._closed, self._fails = name, closed, fails

    def close(self) -> None:
        self._closed.append(self._name)
        if self._fails:
            raise BlockError(5, f"{self._name} does not close")


@pytest.fixture
def closable() -> Callable[..., Any]:
    closed: list[str] = []

    def made(name: str, *, fails: bool = False) -> Any:
        return Closable(name, closed, fails=fails)

    made.closed = closed  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("failing", ["disk1", "addition1", "disc0", "all"])
def test_all_are_closed_though_one_fails(closable: Any, failing: str) -> None:
    build = Build(Plan())
    names = [f"{kind}{number}" for kind in ("disk", "addition", "disc") for number in range(2)]
    made = {name: closable(name, fails=failing in (name, "all")) for name in names}
    build._disks += made["disk0"], made["disk1"]
    build._additions += (
        Addition(lambda machine, number: None, "disk", made[name].close) for name in ("addition0", "addition1")
    )
    build._trays += (SimpleNamespace(medium=made[name]) for name in ("disc0", "disc1"))  # type: ignore[misc]
    with pytest.raises(BlockError, match="disc0" if failing == "all" else failing):
        build.close()
    assert sorted(closable.closed) == sorted(names)
    build.close()
    assert len(closable.closed) == len(names), "a second call does nothing"


def test_additions_of_a_machine(closable: Any) -> None:
    made = [closable(f"{number}", fails=number == 0) for number in range(3)]
    with pytest.raises(BlockError):
        HotPlug._close_additions([Addition(lambda machine, number: None, "disk", one.close) for one in made])
    assert closable.closed == ["0", "1", "2"]
