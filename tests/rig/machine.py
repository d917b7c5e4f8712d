"""One run of the rig: QEMU started, its console shown as it comes, the result fetched, no process left."""

from __future__ import annotations

import codecs
import os
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from vmonty.guests import busybox
from vmonty.guests.progress import Progress, silent

from . import image

QEMU = "qemu-system-x86_64"
TIMEOUT_STATUS = 124  # as timeout(1) has it
# The crypto self-tests are more than half of the kernel's boot, counted in instructions.
_KERNEL_COMMAND_LINE = "console=ttyS0 quiet panic=-1 mitigations=off cryptomgr.notests=1 init_on_alloc=0"


class RigError(Exception):
    """The rig could not be started, or died before its command ended."""


@dataclass(frozen=True)
class RigResult:
    """What a command in the rig left.

    *status* is its exit status, or TIMEOUT_STATUS if it was killed after the time limit; *artefacts* are the
    files that it wrote to the directory ``$VMONTY_RIG_OUT``, by relative path.
    """

    status: int
    output: str
    artefacts: Mapping[str, bytes] = field(default_factory=dict)


class Rig:
    """The rig, ready to run commands; *echo* gets the output piece by piece as it comes.

    Raises RigError if QEMU is missing, GuestError if the kernel or busybox cannot be had.
    """

    def __init__(self, *, progress: Progress = silent, echo: Callable[[str], None] | None = None) -> None:
        if (reason := Rig.missing()) is not None:
            raise RigError(reason)
        self.guest = busybox.build(progress=progress)
        self._base = image.base(self.guest, progress).path
        self._echo = echo

    @staticmethod
    def missing() -> str | None:
        """Why there can be no rig on this host, with the remedy; None if there can."""
        if shutil.which(QEMU) is None:
            return f"{QEMU} is not on this host: install the package qemu-system-x86"
        return None

    def run(
        self,
        command: Sequence[str],
        *,
        npt: bool = True,
        files: Mapping[str, Path] | None = None,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 600,
    ) -> RigResult:
        """Boot, run *command* in the project's directory, switch off.

        *npt* chooses between nested and shadow paging in kvm-amd. *files* maps absolute paths in the guest to
        files here. *timeout_s* is wall-clock time, booting included. Raises RigError if the guest dies.
        """
        with _memory_file("initrd") as initrd, _memory_file("result") as result:
            arguments = self._arguments(initrd, command, npt, files or {}, environment or {}, shell=False)
            arguments += [
                "-serial", "stdio",
                "-device", "virtio-serial-pci",
                "-chardev", f"file,id=result,path={_inherited(result)}",
                "-device", "virtserialport,chardev=result,name=vmonty.result",
            ]  # fmt: skip
            output, in_time = _stream(arguments, timeout_s, self._echo, (initrd.fileno(), result.fileno()))
            if not in_time:
                return RigResult(TIMEOUT_STATUS, output)
            return _result(result, output)

    def shell(self, *, npt: bool = True, files: Mapping[str, Path] | None = None) -> None:
        """Boot to a shell on this terminal; its ``exit`` switches the rig off."""
        with _memory_file("initrd") as initrd:
            environment = {"TERM": os.environ.get("TERM", "linux")}
            arguments = self._arguments(initrd, [], npt, files or {}, environment, shell=True)
            # Ctrl-C is the guest's; QEMU restores the terminal when it ends.
            arguments += ["-chardev", "stdio,id=terminal,signal=off", "-serial", "chardev:terminal"]
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                subprocess.run(arguments, check=False, pass_fds=(initrd.fileno(),))
            finally:
                signal.signal(signal.SIGINT, before)

    def _arguments(
        self,
        initrd: IO[bytes],
        command: Sequence[str],
        npt: bool,
        files: Mapping[str, Path],
        environment: Mapping[str, str],
        *,
        shell: bool,
    ) -> list[str]:
        parameters = {"npt": str(int(npt)), "nested": "1"}
        with self._base.open("rb") as source:
            shutil.copyfileobj(source, initrd, 1 << 20)
        image.write_run(initrd, command, kvm_amd=parameters, files=files, environment=environment, shell=shell)
        initrd.flush()
        return [
            QEMU, "-accel", "tcg,thread=multi", "-cpu", "max", "-M", "pc", "-smp", "1", "-m", "2048",
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-kernel", str(self.guest.kernel), "-initrd", _inherited(initrd),
            "-append", _KERNEL_COMMAND_LINE,
        ]  # fmt: skip


def _stream(
    arguments: Sequence[str],
    timeout_s: float,
    echo: Callable[[str], None] | None,
    pass_fds: Sequence[int] = (),
) -> tuple[str, bool]:
    """Run to the end or to the time limit; returns the output, and whether it ended by itself."""
    deadline = time.monotonic() + timeout_s
    # Dies with this process, even by SIGKILL; and of old age if that fails.
    guard = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    limit = ["timeout", "--kill-after=5", str(int(timeout_s) + 30)]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pieces: list[str] = []
    with subprocess.Popen(
        [*guard, *limit, *guard, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=pass_fds,
    ) as process:
        assert process.stdout is not None
        pipe = process.stdout.fileno()
        try:
            while True:
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([pipe], [], [], left)[0]:
                    return "".join(pieces), False
                data = os.read(pipe, 1 << 16)
                # The kernel's own messages end in CR LF.
                text = decoder.decode(data, final=not data).replace("\r", "")
                pieces.append(text)
                if echo is not None and text:
                    echo(text)
                if not data:
                    return "".join(pieces), True
        finally:
            # The whole group: QEMU, and the guards around it.
            if process.poll() is None:
                _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(0.5)  # the pipe was closed because it is about to end
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def _memory_file(name: str) -> IO[bytes]:
    """A file without a name: no end of this process can leave it behind."""
    return os.fdopen(os.memfd_create(f"vmonty-rig-{name}"), "w+b")


def _inherited(file: IO[bytes]) -> str:
    return f"/proc/self/fd/{file.fileno()}"


def _result(file: IO[bytes], output: str) -> RigResult:
    artefacts: dict[str, bytes] = {}
    status: int | None = None
    try:
        with tarfile.open(fileobj=file) as tar:
            for member in tar:
                contents = tar.extractfile(member) if member.isreg() else None
                if contents is None:
                    continue
                if member.name == "status":
                    status = int(contents.read())
                else:
                    artefacts[member.name.removeprefix("out/")] = contents.read()
    except (OSError, tarfile.TarError, ValueError):
        status = None
    if status is None:
        last = "\n".join(output.splitlines()[-15:]) or "(it printed nothing)"
        raise RigError(f"the rig died before its command ended; its last words:\n{last}")
    return RigResult(status, output, artefacts)


def show(text: str) -> None:
    """Echo to standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
