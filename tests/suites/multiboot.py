"""Run Multiboot test images that report through a serial port and isa-debug-exit, as kvm-unit-tests do, on any KVM.

    python -m tests.suites.multiboot msr.flat --provider soft
    python -m tests.suites.multiboot vmexit.flat --append cpuid --cpus 2 --cpu max,-x2apic
    python -m tests.suites.multiboot --config x86/unittests.cfg --provider soft-svm --only realmode,svm

The machine is a PC with QEMU's test devices: an exit port at 0xF4, a scratch port at 0xE0 (a byte of it at 0xE8),
interrupt lines from 0x2000 on, and scratch memory at 0xFF000000. An image has passed when it writes 0 there,
and was skipped when it writes 38. A configuration file has a section for each test, with file, smp, test_args,
qemu_params, arch, timeout.
"""

from __future__ import annotations

import argparse
import configparser
import itertools
import shlex
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vmonty import kvm
from vmonty.base.cpu_models import FEATURES
from vmonty.base.errors import VmontyError
from vmonty.vmm import boards
from vmonty.vmm.boot import multiboot
from vmonty.vmm.irq import Line
from vmonty.vmm.machine import Config
from vmonty.vmm.outcome import Ending

EXIT_PORT, SCRATCH_PORT, SCRATCH_BYTE, LINES_PORT = 0xF4, 0xE0, 0xE8, 0x2000
SCRATCH_MEMORY, SCRATCH_SIZE = 0xFF00_0000, 0x1_0000
PASSED, SKIPPED = 0, 38
# Below this vmonty's loader keeps what it tells a kernel.
ROOM, STAGING = 0x30000, 0x100000


@dataclass(frozen=True)
class Run:
    """One image and how to start it."""

    name: str
    image: Path
    arguments: str = ""
    cpus: int = 1
    cpu: str = "max"
    memory: int = 128 << 20
    seconds: float = 90


@dataclass(frozen=True)
class Result:
    """What it left with (None: it did not), what it printed, how it ended, and how long it took."""

    status: int | None
    text: str
    ending: str
    seconds: float

    @property
    def word(self) -> str:
        """PASS, SKIP, FAIL, or the ending without a status."""
        words = {None: self.ending.upper(), PASSED: "PASS", SKIPPED: "SKIP"}
        return words.get(self.status, "FAIL")


