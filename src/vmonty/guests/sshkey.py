"""The key that guests let in: the user's own, or one that is made for them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from vmonty.base.cachedir import cache_root
from vmonty.base.errors import GuestError

_NAMES = ("id_ed25519", "id_ecdsa", "id_rsa")


def user_key(cache: Path | None = None) -> Path:
    """The private key of a pair; the public one lies beside it, with .pub.

    The user's own when there is one in ``~/.ssh``, else one without a passphrase in the cache, made once. Raises
    GuestError when none can be made.
    """
    for name in _NAMES:
        own = Path.home() / ".ssh" / name
        if own.exists() and own.with_name(own.name + ".pub").exists():
            return own
    made = (cache or cache_root()) / "keys" / "id_ed25519"
    if made.exists() and made.with_name(made.name + ".pub").exists():
        return made
    program = shutil.which("ssh-keygen")
    if program is None:
        raise GuestError("ssh-keygen is not on this host, and there is no key in ~/.ssh; install openssh-client")
    made.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.chmod(made.parent, 0o700)
    made.unlink(missing_ok=True)
    command = [program, "-q", "-t", "ed25519", "-N", "", "-C", "vmonty", "-f", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode or not made.exists():
        raise GuestError(f"ssh-keygen made no key in {made.parent}: {done.stderr.strip() or 'no reason given'}")
    return made
