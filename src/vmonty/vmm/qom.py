"""The object model: types by name with a parent, class properties and instance properties, as QEMU's -machine,
-accel, -cpu and -device know them.

    object
    ├── machine (abstract)     x86-machine (abstract)     pc, q35, microvm
    ├── accel (abstract)       kvm, soft
    ├── cpu (abstract)         x86-cpu (abstract)         Haswell, EPYC, host, …
    └── device (abstract)      isa-device, pci-device (abstract)     isa-debugcon, pcie-root-port, …
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from vmonty.base.errors import UsageError

ROOT = "object"
_BOOLEANS = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


def boolean(text: str) -> bool:
    """on or off."""
    if text not in _BOOLEANS:
        raise ValueError("'on' or 'off'")
    return _BOOLEANS[text]


def number(text: str) -> int:
    """An integer, decimal or with 0x."""
    try:
        return int(text, 0)
    except ValueError:
        raise ValueError("a number") from None


class Property(NamedTuple):
    """One property of an instance. *convert* makes its value from text, or raises ValueError with what it takes."""

    name: str
    help: str
    default: Any = None
    convert: Callable[[str], Any] = str


class TypeInfo(NamedTuple):
    """One type. *make* builds the thing from what it is realized in, with the properties as keyword arguments.

    *class_properties* are the same for all instances, and inherited.
    """

    name: str
    parent: str = ROOT
    help: str = ""
    abstract: bool = False
    properties: tuple[Property, ...] = ()
    class_properties: Mapping[str, Any] = MappingProxyType({})
    make: Callable[..., Any] | None = None


class Object:
    """An instance: its properties can be set until it is realized."""

    def __init__(self, info: TypeInfo, properties: Mapping[str, Property]) -> None:
        self.info = info
        self._properties = properties
        self._values = {name: known.default for name, known in properties.items()}
        self.realized = False

    def set(self, name: str, text: str) -> None:
        """Set a property from text. Raises UsageError for an unknown one, a bad value, or a realized object."""
        if self.realized:
            raise UsageError(f"{self.info.name}: {name} cannot be changed any more")
        if name not in self._properties:
            known = ", ".join(sorted(self._properties)) or "none"
            raise UsageError(f"{self.info.name} has no property {name!r}; there are: {known}")
        try:
            self._values[name] = self._properties[name].convert(text)
        except ValueError as error:
            raise UsageError(f"{self.info.name}: {name} is {error}, not {text!r}") from None

    def get(self, name: str) -> Any:
        """A property's value. KeyError for an unknown one."""
        return self._values[name]

    @property
    def values(self) -> dict[str, Any]:
        """All properties; names as Python has them."""
        return {name.replace("-", "_"): value for name, value in self._values.items()}

    def realize(self, *context: Any) -> Any:
        """Build the thing, once. Raises UsageError the second time, and what its maker raises."""
        if self.realized:
            raise UsageError(f"this {self.info.name} is in use already")
        if self.info.make is None:
            raise UsageError(f"a {self.info.name} cannot be made by name")
        self.realized = True
        return self.info.make(*context, **self.values)


class TypeRegistry:
    """Types by name."""

    def __init__(self, types: tuple[TypeInfo, ...] = ()) -> None:
        self._types: dict[str, TypeInfo] = {ROOT: TypeInfo(ROOT, "", abstract=True)}
        for info in types:
            self.add(info)

    def add(self, info: TypeInfo) -> None:
        """Register a type; its parent comes first. Raises ValueError for a name that is taken or an unknown parent."""
        if info.name in self._types:
            raise ValueError(f"there is a type {info.name} already")
        if info.parent not in self._types:
            raise ValueError(f"{info.name}'s parent {info.parent} is unknown")
        self._types[info.name] = info

    def lineage(self, name: str) -> Iterator[TypeInfo]:
        """The type and its ancestors, nearest first. KeyError for an unknown one."""
        while name:
            info = self._types[name]
            yield info
            name = info.parent

    def is_a(self, name: str, ancestor: str) -> bool:
        """Is *name* a type below *ancestor*, or that type itself?"""
        return name in self._types and any(info.name == ancestor for info in self.lineage(name))

    def concrete(self, ancestor: str) -> list[TypeInfo]:
        """All types below *ancestor* that can be made, in the order in which they were added."""
        return [info for info in self._types.values() if not info.abstract and self.is_a(info.name, ancestor)]

    def properties(self, name: str) -> dict[str, Property]:
        """All properties that an instance has, the type's own over its ancestors'."""
        found: dict[str, Property] = {}
        for info in reversed(list(self.lineage(name))):
            found |= {known.name: known for known in info.properties}
        return found

    def class_property(self, name: str, key: str) -> Any:
        """A class property, its own or inherited. KeyError when no ancestor has it."""
        for info in self.lineage(name):
            if key in info.class_properties:
                return info.class_properties[key]
        raise KeyError(key)

    def create(self, text: str, ancestor: str) -> Object:
        """Make an instance of a type below *ancestor* from ``name,property=value,…``; not realized yet.

        ``property`` alone means on. Raises UsageError for anything unknown.
        """
        name, *settings = text.split(",")
        if not self.is_a(name, ancestor) or self._types[name].abstract:
            known = ", ".join(info.name for info in self.concrete(ancestor))
            raise UsageError(f"unknown {ancestor} {name!r}; there are: {known}")
        made = Object(self._types[name], self.properties(name))
        for setting in filter(None, settings):
            key, equals, value = setting.partition("=")
            made.set(key, value if equals else "on")
        return made

    def describe(self, ancestor: str) -> str:
        """A list for people: each type below *ancestor*, one to a line, with its properties."""
        lines = []
        for info in self.concrete(ancestor):
            lines.append(f"{info.name:<20} {info.help}".rstrip())
            for known in self.properties(info.name).values():
                shown = ("off", "on")[known.default] if isinstance(known.default, bool) else known.default
                default = "" if shown is None else f" [{shown}]"
                lines.append(f"    {known.name}=…  {known.help}{default}")
        return "\n".join(lines)
