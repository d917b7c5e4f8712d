"""The cache: nothing half-made or damaged is ever handed out."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmonty.base.cachedir import cache_root
from vmonty.base.errors import GuestError
from vmonty.guests.cache import Shelf


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    shelf = Shelf("images", root=tmp_path)
    put(shelf, b"contents")
    return shelf


def put(shelf: Shelf, data: bytes) -> None:
    with shelf.lock(), shelf.write("image", {"version": "1"}) as out:
        out.write(data)


def test_what_was_written_is_found(shelf: Shelf) -> None:
    artefact = shelf.get("image")
    assert artefact is not None
    assert artefact.path.read_bytes() == b"contents"
    assert artefact.notes == {"version": "1"}
    assert shelf.get("other") is None
    put(shelf, b"new")
    assert (artefact := shelf.get("image")) is not None
    assert artefact.path.read_bytes() == b"new"
    shelf.remove("image")
    assert shelf.get("image") is None
    assert not artefact.path.exists()


@pytest.mark.parametrize("damage", [b"content!", b"content", b"contents ", b""])
def test_damage_is_noticed(shelf: Shelf, damage: bytes) -> None:
    (shelf.directory / "image").write_bytes(damage)
    assert shelf.get("image") is None


def test_missing_file_is_noticed(shelf: Shelf) -> None:
    (shelf.directory / "image").unlink()
    assert shelf.get("image") is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=80)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["format", "artefacts", "image", "size", "sha256", "notes"]), inner)
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_damaged_manifest_is_an_empty_one(shelf: Shelf, manifest: bytes) -> None:
    (shelf.directory / "manifest.json").write_bytes(manifest)
    assert shelf.get("image") is None


def test_interrupted_write_leaves_the_old_artefact(shelf: Shelf) -> None:
    def interrupted() -> None:
        with shelf.write("image") as out:
            out.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (artefact := shelf.get("image")) is not None
    assert artefact.path.read_bytes() == b"contents"
    assert sorted(os.listdir(shelf.directory)) == ["image", "lock", "manifest.json"]


def test_leftovers_of_a_killed_builder_are_swept(shelf: Shelf) -> None:
    leftover = shelf.directory / ".image.abc.partial"
    leftover.touch()
    with shelf.lock():
        assert not leftover.exists()


def test_second_builder_waits_and_says_so(shelf: Shelf) -> None:
    phases: list[str] = []
    said = threading.Event()
    order: list[str] = []

    def report(phase: str, done: int, total: int, /) -> None:
        phases.append(phase)
        said.set()

    def second() -> None:
        with shelf.lock(report):
            order.append("second")

    with shelf.lock():
        thread = threading.Thread(target=second)
        thread.start()
        assert said.wait(30)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]
    assert "waiting for another build" in phases[0]


@pytest.mark.parametrize("name", ["lock", "manifest.json", "../up", "a/b", ".hidden", ""])
def test_unfit_names_are_refused(shelf: Shelf, name: str) -> None:
    with pytest.raises(ValueError, match="artefact"), shelf.write(name):
        pass


def test_unwritable_cache_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    shelf = Shelf("images", root=tmp_path / "file")
    with pytest.raises(GuestError, match="set XDG_CACHE_HOME"), shelf.lock():
        pass


def test_full_disk_is_one_clear_line(shelf: Shelf) -> None:
    with pytest.raises(GuestError, match="No space left"), shelf.write("image"):
        raise OSError(28, "No space left on device")


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/elsewhere")
    assert cache_root() == Path("/var/elsewhere/vmonty")
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_root() == tmp_path / ".cache" / "vmonty"
