"""What the processor underneath has to have: translated code and its stubs are its instructions.

What only guests would use isn't asked for here; ``models`` does not offer it where the host lacks it.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from vmonty.base.errors import VmontyError

# By /proc/cpuinfo's names, for what. The kernel leaves out what it does not enable, as AVX without YMM state in XCR0.
REQUIRED = {
    "bmi2": "PEXT, RORX and SARX of every memory access and indirect jump",
    "avx": "VMOVDQU and VZEROUPPER of the vector state",
    "xsave": "XSAVE and XRSTOR of the vector state",
    "lahf_lm": "LAHF and SAHF in 64-bit mode: the guest's flags",
}
CPUINFO = Path("/proc/cpuinfo")


class HostCpuError(VmontyError, RuntimeError):
    """The host's processor cannot run translated code; the line names what is missing."""


@cache
def host_flags() -> frozenset[str]:
    """The flags of the processor underneath, by /proc/cpuinfo's names. Raises OSError when it cannot be read."""
    for line in CPUINFO.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def require() -> None:
    """Raise HostCpuError unless this host can run translated code."""
    machine = os.uname().machine
    if machine not in ("x86_64", "AMD64"):
        raise HostCpuError(f"the software CPU needs an x86-64 processor, and this host's is {machine or 'unknown'}")
    try:
        flags = host_flags()
    except OSError as error:
        raise HostCpuError(
            f"the software CPU cannot tell what the processor has: {CPUINFO}: {error.strerror}; mount /proc"
        ) from error
    if missing := [name for name in REQUIRED if name not in flags]:
        raise HostCpuError(
            f"the software CPU needs {', '.join(missing)}, which this host's processor lacks or its kernel has "
            "switched off; use a newer processor, or in a VM give it its host's CPU model"
        )
