"""docs/python-api.md: its examples run, its table of settings is complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vmonty.vm import Event
from vmonty.vm.settings import Settings, UserNetwork

TEXT = (Path(__file__).parents[2] / "docs" / "python-api.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.usefixtures("busybox_guest")
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, example in enumerate(EXAMPLES):
        exec(compile(example, f"docs/python-api.md, example {number + 1}", "exec"), names)
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("field", [*Settings.model_fields])
def test_every_setting_is_in_the_table(field: str) -> None:
    assert re.search(rf"^\| .*`{field}`.* \|.*\|.*\|$", TEXT, re.MULTILINE)


@pytest.mark.parametrize("name", [*(event.value for event in Event), *UserNetwork.model_fields])
def test_events_and_network_options_are_named(name: str) -> None:
    assert name in {"type", "mac"} or f"`{name}" in TEXT
