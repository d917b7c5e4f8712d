"""An instruction whose CPUID bit is off raises #UD. SDM, "CPUID Feature Flag" column of each instruction."""

from __future__ import annotations

import random

import pytest
from tests.cpu.differential import Maker
from tests.cpu.flat import CODE, Machine

from vmonty.cpu import decode, isa, models, opcodes
from vmonty.cpu.cpuid import set_features

UD = 6
ALL = frozenset(models.FEATURES)
GATED = sorted({row.feature for row in isa.ROWS} - {"", "vmx", "svm"})
DATA = 0x200000


class Processor:
    """Executes one instruction with chosen features."""

    def __init__(self) -> None:
        self.machine = Machine()
        self.machine.cpu.stop_at_events()

    def vector(self, code: bytes, features: frozenset[str]) -> int:
        """The exception that the instruction raises, or -1."""
        cpu = self.machine.cpu
        set_features(cpu.state_address, models.feature_words(features))
        self.machine.load(code + b"\xf4")
        cpu.flush_code()
        cpu["rip"], cpu["rflags"] = CODE, 2
        for name in ("rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi"):
            cpu[name] = DATA
        cpu["rax"] = cpu["rdx"] = 0
        cpu.clear_event()
        cpu.step()
        vector: int = cpu.event["vector"] if cpu.event["pending"] else -1
        cpu.clear_event()
        return vector


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor()


def encodings(row: isa.Row, count: int = 3) -> list[bytes]:
    """Some encodings of a row in 64-bit mode."""
    maker = Maker(random.Random(row.opcode))
    found: list[bytes] = []
    for _ in range(200):
        code = maker.encode(row, [0] * 16, set())
        got = decode.decode_bytes((code or b"") + bytes(15), 0, 8)
        if code and isinstance(got, dict) and got["row"] is row and got["length"] == len(code):
            found.append(code)
        if len(found) == count:
            break
    return found


def needed(row: isa.Row, code: bytes) -> str:
    """The feature that an encoding of the row needs."""
    got = decode.decode_bytes(code + bytes(15), 0, 8)
    assert isinstance(got, dict)
    if row.feature == "cx8" and got["operand_size"] == 8:
        return "cx16"
    vex = code.lstrip(b"\x67")
    wide = row.vex and bool(vex[1 if vex[0] == 0xC5 else 2] & 4)
    if ("y2" in row.attributes and wide) or ("r2" in row.attributes and not got["has_memory"]):
        return "avx2"
    return row.feature


@pytest.mark.parametrize("feature", GATED)
def test_off_is_ud(processor: Processor, feature: str) -> None:
    rows = [row for row in isa.ROWS if row.feature == feature]
    tried = 0
    for row in rows:
        if row.name in ("TZCNT", "LZCNT"):
            continue
        for code in encodings(row):
            name = needed(row, code)
            off = ALL - {name} - ({"lm"} if name == "3dnowprefetch" else set())
            assert processor.vector(code, off) == UD, f"{row.name} {code.hex()} without {name}"
            tried += 1
    assert tried or feature == "abm"


@pytest.mark.parametrize("feature", GATED)
def test_on_is_not_ud(processor: Processor, feature: str) -> None:
    if feature in models.FEATURES and not models.available(feature):
        pytest.skip(f"the processor underneath has no {feature}")
    for row in isa.ROWS:
        if row.feature == feature and row.cls == "copy":
            for code in encodings(row, 1):
                assert processor.vector(code, ALL) != UD, f"{row.name} {code.hex()}"


@pytest.mark.parametrize(
    ("code", "feature", "with_it", "without"),
    [("f3480fbcc3", "bmi1", 4, 4), ("f3480fbdc3", "abm", 59, 4), ("66f30fbdc3", "abm", 11, 4)],
    ids=["tzcnt", "lzcnt", "lzcnt16"],
)
def test_counts_are_scans_without_their_bits(
    processor: Processor, code: str, feature: str, with_it: int, without: int
) -> None:
    """SDM, "LZCNT—Count the Number of Leading Zero Bits": executed as BSR where it is not supported."""
    if not models.available(feature):
        pytest.skip(f"the processor underneath has no {feature}")
    cpu = processor.machine.cpu
    for features, result in ((ALL, with_it), (ALL - {feature}, without)):
        set_features(cpu.state_address, models.feature_words(features))
        processor.machine.load(code + "f4")
        cpu["rip"], cpu["rax"], cpu["rbx"] = CODE, 0, 16
        assert cpu.run() == "halt"
        assert cpu["rax"] == result


def test_a_feature_that_changes_changes_translations(processor: Processor) -> None:
    cpu = processor.machine.cpu
    for features, vector in ((ALL, -1), (ALL - {"cmov"}, UD), (ALL, -1)):
        set_features(cpu.state_address, models.feature_words(features))
        processor.machine.load("0f44c3 f4")
        cpu["rip"] = CODE
        cpu.clear_event()
        cpu.run()
        assert (cpu.event["vector"] if cpu.event["pending"] else -1) == vector
    cpu.clear_event()


def test_every_feature_of_the_table_is_known_to_the_models() -> None:
    assert set(opcodes.FEATURES) - {""} <= set(models.FEATURES)


def test_features_are_read_from_cpuid() -> None:
    configuration = models.parse("SandyBridge")
    rows = {(leaf, sub): registers for leaf, sub, *registers in models.cpuid_rows(configuration)}
    assert models.features_of(lambda leaf, sub: rows.get((leaf, sub), rows.get((leaf, None)))) == configuration.features


def test_bad_features() -> None:
    with pytest.raises(ValueError, match="eight words"):
        set_features(Machine().cpu.state_address, [0])
