from collections.abc import Callable
from typing import NamedTuple, Self

from vmonty.cpu.core import Cpu

class Instruction(NamedTuple):
    rip: int
    linear: int
    bits: int
    code: bytes
    @property
    def text(self) -> str: ...

class Access(NamedTuple):
    rip: int
    linear: int
    physical: int
    write: bool
    data: bytes
    implicit: bool

class Event(NamedTuple):
    rip: int
    vector: int
    kind: str
    error_code: int | None
    address: int

def disassemble(code: bytes, rip: int = 0, bits: int = 64) -> str: ...

class Observer:
    cpu: Cpu
    def __init__(
        self,
        cpu: Cpu,
        on_instruction: Callable[[Instruction], object] | None = None,
        on_block: Callable[[int], object] | None = None,
        on_memory: Callable[[Access], object] | None = None,
        on_event: Callable[[Event], object] | None = None,
    ) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...
    @property
    def instructions(self) -> int: ...
    @property
    def lost(self) -> int: ...
    def stop(self) -> None: ...
    def check(self) -> None: ...
