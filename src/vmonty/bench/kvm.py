"""How long a KVM takes for what guests ask of it: seconds per operation, for any provider.

Each function opens what it needs, runs a guest that does one thing many times, and divides. They are small numbers on
a machine that does other things too: where one thread does all the work its own time is taken; ``measure`` gives
medians of several calls all the same.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from vmonty import kvm
from vmonty.base.ram import Ram
from vmonty.bench.compiler import PayloadError
from vmonty.bench.cpu import repeats_for
from vmonty.bench.payload import build
from vmonty.bench.report import Report, Row, figure, geometric_mean
from vmonty.bench.soft import BareCpu, run_vm
from vmonty.kvm.api import System, Vcpu, Vm
from vmonty.kvm.uapi import Exit
from vmonty.testing.guests import DATA, Mode, load

Run = Callable[[], Exit | int]
RAM_SIZE = 64 << 20
# Guest RAM begins to be touched here by the fill: above what the tiny guest has for itself.
FILL_FROM = 4 << 20
# Where no RAM is.
DEVICE = 0xD000_0000
MSR_X2APIC_EOI, MSR_X2APIC_ICR, MSR_TSC_DEADLINE, MSR_APIC_BASE, MSR_SVR = 0x80B, 0x830, 0x6E0, 0x1B, 0x80F
# An MSR that every KVM emulates: IA32_MISC_ENABLE.
MSR_EMULATED = 0x1A0
IPI_VECTOR, LVT_TIMER, TSC_DEADLINE_MODE = 0x62, 0x832, 0x40000 | 0xEF
DONE = "out 0x10, al"


def wrmsr(index: int, low: str = "0", high: str = "0") -> str:
    """WRMSR of two 32-bit operands."""
    return f"mov ecx, {index:#x}\n mov eax, {low}\n mov edx, {high}\n wrmsr\n"


X2APIC_ON = f"mov ecx, {MSR_APIC_BASE:#x}\n rdmsr\n or eax, 0xc00\n wrmsr\n" + wrmsr(MSR_SVR, "0x1ff")
EMPTY = "nop"
# What the processor does: registers, calls, tables, pages all over memory, vectors.
PAYLOADS, PAYLOAD_S = ("alu", "sieve", "fib", "crc32", "lz_match", "zlib", "regex", "dot_sse"), 0.2
TSC_TO_RAX = "rdtsc\n shl rdx, 32\n or rax, rdx\n"
# Where the guest puts the times of its rounds.
ROUNDS = 0x10_0000


@contextmanager
def guest(system: System, chips: bool = False, vcpus: int = 1) -> Iterator[tuple[Vm, list[Vcpu], Ram]]:
    """A VM with 64 MiB of RAM, its CPUID what this KVM offers."""
    with ExitStack() as stack:
        vm = stack.enter_context(system.create_vm())
        ram = Ram(RAM_SIZE)
        vm.set_user_memory_region(0, 0, ram)
        if chips:
            vm.create_irqchip()
        made = [stack.enter_context(vm.create_vcpu(number)) for number in range(vcpus)]
        offered = system.supported_cpuid()
        for vcpu in made:
            vcpu.set_cpuid2(offered)
        yield vm, made, ram


def _run(vcpu: Vcpu, clock: Callable[[], float] = time.thread_time) -> float:
    """Seconds of this thread until the guest's next OUT. Raises RuntimeError when something else ends the run."""
    begin = clock()
    reason = vcpu.run()
    seconds = clock() - begin
    if reason is not Exit.IO:
        raise RuntimeError(f"the measured guest ended with {reason!r}")
    return seconds


def _loop(system: System, body: str, setup: str = "", count: int = 20_000, chips: bool = False) -> float:
    """Seconds per turn of a loop around *body*, less those of an empty one."""

    def program(inside: str) -> str:
        return f"{setup}\n {DONE}\n mov r15d, {count}\n again: {inside}\n dec r15d\n jnz again\n {DONE}"

    taken = []
    for inside in (body, EMPTY):
        with guest(system, chips) as (_, (vcpu,), ram):
            load(vcpu, ram, Mode.LONG, program(inside))
            _run(vcpu)
            taken.append(_run(vcpu))
    return max(taken[0] - taken[1], 0.0) / count


def cpuid_exit(system: System) -> float:
    """CPUID: an exit that KVM handles alone."""
    return _loop(system, "xor eax, eax\n xor ecx, ecx\n cpuid")


def msr_exit(system: System) -> float:
    """RDMSR of a register that KVM emulates."""
    return _loop(system, f"mov ecx, {MSR_EMULATED:#x}\n rdmsr")


def tsc_deadline_write(system: System) -> float:
    """WRMSR of IA32_TSC_DEADLINE, far in the future, as a tickless guest does on each timer change."""
    setup = X2APIC_ON + wrmsr(LVT_TIMER, f"{TSC_DEADLINE_MODE:#x}")
    body = f"rdtsc\n add edx, 16\n mov ecx, {MSR_TSC_DEADLINE:#x}\n wrmsr"
    return _loop(system, body, setup, chips=True)


