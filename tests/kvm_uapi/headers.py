"""What a set of kernel headers says, found out by a C compiler."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

INCLUDES = "#include <linux/kvm.h>\n#include <asm/kvm.h>\n#include <linux/kvm_para.h>\n"
OURS = ("linux/kvm.h", "asm/kvm.h", "linux/kvm_para.h", "asm/kvm_para.h")
# Some of the headers' macros use the kernel's own, which user space lacks.
PRELUDE = f"""\
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <stddef.h>
{INCLUDES}
#undef GENMASK_ULL
#undef BIT_ULL
#define GENMASK_ULL(high, low) ((~0ULL >> (63 - (high))) & (~0ULL << (low)))
#define GENMASK(high, low) GENMASK_ULL(high, low)
#define BIT_ULL(bit) (1ULL << (bit))
#define BIT(bit) (1UL << (bit))
"""
_MARKER = re.compile(r'# \d+ "([^"]+)"')


@dataclass(frozen=True)
class Headers:
    """The headers that the compiler finds with *directories* in front of its own."""

    name: str
    directories: tuple[str, ...] = ()

    @staticmethod
    def compiler() -> str | None:
        """The C compiler, if there is one."""
        return shutil.which("gcc") or shutil.which("cc")

    def run_compiler(self, arguments: Sequence[str], source: str) -> subprocess.CompletedProcess[str]:
        compiler = Headers.compiler()
        assert compiler is not None
        # -isystem keeps the order and the silence of the system's own directories.
        flags = [flag for directory in self.directories for flag in ("-isystem", directory)]
        command = [compiler, "-x", "c", "-std=gnu11", *flags, *arguments, "-"]
        return subprocess.run(command, input=source, capture_output=True, text=True, check=False)

    def complaint(self) -> str | None:
        """Why they cannot be used, or None."""
        if Headers.compiler() is None:
            return "no C compiler (on Debian or Ubuntu: apt-get install gcc libc6-dev)"
        done = self.run_compiler(["-fsyntax-only"], INCLUDES)
        first = next(iter(done.stderr.splitlines()), "")
        return (
            f"no KVM headers (on Debian or Ubuntu: apt-get install linux-libc-dev): {first}"
            if done.returncode
            else None
        )

    @cached_property
    def text(self) -> str:
        """The lines of the KVM headers themselves, preprocessed, with their macro definitions."""
        done = self.run_compiler(["-E", "-dD"], INCLUDES)
        kept, ours = [], False
        for line in done.stdout.splitlines():
            marker = _MARKER.match(line)
            if marker:
                ours = marker[1].endswith(OURS)
            elif ours:
                kept.append(line)
        return "\n".join(kept)

    @cached_property
    def constants(self) -> set[str]:
        """Macros without parameters, and enumerators."""
        macros = set(re.findall(r"^#define (\w+) \S", self.text, re.MULTILINE))
        plain = re.sub(r"^#.*$", "", self.text, flags=re.MULTILINE)
        bodies = re.findall(r"\benum\b[^;{]*\{([^}]*)\}", plain)
        return macros | {name for body in bodies for name in re.findall(r"(?:^|,)\s*(\w+)\s*(?==|,|$)", body)}

    @cached_property
    def structs(self) -> dict[str, str]:
        """Tag → ``struct`` or ``union``, of those declared with a body."""
        return {tag: kind for kind, tag in re.findall(r"\b(struct|union)\s+(\w+)\s*\{", self.text)}

    def evaluate(self, lines: dict[str, str]) -> dict[str, str]:
        """Run a C program with one statement per key that prints its value; the keys that do not compile are absent."""
        wanted = dict(lines)
        for _ in range(4):
            keys = list(wanted)
            head = PRELUDE + "int main(void)\n{\n"
            first = head.count("\n") + 1
            source = head + "".join(f"{wanted[key]}\n" for key in keys) + "return 0;\n}\n"
            done = self.run_compiler(["-w", "-fsyntax-only", "-fmax-errors=0"], source)
            if done.returncode == 0:
                return dict(zip(keys, self._output(source).splitlines(), strict=True))
            numbers = {int(line) for line in re.findall(r"^<stdin>:(\d+):\d+: error", done.stderr, re.MULTILINE)}
            for number in numbers:
                wanted.pop(keys[number - first], None)
        raise AssertionError(f"the program does not compile:\n{done.stderr[:2000]}")

    def _output(self, source: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder, "abi")
            built = self.run_compiler(["-w", "-O0", "-o", str(program)], source)
            assert built.returncode == 0, built.stderr
            return subprocess.run([program], capture_output=True, text=True, check=True).stdout


def number_line(name: str) -> str:
    """A statement that prints the constant *name*, as a 64-bit number."""
    return f'printf("%llx\\n", (unsigned long long)({name}));'


def struct_lines(kind: str, tag: str, paths: Iterable[str], bit_fields: Iterable[str]) -> dict[str, str]:
    """Statements for the size of a struct, and for the offset and size of each member by path."""
    whole = f"{kind} {tag}"
    lines = {tag: f'printf("%zu\\n", sizeof({whole}));'}
    for path in paths:
        member = f"((({whole} *)0)->{path})"
        lines[f"{tag}.{path} offset"] = f'printf("%zu\\n", offsetof({whole}, {path}));'
        lines[f"{tag}.{path} size"] = f'printf("%zu\\n", sizeof {member});'
    for path in bit_fields:
        lines[f"{tag}.{path} bits"] = (
            f"{{ {whole} s; memset(&s, 0, sizeof s); s.{path} = -1; for (size_t i = 0; i < sizeof s; i++)"
            ' printf("%02x", ((unsigned char *)&s)[i]); puts(""); }'
        )
    return lines
