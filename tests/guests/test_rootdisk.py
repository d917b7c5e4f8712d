"""The Debian guest: the whole way but mmdebstrap itself, which a script plays."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from vmonty.base.errors import GuestError
from vmonty.guests import rootdisk, sshkey
from vmonty.guests.progress import Progress

MMDEBSTRAP = r"""#!/bin/sh
set -e
cat > "$FAKE_LOG"
for argument; do echo "$argument" >> "$FAKE_LOG"; last2=$last; last=$argument; done
[ -z "$FAKE_ERROR" ] || { echo "E: $FAKE_ERROR" >&2; exit 25; }
echo "I: running apt-get update..." >&2
work=$(mktemp -d)
mkdir -p "$work/boot" "$work/etc" "$work/root/.ssh"
echo kernel > "$work/boot/vmlinuz-9.9-cloud"
echo initrd > "$work/boot/initrd.img-9.9-cloud"
echo fake > "$work/etc/hostname"
mkdir "$work/dev"
touch "$work/dev/is-the-kernels"
cp "$VMONTY_KEY" "$work/root/.ssh/authorized_keys"
tar -C "$work" -cf "$last2" .
rm -r "$work"
"""
APT_GET = """#!/bin/sh
for suite in $FAKE_SUITES; do echo "$suite deb mirror:/debian $suite main"; done
"""
SIZE = 16 << 20


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with our mmdebstrap and apt-get; the folder of its programs."""
    for program in ("mke2fs", "ssh-keygen", "tar", "debugfs"):
        if shutil.which(program) is None and shutil.which(program, path="/usr/sbin:/sbin") is None:
            pytest.skip(f"{program} is not on this host: apt-get install e2fsprogs openssh-client")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("mmdebstrap", MMDEBSTRAP), ("apt-get", APT_GET)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/sbin:/usr/bin:/sbin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("FAKE_SUITES", "bookworm bookworm-security bookworm-updates bookworm-backports sid")
    (tmp_path / "home").mkdir()
    return programs


def test_without_privileges(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user namespace where newuidmap makes one; else fakechroot, and what it needs is named."""
    monkeypatch.setenv("PATH", str(host))
    (host / "newuidmap").unlink(missing_ok=True)
    for name in ("mke2fs", "tar", "fakeroot"):
        (host / name).unlink(missing_ok=True)
        (host / name).symlink_to("/bin/true")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(GuestError, match=r"apt-get install fakechroot \(or uidmap"):
        rootdisk.tools()
    (host / "fakechroot").symlink_to("/bin/true")
    rootdisk.tools()
    assert (rootdisk._mode(), rootdisk._disguise()) == ("fakechroot", ["fakeroot"])
    for name in ("newuidmap", "unshare"):
        (host / name).symlink_to("/bin/true")
    assert (rootdisk._mode(), rootdisk._disguise()[0]) == ("unshare", "unshare")


def pack(raw: Path, image: Path, progress: Progress) -> None:
    progress("packing", 0, 0)
    shutil.copyfile(raw, image)


def debugfs(image: Path, request: str) -> str:
    program = shutil.which("debugfs") or "/usr/sbin/debugfs"
    return subprocess.run([program, "-R", request, image], capture_output=True, text=True, check=True).stdout


def test_build(host: Path, tmp_path: Path) -> None:
    phases: list[str] = []
    built = rootdisk.build(pack, size=SIZE, cache=tmp_path, progress=lambda phase, *_: phases.append(phase))
    assert (built.kernel.read_text(), built.initrd.read_text()) == ("kernel\n", "initrd\n")
    assert (built.kernel_release, built.suite, built.size) == ("9.9-cloud", "bookworm", SIZE)
    assert built.disk.stat().st_size == SIZE
    assert debugfs(built.disk, "cat /etc/hostname") == "fake\n"
    assert debugfs(built.disk, "cat /root/.ssh/authorized_keys") == built.key.with_name("id_ed25519.pub").read_text()
    assert rootdisk.ROOT_LABEL in debugfs(built.disk, "stats")
    # Device files would need privileges.
    assert "kernels" not in debugfs(built.disk, "ls /dev")
    assert any("apt-get update" in phase for phase in phases)
    log = (tmp_path / "log").read_text().splitlines()
    assert log[:3] == [
        f"deb mirror:/debian {suite} main" for suite in ("bookworm", "bookworm-security", "bookworm-updates")
    ]
    assert not any("gcc" in line for line in log)
    # From the cache, without the program; another kind is built.
    (host / "mmdebstrap").rename(host / "away")
    assert rootdisk.build(pack, size=SIZE, cache=tmp_path) == built == rootdisk.cached(tmp_path)
    (host / "away").rename(host / "mmdebstrap")
    other = rootdisk.build(pack, size=SIZE, compiler=True, cache=tmp_path)
    assert other.disk == built.disk
    assert "gcc" in (tmp_path / "log").read_text()
    assert not list((tmp_path / "guests" / "debian").glob(".build-*"))


@pytest.mark.usefixtures("host")
def test_a_damaged_image_is_built_again(tmp_path: Path) -> None:
    built = rootdisk.build(pack, size=SIZE, cache=tmp_path)
    built.disk.write_bytes(b"damaged")
    assert rootdisk.cached(tmp_path) is None
    assert rootdisk.build(pack, size=SIZE, cache=tmp_path).disk.stat().st_size == SIZE


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        ("FAKE_ERROR", "the mirror is gone", "mmdebstrap failed: the mirror is gone"),
        ("FAKE_SUITES", "", "no lists of a Debian release"),
        ("FAKE_SUITES", "sid bookworm-security", "no lists of a Debian release"),
    ],
)
@pytest.mark.usefixtures("host")
def test_what_goes_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, complaint: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(GuestError, match=complaint) as error:
        rootdisk.build(pack, size=SIZE, cache=tmp_path)
    assert "\n" not in str(error.value)
    assert rootdisk.cached(tmp_path) is None


def test_missing_programs_are_named(host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sshkey.user_key(tmp_path)
    (host / "mmdebstrap").unlink()
    for name in ("sh", "tar"):
        (host / name).symlink_to(shutil.which(name) or name)
    monkeypatch.setenv("PATH", str(host))
    with pytest.raises(GuestError, match=r"apt-get install .*mmdebstrap"):
        rootdisk.build(pack, size=SIZE, cache=tmp_path)


@pytest.mark.usefixtures("host")
def test_the_users_own_key_comes_first(tmp_path: Path) -> None:
    made = sshkey.user_key(tmp_path)
    assert made == tmp_path / "keys" / "id_ed25519"
    assert made.stat().st_mode & 0o77 == 0
    assert sshkey.user_key(tmp_path) == made
    own = tmp_path / "home" / ".ssh"
    own.mkdir()
    (own / "id_rsa").write_text("private")
    assert sshkey.user_key(tmp_path) == made, "half a pair is none"
    (own / "id_rsa.pub").write_text("public")
    assert sshkey.user_key(tmp_path) == own / "id_rsa"


def test_no_way_to_make_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GuestError, match="openssh-client"):
        sshkey.user_key(tmp_path)
