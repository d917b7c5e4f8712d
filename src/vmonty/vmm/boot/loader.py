"""Direct boot: which kind of kernel an image is, and loading it."""

from __future__ import annotations

from vmonty.base.errors import BootImageError
from vmonty.vmm.boot import acpi, elf, kernelcache, linux, multiboot, pvh
from vmonty.vmm.boot.entry import Entry
from vmonty.vmm.memory import GuestMemory


def check(kernel: bytes, initrd: bytes | None, command_line: str, low_end: int) -> None:
    """Raise BootImageError for what cannot be booted in RAM that ends at *low_end*, below 4 GiB.

    It does not decompress: what only that shows, load() says.
    """
    match kind(kernel):
        case "bzimage":
            linux.place(kernel, initrd, command_line, low_end)
        case "multiboot":
            multiboot.place(multiboot.parse(kernel), initrd, command_line, low_end)
        case "pvh":
            pvh.place(elf.parse(kernel), initrd, command_line, low_end)
        case _:
            linux.place_elf(elf.parse(kernel), linux.elf_header(), initrd, command_line, low_end)


def kind(kernel: bytes) -> str:
    """bzimage, multiboot, pvh or vmlinux. Raises BootImageError for an image that is none of them."""
    if kernel[0x202:0x206] == b"HdrS":
        return "bzimage"
    if multiboot.is_multiboot(kernel):
        return "multiboot"
    if kernel[:4] == elf.MAGIC:
        return "pvh" if pvh.entry_of(elf.parse(kernel)) is not None else "vmlinux"
    raise BootImageError(
        "the kernel is no Linux bzImage (no HdrS signature), ELF or multiboot image; give a distribution's vmlinuz file"
    )


def load(memory: GuestMemory, kernel: bytes, initrd: bytes | None, command_line: str, platform: acpi.Platform) -> Entry:
    """Put everything that the kernel needs into *memory*, which is zero; enter() of the result starts it.

    Raises BootImageError.
    """
    match kind(kernel):
        case "bzimage":
            return linux.load(memory, kernel, initrd, command_line, platform, kernelcache.unpack)
        case "multiboot":
            return multiboot.load(memory, kernel, initrd, command_line, platform)
        case "pvh":
            return pvh.load(memory, kernel, initrd, command_line, platform)
        case _:
            return linux.load_elf(memory, kernel, initrd, command_line, platform)
