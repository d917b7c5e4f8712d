"""What vmonty.kvm.uapi declares, in the headers' names."""

from __future__ import annotations

import ctypes
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

from vmonty.kvm import uapi
from vmonty.kvm.uapi import Cap, Exit, Ioctl, Requests
from vmonty.kvm.uapi import exits as exit_module
from vmonty.kvm.uapi import flags as flag_module

Layout = type[Any]


def constants() -> dict[str, int]:
    """Requests, capabilities, exit reasons and flags: name → number."""
    named = {name: int(value) for name, value in vars(Requests).items() if isinstance(value, Ioctl)}
    named |= {f"KVM_CAP_{cap.name}": int(cap) for cap in Cap}
    named |= {f"KVM_EXIT_{reason.name}": int(reason) for reason in Exit}
    for module in (flag_module, exit_module):
        named |= {name: value for name, value in vars(module).items() if name.isupper() and isinstance(value, int)}
    return named


def _is_layout(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, ctypes.Structure | ctypes.Union)


def layouts() -> dict[str, Layout]:
    """Every struct and union: name → class."""
    found: dict[str, Layout] = {}
    for info in pkgutil.iter_modules(uapi.__path__):
        module = importlib.import_module(f"vmonty.kvm.uapi.{info.name}")
        found |= {name: value for name, value in vars(module).items() if name.startswith("kvm_") and _is_layout(value)}
    return found


def members(layout: Layout, prefix: str = "", base: int = 0) -> Iterator[tuple[str, int, int | None, Layout]]:
    """(path as in C, offset, size, type) of every member, nested ones too; the size of a flexible array is None.

    Bit fields are left out: see bit_fields().
    """
    for name, kind, *width in layout._fields_:
        if width:
            continue
        offset = base + getattr(layout, name).offset
        anonymous = name in getattr(layout, "_anonymous_", ())
        path = prefix.rstrip(".") if anonymous else prefix + name
        if not anonymous:
            flexible = getattr(kind, "_length_", None) == 0
            yield path, offset, None if flexible else ctypes.sizeof(kind), kind
        element, inner = kind, path
        while hasattr(element, "_length_"):
            element, inner = element._type_, f"{inner}[0]"
        if issubclass(element, ctypes.Structure | ctypes.Union):
            yield from members(element, f"{inner}." if inner else "", offset)


def inner_layouts(layout: Layout) -> Iterator[Layout]:
    """The structs and unions that *layout* has as members, at any depth."""
    for _, kind, *_ in layout._fields_:
        element = kind
        while hasattr(element, "_length_"):
            element = element._type_
        if issubclass(element, ctypes.Structure | ctypes.Union):
            yield element
            yield from inner_layouts(element)


def bit_fields(layout: Layout) -> dict[str, str]:
    """Bit field → the whole layout in hexadecimal with all of that field's bits set."""
    rows = {}
    for name, _, *width in layout._fields_:
        if width:
            value = layout()
            setattr(value, name, (1 << width[0]) - 1)
            rows[name] = bytes(value).hex()
        else:
            element, path = {field: kind for field, kind, *_ in layout._fields_}[name], name
            while hasattr(element, "_length_"):
                element, path = element._type_, f"{path}[0]"
            if not issubclass(element, ctypes.Structure | ctypes.Union) or getattr(layout, name).size == 0:
                continue
            offset = getattr(layout, name).offset
            for inner, image in bit_fields(element).items():
                whole = bytearray(ctypes.sizeof(layout))
                whole[offset : offset + len(image) // 2] = bytes.fromhex(image)
                anonymous = name in getattr(layout, "_anonymous_", ())
                rows[inner if anonymous else f"{path}.{inner}"] = whole.hex()
    return rows
