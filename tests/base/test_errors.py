"""The exception tree: what is caught by what, and what a user reads."""

from __future__ import annotations

import errno
import inspect
import os

import pytest

from vmonty.base import errors

TREE = {
    "VmontyError": (Exception,),
    "UsageError": (errors.VmontyError,),
    "BootImageError": (errors.UsageError,),
    "GuestError": (errors.VmontyError,),
    "GuestMemoryError": (errors.VmontyError, IndexError),
    "HandleClosed": (errors.VmontyError, ValueError),
    "KvmError": (errors.VmontyError, OSError),
    "KvmUnavailable": (errors.KvmError,),
    "KvmUnsupported": (errors.KvmError,),
}


@pytest.mark.parametrize("name", TREE)
def test_tree(name: str) -> None:
    for base in TREE[name]:
        assert issubclass(getattr(errors, name), base)


def test_tree_in_the_documentation_is_complete() -> None:
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert TREE.keys() <= defined
    assert defined == {name for name in defined if name in (errors.__doc__ or "")}


@pytest.mark.parametrize("kind", [errors.KvmError, errors.KvmUnavailable, errors.KvmUnsupported])
def test_kvm_error(kind: type[errors.KvmError]) -> None:
    """It carries errno, the call and the cure, and is one line."""
    error = kind(errno.EACCES, "open /dev/kvm", "join the group")
    assert (error.errno, error.call, error.remedy) == (errno.EACCES, "open /dev/kvm", "join the group")
    assert str(error) == f"open /dev/kvm: {os.strerror(errno.EACCES)}; join the group"
    assert str(kind(errno.EINVAL, "KVM_RUN")) == f"KVM_RUN: {os.strerror(errno.EINVAL)}"


def test_errno_does_not_change_the_class() -> None:
    """OSError would make a FileNotFoundError of ENOENT."""
    assert type(errors.KvmError(errno.ENOENT, "KVM_IOEVENTFD")) is errors.KvmError


def test_guest_memory_error() -> None:
    error = errors.GuestMemoryError(0x1000, 8, "RAM of 0x1000 bytes")
    assert str(error) == "guest memory access of 8 bytes at 0x1000 is outside RAM of 0x1000 bytes"
    assert (error.address, error.size) == (0x1000, 8)
