"""SMBIOS, walked as DMI readers walk it."""

from __future__ import annotations

import struct
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.vmm.boot import smbios
from vmonty.vmm.boot.smbios import Identity

GIB = 1 << 30


def walk(structures: bytes) -> list[tuple[int, int, bytes, list[bytes]]]:
    """(type, handle, formatted area, strings) of each structure."""
    found, at = [], 0
    while at < len(structures):
        kind, length, handle = struct.unpack_from("<BBH", structures, at)
        end = structures.index(b"\0\0", at + length)
        strings = structures[at + length : end].split(b"\0") if end > at + length else []
        found.append((kind, handle, structures[at : at + length], strings))
        at = end + 2
    assert at == len(structures)
    return found


LENGTHS = {0: 0x18, 1: 0x1B, 3: 0x16, 4: 0x2A, 16: 0x17, 17: 0x28, 19: 0x1F, 32: 0x0B, 127: 4}


def test_every_structure_has_the_specifications_length() -> None:
    made, count = smbios.tables(Identity(), 2, [(0, 3 * GIB), (4 * GIB, GIB)])
    found = walk(made)
    assert [kind for kind, *_ in found] == [0, 1, 3, 4, 4, 16, 17, 19, 19, 32, 127]
    assert len(found) == count
    assert {kind: len(area) for kind, _, area, _ in found} == LENGTHS
    assert len({handle for _, handle, *_ in found}) == count, "handles are unique"


def test_the_system_is_the_owners() -> None:
    uuid = UUID("00112233-4455-6677-8899-aabbccddeeff")
    made, _ = smbios.tables(Identity("Acme", "q35", "", "S/N 1", uuid), 1, [(0, GIB)])
    _, _, area, strings = walk(made)[1]
    assert strings == [b"Acme", b"q35", b"S/N 1"]
    assert tuple(area[4:8]) == (1, 2, 0, 3), "a version that is empty has no string"
    assert area[8:24].hex() == "33221100554477668899aabbccddeeff"


@pytest.mark.parametrize("size", [64 << 20, 32 * GIB, 3 << 40])
def test_memory_of_any_size(size: int) -> None:
    found = {kind: area for kind, _, area, _ in walk(smbios.tables(Identity(), 1, [(0, size)])[0])}
    (small,) = struct.unpack_from("<H", found[17], 0x0C)
    (extended,) = struct.unpack_from("<I", found[17], 0x1C)
    assert (extended if small == 0x7FFF else small) << 20 == size
    (capacity,) = struct.unpack_from("<I", found[16], 7)
    (large,) = struct.unpack_from("<Q", found[16], 0x0F)
    assert (large if capacity == 0x8000_0000 else capacity << 10) == size


@given(st.integers(1, 255), st.text(max_size=40), st.text(max_size=40))
def test_the_anchor(cpus: int, maker: str, product: str) -> None:
    made, count = smbios.tables(Identity(maker, product), cpus, [(0, GIB)])
    anchor = smbios.anchor(made, count, 0xF_0020)
    assert len(anchor) == smbios.ANCHOR_SIZE == anchor[5]
    assert anchor[:4] == b"_SM_"
    assert anchor[16:21] == b"_DMI_"
    assert sum(anchor) & 0xFF == 0
    assert sum(anchor[16:]) & 0xFF == 0
    length, address, structures = struct.unpack_from("<HIH", anchor, 22)
    assert (length, address, structures) == (len(made), 0xF_0020, count)
    largest = max(len(area) + max(sum(len(s) + 1 for s in strings) + 1, 2) for _, _, area, strings in walk(made))
    assert struct.unpack_from("<H", anchor, 8)[0] == largest
