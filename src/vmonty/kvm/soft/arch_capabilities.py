"""IA32_ARCH_CAPABILITIES: flaws of processors that a guest need not work around.

As kvm_get_arch_capabilities() says it: what the host's processor does not have, a guest that runs on it does not have
either. Without it a Linux guest changes page tables at each system call (Meltdown) and clears buffers (MDS), in vain.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

# SDM, "Enumeration of Architectural Capabilities"; by the name of the host's report in sysfs.
BITS: dict[str, int] = {
    "meltdown": 1 << 0,  # RDCL_NO
    "l1tf": 1 << 3,  # SKIP_L1DFL_VMENTRY
    "spec_store_bypass": 1 << 4,  # SSB_NO
    "mds": 1 << 5,  # MDS_NO
    "itlb_multihit": 1 << 6,  # IF_PSCHANGE_MC_NO
    "tsx_async_abort": 1 << 8,  # TAA_NO
    "mmio_stale_data": 7 << 13,  # SBDR_SSDP_NO, FBSDP_NO, PSDP_NO
    "gather_data_sampling": 1 << 26,  # GDS_NO
    "reg_file_data_sampling": 1 << 27,  # RFDS_NO
    "indirect_target_selection": 1 << 62,  # ITS_NO
}
FOLDER = Path("/sys/devices/system/cpu/vulnerabilities")
NOT_AFFECTED = "Not affected"


def host_report(name: str) -> str:
    """What the host's kernel says of a flaw; empty when it does not know it."""
    try:
        return (FOLDER / name).read_text().strip()
    except OSError:
        return ""


def capabilities(report: Callable[[str], str] = host_report) -> int:
    """The register's value."""
    return sum(bit for name, bit in BITS.items() if report(name) == NOT_AFFECTED)
