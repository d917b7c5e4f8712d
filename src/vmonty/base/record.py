"""Classes that hold fields, for modules that every start of a guest waits for.

``dataclasses`` writes and compiles a source text for each class, which takes half a millisecond; 24 of them were a
twentieth of a start. This takes a fiftieth of that, and more for each object: for what is made seldom.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast, dataclass_transform

T = TypeVar("T")


class _Made:
    def __init__(self, factory: Callable[[], Any]) -> None:
        self.factory = factory


def made(*, factory: Callable[[], T]) -> T:
    """The default of a field: what *factory* makes, anew for each object."""
    return cast("T", _Made(factory))


@dataclass_transform(eq_default=False, field_specifiers=(made,))
class Record:
    """Base of a class whose annotated attributes are fields: its constructor takes them in order or by name.

    A value in the class is the default. Objects can be changed, and equal only themselves. The constructor raises
    TypeError for a field that is missing, given twice, or none.
    """

    _fields: ClassVar[tuple[str, ...]] = ()
    _defaults: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        names = cls.__dict__.get("__annotations__", {})  # noqa: RUF063  # inspect is a slow import
        cls._fields = (*cls._fields, *names)
        cls._defaults = cls._defaults | {name: cls.__dict__[name] for name in names if name in cls.__dict__}

    def __init__(self, *values: Any, **named: Any) -> None:
        fields, mine = self._fields, self.__dict__
        mine.update(zip(fields, values, strict=False))
        if len(values) > len(fields) or not named.keys() <= set(fields[len(values) :]):
            unknown = sorted(named.keys() - set(fields[len(values) :]))
            raise TypeError(f"{type(self).__name__}: {unknown or values[len(fields) :]} given, of {fields}")
        mine.update(named)
        for name in fields[len(values) :]:
            if name not in named:
                if name not in self._defaults:
                    raise TypeError(f"{type(self).__name__}: no {name} given")
                default = self._defaults[name]
                mine[name] = default.factory() if isinstance(default, _Made) else default
        self.__post_init__()

    def __post_init__(self) -> None:
        """Called when all fields are there."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._fields)})"
