"""Meta-tests: every request that the API makes is exercised, every public method is called by some test."""

from __future__ import annotations

import ast
import inspect
import types
from pathlib import Path

import pytest

from vmonty.kvm import api
from vmonty.kvm.api import Device, Handle, Stats, System, Vcpu, Vm
from vmonty.kvm.uapi import Ioctl, Requests

from .conftest import WHOLE_SUITE
from .watched import WatchedProvider

# Request → why the suite does not make it through a provider under test.
NOT_EXERCISED: dict[str, str] = {}
# What kvmtool and QEMU call.
CLIENTS = """
GET_API_VERSION CREATE_VM SET_TSS_ADDR CREATE_PIT2 CREATE_IRQCHIP SET_USER_MEMORY_REGION SET_GSI_ROUTING CREATE_VCPU
GET_VCPU_MMAP_SIZE GET_SUPPORTED_CPUID SET_CPUID2 GET_SREGS SET_SREGS SET_REGS SET_FPU SET_MSRS GET_LAPIC SET_LAPIC RUN
CHECK_EXTENSION GET_MSR_INDEX_LIST GET_MSR_FEATURE_INDEX_LIST X86_GET_MCE_CAP_SUPPORTED SET_IDENTITY_MAP_ADDR IOEVENTFD
REGISTER_COALESCED_MMIO UNREGISTER_COALESCED_MMIO IRQ_LINE_STATUS GET_PIT2 SET_PIT2 SET_IRQCHIP GET_CLOCK SET_CLOCK
ENABLE_CAP X86_SET_MSR_FILTER GET_DEVICE_ATTR SET_DEVICE_ATTR GET_REGS GET_SREGS2 SET_SREGS2 GET_MSRS GET_XCRS SET_XCRS
GET_DEBUGREGS SET_DEBUGREGS GET_VCPU_EVENTS SET_VCPU_EVENTS GET_MP_STATE SET_MP_STATE GET_TSC_KHZ SET_TSC_KHZ GET_XSAVE2
SET_XSAVE X86_SETUP_MCE TPR_ACCESS_REPORTING SET_VAPIC_ADDR KVMCLOCK_CTRL INTERRUPT GET_DIRTY_LOG
SET_USER_MEMORY_REGION2 GET_STATS_FD TRANSLATE SET_GUEST_DEBUG
"""
# Class.method → why no test calls it.
NOT_CALLED: dict[str, str] = {
    "Vm.port_window": "only the software KVM has it: kvm_soft/test_port_window.py",
    "Vm.port_cell": "only the software KVM has it: kvm_soft/test_port_window.py",
}


def attributes(folder: Path, pattern: str) -> set[str]:
    """Every ``something.name`` in the files of *folder*."""
    trees = [ast.parse(path.read_text()) for path in folder.glob(pattern)]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def requests_of_the_api() -> set[str]:
    names = attributes(Path(next(iter(api.__path__))), "*.py")
    return {name for name in names if isinstance(getattr(Requests, name, None), Ioctl)}


def public_methods() -> set[str]:
    found = set()
    for cls in (Handle, System, Vm, Vcpu, Device, Stats):
        for name, member in vars(cls).items():
            if not name.startswith("_") and isinstance(member, types.FunctionType | property | staticmethod):
                found.add(f"{cls.__name__}.{name}")
    return found


def test_every_public_method_is_called() -> None:
    used = attributes(Path(__file__).parent, "*.py")
    missing = {name for name in public_methods() if name.partition(".")[2] not in used} - NOT_CALLED.keys()
    assert not missing
    assert NOT_CALLED.keys() <= public_methods(), "an exclusion of what is no longer there"


def test_every_request_of_the_api_is_exercised(provider: WatchedProvider, request: pytest.FixtureRequest) -> None:
    """By the whole suite, which this test comes at the end of."""
    if not request.config.stash[WHOLE_SUITE]:
        pytest.skip("only a part of the suite was selected")
    missing = requests_of_the_api() - provider.names.keys() - NOT_EXERCISED.keys()
    assert not missing
    assert NOT_EXERCISED.keys() <= requests_of_the_api(), "an exclusion of what is no longer there"


def test_the_api_covers_what_clients_call() -> None:
    """The requests that kvmtool and QEMU make."""
    assert {f"KVM_{name}" for name in CLIENTS.split()} <= requests_of_the_api()


def test_the_api_is_documented() -> None:
    """Every public method says what it does."""
    for cls in (Handle, System, Vm, Vcpu, Device, Stats):
        for name, member in vars(cls).items():
            if not name.startswith("_") and callable(member):
                assert inspect.getdoc(member), f"{cls.__name__}.{name}"
