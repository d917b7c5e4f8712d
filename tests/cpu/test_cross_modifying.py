"""One processor writes code that another executes: what is written before a flag is set is executed by who has seen
the flag. SDM, "Handling Self- and Cross-Modifying Code".
"""

from __future__ import annotations

import pytest

from vmonty.testing.nasm import assemble

from .flat import CODE, Machine, run_together

FUNCTION, PUBLISHED, ACKNOWLEDGED = 0x200000, 0x300000, 0x300040
ROUNDS = 300

# mov eax, VALUE; ret: VALUE is overwritten some times in each round, and published.
WRITER = """
    mov r8d, 1
round:
    mov rdi, {at}
    mov ecx, {writes}
again:
    mov eax, r8d
    shl eax, 12
    {pause}
    add eax, ecx
    mov [rdi], eax
    dec ecx
    jnz again
    mov [{published}], eax
waiting:
    pause
    cmp [{acknowledged}], eax
    jne waiting
    inc r8d
    cmp r8d, {rounds}
    jne round
    mov dword [{published}], -1
    hlt
"""

# Calls it all the time; rbx counts the rounds in which it was not what had been published before the call.
CALLER = """
    xor ebx, ebx
    xor esi, esi
again:
    mov edx, [{published}]
    call {function}
    cmp edx, -1
    je done
    cmp edx, esi
    je again
    mov esi, edx
    cmp eax, edx
    je right
    inc ebx
right:
    mov [{acknowledged}], edx
    jmp again
done:
    hlt
"""


@pytest.mark.parametrize("writes", [1, 2, 40, 300])
@pytest.mark.parametrize("pause", ["", "imul r9, r9\n imul r9, r9"], ids=["at-once", "slowly"])
def test_what_was_published_is_executed(writes: int, pause: str) -> None:
    names = {
        "at": FUNCTION + 1, "published": PUBLISHED, "acknowledged": ACKNOWLEDGED, "function": FUNCTION,
        "rounds": ROUNDS, "writes": writes, "pause": pause,
    }  # fmt: skip
    calling = Machine()
    writing = Machine(calling.memory)
    calling.load("b8 00 00 00 00 c3", FUNCTION)
    calling.load(assemble(f"default abs\n{CALLER.format(**names)}", 64, CODE))
    calling.load(assemble(f"default abs\n{WRITER.format(**names)}", 64, CODE + 0x3000), CODE + 0x3000)
    writing.cpu["rip"], writing.cpu["rsp"] = CODE + 0x3000, 0x70000
    run_together(calling, writing)
    assert calling.cpu["rbx"] == 0


@pytest.mark.parametrize("instruction", ["lock inc dword [{at}]", "lock xadd [{at}], edx", "lock cmpxchg [{at}], ebx"])
def test_locked_operations_in_a_page_with_code(instruction: str) -> None:
    """SDM, "Bus Locking": atomic wherever the operand lies, also beside the code of both processors."""
    rounds, at = 1000, CODE + 0x800
    step = instruction.format(at=at)
    if "cmpxchg" in step:
        step = f"again:\n mov eax, [{at}]\n lea ebx, [rax + 1]\n {step}\n jne again"
    source = f"mov ecx, {rounds}\n next:\n mov edx, 1\n {step}\n dec ecx\n jnz next\n hlt"
    first = Machine()
    second = Machine(first.memory)
    first.load(assemble(f"default abs\n{source}", 64, CODE))
    first.load(assemble(f"default abs\n{source}", 64, CODE + 0x400), CODE + 0x400)
    second.cpu["rip"], second.cpu["rsp"] = CODE + 0x400, 0x70000
    run_together(first, second)
    assert first.get64(at) == 2 * rounds
