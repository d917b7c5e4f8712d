"""The choice of an accelerator: by name, by speed, with fall-back, and what is said about it."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable

import pytest

from vmonty import kvm
from vmonty.base.errors import KvmUnavailable, UsageError
from vmonty.kvm.api import System
from vmonty.kvm.uapi import Exit
from vmonty.vmm import accel
from vmonty.vmm.accel import KvmTooSlow, choose, measure_cpl0

from .fake_kvm import FakeKvm
from .steps import Guest, Leave, Spin

Offer = Callable[..., FakeKvm]


def spinning(mips: float) -> Callable[[int], Guest]:
    def guest(cpu: int) -> Guest:
        yield Spin(mips)

    return guest


class Absent(FakeKvm):
    """A KVM that cannot be opened."""

    def open(self) -> int:
        raise KvmUnavailable(errno.ENOENT, "open /dev/nothing", "load the module")


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Let accelerators be exactly those that the test offers: name → provider."""
    monkeypatch.setattr(accel, "ACCELERATORS", {})
    monkeypatch.setattr(kvm, "PROVIDERS", {})

    def add(name: str, provider: FakeKvm) -> FakeKvm:
        accel.ACCELERATORS[name] = f"{name} provider"
        kvm.PROVIDERS[f"{name} provider"] = (__name__, f"made {name}")
        monkeypatch.setitem(globals(), f"made {name}", lambda: provider)
        return provider

    return add


def test_a_name_is_taken_as_it_is(offer: Offer) -> None:
    fake = offer("slow", FakeKvm(spinning(1)))
    choice = choose("slow")
    assert (choice.name, choice.reason) == ("slow", "using slow, as asked")
    assert "KVM_RUN" not in fake.calls, "it is not measured"
    choice.system.close()
    assert not fake.files


def test_auto_takes_a_fast_kvm_and_says_how_fast(offer: Offer) -> None:
    fake = offer("fast", FakeKvm(spinning(4000)))
    choice = choose("auto")
    assert choice.name == "fast"
    assert choice.reason.startswith("using fast: it runs kernel code at ")
    assert not choice.system.closed
    assert len(fake.files) == 1, "the measuring VM is gone"
    choice.system.close()


def test_auto_refuses_a_slow_kvm_and_says_how_slow(offer: Offer) -> None:
    fake = offer("slow", FakeKvm(spinning(1)))
    with pytest.raises(KvmTooSlow) as refusal:
        choose("auto")
    text = str(refusal.value)
    assert text.startswith("no accelerator to choose: this host's slow runs kernel code (CPL 0) at ")
    assert "--accel slow uses it all the same" in text
    assert not fake.files


def test_auto_looks_at_all_in_order(offer: Offer) -> None:
    offer("absent", Absent())
    slow = offer("slow", FakeKvm(spinning(1)))
    offer("fast", FakeKvm(spinning(4000)))
    other = offer("other", FakeKvm(spinning(9000)))
    with choose("auto").system as system:
        assert system.provider.name == "fake"
        assert not slow.files
        assert not other.calls


def test_a_list_falls_back(offer: Offer) -> None:
    offer("absent", Absent())
    offer("slow", FakeKvm(spinning(1)))
    choice = choose("absent:slow")
    assert choice.name == "slow"
    assert choice.reason == "using slow: open /dev/nothing: No such file or directory"
    choice.system.close()
    choice = choose("auto:slow")
    assert re.fullmatch(r"using slow: this host's slow emulates kernel code, at [01]\.\d MIPS", choice.reason)
    choice.system.close()


def test_the_software_cpu_is_there_always_and_not_measured(offer: Offer) -> None:
    offer("kvm", FakeKvm(spinning(1)))
    soft = offer("soft", FakeKvm(spinning(1)))
    choice = choose("auto")
    assert choice.name == "soft"
    assert "this host's kvm emulates kernel code" in choice.reason
    assert "KVM_RUN" not in soft.calls
    choice.system.close()


def test_when_none_works_every_reason_is_given(offer: Offer) -> None:
    offer("absent", Absent())
    offer("slow", FakeKvm(spinning(1)))
    with pytest.raises(KvmUnavailable) as refusal:
        choose("absent:auto")
    text = str(refusal.value)
    assert "open /dev/nothing: load the module" in text
    assert re.search(r"at [01]\.\d MIPS", text)
    assert "\n" not in text


def test_one_refusal_is_told_as_it_is(offer: Offer) -> None:
    offer("absent", Absent())
    with pytest.raises(KvmUnavailable) as refusal:
        choose("absent")
    assert str(refusal.value) == "open /dev/nothing: No such file or directory; load the module"
    assert refusal.value.errno == errno.ENOENT


@pytest.mark.parametrize("request_", ["", "tcg", "kvm:tcg", "kvm:", ":", "auto:auto2", "KVM"])
def test_unknown_names(request_: str) -> None:
    with pytest.raises(UsageError, match=r"unknown accelerator '.*'; there are: .*auto"):
        choose(request_)


def test_a_kvm_that_makes_no_vm_is_a_refusal_not_an_end(offer: Offer) -> None:
    """Another hypervisor holds the processor: the device opens, and only the VM is refused."""
    busy = offer("busy", FakeKvm(refuses={"KVM_CREATE_VM": errno.EBUSY}))
    with pytest.raises(KvmUnavailable, match=r"KVM_CREATE_VM: .*busy; a remedy"):
        choose("auto")
    assert not busy.files
    offer("fast", FakeKvm(spinning(4000)))
    with choose("auto").system:
        pass
    assert not busy.files


@pytest.mark.parametrize("mips", [2, 1000])
def test_the_measure_is_right(mips: int) -> None:
    fake = FakeKvm(spinning(mips))
    with System(fake) as system:
        # A busy host may wake the vCPU late; it is never early.
        assert mips / 4 < measure_cpl0(system) < mips * 1.1
    assert not fake.files


def test_a_signal_in_between_does_not_change_it() -> None:
    def guest(cpu: int) -> Guest:
        yield Leave(Exit.INTR)
        yield Spin(1000)

    with System(FakeKvm(guest)) as system:
        assert 250 < measure_cpl0(system) < 1100


def test_a_loop_that_ends_is_no_speed() -> None:
    def guest(cpu: int) -> Guest:
        yield Leave(Exit.SHUTDOWN)

    with System(FakeKvm(guest)) as system, pytest.raises(KvmUnavailable, match=r"ended with .*SHUTDOWN"):
        measure_cpl0(system)


def test_every_kvm_of_this_host_can_be_measured(system: System) -> None:
    assert measure_cpl0(system) > 0.01
