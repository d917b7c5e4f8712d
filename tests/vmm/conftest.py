"""Machines: on a fake KVM, whose guests are Python, and on every KVM that this host has."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator

import pytest

from vmonty import kvm
from vmonty.base.errors import KvmUnavailable
from vmonty.kvm.api import System
from vmonty.vmm.accel import ACCELERATORS

from . import kernels

# Every wait of a test ends after this time, and fails it.
LIMIT_S = 30.0


class Screen:
    """What a guest printed; ``wait_for`` returns when it has come."""

    def __init__(self) -> None:
        self.text = bytearray()
        self._more = threading.Condition()

    def write(self, data: bytes) -> None:
        with self._more:
            self.text += data
            self._more.notify_all()

    def wait_until(self, holds: Callable[[bytes], bool], limit_s: float) -> bool:
        """Whether *holds* became true of the text in time."""
        with self._more:
            return self._more.wait_for(lambda: holds(bytes(self.text)), limit_s)

    def wait_for(self, text: bytes, limit_s: float = LIMIT_S) -> None:
        with self._more:
            assert self._more.wait_for(lambda: text in self.text, limit_s), f"{text!r} never came: {bytes(self.text)!r}"


@pytest.fixture
def screen() -> Screen:
    return Screen()


@pytest.fixture(params=sorted(ACCELERATORS))
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    """Each KVM that machines may run on; what this host lacks is a skip."""
    if shutil.which("nasm") is None:
        pytest.skip("nasm is not on this host: apt-get install nasm")
    try:
        opened = kvm.open(ACCELERATORS[request.param])
    except KvmUnavailable as error:
        pytest.skip(f"accelerator {request.param}: {error}")
    with opened:
        yield opened


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """A machine that is closed leaves no thread."""
    before = set(threading.enumerate())
    yield
    left = {thread for thread in threading.enumerate() if thread.name.startswith(("CPU", "console"))} - before
    assert not left


@pytest.fixture(scope="session")
def image() -> bytes:
    """A kernel that is sound and does nothing."""
    return kernels.bzimage(b"\xf4\xeb\xfd")
