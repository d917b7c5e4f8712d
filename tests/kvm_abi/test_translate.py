"""KVM_TRANSLATE: guest-virtual to guest-physical. Source: api.rst, KVM_TRANSLATE."""

from __future__ import annotations

import pytest

from vmonty.testing.guests import CODE, PML4, Mode, TinyGuest


@pytest.mark.parametrize("mode", [Mode.REAL, Mode.PROTECTED], ids=lambda mode: mode.value)
def test_without_paging_it_is_the_identity(guest: TinyGuest, mode: Mode) -> None:
    guest.load(mode, "hlt")
    translation = guest.vcpu.translate(0x12345)
    assert (translation.valid, translation.physical_address) == (1, 0x12345)


@pytest.mark.parametrize("mode", [Mode.LONG, Mode.USER], ids=lambda mode: mode.value)
def test_page_tables_are_walked(guest: TinyGuest, mode: Mode) -> None:
    """A mapping that is not the identity: the second GiB's first 2 MiB lead to physical 0."""
    guest.load(mode, "hlt")
    guest.ram.write_u64(PML4 + 0x3000, 0x87)
    translation = guest.vcpu.translate(0x40000000 + CODE + 5)
    assert (translation.valid, translation.physical_address) == (1, CODE + 5)


def test_not_mapped(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, "hlt")
    assert guest.vcpu.translate(0x7F0000000000).valid == 0


def test_follows_changes_of_the_tables(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, "hlt")
    assert guest.vcpu.translate(0x40000000).physical_address == 0x40000000
    guest.ram.write_u64(PML4 + 0x3000, 0)
    assert guest.vcpu.translate(0x40000000).valid == 0
