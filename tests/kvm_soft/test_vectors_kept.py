"""The guest's x87 and vector state outlives every exit, also where compiled code leaves it in the registers."""

from __future__ import annotations

import ctypes
import os
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmonty.testing.guests import Mode, TinyGuest

from .conftest import with_irqchip
from .test_fastpath import APIC_ON, DEADLINE_MODE

ROOT = Path(__file__).parents[2]
BELL_PORT, BELL = 0x60, 0xFEB0_0000
EXITS = {
    "cpuid": "xor eax, eax\n cpuid",
    "rdmsr": "mov ecx, 0x1b\n rdmsr",
    "an MSR of Python's": "mov ecx, 0x4b564d01\n rdmsr",
    "EOI": "mov ecx, 0x80b\n xor eax, eax\n xor edx, edx\n wrmsr",
    "an IPI to itself": "mov ecx, 0x83f\n mov eax, 0x51\n xor edx, edx\n wrmsr",
    "an IPI": "mov ecx, 0x830\n mov eax, 0x52\n mov edx, 1\n wrmsr",
    "an NMI": "mov ecx, 0x830\n mov eax, 0x400\n mov edx, 1\n wrmsr",
    "a deadline": "rdtsc\n mov edx, 0x7fff0000\n mov ecx, 0x6e0\n wrmsr",
    "a port of an eventfd": f"mov al, 1\n out {BELL_PORT}, al",
    "memory of an eventfd": f"mov rdx, {BELL}\n mov dword [rdx], 1",
    "a port of the KVM's": "in al, 0x21",
    "all in turn": "",
}
EXITS["all in turn"] = "\n".join(EXITS.values())


@pytest.fixture(params=["kvm_intel", "kvm_amd"])
def guest(request: pytest.FixtureRequest) -> Iterator[TinyGuest]:
    """With two doorbells, and another vCPU to send to."""
    with with_irqchip(request.param) as made, made.vm.create_vcpu(1):
        event = os.eventfd(0, os.EFD_NONBLOCK)
        made.vm.ioeventfd(event, BELL_PORT, 1, pio=True)
        made.vm.ioeventfd(event, BELL, 4)
        yield made
        os.close(event)


@pytest.mark.parametrize("name", EXITS)
def test_state_outlives_exits(guest: TinyGuest, name: str) -> None:
    guest.load(
        Mode.LONG,
        f"{APIC_ON}{DEADLINE_MODE} out 0x10, al\n mov r15d, 300\n again:\n{EXITS[name]}\n"
        "dec r15d\n jnz again\n out 0x11, al",
    )
    assert guest.out()[0] == 0x10
    area = guest.vcpu.get_xsave()
    image = bytearray(bytes(area)[:4096])
    made = random.Random(name)
    image[0:6] = bytes((0x7E, 3, 0x81, 0x80, 0xFF, 0))  # an invalid operation that waits to be told
    image[24:28] = (0x9FC0).to_bytes(4, "little")
    for at in range(8):
        image[32 + 16 * at : 42 + 16 * at] = made.randbytes(10)
    image[160:416] = made.randbytes(256)
    image[576:832] = made.randbytes(256)
    image[512:520] = (7).to_bytes(8, "little")
    ctypes.memmove(ctypes.addressof(area), bytes(image), 4096)
    guest.vcpu.set_xsave(area)
    assert guest.out()[0] == 0x11
    found = bytes(guest.vcpu.get_xsave())
    for first, last in ((0, 5), (24, 28), (32, 160), (160, 416), (512, 520), (576, 832)):
        wrong = [at for at in range(first, last) if found[at] != image[at]]
        assert not wrong


def test_what_runs_with_the_guests_vectors_has_no_vector_instructions() -> None:
    """The compiler was told so; this looks at what it made, and at what libraries it took in."""
    setup = (ROOT / "setup.py").read_text()
    names = re.findall(r'"(vmonty[\w.]+)"', re.search(r"GENERAL_REGS_ONLY = \{(.*?)\n\}", setup, re.DOTALL)[1])  # type: ignore[index]
    assert len(names) > 50
    for name in (
        "vmonty.kvm.soft.fastpath",
        "vmonty.kvm.soft.vmx.run",
        "vmonty.kvm.soft.svm.run",
        "vmonty.cpu.dispatch",
    ):
        assert name in names
        (built,) = (ROOT / "src" / Path(*name.split("."))).parent.glob(f"{name.rsplit('.', 1)[1]}.cpython-*.so")
        listing = subprocess.run(["objdump", "-d", built], capture_output=True, text=True, check=True).stdout
        assert re.findall(r"^.*%[xyz]mm.*$", listing, re.MULTILINE) == []
