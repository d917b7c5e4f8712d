"""Which format an image has, by its first bytes."""

from __future__ import annotations

PROBED_BYTES = 512  # at either end

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
# In the last 512 bytes; those of a fixed VHD are all that it has.
_TRAILERS = [(b"koly", "DMG"), (b"conectix", "VHD")]


def probe(head: bytes, tail: bytes = b"") -> str:
    """The name of the format that *head*, the first 512 bytes, belongs to: raw when it is none that is known.

    *tail*, the last 512, tells of some more.
    """
    for offset, signature, name in _SIGNATURES:
        if head.startswith(signature, offset):
            return name
    for signature, name in _TRAILERS:
        if tail.startswith(signature):
            return name
    return "raw"
