"""Fixtures of the ABI suite: provider → system → vm → guest, each on the KVM under test."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import pytest

from vmonty import kvm
from vmonty.base.errors import KvmUnavailable
from vmonty.base.ram import Ram
from vmonty.kvm.api import CpuidEntry, System, Vcpu, Vm
from vmonty.kvm.soft import modules
from vmonty.kvm.uapi import Cap
from vmonty.testing.guests import RAM_SIZE, Mode, TinyGuest

from .known_gaps import SOFT_UNFINISHED, why_skip
from .runner import Runner, runners
from .second_vcpu import second_vcpu
from .watched import WatchedProvider

CATALOGUE = "test_catalogue.py"
# Below the firmware of a PC.
IDENTITY_MAP = 0xFEFF_C000
# The fixtures that create a vCPU, and beside it a second one with --vcpus 2.
WITH_VCPU = {"vcpu", "chipped"}
_WATCHED: dict[str, WatchedProvider] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "known_gap(name): skip on a KVM that known_gaps.py says is wrong here")
    config.addinivalue_line("markers", "needs(cap, ...): skip on a KVM without these capabilities")
    chosen = config.getoption("--provider")
    if chosen is not None and chosen not in kvm.PROVIDERS:
        raise pytest.UsageError(f"--provider={chosen}: there are {', '.join(sorted(kvm.PROVIDERS))}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "provider_name" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--provider")
        # The others need a vendor module of their own, and only one can be loaded: they are asked for by name.
        metafunc.parametrize("provider_name", [chosen] if chosen else ["linux", "soft"], scope="session")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The catalogue's tests come last, and know whether the whole suite was selected."""
    items.sort(key=lambda item: item.path.name == CATALOGUE)
    for item in items:
        if reason := why_unfinished(item):
            item.add_marker(pytest.mark.xfail(strict=True, reason=f"soft: {reason}"))
    if config.getoption("--vcpus") == 2:
        _give_second_vcpu(config, items)
    folder = Path(__file__).parent
    collected = {item.path.name for item in items if item.path.parent == folder}
    options = config.option
    config.stash[WHOLE_SUITE] = (
        collected == {path.name for path in folder.glob("test_*.py")}
        and not (options.keyword or options.markexpr or options.deselect or getattr(options, "lf", False))
        and not any("::" in argument for argument in config.args)
        and config.getoption("--vcpus") == 1
    )


