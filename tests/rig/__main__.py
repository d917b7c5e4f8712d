"""``python -m tests.rig``: run a command, by default the ABI suite, on a real kvm-amd under QEMU."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from vmonty.base.errors import GuestError

from . import image
from .machine import Rig, RigError, show

SKIPPED = 77  # the status by which test drivers know a skip from a failure
DEFAULT_COMMAND = [
    "python",
    "-m",
    "pytest",
    "tests/kvm_abi",
    "--provider=linux",
    "-q",
    "-p",
    "no:cacheprovider",
]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.rig",
        description="Boot a Linux with kvm-amd under QEMU's TCG and run COMMAND in it, "
        "by default the ABI suite. The exit status is the command's; "
        f"{SKIPPED} when there can be no rig here.",
        epilog="example: python -m tests.rig --npt both -- python -m pytest -q tests/kvm_abi -k msr",
    )
    parser.add_argument(
        "--npt", choices=["0", "1", "both"], default="1", help="nested paging on, off, or one run with each"
    )
    parser.add_argument("--shell", action="store_true", help="an interactive shell instead of a command")
    parser.add_argument("--guest", action="store_true", help="bring the default guest along, for `vmonty run`")
    parser.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="GUEST=HOST",
        help="copy HOST to the absolute path GUEST",
    )
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds for each run")
    parser.add_argument("command", nargs="*", metavar="COMMAND")
    arguments = parser.parse_args()
    if (reason := Rig.missing()) is not None:
        print(f"rig: skipped: {reason}", file=sys.stderr)
        return SKIPPED
    files = {}
    for pair in arguments.file:
        name, separator, path = pair.partition("=")
        if not separator or not name.startswith("/") or not Path(path).is_file():
            parser.error(f"--file {pair}: give an absolute path in the guest, '=', and a file here")
        files[name] = Path(path)
    try:
        rig = Rig(progress=_report, echo=show)
        if arguments.guest:
            files |= image.default_guest(rig.guest)
        if arguments.shell:
            rig.shell(npt=arguments.npt != "0", files=files)
            return 0
        statuses = []
        for npt in {"0": [False], "1": [True], "both": [True, False]}[arguments.npt]:
            print(f"rig: npt={int(npt)}", file=sys.stderr)
            begin = time.monotonic()
            command = arguments.command or DEFAULT_COMMAND
            status = rig.run(command, npt=npt, files=files, timeout_s=arguments.timeout).status
            print(
                f"rig: npt={int(npt)}: status {status} after {time.monotonic() - begin:.1f} s",
                file=sys.stderr,
            )
            statuses.append(status)
        return max(statuses)
    except (GuestError, RigError) as error:
        print(f"rig: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rig: interrupted", file=sys.stderr)
        return 130


_phase = ""


def _report(phase: str, done: int, total: int, /) -> None:
    global _phase
    if phase != _phase:
        _phase = phase
        print(f"rig: {phase} …", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
