"""Declared binary layouts: C structs as annotated Python classes.

    @layout
    class kvm_msr_filter_range(Structure):
        flags: u32
        nmsrs: u32
        base: u32
        bitmap: u64

An annotation is a scalar of this module or another layout (nested); ``name: u8s = array(3)`` is an array,
``name: u8 = bits(3)`` a bit field. A last field ``= array(0)`` is a C flexible array: ``flexible(cls, n)`` is
the same layout with n elements. Layouts follow the x86-64 System V ABI.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import typing
from ctypes import Array, Structure, Union
from typing import Annotated, Any, NamedTuple, TypeVar

__all__ = [
    "Array", "Structure", "Union", "array", "bits", "flexible", "i8", "i8s", "i16", "i32", "i64", "layout",
    "u8", "u8s", "u16", "u16s", "u32", "u32s", "u64", "u64s",
]  # fmt: skip

u8 = Annotated[int, ctypes.c_uint8]
u16 = Annotated[int, ctypes.c_uint16]
u32 = Annotated[int, ctypes.c_uint32]
u64 = Annotated[int, ctypes.c_uint64]
i8 = Annotated[int, ctypes.c_int8]
i16 = Annotated[int, ctypes.c_int16]
i32 = Annotated[int, ctypes.c_int32]
i64 = Annotated[int, ctypes.c_int64]
u8s = Array[ctypes.c_uint8]
u16s = Array[ctypes.c_uint16]
u32s = Array[ctypes.c_uint32]
u64s = Array[ctypes.c_uint64]
i8s = Array[ctypes.c_int8]

S = TypeVar("S", bound="Structure | Union")


class _Dimensions(NamedTuple):
    counts: tuple[int, ...]


class _Bits(NamedTuple):
    width: int


def array(*counts: int) -> Any:
    """Say that the annotated field is an array of *counts* elements (several: an array of arrays)."""
    return _Dimensions(counts)


def bits(width: int) -> Any:
    """Say that the annotated field is a bit field of *width* bits."""
    return _Bits(width)


def _scalar(hint: Any) -> Any:
    while typing.get_origin(hint) is Array:
        hint = typing.get_args(hint)[0]
    return typing.get_args(hint)[1] if typing.get_origin(hint) is Annotated else hint


# By identity: what nearly every field is of.
_SCALARS = {
    id(hint): _scalar(hint)
    for hint in (u8, u16, u32, u64, i8, i16, i32, i64, u8s, u16s, u32s, u64s, i8s)
}  # fmt: skip


def _hints(cls: type) -> dict[str, Any]:
    """Field → annotation, evaluated. Nearly all are names of the module, and looking those up is much the cheapest."""
    names = vars(sys.modules[cls.__module__])
    try:
        return {field: names[text] for field, text in cls.__annotations__.items()}
    except (KeyError, TypeError):
        return typing.get_type_hints(cls, include_extras=True)


def _field(cls: type, name: str, hint: Any) -> tuple[Any, ...]:
    kind = _SCALARS.get(id(hint)) or _scalar(hint)
    match cls.__dict__.get(name):
        case _Dimensions(counts):
            delattr(cls, name)
            return name, functools.reduce(lambda element, count: element * count, reversed(counts), kind)
        case _Bits(width):
            delattr(cls, name)
            return name, kind, width
        case None:
            return name, kind
        case other:
            raise TypeError(f"{cls.__name__}.{name}: {other!r} is neither array() nor bits()")


def layout(cls: type[S]) -> type[S]:
    """Give *cls*, a Structure or Union, the fields that its annotations declare, in their order.

    Raises TypeError when an annotation is no C type.
    """
    hints = _hints(cls)
    cls._fields_ = [_field(cls, name, hints[name]) for name in cls.__annotations__]
    return cls


@functools.cache
def flexible(cls: type[S], count: int) -> type[S]:
    """Return *cls* with *count* elements in its last field, which *cls* declares as ``array(0)``.

    Raises TypeError when *cls* has no flexible array.
    """
    *head, last = cls._fields_
    empty = typing.cast("type[Array[Any]]", last[1])
    if getattr(empty, "_length_", None) != 0:
        raise TypeError(f"{cls.__name__} does not end in a flexible array")
    sized: Any = empty._type_
    namespace = {"_fields_": [*head, (last[0], sized * count)], "_anonymous_": getattr(cls, "_anonymous_", ())}
    metaclass: Any = type(Structure)
    return typing.cast("type[S]", metaclass(f"{cls.__name__}[{count}]", (Structure,), namespace))
