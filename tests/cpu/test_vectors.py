"""Gathers that stop in the middle, and the XSAVE family beyond XSAVE itself."""

from __future__ import annotations

import struct

import pytest
from tests.cpu.flat import CODE, Machine
from tests.cpu.machine import Machine as SystemMachine

from vmonty.cpu import models
from vmonty.testing.nasm import assemble

AREA, TABLE, ABSENT = 0x200000, 0x300000, 0x40000000
GP, PF = 13, 14
YMM_HIGH, XMM = 576, 160
pytestmark = pytest.mark.skipif(not models.available("avx2"), reason="the processor underneath has no AVX2")


@pytest.fixture
def machine() -> Machine:
    made = Machine()
    made.put64(0x2000 + 8 * (ABSENT >> 30), 0)
    made.cpu.stop_at_events()
    return made


def set_xmm(machine: Machine, number: int, low: bytes, high: bytes = bytes(16)) -> None:
    image = bytearray(machine.cpu.xsave)
    image[XMM + 16 * number : XMM + 16 * number + 16] = low
    image[YMM_HIGH + 16 * number : YMM_HIGH + 16 * number + 16] = high
    image[512] = 7
    machine.cpu.xsave = bytes(image)


def ymm(machine: Machine, number: int) -> bytes:
    image = machine.cpu.xsave
    return (
        image[XMM + 16 * number : XMM + 16 * number + 16] + image[YMM_HIGH + 16 * number : YMM_HIGH + 16 * number + 16]
    )


def run(machine: Machine, source: str) -> int:
    """Run to the HLT that is put behind; the vector of the exception, or -1."""
    machine.load(assemble(f"{source}\n hlt", 64, CODE))
    machine.cpu.flush_code()
    machine.cpu["rip"] = CODE
    machine.cpu.clear_event()
    machine.cpu.run()
    return machine.cpu.event["vector"] if machine.cpu.event["pending"] else -1


