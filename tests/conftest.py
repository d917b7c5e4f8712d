"""Options of the whole suite."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from vmonty.guests.busybox import Guest

# A loaded host may take long for an example; that is no failure. The examples are the same each time, so that a red run
# says something of the change; with VMONTY_RANDOM others are looked for.
hypothesis.settings.register_profile("vmonty", deadline=None, derandomize="VMONTY_RANDOM" not in os.environ)
hypothesis.settings.load_profile("vmonty")


@pytest.fixture(scope="session")
def busybox_guest() -> Guest:
    """The guest of busybox; a skip where this host lacks what it is built of."""
    from vmonty.base.errors import GuestError  # a suite that has no guest must not need them
    from vmonty.guests import busybox

    try:
        return busybox.build()
    except GuestError as error:
        pytest.skip(f"the busybox guest cannot be built here: {error}")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vmonty")
    group.addoption(
        "--provider",
        metavar="NAME",
        default=None,
        help="the KVM under test: linux, soft, soft-svm, soft-vmx-shadow, soft-svm-shadow, soft-vmx-restricted;"
        " by default linux and soft",
    )
    group.addoption(
        "--vcpus",
        type=int,
        choices=(1, 2),
        default=1,
        help="2: a second vCPU runs beside that of each test of the ABI suite that has one of the fixtures'",
    )
    group.addoption(
        "--try-known-gaps",
        action="store_true",
        help="run also the tests that the KVM under test is known to fail, to see whether it still does",
    )
    group.addoption(
        "--rom", metavar="FILE,PORT", default=None, help="a BIOS ROM image to run, and the port of its POST codes"
    )
    group.addoption(
        "--kvm-headers",
        metavar="DIR",
        action="append",
        default=[],
        help="an include directory with kernel headers to compare the ABI with, before the system's (repeatable)",
    )
