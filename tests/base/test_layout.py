"""Declared layouts are C's: alignment, arrays, bit fields, nesting, flexible arrays."""

from __future__ import annotations

import ctypes

import pytest

from vmonty.base.layout import (
    Array,
    Structure,
    Union,
    array,
    bits,
    flexible,
    i8,
    i16,
    i32,
    i64,
    layout,
    u8,
    u8s,
    u16,
    u32,
    u64,
    u64s,
)


@layout
class Inner(Structure):
    small: u8
    large: u32


@layout
class Choice(Union):
    number: u64
    inner: Inner
    raw: u8s = array(16)


@layout
class Outer(Structure):
    _anonymous_ = ("choice",)
    tag: u16
    choice: Choice
    many: Array[Inner] = array(3)
    grid: Array[u8s] = array(2, 5)
    end: i64


@layout
class Flags(Structure):
    vector: u8
    mode: u8 = bits(3)
    level: u8 = bits(1)
    rest: u8 = bits(4)
    after: u16


@layout
class Listed(Structure):
    count: u32
    items: u64s = array(0)


@layout
class ListedInner(Structure):
    count: u32
    items: Array[Inner] = array(0)


def test_alignment() -> None:
    assert (ctypes.sizeof(Inner), Inner.large.offset) == (8, 4)
    assert (Outer.choice.offset, Outer.many.offset, Outer.grid.offset, Outer.end.offset) == (8, 24, 48, 64)
    assert ctypes.sizeof(Outer) == 72


@pytest.mark.parametrize(
    ("kind", "size"), [(u8, 1), (u16, 2), (u32, 4), (u64, 8), (i8, 1), (i16, 2), (i32, 4), (i64, 8)]
)
def test_scalars(kind: object, size: int) -> None:
    cls = layout(type("One", (Structure,), {"__annotations__": {"value": kind}}))
    assert ctypes.sizeof(cls) == size


def test_signs() -> None:
    outer = Outer(end=-1)
    assert outer.end == -1
    outer.tag = 0x1FFFF
    assert outer.tag == 0xFFFF, "unsigned fields wrap"


def test_arrays() -> None:
    outer = Outer()
    outer.many[2].large = 7
    outer.grid[1][4] = 9
    raw = bytes(outer)
    assert raw[24 + 2 * 8 + 4] == 7
    assert raw[48 + 1 * 5 + 4] == 9
    assert (len(outer.many), len(outer.grid), len(outer.grid[0])) == (3, 2, 5)
    with pytest.raises(IndexError):
        outer.many[3]


def test_union_members_share_their_bytes() -> None:
    outer = Outer()
    outer.choice.inner.large = 0x11223344
    assert outer.choice.number == 0x1122334400000000
    assert outer.number == outer.choice.number, "anonymous: its members are the outer's"


def test_bit_fields() -> None:
    flags = Flags(vector=1, mode=5, level=1, rest=0xA, after=2)
    assert bytes(flags) == bytes([1, 5 | 1 << 3 | 0xA << 4, 2, 0])
    flags.mode = 0xF
    assert (flags.mode, flags.level) == (7, 1), "no bit spills over"


def test_flexible_array() -> None:
    assert ctypes.sizeof(Listed) == 8
    listed = flexible(Listed, 3)(count=3)
    listed.items[:] = [1, 2, 3]
    assert bytes(listed) == b"".join(n.to_bytes(8, "little") for n in (3, 1, 2, 3))
    assert flexible(Listed, 3) is flexible(Listed, 3)
    assert len(flexible(ListedInner, 2)().items) == 2
    assert ctypes.sizeof(flexible(Listed, 0)) == ctypes.sizeof(Listed)


def test_flexible_needs_a_flexible_array() -> None:
    with pytest.raises(TypeError, match="Inner"):
        flexible(Inner, 2)


def test_fields_keep_their_order() -> None:
    assert [name for name, *_ in Outer._fields_] == ["tag", "choice", "many", "grid", "end"]


def test_a_default_is_no_declaration() -> None:
    with pytest.raises(TypeError, match=r"Wrong\.value: 5"):
        layout(type("Wrong", (Structure,), {"__annotations__": {"value": u8}, "value": 5}))


def test_an_annotation_must_be_a_c_type() -> None:
    with pytest.raises(TypeError):
        layout(type("Wrong", (Structure,), {"__annotations__": {"value": str}}))
