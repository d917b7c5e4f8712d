"""The setup header: what is a kernel, and what is refused with one line."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmonty.base.errors import BootImageError
from vmonty.guests import busybox
from vmonty.guests.cache import Shelf
from vmonty.vmm.boot import acpi, linux, lowmem
from vmonty.vmm.memory import GuestMemory

from . import kernels

PLATFORM = acpi.Platform(cpus=1, pm_base=0x600)
HALT = b"\xf4"
IMAGE = kernels.bzimage(HALT * 64)


@pytest.fixture(scope="module")
def distribution_kernel() -> bytes:
    """The default guest's kernel, when it is in the cache: this suite fetches nothing."""
    kernel = Shelf("guests", "busybox").get("vmlinuz")
    if kernel is None:
        pytest.skip(f"the {busybox.__name__} guest is not in the cache: vmonty guest build busybox")
    return kernel.path.read_bytes()


def test_fields() -> None:
    header = linux.parse(kernels.bzimage(HALT, pref_address=0x123_0000, init_size=0x45_6000, setup_sects=7))
    assert (header.setup_size, header.version) == (8 * 512, 0x20F)
    assert (header.pref_address, header.init_size) == (0x123_0000, 0x45_6000)
    assert (header.alignment, header.relocatable) == (kernels.LOAD_ADDRESS, True)
    assert (header.cmdline_size, header.initrd_addr_max) == (2047, 0x7FFF_FFFF)


def test_no_setup_sectors_means_four() -> None:
    image = kernels.bzimage(HALT, setup_sects=4)
    assert linux.parse(image[:0x1F1] + b"\0" + image[0x1F2:]).setup_size == 5 * 512


def test_a_distributions_kernel(distribution_kernel: bytes) -> None:
    header = linux.parse(distribution_kernel)
    assert header.version >= 0x20F
    assert header.relocatable
    assert header.init_size > len(distribution_kernel) - header.setup_size
    assert header.pref_address % header.alignment == 0
    assert header.cmdline_size >= 255
    assert 0x202 + header.raw[0x201 - linux.HEADER] == linux.HEADER + len(header.raw)


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (b"", "no Linux bzImage"),
        (b"#!/bin/sh\n" * 1000, "no Linux bzImage"),
        (b"\x7fELF" + bytes(4096), "no Linux bzImage"),
        (IMAGE[:0x26F], "no Linux bzImage"),
        (IMAGE[:0x280], "truncated: 640 bytes"),
        (IMAGE[:-64], "truncated"),
        (kernels.bzimage(HALT, version=0x201), r"boot protocol 2\.01 is too old"),
        (kernels.bzimage(HALT, loadflags=0), "zImage"),
        (kernels.bzimage(HALT, kernel_alignment=0), "alignment of 0x0"),
        (kernels.bzimage(HALT, kernel_alignment=0x30_0000), "no power of two"),
    ],
)
def test_what_is_no_kernel(image: bytes, complaint: str) -> None:
    with pytest.raises(BootImageError, match=complaint) as error:
        linux.parse(image)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [0, 0x1F1, 0x202, 0x26F, 0x400, 0x4400, 1 << 20])
def test_a_distributions_kernel_cut_short(distribution_kernel: bytes, kept: int) -> None:
    with pytest.raises(BootImageError):
        linux.parse(distribution_kernel[:kept])
    # What lies behind the last paragraph is a signature, which nobody here reads.
    paragraphs = struct.unpack_from("<I", distribution_kernel, 0x1F4)[0]
    end = linux.parse(distribution_kernel).setup_size + paragraphs * 16
    linux.parse(distribution_kernel[:end])
    with pytest.raises(BootImageError, match="truncated"):
        linux.parse(distribution_kernel[: end - 16])


@given(length=st.integers(0, len(IMAGE) + 16))
def test_a_kernel_of_any_length(length: int) -> None:
    with contextlib.suppress(BootImageError):
        linux.load(GuestMemory(kernels.MEMORY), IMAGE.ljust(length, b"\0")[:length], None, "", PLATFORM)


interesting = st.one_of(
    st.sampled_from([0, 1, 0xFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 63, (1 << 64) - 1]),
    st.integers(0, 1 << 64),
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(kernels.HEADER_FIELDS)), interesting, max_size=4))
def test_a_mutated_header_is_refused_or_loaded(changes: dict[str, int]) -> None:
    image = bytearray(IMAGE)
    for name, value in changes.items():
        offset, form = kernels.HEADER_FIELDS[name]
        struct.pack_into("<" + form, image, offset, value & ((1 << 8 * struct.calcsize(form)) - 1))
    _load_or_refuse(bytes(image))


@settings(deadline=None)
@given(st.dictionaries(st.integers(0x1F1, 0x26F), st.integers(0, 255), max_size=20))
def test_random_bytes_in_the_header(changes: dict[int, int]) -> None:
    image = bytearray(IMAGE)
    for at, value in changes.items():
        image[at] = value
    _load_or_refuse(bytes(image))


def _load_or_refuse(image: bytes) -> None:
    memory = GuestMemory(kernels.MEMORY)
    with contextlib.suppress(BootImageError):
        entry = linux.load(memory, image, b"an initrd", "quiet", PLATFORM).address
        assert lowmem.HIGH_MEMORY <= entry < memory.size
