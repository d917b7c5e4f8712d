"""Both transports against a driver that writes anything to their registers: a reset makes the device whole again."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmonty.testing.virtio import MmioAccess, PciAccess
from vmonty.vmm.hw.pci import config as cfg
from vmonty.vmm.virtio import mmio
from vmonty.vmm.virtio.pci import BAR_SIZE

from .conftest import Bench
from .test_hostile import DEVICES
from .test_hostile import failures as failures

REGISTERS = sorted(value for name, value in vars(mmio.Register).items() if name.isupper())
# Small numbers select and switch on; addresses of rings lie in and outside of RAM.
VALUES = st.one_of(
    st.integers(0, 16), st.sampled_from([0x8000, 0xFFFF, 0xF_F000, 16 << 20, 0xFFFF_FFFF, (1 << 64) - 1]),
    st.integers(0, (1 << 64) - 1),
)  # fmt: skip
SIZES = st.sampled_from([1, 2, 4, 4, 4, 8])
mmio_places = st.one_of(st.sampled_from(REGISTERS), st.integers(0, mmio.SIZE - 8))
pci_places = st.one_of(
    st.integers(0, 0x40), st.integers(0, BAR_SIZE - 8), st.sampled_from([0x1000, 0x2000, 0x3000, 0x3004])
)


@pytest.fixture(params=["mmio", "pci"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", DEVICES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_anything_in_the_registers(bench: Bench, failures: list[object], name: str, data: st.DataObject) -> None:
    driver = bench.driver(DEVICES[name](bench))
    access = driver.access
    places = mmio_places if bench.transport == "mmio" else pci_places
    steps = data.draw(st.lists(st.tuples(st.integers(0, 9), places, SIZES, VALUES), min_size=1, max_size=40))
    if data.draw(st.booleans()):
        driver.start(size=16)
    for kind, offset, size, value in steps:
        value &= (1 << 8 * size) - 1
        if isinstance(access, PciAccess):
            function = access._function
            if kind == 0:
                at = cfg.HEADER_SIZE + offset % (cfg.CONFIG_SIZE - cfg.HEADER_SIZE - 8)
                function.config_write(at, min(size, 4), value & 0xFFFF_FFFF)
                assert 0 <= function.config_read(at, min(size, 4)) < 1 << 32
                continue
            device = function._area
        else:
            assert isinstance(access, MmioAccess)
            device = access._device  # type: ignore[assignment]
        device.write(offset, size, value)
        assert device.read(offset, size) >= 0
    bench.settle()
    access.set_status(0)
    assert access.status() == 0
    driver.start(size=16)
    assert not driver.broken
    bench.settle()