def x2apic_eoi(system: System) -> float:
    """WRMSR of the x2APIC's EOI register, with nothing in service."""
    return _loop(system, wrmsr(MSR_X2APIC_EOI), X2APIC_ON, chips=True)


def x2apic_icr(system: System) -> float:
    """WRMSR of the x2APIC's ICR: an IPI to itself, with interrupts off."""
    return _loop(system, wrmsr(MSR_X2APIC_ICR, f"{IPI_VECTOR | 0x40000:#x}"), X2APIC_ON, chips=True)


def port_write(system: System) -> float:
    """OUT to a device in Python and back into the guest."""
    return _port(system, DONE)


def port_read(system: System) -> float:
    """IN from a device in Python and back into the guest."""
    return _port(system, "in al, 0x10")


def mmio_write(system: System) -> float:
    """MOV to a device's register in memory, a device in Python, and back into the guest."""
    return _mmio(system, "mov [rbx], ecx")


def mmio_read(system: System) -> float:
    """MOV from a device's register in memory, a device in Python, and back into the guest."""
    return _mmio(system, "mov ecx, [rbx]")


def _port(system: System, access: str) -> float:
    devices: dict[int, Callable[[bool, int, memoryview], None]] = {0x10: lambda reads, size, data: None}

    def serve(run: Run, vcpu: Vcpu) -> bool:
        if run() is not Exit.IO:
            return False
        reads, size, port, data = vcpu.io_access()
        devices[port](reads, size, data)
        return True

    return _served(system, f"again: {access}\n jmp again", serve)


def _mmio(system: System, access: str) -> float:
    devices: dict[int, Callable[[bool, memoryview], None]] = {DEVICE: lambda writes, data: None}

    def serve(run: Run, vcpu: Vcpu) -> bool:
        if run() is not Exit.MMIO:
            return False
        writes, address, data = vcpu.mmio_access()
        devices[address](writes, data)
        return True

    return _served(system, f"mov ebx, {DEVICE:#x}\n again: {access}\n jmp again", serve)


def _served(system: System, program: str, serve: Callable[[Run, Vcpu], bool], count: int = 3000) -> float:
    """Seconds of a round: what the VMM does, on a thread of the vCPU's, with a bus of one device."""
    taken: list[float] = []

    def main() -> None:
        with vcpu.runs() as run:
            serve(run, vcpu)
            begin = time.thread_time()
            if all(serve(run, vcpu) for _ in range(count)):
                taken.append((time.thread_time() - begin) / count)

    with guest(system) as (_, (vcpu,), ram):
        load(vcpu, ram, Mode.LONG, program)
        thread = threading.Thread(target=main)
        thread.start()
        thread.join()
    if not taken:
        raise RuntimeError("the measured guest ended with another exit")
    return taken[0]


def page_fill(system: System) -> float:
    """The first touch of a page, averaged over one touch per 4 KiB of fresh RAM: faults, and what they bring."""
    pages = (RAM_SIZE - FILL_FROM) >> 12
    program = (
        f"{DONE}\n mov ebx, {FILL_FROM:#x}\n mov r15d, {pages}\n again: mov al, [rbx]\n add ebx, 4096\n dec r15d\n"
        f" jnz again\n {DONE}\n mov ebx, {FILL_FROM:#x}\n mov r15d, {pages}\n second: mov al, [rbx]\n add ebx, 4096\n"
        f" dec r15d\n jnz second\n {DONE}"
    )
    with guest(system) as (_, (vcpu,), ram):
        ram.fill(FILL_FROM, RAM_SIZE - FILL_FROM, 1)  # the host's own faults are not to be measured
        load(vcpu, ram, Mode.LONG, program)
        _run(vcpu)
        first, second = _run(vcpu), _run(vcpu)
        return max(first - second, 0.0) / pages


