"""``vmonty bench cpu``: payloads on the processor itself, on ours, and under QEMU's TCG, in turns.

Figures are CPU seconds per repeat, without what the payload does before its first repeat; medians over the rounds.
"""

from __future__ import annotations

import mmap
import random
import resource
import statistics
import struct
import time
from collections.abc import Callable, Sequence

from vmonty import kvm
from vmonty.bench.compiler import PayloadError
from vmonty.bench.native import Native
from vmonty.bench.payload import INTEGER, NAMES, SYSTEM, TEXT, Image, build
from vmonty.bench.qemu import run_tcg
from vmonty.bench.report import Report, Row, geometric_mean, qemu_version
from vmonty.bench.soft import BareCpu, run_vm
from vmonty.cpu.core import Cpu

Runner = Callable[[str, int], tuple[float, int]]
Say = Callable[[str, int, int], None]

# What the summaries are of. Vector: arithmetic on lanes, for which QEMU calls a function each.
GROUPS = {
    "integer": ((*INTEGER, *TEXT), "≥ 2.5"),
    "vector": (("dot_sse", "dot_avx2", "bytes_sse"), "≥ 50"),
    "float": (("nbody",), ""),
    "memory": (("byte_copy", "memcpy_rep", "memcpy_sse"), ""),
    "system": (tuple(SYSTEM), ""),
}
LEAST_S, QUICK_S = 0.25, 0.03
ROUNDS = 3
LONG_S = 2.0  # a peer that takes longer for a round has only one
TRANSLATED = 60_000


def repeats_for(run: Runner, name: str, least: float) -> int:
    """How many repeats take about *least* CPU seconds."""
    base, _ = run(name, 0)
    repeats = 1
    while True:
        seconds, _ = run(name, repeats)
        if seconds - base >= least / 4:
            return max(1, round(repeats * least / (seconds - base)))
        repeats *= 4


def measure(names: Sequence[str] = NAMES, quick: bool = False, say: Say = lambda *_: None) -> Report:
    """Run the payloads *names*. Raises PayloadError when one fails or two of the three disagree on its result."""
    image = build()
    report = Report("CPU: seconds of CPU time per repeat")
    with Native() as native:
        bare = BareCpu(image)
        for at, name in enumerate(names):
            say("payloads", at, len(names))
            report.rows.append(_payload(image, native, bare, name, QUICK_S if quick else LEAST_S))
        say("payloads", len(names), len(names))
    report.rows += summaries(report.rows)
    report.rows += [_translation(), _start_up(), _memory()]
    return report


def _payload(image: Image, native: Native, bare: BareCpu, name: str, least: float) -> Row:
    """Measure one payload in rounds, each runner in its turn.

    The host may be twice as slow for a second or two while others use its processor: the median leaves that out.
    """
    system = name in SYSTEM

    def ours(name: str, repeats: int) -> tuple[float, int]:
        if not system:
            return bare.run(name, repeats)
        with kvm.open("soft") as opened:
            return run_vm(opened, image, name, repeats)

    def tcg(name: str, repeats: int) -> tuple[float, int]:
        return run_tcg(image, name, repeats)

    runners: dict[str, Runner] = {"vmonty": ours}
    if not system:
        runners["native"] = native.run
    if qemu_version():
        runners["qemu_tcg"] = tcg
    figures: dict[str, list[float]] = {runner: [] for runner in runners}
    checksums: dict[int, set[int]] = {}
    counts = dict.fromkeys(runners, repeats_for(ours if system else native.run, name, least))
    bases = {runner: run(name, 0)[0] for runner, run in runners.items()}
    if "qemu_tcg" in runners:  # it may be three orders of magnitude slower
        seconds, checksum = tcg(name, 1)
        seconds -= bases["qemu_tcg"]
        counts["qemu_tcg"] = min(counts["vmonty"], max(1, round(4 * least / max(seconds, 1e-3))))
        checksums[1] = {checksum, ours(name, 1)[1]}
        if seconds > LONG_S:
            figures["qemu_tcg"] = [seconds]
    for _ in range(ROUNDS):
        for runner, run in runners.items():
            if figures[runner] and figures[runner][0] * counts[runner] > LONG_S:
                continue
            seconds, checksum = run(name, counts[runner])
            figures[runner].append(max(seconds - bases[runner], 1e-9) / counts[runner])
            checksums.setdefault(counts[runner], set()).add(checksum)
    if any(len(given) > 1 for given in checksums.values()):
        raise PayloadError(f"{name}: not all give the same result: {checksums}")
    medians = {runner: statistics.median(values) for runner, values in figures.items()}
    return Row(name, "s", "less", medians["vmonty"], medians.get("native"), medians.get("qemu_tcg"))


