"""KVM_RUN again and again on one thread."""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from types import TracebackType
from typing import TYPE_CHECKING

from vmonty.kvm.uapi import Exit, Requests
from vmonty.kvm.uapi.run import kvm_run

if TYPE_CHECKING:
    from vmonty.kvm.api.vcpu import Vcpu

EXITS = {int(reason): reason for reason in Exit}
KVM_RUN = int(Requests.KVM_RUN)
_REASON_AT: int = kvm_run.exit_reason.offset  # type: ignore[attr-defined]


class Runs:
    """Gives a function that does what *vcpu*.run() does, while the block lasts, on the thread that entered it.

    What run() does before and after each KVM_RUN is done once: that is a fourth of an exit to a device in Python.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu

    def __enter__(self) -> Callable[[], Exit | int]:
        vcpu = self._vcpu
        vcpu._begin_runs(get_ident())
        enter, interrupted, known = self._entry(), vcpu._interrupted, EXITS
        reason = vcpu.page[_REASON_AT : _REASON_AT + 4].cast("I")

        def run() -> Exit | int:
            if (result := enter()) != 0:
                return interrupted(result)
            return known.get(reason[0], reason[0])

        return run

    def _entry(self) -> Callable[[], int]:
        """KVM_RUN: its result, or minus errno."""
        provider, fd = self._vcpu.provider, self._vcpu.fileno()
        # Where a provider is of this process there are no descriptors to look up.
        if (direct := getattr(provider, "vcpu_entry", None)) is not None:
            entry: Callable[[], int] = direct(fd)
            return entry
        return lambda: provider.ioctl(fd, KVM_RUN, 0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._vcpu._end_runs()
