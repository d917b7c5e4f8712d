"""A guest of the software KVM with nothing but RAM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vmonty import kvm
from vmonty.base.ram import Ram
from vmonty.kvm.soft import modules
from vmonty.testing.guests import RAM_SIZE, TinyGuest


@contextmanager
def plain_guest(text: str) -> Iterator[TinyGuest]:
    """One of the module that *text* names, with its parameters: ``kvm_intel ept=0``."""
    name, parameters = modules.parse(text)
    with modules.only(name, **parameters), kvm.open("soft") as system, system.create_vm() as vm:
        ram = Ram(RAM_SIZE)
        vm.set_user_memory_region(0, 0, ram)
        with vm.create_vcpu() as vcpu:
            yield TinyGuest(vm, vcpu, ram)
