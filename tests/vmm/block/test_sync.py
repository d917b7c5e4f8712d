"""A host that could not write what it had taken: it says so once, and has forgotten it then."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmonty.base.errors import BlockError
from vmonty.vmm.block import file as block_file
from vmonty.vmm.block.file import HostFile
from vmonty.vmm.block.image import open_image
from vmonty.vmm.block.qcow2.header import DIRTY, FEATURES_AT

Make = Callable[..., Path]
Syncs = list[int | None]
SIZE = 1 << 20


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Syncs]:
    """What the next syncs of the host fail with; without an entry they are the host's."""
    results: Syncs = []
    real = os.fdatasync

    def sync(fd: int) -> None:
        if results and (number := results.pop(0)) is not None:
            raise OSError(number, os.strerror(number))
        real(fd)

    monkeypatch.setattr(block_file.os, "fdatasync", sync)
    yield results
    assert not results, "as many as that"


def fails(flush: Callable[[], None]) -> None:
    """Never with ENOSPC: what waited for room would come too late."""
    with pytest.raises(BlockError) as caught:
        flush()
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_raw_disk(tmp_path: Path, syncs: Syncs, number: int) -> None:
    (path := tmp_path / "disk").write_bytes(bytes(SIZE))
    disk = open_image(path, format="raw")
    disk.write(0, b"before")
    disk.flush()
    disk.write(0, b"after!")
    syncs.append(number)
    for _ in range(3):
        fails(disk.flush)
    disk.write(0, b"again!")
    fails(disk.flush)
    fails(disk.close)
    with open_image(path, format="raw") as opened:
        opened.flush()


@pytest.mark.parametrize("step", range(3))
def test_a_qcow2_disk(make: Make, syncs: Syncs, step: int) -> None:
    path = make(SIZE)
    disk = open_image(path)
    disk.write(0, b"data" * 1000)
    syncs.extend([None] * step + [errno.EIO])
    for _ in range(3):
        fails(disk.flush)
    fails(disk.close)
    if step:
        assert path.read_bytes()[79] & DIRTY
    open_image(path).close()
    assert not path.read_bytes()[79] & DIRTY


def test_a_mark_that_could_not_be_written_is_written_the_next_time(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(SIZE)
    write = HostFile.write
    failing = [True]

    def fail(self: HostFile, offset: int, data: bytes) -> None:
        if offset == FEATURES_AT and failing.pop():
            raise BlockError(errno.ENOSPC, "writing: No space left on device")
        write(self, offset, data)

    with open_image(path) as disk:
        disk.write(0, b"data" * 1000)
        with monkeypatch.context() as patched:
            patched.setattr(HostFile, "write", fail)
            with pytest.raises(BlockError, match="No space left"):
                disk.flush()
        disk.flush()
        assert path.read_bytes()[79] & DIRTY
    assert not path.read_bytes()[79] & DIRTY


def test_syncs_that_wait_for_the_same_writes_fail_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "disk").write_bytes(bytes(SIZE))
    file = HostFile(path, writable=True)
    began, go_on = threading.Event(), threading.Event()
    failed: list[int] = []
    calls: list[int] = []

    def sync(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            began.set()
            assert go_on.wait(30)
            raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(block_file.os, "fdatasync", sync)

    def flush() -> None:
        try:
            file.sync()
        except BlockError as error:
            failed.append(error.errno)

    threads = [threading.Thread(target=flush) for _ in range(3)]
    threads[0].start()
    assert began.wait(30)
    for thread in threads[1:]:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join()
    assert failed == [errno.EIO] * 3
    assert len(calls) == 1
    file.close()


def test_what_is_not_to_last_is_never_lost(tmp_path: Path, syncs: Syncs) -> None:
    (path := tmp_path / "disk").write_bytes(bytes(SIZE))
    file = HostFile(path, writable=True, durable=False)
    file.sync()
    file.close()
