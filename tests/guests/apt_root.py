"""apt with a root of its own: the host's sources, keys and proxies, another set of packages or another architecture.

apt fetches and checks; nothing is installed on the host, and no address is named here.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmonty.base.errors import GuestError

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
HELPER = "/usr/lib/apt/apt-helper"
DEBS, UDEBS = "main", "main/debian-installer"
LIMIT_S = 1800.0
# Lists are asked for again when they are older.
FRESH_S = 86400.0


@dataclass(frozen=True)
class Stanza:
    """One package of an index, its fields as they are written there."""

    text: str

    def __getitem__(self, field: str) -> str:
        found = re.search(rf"^{field}: (.*)$", self.text, re.MULTILINE)
        return found[1] if found else ""

    def names(self, field: str) -> list[list[str]]:
        """The alternatives of each clause of a relation, without versions."""
        clauses = filter(None, (clause.strip() for clause in self[field].split(",")))
        return [[re.split(r"[ (:]", name.strip())[0] for name in clause.split("|")] for clause in clauses]


def stanzas(text: str) -> list[Stanza]:
    return [Stanza(part.strip()) for part in text.strip().split("\n\n") if part.strip()]


def closure(index: Iterable[Stanza], wanted: Iterable[str]) -> list[Stanza]:
    """The packages named *wanted* and what they depend on; for a virtual package, all that provide it."""
    known: dict[str, list[Stanza]] = {}
    for stanza in index:
        for name in (stanza["Package"], *(names[0] for names in stanza.names("Provides"))):
            known.setdefault(name, []).append(stanza)
    taken: dict[str, Stanza] = {}
    names = list(wanted)
    while names:
        for stanza in known.get(names.pop(), ()):
            if stanza["Package"] not in taken:
                taken[stanza["Package"]] = stanza
                names += (name for clause in stanza.names("Depends") for name in clause)
    return [taken[name] for name in sorted(taken)]


class AptRoot:
    """apt with lists and a cache of its own under *directory*, for *architecture*, of release *codename* alone.

    Raises GuestError when the host's apt knows no such release, or when something fails.
    """

    def __init__(self, directory: Path, codename: str, architecture: str = "amd64") -> None:
        self.directory, self.architecture = directory, architecture
        for part in ("lists/partial", "archives/partial"):
            (directory / part).mkdir(parents=True, exist_ok=True)
        (directory / "status").touch()
        (directory / "sources.list").write_text(self._source(codename))
        self._options = [
            f"Dir::State={directory}", f"Dir::State::status={directory}/status", f"Dir::Cache={directory}",
            f"Dir::Etc::sourcelist={directory}/sources.list", "Dir::Etc::sourceparts=/dev/null",
            f"APT::Architecture={architecture}", f"APT::Architectures={architecture}",
            "APT::Sandbox::User=", "APT::Install-Recommends=false", "Acquire::Retries=3",
            "Binary::apt-get::APT::Keep-Downloaded-Packages=true",
        ]  # fmt: skip
        stamp = directory / "updated"  # the lists have the archive's times
        if not stamp.exists() or time.time() - stamp.stat().st_mtime > FRESH_S:
            self.run("apt-get", "-qq", "update")
            stamp.touch()

    def _source(self, codename: str) -> str:
        """The line of the repository that the host itself takes *codename* from."""
        form = "$(REPO_URI) $(RELEASE) $(CODENAME) $(COMPONENT)"
        for line in self._run(["apt-get", "indextargets", "--format", form, "Created-By: Packages"]).splitlines():
            address, release, *names = line.split()
            if names == [codename, DEBS]:
                signed = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
                return f"deb {signed}{address} {release} {DEBS} {UDEBS}\n"
        raise GuestError(f"the host's apt has no sources for {codename}")

    def run(self, command: str, *arguments: str) -> str:
        """The output of an apt *command* in this root."""
        options = [word for option in self._options for word in ("-o", option)]
        return self._run([command, *options, *arguments])

    def _run(self, command: Sequence[str]) -> str:
        done = subprocess.run(
            command, cwd=self.directory / "archives", capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        if done.returncode:
            raise GuestError(f"{command[0]} failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
        return done.stdout

    def index(self, component: str) -> list[Stanza]:
        """The packages of *component*."""
        wanted = ("Created-By: Packages", f"Component: {component}")
        (file,) = self.run("apt-get", "indextargets", "--format", "$(FILENAME)", *wanted).split()
        return stanzas(self.run(HELPER, "cat-file", file))

    def solve(self, names: Iterable[str]) -> list[Stanza]:
        """The packages that apt would install for *names* on a system that has none."""
        said = self.run("apt-get", "install", "-qq", "--yes", "--simulate", *names)
        versions = dict(re.findall(r"^Inst (\S+) \((\S+) ", said, re.MULTILINE))
        return [stanza for stanza in self.index(DEBS) if versions.get(stanza["Package"]) == stanza["Version"]]

    def fetch(self, wanted: Iterable[Stanza]) -> dict[str, Path]:
        """The files of the packages *wanted*, by their paths in an archive."""
        archives = self.directory / "archives"
        files = {stanza["Filename"]: archives / self._name(stanza) for stanza in wanted}
        missing = [stanza["Package"] for stanza in wanted if not files[stanza["Filename"]].exists()]
        if missing:
            self.run("apt-get", "-qq", "download", *missing)
        for stanza in wanted:
            path = files[stanza["Filename"]]
            if not path.exists() or path.stat().st_size != int(stanza["Size"]):
                raise GuestError(f"apt did not fetch {path.name}")
        return files

    @staticmethod
    def _name(stanza: Stanza) -> str:
        version = stanza["Version"].replace(":", "%3a")
        return f"{stanza['Package']}_{version}_{stanza['Architecture']}.{stanza['Filename'].rsplit('.', 1)[1]}"
