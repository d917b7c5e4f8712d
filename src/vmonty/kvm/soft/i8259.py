"""The pair of 8259A interrupt controllers, as KVM's in-kernel PIC.

Behaviour is that of Linux's KVM, seen from guests (ports 0x20, 0x21, 0xA0, 0xA1, and the ELCR at 0x4D0, 0x4D1) and
from user space (KVM_GET/SET_IRQCHIP, the results of KVM_IRQ_LINE_STATUS); section titles are those of the 8259A
data sheet. Where KVM has a choice of its own, so have we:

- A poll ("Poll Command") ends the request at once: it never sets an in-service bit. Without a request it gives 7.
- The master sees the slave's output as one edge on its input 2 each time that the slave's state is evaluated.
- ICW1's single and level bits are ignored; the ELCR decides on level or edge.

Where KVM keeps a mode's bit but leaves the mode out, the data sheet decides: the special mask mode works.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from vmonty.kvm.soft.iodev import KvmIoBus
from vmonty.kvm.uapi.irq import kvm_pic_state

__all__ = ["I8259", "PIC_NUM_PINS", "Pic"]

PIC_NUM_PINS = 16
# Inputs that the ELCR cannot make level-triggered: timer, keyboard, cascade; real-time clock, FPU.
_ELCR_MASKS = (0xF8, 0xDE)
_CASCADE = 2
_PORTS = ((0x20, 2), (0xA0, 2), (0x4D0, 2))

_FIELDS = tuple(str(field[0]) for field in kvm_pic_state._fields_)


def _nothing(*_: object) -> None:
    """Nobody listens."""


class I8259:
    """One 8259A: registers (named as in kvm_pic_state) and its priority resolver."""

    def __init__(self, chip: int, ended: Callable[[int, int], None], masked: Callable[[int, int, bool], None]) -> None:
        """The master is *chip* 0. For *ended* and *masked* see Pic."""
        self.chip = chip
        self.master = chip == 0
        self._ended = ended
        self._masked = masked
        self.last_irr = self.irr = self.imr = self.isr = 0
        self.priority_add = self.irq_base = 0
        self.read_reg_select = self.poll = self.special_mask = 0
        self.init_state = self.init4 = 0
        self.auto_eoi = self.rotate_on_auto_eoi = self.special_fully_nested_mode = 0
        self.elcr = 0
        self.elcr_mask = _ELCR_MASKS[chip]

    def get_state(self) -> kvm_pic_state:
        """The registers, as KVM_GET_IRQCHIP shows them."""
        return kvm_pic_state(**{name: getattr(self, name) for name in _FIELDS})

    def set_state(self, state: kvm_pic_state) -> None:
        """Take all registers as they are; user space may put nonsense into its own machine."""
        for name in _FIELDS:
            setattr(self, name, getattr(state, name))

    def set_line(self, irq: int, level: int) -> int:
        """Drive input *irq* (0–7); -1 when it is masked, 0 when a request was already pending, else 1."""
        bit = 1 << irq
        result = 1
        if not level:
            self.last_irr &= ~bit
            if self.elcr & bit:
                self.irr &= ~bit
        else:
            if self.elcr & bit or not self.last_irr & bit:
                result = 0 if self.irr & bit else 1
                self.irr |= bit
            self.last_irr |= bit
        return -1 if self.imr & bit else result

    def highest(self, requests: int) -> int | None:
        """The place of the most urgent of *requests*: 0 is the top of the present rotation."""
        if not requests:
            return None
        turn = self.priority_add & 7
        rotated = (requests >> turn | requests << (8 - turn)) & 0xFF
        return (rotated & -rotated).bit_length() - 1

    def _in_service(self) -> int:
        """The in-service bits that hold others back. See "Special Mask Mode"."""
        return self.isr & ~self.imr if self.special_mask else self.isr

    def request(self) -> int | None:
        """The input that may interrupt now, or None. See "Fully Nested Mode", "Special Fully Nested Mode"."""
        place = self.highest(self.irr & ~self.imr)
        if place is None:
            return None
        busy = self._in_service()
        if self.special_fully_nested_mode and self.master:
            busy &= ~(1 << _CASCADE)
        current = self.highest(busy)
        if current is not None and current <= place:
            return None
        return (place + self.priority_add) & 7

    def acknowledge(self, irq: int) -> None:
        """INTA for *irq*. A level request stays pending as long as its line is high. See "Automatic EOI Mode"."""
        self.isr |= 1 << irq
        if not self.elcr & 1 << irq:
            self.irr &= ~(1 << irq)
        if self.auto_eoi:
            if self.rotate_on_auto_eoi:
                self.priority_add = (irq + 1) & 7
            self.end(irq)

    def end(self, irq: int) -> None:
        """End of interrupt: *irq* is no longer in service."""
        self.isr &= ~(1 << irq)
        self._ended(self.chip, irq + 8 * self.chip)

    def _initialize(self, value: int) -> None:
        """ICW1. Level-triggered lines that are high keep their requests; edges are lost, and count as ended.

        What is in service otherwise stays so, as in KVM.
        """
        self.init4 = value & 1
        lost = self.irr & ~self.elcr
        self.irr &= self.elcr
        self.last_irr = self.imr = 0
        self.priority_add = self.special_mask = self.read_reg_select = 0
        if not self.init4:
            self.special_fully_nested_mode = self.auto_eoi = 0
        self.init_state = 1
        for irq in range(8):
            if lost >> irq & 1:
                self.end(irq)

    def write_command(self, value: int) -> bool:
        """A write with A0 = 0: ICW1, OCW3 or OCW2. Whether the chip's request may have changed."""
        if value & 0x10:
            self._initialize(value)
            return False
        if value & 0x08:
            if value & 0x04:
                self.poll = 1
            if value & 0x02:
                self.read_reg_select = value & 1
            if value & 0x40 and self.special_mask != value >> 5 & 1:
                self.special_mask = value >> 5 & 1
                return True
            return False
        return self._end_command(value)

    def _end_command(self, value: int) -> bool:
        """OCW2: R, SL and EOI in bits 7–5, a level in bits 2–0. See "Operation Command Word 2"."""
        rotate, specific, end = value >> 7 & 1, value >> 6 & 1, value >> 5 & 1
        if not end:
            if not specific:
                self.rotate_on_auto_eoi = rotate
                return False
            if rotate:
                self.priority_add = (value + 1) & 7
            return bool(rotate)
        if specific:
            irq = value & 7
        else:
            place = self.highest(self._in_service())
            if place is None:
                return False
            irq = (place + self.priority_add) & 7
        if rotate:
            self.priority_add = (irq + 1) & 7
        self.end(irq)
        return True

    def write_data(self, value: int) -> bool:
        """A write with A0 = 1: ICW2 to ICW4 in turn, else the mask. Whether the chip's request may have changed."""
        match self.init_state:
            case 0:
                changed = self.imr ^ value
                self.imr = value
                for irq in range(8):
                    if changed >> irq & 1:
                        self._masked(self.chip, irq + 8 * self.chip, bool(value >> irq & 1))
                return True
            case 1:
                self.irq_base = value & 0xF8
                self.init_state = 2
            case 2:
                self.init_state = 3 if self.init4 else 0
            case 3:
                self.special_fully_nested_mode = value >> 4 & 1
                self.auto_eoi = value >> 1 & 1
                self.init_state = 0
        return False

    def read(self, port: int) -> int:
        """A read of the mask (A0 = 1), or of what OCW3 has selected."""
        if port & 1:
            return self.imr
        return self.isr if self.read_reg_select else self.irr


