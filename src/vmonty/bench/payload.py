"""The payload image: built once by gcc from payloads/, run by whoever is measured."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from vmonty.bench.compiler import compiled

SOURCES = Path(__file__).parent / "payloads"
IMAGE_BASE = 0x100_0000
IMAGE_ROOM = 32 << 20
GCC = (
    "gcc", "-O2", "-ffreestanding", "-fno-stack-protector", "-fcf-protection=none", "-fno-pic", "-no-pie", "-nostdlib",
    "-static", "-Wl,-N", f"-Wl,-Ttext={IMAGE_BASE + 0x1000:#x}", f"-Wl,--section-start=.first={IMAGE_BASE:#x}",
    "-Wl,--build-id=none", "-Wl,--oformat=binary", "-Wl,-e,entry",
)  # fmt: skip

INTEGER = ["alu", "sieve", "qsort_8mb", "fib", "crc32", "sha256", "lz_match", "indirect_calls", "pointer_chase", "tree"]
TEXT = ["zlib", "regex"]
VECTOR = ["byte_copy", "memcpy_rep", "memcpy_sse", "nbody", "dot_sse", "dot_avx2", "bytes_sse"]
SYSTEM = ["system_calls", "context_switches", "page_faults", "page_faults_user"]
NAMES = (*INTEGER, *TEXT, *VECTOR, *SYSTEM)


@dataclass(frozen=True)
class Image:
    """The built image; its table of functions stands at its start."""

    path: Path
    data: bytes

    def address(self, name: str) -> int:
        """Where a payload's function is, once the image lies at IMAGE_BASE."""
        (address,) = struct.unpack_from("<Q", self.data, 8 * NAMES.index(name))
        return int(address)


def build() -> Image:
    """Compile the payloads, or find them compiled before. Raises PayloadError."""
    files = sorted(path for path in SOURCES.iterdir() if path.is_file())
    sources = [path for path in files if path.suffix in (".S", ".c")]
    path = compiled("payloads-*.bin", GCC, sources, [path for path in files if path not in sources])
    return Image(path, path.read_bytes())
