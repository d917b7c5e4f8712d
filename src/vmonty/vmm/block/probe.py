"""Which format an image has, by its first bytes."""

from __future__ import annotations

PROBED_BYTES = 512

# Formats that this program does not read are known too: taking one for a raw disk would show the guest its metadata.
_SIGNATURES = [
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "QED"),
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"conectix", "VHD"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI"),
]


def probe(head: bytes) -> str:
    """The name of the format that *head*, the first 512 bytes, belongs to: raw when it is none that is known."""
    for offset, signature, name in _SIGNATURES:
        if head.startswith(signature, offset):
            return name
    return "raw"