class Pic:
    """Master and slave, and the INTR line to the processors. An IoDevice; every entry takes *lock*.

    *output* is called with INTR's level whenever that was evaluated to a change, or to be raised again after an
    acknowledge. *ended(chip, pin)* and *masked(chip, pin, is_masked)* get KVM_IRQCHIP_PIC_MASTER or _SLAVE and the
    pin counted over both chips (0–15).
    """

    def __init__(
        self,
        lock: threading.RLock,
        output: Callable[[bool], None] = _nothing,
        ended: Callable[[int, int], None] = _nothing,
        masked: Callable[[int, int, bool], None] = _nothing,
    ) -> None:
        self.lock = lock
        self.output = False
        self._notify_output = output
        self.chips = (I8259(0, ended, masked), I8259(1, ended, masked))
        # Which sources hold a line up: a set of bits per pin.
        self._sources = [0] * PIC_NUM_PINS

    def register(self, bus: KvmIoBus) -> None:
        """Put the ports on the PIO bus."""
        for port, length in _PORTS:
            bus.register(port, length, self)

    def set_irq(self, irq: int, irq_source_id: int, level: int) -> int:
        """Let source *irq_source_id* drive pin *irq* (0–15); the line is up while any source holds it.

        Return -1 when the pin is masked, 0 when its request was already pending, else 1.
        """
        with self.lock:
            bit = 1 << irq_source_id
            self._sources[irq] = self._sources[irq] | bit if level else self._sources[irq] & ~bit
            result = self.chips[irq >> 3].set_line(irq & 7, 1 if self._sources[irq] else 0)
            self._update()
            return result

    def clear_source(self, irq_source_id: int) -> None:
        """Forget that *irq_source_id* holds any line; the lines move with their next change."""
        with self.lock:
            self._sources = [sources & ~(1 << irq_source_id) for sources in self._sources]

    def read_irq(self) -> int:
        """The processor's INTA cycles: acknowledge the most urgent request, and return its vector.

        Without a request it is the spurious vector of input 7. See "Interrupt Sequence", "Cascade Mode".
        """
        with self.lock:
            master, slave = self.chips
            irq = master.request()
            if irq is None:
                vector = master.irq_base + 7
            else:
                master.acknowledge(irq)
                vector = master.irq_base + irq
                if irq == _CASCADE:
                    irq = slave.request()
                    if irq is not None:
                        slave.acknowledge(irq)
                    vector = slave.irq_base + (7 if irq is None else irq)
            self._update()
            return vector & 0xFF

    def _update(self) -> None:
        """Pass the slave's request on to the master, and the master's to the processors."""
        master, slave = self.chips
        if slave.request() is not None:
            master.set_line(_CASCADE, 1)
            master.set_line(_CASCADE, 0)
        level = master.request() is not None
        changed = level != self.output
        self.output = level
        if changed:
            self._notify_output(level)

    def _poll(self, chip: I8259) -> int:
        chip.poll = 0
        irq = chip.request()
        if irq is None:
            self._update()
            return 7
        if not chip.master:
            self.chips[0].isr &= ~(1 << _CASCADE)
            self.chips[0].irr &= ~(1 << _CASCADE)
        chip.irr &= ~(1 << irq)
        chip.end(irq)
        if not chip.master or irq != _CASCADE:
            self._update()
        return 0x80 | irq

    # ---- ports, and user space -----------------------------------------------------------------------

    def read(self, address: int, size: int) -> int | None:
        """A port read. One that is not a byte gives 0."""
        if size != 1:
            return 0
        with self.lock:
            if address & ~1 == 0x4D0:
                return self.chips[address & 1].elcr
            chip = self.chips[address >> 7 & 1]
            return self._poll(chip) if chip.poll else chip.read(address)

    def write(self, address: int, size: int, value: int) -> bool:
        """A port write. One that is not a byte is ignored."""
        if size != 1:
            return True
        value &= 0xFF
        with self.lock:
            if address & ~1 == 0x4D0:
                chip = self.chips[address & 1]
                chip.elcr = value & chip.elcr_mask
                return True
            chip = self.chips[address >> 7 & 1]
            if chip.write_data(value) if address & 1 else chip.write_command(value):
                self._update()
        return True

    def get_state(self, chip: int) -> kvm_pic_state:
        """KVM_GET_IRQCHIP of KVM_IRQCHIP_PIC_MASTER (0) or _SLAVE (1)."""
        with self.lock:
            return self.chips[chip].get_state()

    def set_state(self, chip: int, state: kvm_pic_state) -> None:
        """KVM_SET_IRQCHIP of one chip."""
        with self.lock:
            self.chips[chip].set_state(state)
            self._update()