def summaries(rows: Sequence[Row]) -> list[Row]:
    """Geometric means of the payloads' rows, by group: times TCG, of vmonty and of the processor itself."""
    result = []
    named = {row.name: row for row in rows}
    over = [row.over_native for row in rows if row.over_native]
    if over:
        result.append(Row("÷ native, geometric mean", "×", "less", geometric_mean(over), 1.0, None, "≤ 1.9"))
    for group, (names, target) in GROUPS.items():
        known = [named[name] for name in names if name in named and named[name].qemu_tcg]
        if not known:
            continue
        ours = geometric_mean(row.qemu_tcg / row.vmonty for row in known if row.qemu_tcg and row.vmonty)
        possible = [row.qemu_tcg / row.native for row in known if row.qemu_tcg and row.native]
        native = geometric_mean(possible) if len(possible) == len(known) else None
        result.append(Row(f"× TCG, {group} payloads", "×", "more", ours, native, 1.0, target))
    least = [(row.tcg_over_vmonty, row.name) for row in rows if row.tcg_over_vmonty]
    if least:
        ratio, name = min(least)
        result.append(Row(f"× TCG, least ({name})", "×", "more", ratio, None, 1.0, "≥ 1"))
    return result


def straight_code(instructions: int, seed: int = 1) -> bytes:
    """Code as compilers make it, that runs once from its first byte to a final HLT: rdi points to memory."""
    pool = (
        "4801d8", "488b4708", "48895710", "4839c3", "89d8", "488d440308", "31c9", "83c001", "0fb64701", "4885c0",
        "48c1e003", "7400", "7500", "48634f04", "0fb6c0", "41b801000000", "4989c0", "21d0", "c6470301", "eb00",
    )  # fmt: skip
    chosen = random.Random(seed).choices([bytes.fromhex(text) for text in pool], k=instructions)
    return b"".join(chosen) + b"\xf4"


def _translation() -> Row:
    """Instructions translated per second: the first run of straight code against its second."""
    code = straight_code(TRANSLATED)
    best = 0.0
    for _ in range(3):
        memory = mmap.mmap(-1, 16 << 20)
        memory[0x1000:0x1008] = struct.pack("<Q", 0x2003)
        memory[0x2000:0x2008] = struct.pack("<Q", 0x3003)
        memory[0x3000:0x4000] = struct.pack("<512Q", *(0x83 | number << 21 for number in range(512)))
        memory[0x10_0000 : 0x10_0000 + len(code)] = code
        cpu = Cpu(128 << 20)
        cpu.add_region(0, memory)
        cpu.set_long_mode(0x1000)
        took = []
        for _ in range(2):
            cpu["rip"], cpu["rdi"], cpu["rsp"] = 0x10_0000, 0x8000, 0x9000
            begin = time.thread_time()
            if cpu.run() != "halt":
                raise PayloadError(f"straight code stopped at {cpu['rip']:#x}, event {cpu.event}")
            took.append(time.thread_time() - begin)
        best = max(best, TRANSLATED / max(took[0] - took[1], 1e-9))
    return Row("translation", "instructions/s", "more", best, None, None, "≥ 5 million")


def _start_up() -> Row:
    """From nothing to the first instruction executed."""
    took = []
    for _ in range(5):
        begin = time.perf_counter()
        memory = mmap.mmap(-1, 1 << 20)
        memory[0xFFFF0] = 0xF4  # the reset vector
        cpu = Cpu()
        cpu.add_region(0xFFF0_0000, memory)
        cpu.add_region(0, memory)
        cpu.run()
        took.append(time.perf_counter() - begin)
    return Row("start-up of a processor", "s", "less", statistics.median(took), None, None, "≤ 50 ms")


def _memory() -> Row:
    """What one more processor adds to the process that makes it, without its code cache's contents."""

    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()

    before = resident()
    processors = [Cpu() for _ in range(4)]
    each = (resident() - before) / len(processors)
    return Row("memory of a processor", "MB", "less", each / 1e6, None, None, "≤ 16 MB")
