"""Kernels in every format that can be booted: run for real, and refused in one line when they are damaged."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import lz4.block
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmonty.base import zstd
from vmonty.base.errors import BootImageError
from vmonty.kvm.api import System
from vmonty.testing.nasm import assemble
from vmonty.vmm import boards
from vmonty.vmm.boot import acpi, kernelcache, linux, loader, lzo, payload
from vmonty.vmm.machine import Config
from vmonty.vmm.memory import GuestMemory
from vmonty.vmm.outcome import Ending

from . import kernels
from .conftest import LIMIT_S, Screen
from .elves import elf, note

ADDRESS = 0x20_0000
PLATFORM = acpi.Platform(cpus=1, pm_base=0x600)
INITRD = b"module contents\0"

# 32-bit code: ebx (for Linux esi) is what the loader left; prints strings, checks that data segments are flat.
PROLOGUE_32 = """
    mov esp, 0x300000
    jmp main
print:                          ; esi: text, which a zero byte ends
    mov dx, 0x3f8
.next:
    lodsb
    test al, al
    jz .done
    out dx, al
    jmp .next
.done:
    ret
power_off:
    mov dx, 0x604
    mov ax, (5 << 10) | (1 << 13)
    out dx, ax
halt:
    hlt
    jmp halt
main:
"""
MULTIBOOT = """
    cmp eax, 0x2badb002
    jne halt
    mov esi, [ebx + 16]         ; cmdline
    call print
    mov ecx, [ebx + 24]         ; mods_addr
    mov esi, [ecx]
    call print
    mov eax, [ebx + 48]         ; mmap_addr: the first entry is RAM at 0
    cmp dword [eax], 20
    jne halt
    cmp dword [eax + 20], 1
    jne halt
    cmp dword [bss], 0
    jne halt
    jmp power_off
    align 4
bss:
"""
PVH = """
    cmp dword [ebx], 0x336ec578
    jne halt
    mov esi, [ebx + 24]         ; cmdline_paddr
    call print
    mov ecx, [ebx + 16]         ; modlist_paddr
    mov esi, [ecx]
    call print
    mov ecx, [ebx + 32]         ; rsdp_paddr
    cmp dword [ecx], 'RSD '
    jne halt
    mov ecx, [ebx + 40]         ; memmap_paddr
    cmp dword [ecx + 16], 1
    jne halt
    jmp power_off
"""
LINUX_32 = """
    mov ebx, esi
    cmp dword [ebx + 0x202], 'HdrS'
    jne halt
    mov esi, [ebx + 0x228]
    call print
    mov esi, [ebx + 0x218]
    call print
    jmp power_off
"""
LINUX_64 = """
    mov rbp, rsi
    mov ebx, [rbp + 0x228]
    call print
    mov ebx, [rbp + 0x218]
    call print
    jmp power_off
