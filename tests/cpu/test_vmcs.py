"""The table of VMCS fields. SDM, "Field Encoding in VMCS"."""

from __future__ import annotations

from pathlib import Path

import pytest

import vmonty.cpu.vmcs as vmcs
from vmonty.base.ram import Ram
from vmonty.cpu.core import Cpu
from vmonty.cpu.vmcs import REVISION, Field, info
from vmonty.cpu.vmx import Vmx
from vmonty.cpu.vmx_errors import VmxError


class Regions:
    """VMXON region, two VMCS regions and one page that is none."""

    def __init__(self) -> None:
        self.ram = Ram(4 * 4096)
        for page in range(3):
            self.ram.write_u32(page * 4096, REVISION)

    def __getitem__(self, page: int) -> int:
        return self.ram.address + page * 4096


@pytest.fixture
def regions() -> Regions:
    return Regions()


@pytest.fixture
def current(regions: Regions) -> Vmx:
    vmx = Vmx(Cpu(1 << 20))
    vmx.vmxon(regions[0])
    vmx.vmclear(regions[1])
    vmx.vmptrld(regions[1])
    return vmx


def test_c_names_are_the_tables() -> None:
    assert Path(vmcs.__file__).with_suffix(".pxd").read_text() == vmcs.c_names()


def test_slots_do_not_overlap_and_leave_the_header_free() -> None:
    offsets = [info(field).offset for field in Field]
    assert len(set(offsets)) == len(offsets)
    assert min(offsets) >= 256
    assert max(offsets) + 8 <= vmcs.REGION_SIZE


@pytest.mark.parametrize(
    ("field", "width", "natural", "kind", "read_only"),
    [
        (Field.GUEST_CS_SELECTOR, 16, False, "guest state", False),
        (Field.EPT_POINTER, 64, False, "control", False),
        (Field.VM_EXIT_REASON, 32, False, "exit information", True),
        (Field.HOST_RIP, 64, True, "host state", False),
        (Field.GUEST_PHYSICAL_ADDRESS, 64, False, "exit information", True),
    ],
)
def test_an_encoding_says_all(field: Field, width: int, natural: bool, kind: str, read_only: bool) -> None:
    found = info(field)
    assert (found.width, found.natural, found.kind, found.read_only) == (width, natural, kind, read_only)


@pytest.mark.parametrize("field", [field for field in Field if not info(field).read_only], ids=lambda f: f.name)
def test_every_writable_field_keeps_its_width(current: Vmx, field: Field) -> None:
    current.vmwrite(field, 0xFEDCBA9876543210)
    assert current.vmread(field) == 0xFEDCBA9876543210 & ((1 << info(field).width) - 1)
    if info(field).width == 64 and not info(field).natural:
        assert current.vmread(field | 1) == 0xFEDCBA98
        current.vmwrite(field | 1, 0x11223344)
        assert current.vmread(field) == 0x1122334476543210


@pytest.mark.parametrize("field", [field for field in Field if info(field).read_only], ids=lambda f: f.name)
def test_exit_information_is_read_only(current: Vmx, field: Field) -> None:
    with pytest.raises(VmxError) as caught:
        current.vmwrite(field, 1)
    assert caught.value.number == 13
    assert current.vmread(Field.VM_INSTRUCTION_ERROR) == 13


@pytest.mark.parametrize("encoding", [0x7FFE, 0x6023 + 0x200, 0x0001, 0x4001, 0x6001, 0xFFFF, 0x8000])
def test_unsupported_components(current: Vmx, encoding: int) -> None:
    for call in (lambda: current.vmread(encoding), lambda: current.vmwrite(encoding, 0)):
        with pytest.raises(VmxError) as caught:
            call()
        assert caught.value.number == 12


def test_fields_do_not_disturb_each_other(current: Vmx) -> None:
    writable = [field for field in Field if not info(field).read_only]
    for number, field in enumerate(writable):
        current.vmwrite(field, number + 1)
    assert [current.vmread(field) for field in writable] == list(range(1, len(writable) + 1))


def test_dump_shows_names(current: Vmx, regions: Regions) -> None:
    current.vmwrite(Field.GUEST_RIP, 0x1234)
    shown = vmcs.dump(regions.ram.view(4096, 4096))
    assert shown["GUEST_RIP"] == 0x1234
    assert set(shown) == {field.name for field in Field}


def test_regions_and_pointers(regions: Regions) -> None:
    """SDM, "VMXON", "VMCLEAR", "VMPTRLD", "VMPTRST": who may name which region."""
    vmx = Vmx(Cpu(1 << 20))
    for number, call in (
        (-1, lambda: vmx.vmclear(regions[1])),
        (0, lambda: vmx.vmxon(regions[0] + 8)),
        (0, lambda: vmx.vmxon(regions[3])),
    ):
        with pytest.raises(VmxError) as caught:
            call()
        assert caught.value.number == number
    vmx.vmxon(regions[0])
    assert vmx.vmptrst() == 0xFFFFFFFFFFFFFFFF
    with pytest.raises(VmxError) as caught:
        vmx.vmread(Field.GUEST_RIP)
    assert caught.value.number == 0
    vmx.vmptrld(regions[1])
    assert vmx.vmptrst() == regions[1]
    for number, call in (
        (15, lambda: vmx.vmxon(regions[0])),
        (2, lambda: vmx.vmclear(regions[1] + 1)),
        (3, lambda: vmx.vmclear(regions[0])),
        (9, lambda: vmx.vmptrld(0)),
        (10, lambda: vmx.vmptrld(regions[0])),
        (11, lambda: vmx.vmptrld(regions[3])),
    ):
        with pytest.raises(VmxError) as caught:
            call()
        assert caught.value.number == number
        assert vmx.vmread(Field.VM_INSTRUCTION_ERROR) == number
    vmx.vmclear(regions[1])
    assert vmx.vmptrst() == 0xFFFFFFFFFFFFFFFF
    vmx.vmxoff()
    with pytest.raises(VmxError):
        vmx.vmptrst()
