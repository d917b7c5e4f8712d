"""Shadow RAM and the ROM behind it, as code sees them that runs from that ROM, on every KVM that this host has."""

from __future__ import annotations

import pytest

from vmonty.base.errors import UsageError
from vmonty.kvm.api import System
from vmonty.testing.nasm import assemble
from vmonty.vmm import boards
from vmonty.vmm.firmware import Firmware
from vmonty.vmm.machine import Config
from vmonty.vmm.outcome import Ending

from .conftest import LIMIT_S, Screen

MEMORY = 8 << 20
ROM_SIZE = 0x2_0000
# (PAM0, SMRAM) of each board's host bridge.
REGISTERS = {"pc": (0x59, 0x72), "q35": (0x90, 0x9D)}

# The second half of a ROM of 128 KiB, at F000:0. put sends AL; config writes AL to register BL of the host bridge.
ROM = """
start:
    xor ax, ax
    mov ss, ax
    mov sp, 0x7000
    jmp main
put:
    mov dx, 0x3f8
    out dx, al
    ret
config:
    push ax
    mov eax, 0x80000000
    mov al, bl
    and al, 0xfc
    mov dx, 0xcf8
    out dx, eax
    mov dl, bl
    and dl, 3
    add dl, 0xfc
    pop ax
    out dx, al
    ret
%macro attribute 2              ; a register behind PAM0, and its value
    mov bl, PAM + %1
    mov al, %2
    call config
%endmacro
%macro show 1                   ; the byte at DS:offset
    mov al, [%1]
    call put
%endmacro
main:
    mov ax, 0xc000
    mov ds, ax
    mov byte [0], 0x11          ; nobody is there
    show 0
    attribute 1, 0x02           ; C0000: writes reach RAM, reads do not
    mov byte [0], 0x22
    show 0
    attribute 1, 0x01           ; reads do, writes do not
    mov byte [0], 0x33
    show 0
    attribute 1, 0x03
    mov byte [0], 0x44
    show 0
    mov byte [0x4000], 0x55     ; the next segment is not RAM
    show 0x4000
    attribute 1, 0x33
    mov byte [0x4000], 0x66
    show 0x4000
    attribute 1, 0x00
    show 0
    attribute 1, 0x03           ; what it held is still there
    show 0
    mov ax, 0xe000              ; the ROM's first byte shows at E0000
    mov ds, ax
    show 0
    mov byte [0], 0x77
    show 0
    mov ax, 0xf000              ; this code becomes RAM while it runs: copied onto itself, then switched over
    mov ds, ax
    mov es, ax
    attribute 0, 0x20
    xor si, si
    xor di, di
    mov cx, end
    cld
    rep movsb
    mov byte [variable], 'r'
    show variable
    attribute 0, 0x10
    show variable
    mov byte [variable], 's'
    show variable
    attribute 0, 0x30
    mov byte [variable], 't'
    show variable
    mov ax, 0xa000              ; the screen's memory is nobody's, until SMRAM is open
    mov ds, ax
    mov byte [0], 0x88
    show 0
    mov bl, SMRAM
    mov al, 0x4a
    call config
    mov byte [0], 0x99
    show 0
    mov al, 0x1a                ; locked: closed, for good
    call config
    show 0
    mov al, 0x4a
    call config
    show 0
    mov dx, 0x501
    xor ax, ax
    out dx, ax
    hlt
variable: db 'o'
end:
    times 0xfff0 - ($ - $$) db 0
    jmp 0xf000:0
    times 0x10000 - ($ - $$) db 0
"""


@pytest.mark.parametrize("board", sorted(REGISTERS))
def test_every_attribute(system: System, screen: Screen, board: str) -> None:
    pam, smram = REGISTERS[board]
    code = b"\xee" * 0x1_0000 + assemble(f"PAM equ {pam}\nSMRAM equ {smram}\n" + ROM)
    config = Config(
        memory=MEMORY, machine=board, firmware=Firmware("a test's", code), devices=("isa-debug-exit",)
    )  # fmt: skip
    with boards.create(system, config, screen.write) as machine:
        machine.start()
        outcome = machine.wait(LIMIT_S)
        assert outcome is not None, bytes(screen.text)
        assert outcome.ending is Ending.DEBUG_EXIT, outcome
        shadowed = machine.memory.read(0xF_0000, 0x100)
    assert shadowed == code[0x1_0000:0x1_0100], "the copy went to RAM"
    assert bytes(screen.text) == (
        bytes.fromhex("ff ff 22 44 ff 66 ff 44 ee ee") + b"orrt" + bytes.fromhex("ff 99 ff ff")
    )


def test_a_pc_needs_its_first_mib(system: System) -> None:
    config = Config(memory=0x9_0000, firmware=Firmware("a test's", bytes(ROM_SIZE)))
    with pytest.raises(UsageError, match="1 MiB or more"):
        boards.create(system, config, bytes)
