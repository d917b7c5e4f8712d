"""What a test expects when KVM refuses."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import pytest

from vmonty.base.errors import KvmError


@contextlib.contextmanager
def refused(*codes: int) -> Iterator[None]:
    """The block must raise KvmError with one of these errnos (several where kernels differ)."""
    with pytest.raises(KvmError) as caught:
        yield
    names = [errno.errorcode[code] for code in codes]
    got = errno.errorcode.get(caught.value.errno or 0, str(caught.value.errno))
    assert got in names, f"{caught.value} is {got}, not {' or '.join(names)}"
    assert caught.value.call.startswith("KVM_"), "the error must name the request"
