"""What a test expects when KVM refuses."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator

import pytest

from vmonty.base.errors import KvmError


def outcome(call: Callable[[], object], *codes: int) -> int:
    """0 when *call* works, else its errno, which must be one of *codes*."""
    try:
        call()
    except KvmError as error:
        number = error.errno or 0
    else:
        number = 0
    if number not in (0, *codes):
        raise AssertionError(f"{errno.errorcode[number]} is none of {[errno.errorcode[code] for code in codes]}")
    return number


@contextlib.contextmanager
def refused(*codes: int) -> Iterator[None]:
    """The block must raise KvmError with one of these errnos (several where kernels differ)."""
    with pytest.raises(KvmError) as caught:
        yield
    names = [errno.errorcode[code] for code in codes]
    got = errno.errorcode.get(caught.value.errno or 0, str(caught.value.errno))
    assert got in names, f"{caught.value} is {got}, not {' or '.join(names)}"
    assert caught.value.call.startswith("KVM_"), "the error must name the request"