"""


def multiboot_header(flags: int, *addresses: int) -> bytes:
    return struct.pack("<III", 0x1BAD_B002, flags, -(0x1BAD_B002 + flags) & 0xFFFF_FFFF) + struct.pack(
        f"<{len(addresses)}I", *addresses
    )


def multiboot_flat() -> bytes:
    """By the addresses in its header, which lies behind some other bytes."""
    code = assemble(PROLOGUE_32 + MULTIBOOT, 32, ADDRESS + 64)
    end = ADDRESS + 64 + len(code)
    return (
        b"#!other"
        + b"\0"
        + multiboot_header(0x1_0003, ADDRESS + 8, ADDRESS, end, end + 64, ADDRESS + 64).ljust(56, b"\0")
        + code
    )


def multiboot_elf(bits: int) -> bytes:
    code = multiboot_header(3).ljust(64, b"\0") + assemble(PROLOGUE_32 + MULTIBOOT, 32, ADDRESS + 64)
    return elf(bits, ADDRESS + 64, code, address=ADDRESS, zeroes=4096)


def pvh() -> bytes:
    code = assemble(PROLOGUE_32 + PVH, 32, ADDRESS)
    return elf(
        64,
        0xFFFF_FFFF_8100_0000,
        code,
        address=ADDRESS,
        notes=note(b"Other", 1, b"x") + note(b"Xen", 18, ADDRESS.to_bytes(4, "little")),
    )


def vmlinux() -> bytes:
    return elf(64, ADDRESS, assemble(kernels.PROLOGUE + LINUX_64, 64, ADDRESS), address=ADDRESS)


def bzimage_32(version: int) -> bytes:
    load = ADDRESS if version >= 0x20A else 0x10_0000
    image = kernels.bzimage(b"", xloadflags=0, version=version)
    return image[:1024] + assemble(PROLOGUE_32 + LINUX_32, 32, load).ljust(0x400, b"\0")


def bzimage_with(compressed: bytes) -> bytes:
    """A bzImage whose own code only halts: it must not be what runs."""
    image = kernels.bzimage(b"\xf4" * 64 + compressed, syssize=(0x240 + len(compressed) + 15) // 16)
    return image[:0x248] + struct.pack("<II", 0x240, len(compressed)) + image[0x250:]


def with_size(data: bytes, packed: bytes) -> bytes:
    return packed + struct.pack("<I", len(data))


def lz4_legacy(data: bytes) -> bytes:
    packed = b"\x02!L\x18"
    for start in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[start : start + (8 << 20)], store_size=False)
        packed += struct.pack("<I", len(block)) + block
    return packed


def lzop_stored(data: bytes) -> bytes:
    """A file of lzop, without its compression: each block as it is."""
    head = b"\x89LZO\0\r\n\x1a\n" + struct.pack(">HHHBBIIIIBI", 0x1030, 0x20A0, 0x0940, 1, 5, 0, 0, 0, 0, 0, 0)
    blocks = (data[start : start + (256 << 10)] for start in range(0, len(data), 256 << 10))
    return head + b"".join(struct.pack(">II", len(block), len(block)) + block for block in blocks) + bytes(4)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data),
    "bzip2": lambda data: with_size(data, bz2.compress(data)),
    "lzma": lambda data: with_size(data, lzma.compress(data, lzma.FORMAT_ALONE)),
    "xz": lambda data: with_size(
        data,
        lzma.compress(
            data, check=lzma.CHECK_CRC32,
            filters=[{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}],
        ),
    ),
    "lz4": lambda data: with_size(data, lz4_legacy(data)),
    "lzo": lambda data: with_size(data, lzop_stored(data)),
    "zstd": lambda data: with_size(data, zstd.compress(data)),
}  # fmt: skip

FORMATS: dict[str, Callable[[], bytes]] = {
    "multiboot-flat": multiboot_flat,
    "multiboot-elf32": lambda: multiboot_elf(32),
    "multiboot-elf64": lambda: multiboot_elf(64),
    "pvh": pvh,
    "vmlinux": vmlinux,
    "bzimage-32": lambda: bzimage_32(0x20F),
    "bzimage-2.05": lambda: bzimage_32(0x205),
    "bzimage-compressed": lambda: bzimage_with(COMPRESSORS["zstd"](vmlinux())),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vmonty" / "kernels"


@pytest.mark.parametrize("name", FORMATS)
def test_it_runs_and_finds_what_it_was_given(system: System, screen: Screen, name: str) -> None:
    config = Config(FORMATS[name](), INITRD, "its command line, ", kernels.MEMORY)
    with boards.create(system, config, screen.write) as machine:
        machine.start()
        outcome = machine.wait(LIMIT_S)
    assert outcome is not None, f"it hangs; it printed {bytes(screen.text)!r}"
    assert screen.text == b"its command line, module contents"
    assert outcome.ending is Ending.POWER_OFF


SMALL = {name: compress(b"\x7fELF" + random.Random(2).randbytes(700) * 2) for name, compress in COMPRESSORS.items()}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_decompression(name: str) -> None:
    data = vmlinux_bytes()
    packed = COMPRESSORS[name](data)
    assert payload.decompress(packed) == data
    for damaged in (packed[:-100] + packed[-4:], packed[:40] + bytes(60) + packed[100:], packed[:-4] + b"\xff" * 4):
        with contextlib.suppress(BootImageError):
            # A stored part may be damaged unseen where the format has no checksum.
            assert len(payload.decompress(damaged) or data) == len(data)
    with pytest.raises(BootImageError):
        payload.decompress(packed[:-4] + struct.pack("<I", len(data) + 1))


@pytest.mark.parametrize("name", COMPRESSORS)
@settings(deadline=None, max_examples=60)
@given(
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=4),
    length=st.none() | st.integers(0, 1 << 12),
)
def test_damaged_payloads_of_every_format(name: str, changes: list[tuple[int, int]], length: int | None) -> None:
    """Bytes changed, and cut off: an error of one line, no kernel, or one of the size that it names."""
    packed = bytearray(SMALL[name])
    for at, value in changes:
        packed[at % len(packed)] = value
    del packed[length:]
    with contextlib.suppress(BootImageError):
        made = payload.decompress(bytes(packed))
        assert made is None or len(made) == struct.unpack("<I", packed[-4:])[0]


def vmlinux_bytes() -> bytes:
    chance = random.Random(1)
    return b"\x7fELF" + b"".join(chance.choice([b"text " * 99, chance.randbytes(300)]) for _ in range(1500))


def test_lzo_against_lzop(tmp_path: Path) -> None:
    if shutil.which("lzop") is None:
        pytest.skip("lzop is not on this host: apt-get install lzop")
    data = vmlinux_bytes()
    for level in ("-1", "-9"):
        packed = subprocess.run(["lzop", level, "--stdout"], input=data, capture_output=True, check=True).stdout
        assert payload.decompress(with_size(data, packed)) == data


@pytest.mark.parametrize(
    ("packed", "plain"),
    [
        # Literals, then copies of every kind, by the sequences of the kernel's description.
        (b"\x15abcd\x11\0\0", b"abcd"),
        (b"\x15abcd\x6c\0\x11\0\0", b"abcd" + b"abcd"),
        (b"\x15abcd\x29\x0c\0\x11\0\0", b"abcd" + b"abcdabcdabc"),
    ],
)
def test_lzo_sequences(packed: bytes, plain: bytes) -> None:
    assert lzo.decompress(packed, len(plain)) == plain


@settings(deadline=None, max_examples=300)
@given(data=st.binary(max_size=300), size=st.integers(0, 1 << 16))
def test_lzo_of_anything(data: bytes, size: int) -> None:
    with contextlib.suppress(ValueError):
        assert len(lzo.decompress(data, size)) == size


@pytest.mark.parametrize("data", [b"", b"\xff" * 64, b"\x1f\x8b" + bytes(64), b"unknown compression method"])
def test_what_is_no_payload(data: bytes) -> None:
    with contextlib.suppress(BootImageError):
        assert payload.decompress(data) is None


def test_a_bomb_takes_no_memory() -> None:
    bomb = zstd.compress(bytes(1 << 28))
    with pytest.raises(BootImageError, match="damaged"):
        payload.decompress(bomb + struct.pack("<I", 0xFFFF_FFF0))
    assert payload.decompress(bomb + struct.pack("<I", 1000)) is None, "a beginning that is no kernel"


def test_the_cache(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = vmlinux_bytes()
    packed = COMPRESSORS["zstd"](data)
    assert kernelcache.unpack(packed) == data
    (file,) = own_cache.iterdir()
    real = payload.decompress
    monkeypatch.setattr(payload, "decompress", lambda _: pytest.fail("it is in the cache"))
    assert kernelcache.unpack(packed) == data
    monkeypatch.setattr(payload, "decompress", real)
    file.write_bytes(file.read_bytes()[:-1])
    assert kernelcache.unpack(packed) == data
    own_cache.chmod(0o500)
    for number in range(12):
        assert kernelcache.unpack(COMPRESSORS["gzip"](data + bytes([number]))) == data + bytes([number])
    assert len(list(own_cache.iterdir())) <= 9


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (b"\x7fELF" + bytes(100), "another kind of machine"),
        (b"\x7fELF\2\1" + bytes(200), "no executable"),
        (elf(64, ADDRESS, b"\xf4", address=ADDRESS, machine=183), "no executable"),
        (elf(64, ADDRESS, b"\xf4" * 99, address=ADDRESS)[:-1], "cut off"),
        (elf(64, ADDRESS + 5000, b"\xf4", address=ADDRESS), "without a 64-bit entry"),
        (elf(32, ADDRESS, b"\xf4", address=ADDRESS), "without a 64-bit entry"),
        (elf(64, 0x1000, b"\xf4", address=0x1000), "over what it is told"),
        (elf(64, ADDRESS, b"\xf4", address=ADDRESS, zeroes=1 << 40), "give it more memory"),
        (elf(64, ADDRESS, b"\xf4", address=ADDRESS, notes=note(b"Xen", 18, b"\1\0\0\0")), "PVH entry is not inside"),
        (multiboot_header(0x1_0003, 0, ADDRESS, 0, 0, 0) + bytes(64), "addresses"),
        (multiboot_header(0x1_0003, ADDRESS, ADDRESS, 0, 0, 0) + bytes(64), "entry 0x0 is not inside"),
        (multiboot_header(0x1_0003, 0x9_0000, 0x9_0000, 0, 0xB_0000, 0x9_0000) + bytes(64), "RAM is free"),
        (multiboot_header(0x1_0003), "cut off"),
        (multiboot_header(0x10) + bytes(64), "flags 0x10"),
        (multiboot_header(3) + bytes(64), "no ELF file"),
        (multiboot_header(4).ljust(48, b"\0"), "graphics"),
        (b"MZ" + bytes(5000), "no Linux bzImage"),
        (b"", "no Linux bzImage"),
    ],
)
def test_what_cannot_be_booted(image: bytes, complaint: str) -> None:
    with pytest.raises(BootImageError, match=complaint) as error:
        loader.check(image, None, "", kernels.MEMORY)
    assert "\n" not in str(error.value)
    with pytest.raises(BootImageError):
        loader.load(GuestMemory(kernels.MEMORY), image, None, "", PLATFORM)


@pytest.mark.parametrize("name", FORMATS)
def test_an_initrd_or_command_line_that_does_not_fit(name: str) -> None:
    image = FORMATS[name]()
    with pytest.raises(BootImageError, match="does not fit"):
        loader.check(image, bytes(7 << 20), "", kernels.MEMORY)
    with pytest.raises(BootImageError, match="command line"):
        loader.check(image, None, "x" * (1 << 16), kernels.MEMORY)


@settings(deadline=None, max_examples=250)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    changes=st.lists(st.tuples(st.integers(0, 0x300), st.integers(0, 255)), max_size=6),
)
def test_damaged_images_are_refused_or_loaded(name: str, changes: list[tuple[int, int]]) -> None:
    image = bytearray(FORMATS[name]())
    for at, value in changes:
        image[at % len(image)] = value
    with contextlib.suppress(BootImageError):
        loader.load(GuestMemory(kernels.MEMORY), bytes(image), INITRD, "quiet", PLATFORM)


def test_a_damaged_payload_is_an_error_and_an_unknown_one_is_the_guests() -> None:
    packed = COMPRESSORS["zstd"](vmlinux())
    with pytest.raises(BootImageError, match=r"damaged|cut off"):
        loader.load(
            GuestMemory(kernels.MEMORY), bzimage_with(packed[:30] + bytes(30) + packed[60:]), None, "", PLATFORM
        )
    unknown = bzimage_with(b"who knows what this is" * 9)
    assert linux.parse(unknown).payload[1]
    assert loader.load(GuestMemory(kernels.MEMORY), unknown, None, "", PLATFORM).address == kernels.ENTRY
