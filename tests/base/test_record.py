"""Records behave as dataclasses do, as far as they go."""

from __future__ import annotations

import pytest

from vmonty.base.record import Record, made


class Point(Record):
    x: int
    y: int = 7
    seen: list[int] = made(factory=list)


class Named(Point):
    name: str = "origin"


def test_fields_in_order_and_by_name() -> None:
    assert vars(Point(1)) == {"x": 1, "y": 7, "seen": []}
    assert vars(Point(1, seen=[2])) == {"x": 1, "y": 7, "seen": [2]}
    assert vars(Named(1, 2, [3], "corner")) == {"x": 1, "y": 2, "seen": [3], "name": "corner"}
    assert repr(Point(x=3, y=4)) == "Point(x=3, y=4, seen=[])"


def test_each_object_has_its_own() -> None:
    first, second = Point(1), Point(1)
    first.seen.append(5)
    first.y = 8
    assert (second.seen, second.y, Point.y) == ([], 7, 7)
    assert first != second


@pytest.mark.parametrize(
    ("values", "named", "complaint"),
    [
        ((), {}, "no x given"),
        ((1, 2, [], 4), {}, r"Point: \(4,\) given"),
        ((1,), {"x": 2}, r"\['x'\] given"),
        ((1,), {"z": 2}, r"\['z'\] given"),
    ],
)
def test_what_is_refused(values: tuple[object, ...], named: dict[str, object], complaint: str) -> None:
    with pytest.raises(TypeError, match=complaint):
        Point(*values, **named)  # type: ignore[arg-type]
