"""The user network with a real guest: Linux's virtio-net driver on the software CPU."""

from __future__ import annotations

import hashlib
import os
import re
import urllib.request
from pathlib import Path

import pytest
from tests.vmm.net.namespace import web_server

import vmonty


@pytest.mark.usefixtures("busybox_guest")
@pytest.mark.parametrize("machine", ["pc", "microvm"])
def test_a_guest_has_an_address_and_passes_files_both_ways(tmp_path: Path, machine: str) -> None:
    data = os.urandom(8 << 20)
    (tmp_path / "file").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    network = "user,hostfwd=tcp:127.0.0.1:0-:80"
    with (
        web_server(tmp_path) as port,
        vmonty.VM(machine=machine, memory="256M", accel="soft", net=network) as vm,
    ):
        vm.start()
        vm.console.expect("/root # ", 120)
        vm.console.sendline("ip addr show eth0; cat /etc/resolv.conf; ping -c 2 10.0.2.2")
        vm.console.expect("inet 10.0.2.15/24", 60)
        vm.console.expect("nameserver 10.0.2.3", 60)
        vm.console.expect("2 packets received", 60)
        vm.console.sendline(f"wget -q -O file http://10.0.2.2:{port}/file; sha256sum file; httpd -p 80; echo do''ne")
        vm.console.expect(digest, 120)
        vm.console.expect("done", 60)
        with urllib.request.urlopen(f"http://127.0.0.1:{vm.forwarded_ports[0]}/file", timeout=120) as answer:
            assert hashlib.sha256(answer.read()).hexdigest() == digest
        # Linux counts what it hands to the card: with TSO that is more than a frame at a time.
        vm.console.sendline(
            "cd /sys/class/net/eth0/statistics; echo sent: $(($(cat tx_bytes) / $(cat tx_packets))) a packet"
        )
        sent = vm.console.expect(re.compile(rb"\nsent: (\d+) a packet"), 60)
        assert int(sent[1]) > 3000, "frames went out one by one, not as large segments"
        vm.console.sendline("poweroff -f")
        outcome = vm.wait(60)
    assert outcome is not None
    assert outcome.ending.value == "power-off"