class Scratch:
    """Memory that answers as a device."""

    def __init__(self, size: int) -> None:
        self._bytes = bytearray(size)

    def read(self, offset: int, size: int) -> int:
        """What was written."""
        return int.from_bytes(self._bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Keep it."""
        self._bytes[offset : offset + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")


class LinePorts:
    """A port for each interrupt line: bit 0 is its level."""

    def __init__(self, lines: list[Line]) -> None:
        self._lines = lines

    def read(self, offset: int, size: int) -> int:
        """Nothing."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Drive the line."""
        self._lines[offset](value & 1)


def movable(image: bytes) -> bytes:
    """*image*, or one that puts it where it wants to be, if that is where the loader keeps its information."""
    kernel = multiboot.parse(image)
    segments = kernel.kernel.segments
    start = min(segment.physical for segment in segments)
    if start >= ROOM:
        return image
    end = max(segment.physical + segment.memory_size for segment in segments)
    data = bytearray(end - start)
    for segment in segments:
        at = segment.physical - start
        data[at : at + segment.file_size] = image[segment.offset : segment.offset + segment.file_size]
    header = struct.pack(
        "<8I", multiboot.HEADER_MAGIC, 1 << 16, -(multiboot.HEADER_MAGIC + (1 << 16)) & 0xFFFF_FFFF,
        STAGING, STAGING, 0, 0, STAGING + 32,
    )  # fmt: skip
    code = (
        b"\xfc\xbe" + struct.pack("<I", STAGING + 128)  # cld; mov esi, data
        + b"\xbf" + struct.pack("<I", start)  # mov edi, its place
        + b"\xb9" + struct.pack("<I", len(data)) + b"\xf3\xa4"  # mov ecx, size; rep movsb
        + b"\xb8" + struct.pack("<I", multiboot.LOADER_MAGIC)  # mov eax, magic
        + b"\xba" + struct.pack("<I", kernel.entry) + b"\xff\xe2"  # mov edx, entry; jmp edx
    )  # fmt: skip
    return (header + code).ljust(128, b"\0") + data


def offered(model: str) -> str:
    """*model* without the flags that vmonty does not know, such as the vendor's name."""
    name, *flags = model.split(",")
    return ",".join([name, *(flag for flag in flags if flag.lstrip("+-").split("=")[0] in FEATURES)])


def run(test: Run, provider: str) -> Result:
    """Run *test* to its end, or for its time. Raises VmontyError when the machine cannot be built."""
    text = bytearray()
    # A shell reads them elsewhere; this is all that it is used for.
    arguments = test.arguments.replace("`date +%s`", str(int(time.time())))
    config = Config(
        movable(test.image.read_bytes()), None, f"{test.image.name} {arguments}".strip(), test.memory, test.cpus,
        "pc", test.cpu, (f"isa-debug-exit,iobase={EXIT_PORT},iosize=4",),
    )  # fmt: skip
    begin = time.monotonic()
    with kvm.open(provider) as system, boards.create(system, config, text.extend) as machine:
        scratch = Scratch(4)
        machine.ports.place(SCRATCH_PORT, 4, scratch, "test-port")
        machine.ports.place(SCRATCH_BYTE, 1, scratch, "test-byte")
        machine.ports.place(LINES_PORT, 24, LinePorts([machine.lines.source(gsi) for gsi in range(24)]), "test-lines")
        machine.mmio.place(SCRATCH_MEMORY, SCRATCH_SIZE, Scratch(SCRATCH_SIZE), "test-memory")
        machine.start()
        outcome = machine.wait(test.seconds)
        machine.stop()
    status = outcome.status >> 1 if outcome is not None and outcome.status is not None else None
    ending = "timeout" if outcome is None else outcome.ending.value
    if outcome is not None and outcome.ending is not Ending.DEBUG_EXIT:
        text += f"\n{outcome.detail}\n{outcome.register_dump()}\n".encode()
    return Result(status, text.decode("latin-1"), ending, time.monotonic() - begin)


def configured(path: Path, arch: str) -> Iterator[Run]:
    """The tests of a configuration file that are for *arch*."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, inline_comment_prefixes=("#",))
    parser.read_string(path.read_text())
    for name in parser.sections():
        section = parser[name]
        if section.get("arch", arch) != arch:
            continue
        words = shlex.split(section.get("qemu_params", section.get("extra_params", "")))
        options = dict(itertools.pairwise(words))
        memory = options.get("-m", "128").upper()
        yield Run(
            name,
            path.parent / section["file"],
            section.get("test_args", "").strip("'\""),
            int(section.get("smp", "1")),
            offered(options.get("-cpu", "max").replace("host", "max")),
            int(memory.rstrip("MG")) << (30 if memory.endswith("G") else 20),
            float(section.get("timeout", "90")),
        )


def main() -> int:
    """The command line: 0 when everything passed or was skipped by the image itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="*")
    parser.add_argument("--provider", default="soft", help="a KVM, such as soft, soft-svm, linux")
    parser.add_argument("--config", type=Path, help="run the tests of this file")
    parser.add_argument("--only", default="", help="of those, the ones with these names, by commas")
    parser.add_argument("--arch", default="x86_64")
    parser.add_argument("--append", default="", help="arguments for the image")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--cpu", default="max", help="a CPU model")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--most", type=float, help="no test may take longer, whatever its configuration says")
    parser.add_argument("--logs", type=Path, help="a folder for what each test prints")
    options = parser.parse_args()
    tests = [
        Run(image.stem, image, options.append, options.cpus, options.cpu, seconds=options.seconds)
        for image in options.images
    ]
    if options.config:
        only = set(filter(None, options.only.split(",")))
        tests += [test for test in configured(options.config, options.arch) if not only or test.name in only]
    bad = 0
    for test in tests:
        if options.most:
            test = replace(test, seconds=min(test.seconds, options.most))
        try:
            result = run(test, options.provider)
        except (VmontyError, OSError) as error:
            result = Result(None, f"{error}\n", "refused", 0)
        bad += result.word not in ("PASS", "SKIP")
        if options.logs:
            (options.logs / f"{test.name}.{options.provider}.log").write_text(result.text)
        else:
            sys.stdout.write(result.text)
        summary = [line for line in result.text.splitlines() if line.startswith("SUMMARY")]
        print(f"{result.word:10} {test.name:32} {result.seconds:6.1f} s  {' '.join(summary[-1:])}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