def _give_second_vcpu(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only tests with a vCPU of the fixtures can have another one beside it; others would be what they are without."""
    chosen = [item for item in items if not WITH_VCPU.isdisjoint(getattr(item, "fixturenames", ()))]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def why_unfinished(item: pytest.Item) -> str | None:
    """Why *item*, run on the software KVM, is expected to fail."""
    callspec = getattr(item, "callspec", None)
    provider = "" if callspec is None else str(callspec.params.get("provider_name"))
    if not provider.startswith("soft"):
        return None
    name, _, case = item.name.rstrip("]").partition(f"[{provider}")
    return SOFT_UNFINISHED.get(name) or SOFT_UNFINISHED.get(f"{name}[{case.removeprefix('-')}]")


WHOLE_SUITE = pytest.StashKey[bool]()


@cache
def _unavailable(name: str) -> KvmUnavailable | None:
    try:
        kvm.open(name).close()
    except KvmUnavailable as error:
        return error
    return None


def watched(name: str) -> WatchedProvider:
    """The provider under test; one for the whole session, so that its count of requests is complete."""
    if name not in _WATCHED:
        _WATCHED[name] = WatchedProvider(kvm.provider(name))
    return _WATCHED[name]


@pytest.fixture
def provider(provider_name: str, request: pytest.FixtureRequest) -> WatchedProvider:
    """The KVM under test. One that cannot be opened is a skip, or a failure if it was asked for by name."""
    error = _unavailable(provider_name)
    if error is not None:
        missing_in_ci = error.errno == errno.ENOENT and bool(os.environ.get("CI"))
        if request.config.getoption("--provider") and not missing_in_ci:
            pytest.fail(f"--provider={provider_name}: {error}", pytrace=False)
        pytest.skip(f"provider {provider_name}: {error}")
    for marker in request.node.iter_markers("known_gap"):
        if request.config.getoption("--try-known-gaps"):
            break
        reason = why_skip(provider_name, marker.args[0])
        if reason is not None:
            pytest.skip(reason)
    return watched(provider_name)


@pytest.fixture
def system(provider: WatchedProvider, request: pytest.FixtureRequest) -> Iterator[System]:
    """An open system file, with every capability that the test says it needs. Nothing of it is left by the test."""
    before = _in_use()
    with System(provider) as opened:
        needed = [cap for marker in request.node.iter_markers("needs") for cap in marker.args]
        if needed:
            with opened.create_vm() as probe:
                absent = [Cap(cap).name for cap in needed if probe.check_extension(cap) <= 0]
            if absent:
                pytest.skip(f"this KVM has no KVM_CAP_{', KVM_CAP_'.join(absent)}")
        yield opened
    assert _in_use() == before, "the test left a file open: the vendor module cannot be unloaded"


def _in_use() -> int:
    """How many files use the software KVM's vendor module."""
    module = modules.loaded()
    return 0 if module is None else module.references


@pytest.fixture
def vm(system: System) -> Iterator[Vm]:
    """A VM without memory, chips or vCPUs."""
    with system.create_vm() as made:
        yield made


@pytest.fixture
def ram() -> Ram:
    """RAM that is in no slot yet."""
    return Ram(RAM_SIZE)


@pytest.fixture
def configured(vm: Vm, ram: Ram) -> Vm:
    """A VM with `ram` in slot 0 at 0, and where Intel's real mode may keep its tables, as all clients have it."""
    vm.set_identity_map_addr(IDENTITY_MAP)
    vm.set_tss_addr(IDENTITY_MAP + 0x1000)
    vm.set_user_memory_region(0, 0, ram)
    return vm


def others(request: pytest.FixtureRequest, vm: Vm, chipped: bool = False) -> AbstractContextManager[object]:
    """The second vCPU, if there is to be one."""
    return second_vcpu(vm, chipped) if request.config.getoption("--vcpus") == 2 else nullcontext()


@pytest.fixture
def vcpu(configured: Vm, request: pytest.FixtureRequest) -> Iterator[Vcpu]:
    """vCPU 0 in its reset state, in a VM with RAM and no irqchip."""
    with configured.create_vcpu() as made, others(request, configured):
        yield made


@pytest.fixture
def guest(configured: Vm, vcpu: Vcpu, ram: Ram) -> TinyGuest:
    """A guest to load a program into; no irqchip."""
    return TinyGuest(configured, vcpu, ram)


@pytest.fixture
def chipped(configured: Vm, ram: Ram, request: pytest.FixtureRequest) -> Iterator[TinyGuest]:
    """A guest whose VM has the in-kernel irqchip."""
    configured.create_irqchip()
    with configured.create_vcpu() as made, others(request, configured, chipped=True):
        yield TinyGuest(configured, made, ram)


@pytest.fixture
def cpuid(system: System) -> list[CpuidEntry]:
    """All that this KVM can offer a guest."""
    return system.supported_cpuid()


@pytest.fixture
def runner() -> Iterator[Callable[[Vcpu], Runner]]:
    """A factory of threads that run vCPUs; whatever still runs when the test ends is kicked out."""
    with runners() as start:
        yield start


@pytest.fixture(params=list(Mode), ids=[mode.value for mode in Mode])
def mode(request: pytest.FixtureRequest) -> Mode:
    """Every mode of the processor that tiny guests know."""
    chosen: Mode = request.param
    return chosen


def pytest_sessionfinish(session: pytest.Session) -> None:
    for provider in _WATCHED.values():
        provider.stop()


def ids(rows: Sequence[tuple[object, ...]]) -> list[str]:
    """The first column of a table: its rows' ids."""
    return [str(row[0]) for row in rows]