def ipi_round(system: System, count: int = 2000) -> float:
    """Half of a round of IPIs between two running vCPUs, both in loops that wait for a word in memory.

    Each one's handler adds one to the word that it waits for; so a round is two IPIs and two deliveries. The guest
    times each round by its TSC, and the median counts: on a host with other work vCPUs wait for processors.
    """
    words = DATA, DATA + 64

    def program(own: int, first: bool) -> str:
        send = wrmsr(MSR_X2APIC_ICR, f"{IPI_VECTOR:#x}", f"{1 - own}")
        wait = f"until: cmp dword [abs {words[own]}], r14d\n pause\n jb until\n"
        taken = f"{TSC_TO_RAX} mov r11, rax\n {send} {wait} {TSC_TO_RAX} sub rax, r11\n mov [r10], rax\n add r10, 8\n"
        turn = f"inc r14d\n {taken if first else wait + send}"
        return (
            f"{X2APIC_ON} sti\n xor r14d, r14d\n mov r10d, {ROUNDS:#x}\n {DONE}\n mov r15d, {count}\n"
            f" again: {turn} dec r15d\n jnz again\n {DONE}"
        )

    with guest(system, chips=True, vcpus=2) as (_, vcpus, ram):
        for own, vcpu in enumerate(vcpus):
            if own:
                vcpu.set_mp_state(0)
        # One IDT serves both: the handler finds its word by the register that no program changes.
        both = (
            f"push rax\n push rcx\n push rdx\n inc dword [r13]\n {wrmsr(MSR_X2APIC_EOI)}"
            " pop rdx\n pop rcx\n pop rax\n iretq"
        )
        for own, (vcpu, code, stack) in enumerate(zip(vcpus, (0x8000, 0x9000), (0xF000, 0x10000), strict=True)):
            load(
                vcpu, ram, Mode.LONG, f"mov r13d, {words[own]}\n {program(own, first=own == 0)}", {IPI_VECTOR: both},
                code=code, stack=stack,
            )  # fmt: skip
            _run(vcpu)
        failed: list[BaseException] = []

        def other() -> None:
            try:
                _run(vcpus[1])
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        try:
            _run(vcpus[0])
            rounds = sorted(ram.read_u64(ROUNDS + 8 * number) for number in range(count))
            return rounds[count // 2] / (2000 * vcpus[0].get_tsc_khz())
        finally:
            thread.join()
            if failed:
                raise failed[0]


def creation(system: System, count: int = 20) -> float:
    """A VM with RAM and one vCPU, made and closed."""
    ram = Ram(1 << 20)
    begin = time.perf_counter()
    for _ in range(count):
        with system.create_vm() as vm:
            vm.set_user_memory_region(0, 0, ram)
            vm.create_vcpu().close()
    return (time.perf_counter() - begin) / count


def in_a_vm(system: System) -> float:
    """Payloads in a VM against the same on the bare processor, in turns: how many times the CPU time."""
    image = build()
    bare = BareCpu(image)
    ratios = []
    for name in PAYLOADS:
        repeats = repeats_for(bare.run, name, PAYLOAD_S)
        rounds = []
        for _ in range(3):
            alone, checksum = bare.run(name, repeats)
            seconds, same = run_vm(system, image, name, repeats)
            if checksum != same:
                raise PayloadError(f"{name}: {same:#x} in a VM, {checksum:#x} on the processor")
            rounds.append(seconds / alone)
        ratios.append(statistics.median(rounds))
    return geometric_mean(ratios)


# Name, what measures it, and the most seconds (or the largest ratio) that it should take in kvm.soft.
ROWS: tuple[tuple[str, Callable[[System], float], float], ...] = (
    ("CPUID exit", cpuid_exit, 2e-6),
    ("MSR exit", msr_exit, 2e-6),
    ("port write to Python and back", port_write, 5e-6),
    ("port read from Python and back", port_read, 5e-6),
    ("MMIO write to Python and back", mmio_write, 5e-6),
    ("MMIO read from Python and back", mmio_read, 5e-6),
    ("TSC deadline write", tsc_deadline_write, 0.3e-6),
    ("x2APIC EOI", x2apic_eoi, 0.3e-6),
    ("x2APIC ICR", x2apic_icr, 0.3e-6),
    ("page fill", page_fill, 3e-6),
    ("IPI between running vCPUs", ipi_round, 20e-6),
    ("VM and vCPU creation", creation, 5e-3),
    ("CPU payloads in a VM ÷ bare processor", in_a_vm, 1.03),
)
# Ratios; the others are seconds.
RATIOS = ("in_a_vm",)
NAMES = tuple(measured.__name__ for _, measured, _ in ROWS)


def measure(
    provider: str,
    names: Sequence[str] = NAMES,
    quick: bool = False,
    say: Callable[[str, int, int], None] = lambda *_: None,
) -> Report:
    """What *provider*'s KVM takes for the operations *names*: medians of five calls, *quick* of one.

    Raises UsageError for an unknown provider, KvmUnavailable when it cannot be used here.
    """
    report = Report(f"KVM {provider}: seconds per operation")
    wanted = [row for row in ROWS if row[1].__name__ in names]
    with kvm.open(provider) as system:
        # In turns, so that a busy minute of the host falls on all of them.
        taken: dict[str, list[float]] = {name: [] for name, _, _ in wanted}
        rounds = 1 if quick else 5
        for turn in range(rounds):
            for at, (name, measured, _) in enumerate(wanted):
                say("operations", turn * len(wanted) + at, rounds * len(wanted))
                taken[name].append(measured(system))
    for name, measured, most in wanted:
        unit = "×" if measured.__name__ in RATIOS else "s"
        report.rows.append(Row(name, unit, "less", statistics.median(taken[name]), target=f"≤ {figure(most, unit)}"))
    return report