def test_a_gather_keeps_what_it_loaded_before_a_fault(machine: Machine) -> None:
    """SDM, "VPGATHERDD": a fault is delivered with the elements before it done, and their mask cleared."""
    machine.memory[TABLE : TABLE + 16] = struct.pack("<4I", 11, 22, 33, 44)
    set_xmm(machine, 1, struct.pack("<4i", 0, 1, (ABSENT - TABLE) // 4, 3))
    set_xmm(machine, 2, struct.pack("<4I", 0x80000000, 0, 0x80000000, 0xFFFFFFFF), b"\xff" * 16)
    set_xmm(machine, 0, b"\xaa" * 16, b"\xbb" * 16)
    machine.cpu["rax"] = TABLE
    gather = "vpgatherdd xmm0, [rax + xmm1 * 4], xmm2"
    assert run(machine, gather) == PF
    assert machine.cpu.event["payload"] == ABSENT
    assert machine.cpu["rip"] == CODE
    assert ymm(machine, 2)[:16] == struct.pack("<4I", 0, 0, 0xFFFFFFFF, 0xFFFFFFFF)
    assert struct.unpack_from("<4I", ymm(machine, 0)) == (11, 0xAAAAAAAA, 0xAAAAAAAA, 0xAAAAAAAA)
    set_xmm(machine, 1, struct.pack("<4i", 9, 9, 2, 3))  # elements that are done are not loaded again
    assert run(machine, gather) == -1
    assert struct.unpack_from("<4I", ymm(machine, 0)) == (11, 0xAAAAAAAA, 33, 44)
    assert ymm(machine, 0)[16:] == ymm(machine, 2)[16:] == bytes(16)
    assert ymm(machine, 2)[:16] == bytes(16)


def test_a_gather_of_four_quadwords_by_doublewords(machine: Machine) -> None:
    machine.memory[TABLE : TABLE + 64] = struct.pack("<8Q", *range(100, 108))
    set_xmm(machine, 1, struct.pack("<4i", 7, -1, 0, 3))
    set_xmm(machine, 2, b"\xff" * 16, b"\xff" * 8 + bytes(8))
    set_xmm(machine, 0, bytes(16), b"\x77" * 16)
    machine.cpu["r12"] = TABLE + 8
    machine.memory[TABLE + 64 : TABLE + 72] = struct.pack("<Q", 999)
    assert run(machine, "vpgatherdq ymm0, [r12 + xmm1 * 8], ymm2") == -1
    assert struct.unpack("<4Q", ymm(machine, 0)) == (999, 100, 101, 0x7777777777777777)


@pytest.mark.parametrize("registers", ["c4e26d904400", "c4e269901488", "c4e271900408"])
def test_a_gather_with_a_register_twice_is_ud(machine: Machine, registers: str) -> None:
    machine.load(registers + "f4")
    machine.cpu["rip"] = CODE
    machine.cpu.clear_event()
    machine.cpu.run()
    assert machine.cpu.event["vector"] == 6


@pytest.mark.skipif(not models.available("xsavec"), reason="the processor underneath has no XSAVEC")
class TestCompacted:
    """XSAVEC, XSAVES, XRSTORS. SDM, "Extended Region of an XSAVE Area"."""

    @pytest.mark.parametrize("save", ["xsavec", "xsaves"])
    @pytest.mark.parametrize("restore", ["xrstor", "xrstors"])
    def test_round_trip(self, machine: Machine, save: str, restore: str) -> None:
        set_xmm(machine, 3, b"\x12" * 16, b"\x34" * 16)
        source = f"mov eax, 6\n xor edx, edx\n {save} [{AREA:#x}]\n vzeroall\n {restore} [{AREA:#x}]"
        assert run(machine, source) == -1
        assert struct.unpack_from("<QQ", machine.memory, AREA + 512) == (6, 6 | 1 << 63)
        assert ymm(machine, 3) == b"\x12" * 16 + b"\x34" * 16

    def test_components_in_their_initial_state_are_not_written(self, machine: Machine) -> None:
        machine.memory[AREA : AREA + 832] = b"\xee" * 832
        assert run(machine, f"vzeroall\n mov eax, 7\n xor edx, edx\n xsavec [{AREA:#x}]") == -1
        assert machine.get64(AREA + 512) & 4 == 0
        assert machine.memory[AREA + 576 : AREA + 832] == b"\xee" * 256

    @pytest.mark.parametrize(
        ("xstate_bv", "xcomp_bv", "also"),
        [
            pytest.param(4, 2 | 1 << 63, 0, id="not in XCOMP_BV"),
            pytest.param(2, 1 << 63 | 1 << 9 | 2, 0, id="beyond XCR0"),
            pytest.param(2, 2 | 1 << 63, 1, id="reserved bytes"),
            pytest.param(2, 2, 0, id="standard format with XCOMP_BV"),
            pytest.param(2 | 1 << 63, 2 | 1 << 63, 0, id="bit 63 of XSTATE_BV"),
        ],
    )
    def test_bad_headers(self, machine: Machine, xstate_bv: int, xcomp_bv: int, also: int) -> None:
        machine.memory[AREA : AREA + 832] = bytes(832)
        struct.pack_into("<QQQ", machine.memory, AREA + 512, xstate_bv, xcomp_bv, also)
        assert run(machine, f"mov eax, 6\n xor edx, edx\n xrstor [{AREA:#x}]") == GP

    def test_xrstors_takes_the_compacted_format_alone(self, machine: Machine) -> None:
        machine.memory[AREA : AREA + 832] = bytes(832)
        assert run(machine, f"mov eax, 6\n xor edx, edx\n xrstors [{AREA:#x}]") == GP

    @pytest.mark.parametrize("instruction", ["xsaves", "xrstors"])
    def test_supervisor_only(self, instruction: str) -> None:
        machine = SystemMachine().long_mode(user=True)
        assert machine.run(assemble(f"xor eax, eax\n xor edx, edx\n {instruction} [0xA000]", 64, 0x8000)) == "halt"
        assert machine.handler == GP


@pytest.mark.parametrize("component", [3, 4, 5, 6, 7, 8, 9, 17, 18, 62, 63])
@pytest.mark.parametrize("rfbm", [0, 4, 7])
def test_components_beyond_xcr0_are_refused(machine: Machine, component: int, rfbm: int) -> None:
    """Also those that the processor underneath has enabled for itself. SDM, "Standard Form of XRSTOR"."""
    machine.memory[AREA : AREA + 832] = bytes(832)
    machine.put64(AREA + 512, 1 << component | 4)
    machine.cpu["rax"], machine.cpu["rdx"] = rfbm, 0
    assert run(machine, f"xrstor [{AREA:#x}]") == GP
    machine.put64(AREA + 512, 4)
    assert run(machine, f"xrstor [{AREA:#x}]") == -1


@pytest.mark.skipif(not models.available("xsavec"), reason="the processor underneath has no XSAVEC")
@pytest.mark.parametrize("component", [3, 5, 9, 18, 62])
@pytest.mark.parametrize("rfbm", [0, 4, 7])
def test_compacted_components_beyond_xcr0_are_refused(machine: Machine, component: int, rfbm: int) -> None:
    """In XCOMP_BV, of which XSTATE_BV names fewer. SDM, "Compacted Form of XRSTOR"."""
    machine.memory[AREA : AREA + 832] = bytes(832)
    machine.put64(AREA + 520, 1 << 63 | 1 << component | 6)
    machine.cpu["rax"], machine.cpu["rdx"] = rfbm, 0
    assert run(machine, f"xrstor [{AREA:#x}]") == GP
    machine.put64(AREA + 520, 1 << 63 | 6)
    assert run(machine, f"xrstor [{AREA:#x}]") == -1


def test_xgetbv_tells_what_is_in_use(machine: Machine) -> None:
    set_xmm(machine, 0, b"\1" * 16)
    assert run(machine, "vzeroupper\n mov ecx, 1\n xgetbv\n mov ebx, eax\n vzeroall\n xgetbv") == -1
    assert machine.cpu["rbx"] & 6 == 2
    assert machine.cpu["rax"] & 6 == 0


def test_ia32_xss_has_no_bits(machine: Machine) -> None:
    assert run(machine, "mov ecx, 0xDA0\n mov eax, -1\n rdmsr\n wrmsr") == -1
    assert machine.cpu["rax"] == 0
    assert run(machine, "mov ecx, 0xDA0\n mov eax, 256\n xor edx, edx\n wrmsr") == GP


@pytest.mark.parametrize(("selector", "rpl", "result", "zf"), [(0x100, 3, 0x103, 1), (0x103, 2, 0x103, 0)])
@pytest.mark.parametrize("operand", ["ax", "[0xA000]"])
def test_arpl(selector: int, rpl: int, result: int, zf: int, operand: str) -> None:
    machine = SystemMachine().protected_mode()
    machine.ram.write(0xA000, selector.to_bytes(2, "little"))
    source = f"mov ax, {selector}\n mov cx, {rpl}\n arpl {operand}, cx\n setz dl\n movzx eax, word {operand}\n hlt"
    assert machine.run(assemble(source, 32, 0x8000)) == "halt"
    assert (machine["rax"] & 0xFFFF, machine["rdx"] & 0xFF) == (result, zf)


def test_arpl_is_ud_in_real_mode() -> None:
    machine = SystemMachine()
    machine.set_segment("cs", 0, 0, 0xFFFF, 0x9B)
    machine.cpu.stop_at_events()
    machine.run(assemble("arpl ax, cx", 16, 0x8000))
    assert machine.cpu.event["vector"] == 6
