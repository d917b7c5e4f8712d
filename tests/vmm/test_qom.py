"""The object model: types by name, properties, and what a machine makes of them."""

from __future__ import annotations

import pytest

from vmonty.base.cpu_models import MODELS
from vmonty.base.errors import UsageError
from vmonty.vmm.boards import BOARDS
from vmonty.vmm.catalogue import TYPES
from vmonty.vmm.qom import Property, TypeInfo, TypeRegistry, boolean, number


@pytest.fixture
def types() -> TypeRegistry:
    return TypeRegistry(
        (
            TypeInfo("vehicle", abstract=True, properties=(Property("wheels", "how many", 4, number),),
                     class_properties={"moves": True, "sound": "none"}),
            TypeInfo("bicycle", "vehicle", "with pedals", properties=(Property("bell", "rings", False, boolean),),
                     class_properties={"sound": "ring"},
                     make=lambda road, **values: (road, values)),
        )
    )  # fmt: skip


def test_properties_and_inheritance(types: TypeRegistry) -> None:
    made = types.create("bicycle,wheels=0x2,bell", "vehicle")
    assert made.realize("lane") == ("lane", {"wheels": 2, "bell": True})
    assert types.create("bicycle", "object").get("wheels") == 4
    assert types.class_property("bicycle", "moves") is True
    assert types.class_property("bicycle", "sound") == "ring"
    with pytest.raises(KeyError):
        types.class_property("bicycle", "colour")
    assert [info.name for info in types.lineage("bicycle")] == ["bicycle", "vehicle", "object"]
    assert types.is_a("bicycle", "vehicle")
    assert not types.is_a("vehicle", "bicycle")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("car", "unknown vehicle 'car'; there are: bicycle"),
        ("vehicle", "unknown vehicle 'vehicle'"),
        ("bicycle,motor=on", "bicycle has no property 'motor'; there are: bell, wheels"),
        ("bicycle,wheels=two", "bicycle: wheels is a number, not 'two'"),
        ("bicycle,bell=maybe", "bicycle: bell is 'on' or 'off', not 'maybe'"),
    ],
)
def test_bad_text(types: TypeRegistry, text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        types.create(text, "vehicle")


def test_realized_once(types: TypeRegistry) -> None:
    made = types.create("bicycle", "vehicle")
    made.realize("lane")
    with pytest.raises(UsageError, match="in use already"):
        made.realize("lane")
    with pytest.raises(UsageError, match="cannot be changed"):
        made.set("wheels", "3")


def test_registering_wrongly(types: TypeRegistry) -> None:
    with pytest.raises(ValueError, match="already"):
        types.add(TypeInfo("bicycle"))
    with pytest.raises(ValueError, match="unknown"):
        types.add(TypeInfo("tram", "rails"))


def test_description(types: TypeRegistry) -> None:
    assert types.describe("vehicle").splitlines() == [
        "bicycle              with pedals", "    wheels=…  how many [4]", "    bell=…  rings [off]",
    ]  # fmt: skip


def test_the_catalogue_is_whole() -> None:
    assert [info.name for info in TYPES.concrete("machine")] == list(BOARDS)
    assert {info.name for info in TYPES.concrete("x86-cpu")} == set(MODELS)
    assert {info.name for info in TYPES.concrete("accel")} >= {"kvm", "soft"}
    for info in TYPES.concrete("object"):
        assert TYPES.create(info.name, "object").info is info
