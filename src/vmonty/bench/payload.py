"""The payload image: built once by gcc from payloads/, run by whoever is measured."""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vmonty.base.cachedir import cache_root
from vmonty.base.errors import VmontyError

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


class PayloadError(VmontyError):
    """The payloads cannot be built or run here."""


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
    sources = sorted(path for path in SOURCES.iterdir() if path.is_file())
    digest = hashlib.sha256(" ".join(GCC).encode() + b"".join(source.read_bytes() for source in sources)).hexdigest()
    path = cache_root() / "bench" / f"payloads-{digest[:16]}.bin"
    if not path.exists():
        if shutil.which("gcc") is None:
            raise PayloadError("the benchmark's payloads are compiled by gcc, which is not there: apt-get install gcc")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        inputs = [str(source) for source in sources if source.suffix in (".S", ".c")]
        done = subprocess.run(
            [*GCC, "-o", str(part), *inputs], capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            raise PayloadError(f"gcc could not build the benchmark's payloads: {done.stderr.strip().splitlines()[-1]}")
        part.replace(path)
    return Image(path, path.read_bytes())
