"""``vmonty bench net``: TCP between a Linux guest and the host by the user network, on soft and under QEMU's TCG.

To the host the guest connects to 10.0.2.2; from the host a forwarded port is used. Each transfer is one connection,
which ends when its receiver has everything.
"""

from __future__ import annotations

import socket
import tempfile
import threading
from pathlib import Path

from vmonty.bench.compiler import PayloadError
from vmonty.bench.linux import Guest, Sample, guests, rows
from vmonty.bench.report import Report
from vmonty.guests.progress import Progress, silent

MIB = 1 << 20
CHUNK = 256 << 10
GUEST_PORT = 5001
LIMIT_S = 300.0
TARGET = "≥ TCG"
# Rounds, and the bytes of a transfer.
FULL, QUICK = (3, 256 * MIB), (1, 64 * MIB)


def measure(quick: bool = False, say: Progress = silent) -> Report:
    """Three rounds, *quick* one of shorter transfers. Raises PayloadError, GuestError."""
    rounds, total = QUICK if quick else FULL
    report = Report("Net: TCP by the user network")
    ports = {who: _free_port() for who in ("vmonty", "qemu_tcg")}
    forwards = {who: f"hostfwd=tcp:127.0.0.1:{port}-:{GUEST_PORT}" for who, port in ports.items()}
    ours = ["--net", f"user,{forwards['vmonty']}"]
    qemus = ["-netdev", f"user,id=n,{forwards['qemu_tcg']}", "-device", "virtio-net-pci,netdev=n"]
    with tempfile.TemporaryDirectory() as name, guests(Path(name), ours, qemus, say) as running:
        for title, transfer in (("guest to host", _to_host), ("host to guest", _to_guest)):
            taken: dict[str, list[Sample]] = {guest.who: [] for guest in running}
            for turn in range(rounds):
                say(title, turn, rounds)
                for guest in running:
                    taken[guest.who].append(transfer(guest, ports[guest.who], total))
            report.rows += rows(f"TCP, {title}", "MB", total / 1e6, taken, TARGET)
    return report


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _to_host(guest: Guest, port: int, total: int) -> Sample:
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.settimeout(LIMIT_S)
        received = 0

        def receive() -> None:
            nonlocal received
            link, _ = door.accept()
            buffer = bytearray(CHUNK)
            with link:
                while got := link.recv_into(buffer):
                    received += got
                link.sendall(b"!")

        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        taken = guest.command(f"transfers send 10.0.2.2 {door.getsockname()[1]} {total}")
        thread.join(LIMIT_S)
    if received != total:
        raise PayloadError(f"{guest.who}: {received} bytes of {total} came from the guest")
    return taken


def _to_guest(guest: Guest, port: int, total: int) -> Sample:
    failures: list[str] = []

    def send() -> None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as link:
                data = bytes(CHUNK)
                for _ in range(total // CHUNK):
                    link.sendall(data)
                if link.recv(1) != b"!":
                    failures.append("the guest closed the connection early")
        except OSError as error:
            failures.append(str(error))

    thread = threading.Thread(target=send, daemon=True)
    taken = guest.command(f"transfers sink {GUEST_PORT} {total}", thread.start)
    thread.join(LIMIT_S)
    if failures:
        raise PayloadError(f"{guest.who}: {failures[0]}")
    return taken
