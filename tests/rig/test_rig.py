"""The rig itself, and what only an ordinary KVM can show: the ABI suite and a nested guest, npt on and off."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmonty.base.errors import GuestError

from . import image, machine
from .machine import TIMEOUT_STATUS, Rig, RigError

PROBE = """\
import fcntl, os, pathlib
print("api", fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), 0xAE00, 0))  # KVM_GET_API_VERSION
print("npt", pathlib.Path("/sys/module/kvm_amd/parameters/npt").read_text())
pathlib.Path(os.environ["VMONTY_RIG_OUT"], "big").write_bytes(bytes(range(256)) * 4096)
raise SystemExit(200)
"""


# In the environment of every process that these tests start; another rig may run beside.
MARK = f"VMONTY_RIG_TEST={os.getpid()}"


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    if (reason := Rig.missing()) is not None:
        pytest.skip(reason)
    try:
        made = Rig(echo=machine.show)
    except GuestError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*MARK.split("="))
        yield made
    assert not leftovers(), "a QEMU of the rig is still running"


def leftovers() -> list[str]:
    """The QEMUs, and the guards around them, that these tests started and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if MARK.encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append((path / "cmdline").read_text(errors="replace").replace("\0", " "))
        except OSError:
            continue  # it has ended, or is not ours
    return found


def test_mark_is_seen(rig: Rig) -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            assert leftovers() == ["sleep 600 "]
        finally:
            process.kill()


@pytest.mark.parametrize("npt", [True, False], ids=["npt=1", "npt=0"])
def test_kvm_answers(rig: Rig, npt: bool, tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    result = rig.run(["python", "/root/probe.py"], npt=npt, files={"/root/probe.py": probe}, timeout_s=120)
    assert "api 12\n" in result.output
    assert f"npt {'Y' if npt else 'N'}\n" in result.output
    assert result.status == 200
    assert result.artefacts == {"big": bytes(range(256)) * 4096}


def test_time_limit(rig: Rig) -> None:
    result = rig.run(["sleep", "600"], timeout_s=5)
    assert result.status == TIMEOUT_STATUS
    assert not leftovers()


def test_death_of_the_guest_is_told(rig: Rig) -> None:
    with pytest.raises(RigError, match=r"died before its command ended; its last words:\n.*farewell"):
        rig.run(["sh", "-c", "echo farewell; sleep 1; poweroff -f"], timeout_s=120)


def test_missing_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(RigError, match="install the package qemu-system-x86"):
        Rig()


@pytest.mark.parametrize("npt", [True, False], ids=["npt=1", "npt=0"])
def test_abi_suite(rig: Rig, npt: bool) -> None:
    """The whole ABI suite passes on a real kvm-amd, and it is not an empty one."""
    if not list(Path(image.PROJECT, "tests", "kvm_abi").glob("test_*.py")):
        pytest.skip("tests/kvm_abi has no tests")
    command = ["python", "-m", "pytest", "tests/kvm_abi", "--provider=linux", "-q", "-p", "no:cacheprovider"]
    result = rig.run(command, npt=npt)
    summary = result.output.rstrip().rpartition("\n")[2]
    assert result.status == 0, summary
    passed = re.search(r"(\d+) passed", summary)
    assert passed is not None, summary
    assert int(passed[1]) >= 100, summary


@pytest.mark.parametrize("npt", [True, False], ids=["npt=1", "npt=0"])
def test_machines_boot_the_default_guest(rig: Rig, npt: bool) -> None:
    """``vmonty run`` boots Linux on KVM, on every board, with input from a plain stream, and ends with the guest."""
    if not Path(image.PROJECT, "src", "vmonty", "cli", "run.py").exists():
        pytest.skip("there is no `vmonty run`")
    boards = {"pc --cpus 2": 2} | ({"q35": 1, "microvm": 1} if npt else {})  # each takes twice as long without
    script = f"""
for machine in {" ".join(f"'{board}'" for board in boards)}; do
  echo "machine $machine"
  echo 'uname -r; echo cpus=$(nproc); poweroff -f' | vmonty run --accel kvm --machine $machine || exit
done
"""
    result = rig.run(["sh", "-c", script], npt=npt, files=image.default_guest(rig.guest))
    assert result.status == 0
    _, *told = result.output.split("machine ")
    assert [text.split()[0] for text in told] == [board.split()[0] for board in boards]
    for text, cpus in zip(told, boards.values(), strict=True):
        assert "vmonty: userspace is up" in text
        assert f"\n{rig.guest.kernel_release}\n" in text
        assert f"\ncpus={cpus}\n" in text


DRIVER = """\
import sys
from tests.rig.machine import _stream
_stream(["sh", "-c", "echo $$; exec sleep 600"], 600, lambda text: print(text, end="", flush=True))
"""


def test_qemu_dies_with_its_driver() -> None:
    """Even a killed driver, which can clean nothing up, leaves no process."""
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not on this host: install util-linux")
    path = {"PYTHONPATH": f"{image.PROJECT}:{image.PROJECT / 'src'}"}
    command = [sys.executable, "-c", DRIVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | path) as driver:
        assert driver.stdout is not None
        guarded = os.pidfd_open(int(driver.stdout.readline()))
        driver.kill()
    try:
        ended = select.select([guarded], [], [], 60)[0]
    finally:
        os.close(guarded)
    assert ended
