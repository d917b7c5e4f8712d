"""Events in flight of a vCPU: KVM_GET/SET_VCPU_EVENTS, KVM_INTERRUPT, KVM_NMI, MP_STATE, LAPIC."""

from __future__ import annotations

import errno

from vmonty.kvm.soft.files import answers
from vmonty.kvm.soft.user import Argument
from vmonty.kvm.soft.vcpu_state import QueuedException, VcpuState
from vmonty.kvm.uapi import Requests, flags, irq, vcpu

VALID_FLAGS = (
    flags.KVM_VCPUEVENT_VALID_NMI_PENDING
    | flags.KVM_VCPUEVENT_VALID_SIPI_VECTOR
    | flags.KVM_VCPUEVENT_VALID_SHADOW
    | flags.KVM_VCPUEVENT_VALID_PAYLOAD
)


class EventIoctls(VcpuState):
    """The ioctls."""

    @answers(Requests.KVM_INTERRUPT)
    def interrupt(self, argument: Argument) -> None:
        vector = argument.get(vcpu.kvm_interrupt).irq
        if vector > 255:
            raise OSError(errno.EINVAL, "a vector is a byte")
        if self.apic is not None:
            if self.kvm.irqs.pic is not None:
                raise OSError(errno.ENXIO, "the interrupt controller is in the kernel")
            if self.external_vector is not None:
                raise OSError(errno.EEXIST, "there is an interrupt that has not been taken")
            self.external_vector = vector
            self.kick()
            return
        self.interrupt_injected = vector

    @answers(Requests.KVM_NMI)
    def nmi(self, argument: Argument) -> None:
        self.arch.inject_nmi()

    @answers(Requests.KVM_GET_MP_STATE)
    def get_mp_state(self, argument: Argument) -> None:
        argument.put(vcpu.kvm_mp_state(mp_state=self.mp_state))

    @answers(Requests.KVM_SET_MP_STATE)
    def set_mp_state(self, argument: Argument) -> None:
        state = argument.get(vcpu.kvm_mp_state).mp_state
        known = range(flags.KVM_MP_STATE_RUNNABLE, flags.KVM_MP_STATE_SIPI_RECEIVED + 1)
        if state not in known or (self.apic is None and state != flags.KVM_MP_STATE_RUNNABLE):
            raise OSError(errno.EINVAL, "not a state that this vCPU can have")
        self.mp_state = state

    @answers(Requests.KVM_GET_LAPIC)
    def get_lapic(self, argument: Argument) -> None:
        if self.apic is None:
            raise OSError(errno.EINVAL, "there is no local APIC in the kernel")
        argument.put(self.apic.get_state())

    @answers(Requests.KVM_SET_LAPIC)
    def set_lapic(self, argument: Argument) -> None:
        if self.apic is None:
            raise OSError(errno.EINVAL, "there is no local APIC in the kernel")
        if not self.apic.set_state(argument.get(irq.kvm_lapic_state)):
            raise OSError(errno.EINVAL, "the APIC ID is another vCPU's")
        if self.kvm.irqs.ioapic is not None:
            self.kvm.irqs.ioapic.restore_rtc_tracking(self.apic)

    @answers(Requests.KVM_GET_VCPU_EVENTS)
    def get_vcpu_events(self, argument: Argument) -> None:
        argument.put(self.store_events())

    def store_events(self) -> vcpu.kvm_vcpu_events:
        payloads = self.kvm.exception_payload_enabled
        known = VALID_FLAGS if payloads else VALID_FLAGS & ~flags.KVM_VCPUEVENT_VALID_PAYLOAD
        if self.kvm.triple_fault_event:
            known |= flags.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
        events = vcpu.kvm_vcpu_events(flags=known, sipi_vector=0)
        if (exception := self.exception) is not None:
            if exception.pending and payloads:
                events.exception_has_payload = int(exception.payload is not None)
                events.exception_payload = exception.payload or 0
            elif exception.payload is not None:
                # Who does not know of payloads finds it in the register.
                self.deliver_payload(exception)
                self.exception = exception._replace(payload=None)
            events.exception.pending = int(exception.pending)
            events.exception.injected = int(not exception.pending or not payloads)
            events.exception.nr = exception.vector
            events.exception.has_error_code = int(exception.error_code is not None)
            events.exception.error_code = exception.error_code or 0
        if (vector := self.interrupt_injected) is not None:
            events.interrupt.injected, events.interrupt.nr = 1, vector
        events.interrupt.shadow = self.vendor.get_interrupt_shadow()
        if self.kvm.triple_fault_event:
            events.triple_fault.pending = int(self.triple_fault_pending)
        events.nmi.injected = int(self.nmi_injected)
        events.nmi.pending = int(self.arch.nmi_pending > 0)
        events.nmi.masked = int(self.vendor.get_nmi_mask())
        return events

    @answers(Requests.KVM_SET_VCPU_EVENTS)
    def set_vcpu_events(self, argument: Argument) -> None:
        self.load_events(argument.get(vcpu.kvm_vcpu_events))

    def load_events(self, events: vcpu.kvm_vcpu_events) -> None:
        payloads = bool(events.flags & flags.KVM_VCPUEVENT_VALID_PAYLOAD)
        triple_fault = flags.KVM_VCPUEVENT_VALID_TRIPLE_FAULT if self.kvm.triple_fault_event else 0
        if events.flags & ~(VALID_FLAGS | triple_fault) or (payloads and not self.kvm.exception_payload_enabled):
            raise OSError(errno.EINVAL, "unknown flags")
        given = events.exception
        pending = payloads and bool(given.pending)
        if (given.injected or pending) and (given.nr > 31 or given.nr == 2):
            raise OSError(errno.EINVAL, "no exception vector")
        if events.flags & triple_fault:
            self.triple_fault_pending = bool(events.triple_fault.pending)
        self.exception = None
        if given.injected or pending:
            code = given.error_code if given.has_error_code else None
            payload = events.exception_payload if pending and events.exception_has_payload else None
            self.exception = QueuedException(given.nr, code, payload, pending)
        self.interrupt_injected = events.interrupt.nr if events.interrupt.injected else None
        if events.flags & flags.KVM_VCPUEVENT_VALID_SHADOW:
            self.vendor.set_interrupt_shadow(events.interrupt.shadow)
        self.nmi_injected = bool(events.nmi.injected)
        if events.flags & flags.KVM_VCPUEVENT_VALID_NMI_PENDING:
            self.arch.nmi_pending = int(bool(events.nmi.pending))
        self.vendor.set_nmi_mask(bool(events.nmi.masked))
