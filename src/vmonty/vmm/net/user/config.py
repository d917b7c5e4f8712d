"""What a user network looks like, from the text of ``--net user,…``."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import AddressValueError, IPv4Address, IPv4Network, NetmaskValueError
from pathlib import Path

from vmonty.base.errors import UsageError

OPTIONS = "net= host= dns= dhcpstart= hostname= domainname= restrict= ipv6= tftp= bootfile= hostfwd="

# An option of DHCP holds 255 bytes, the boot file field 128 with its end.
MOST_HOSTNAME, MOST_BOOTFILE = 255, 127

DEFAULT_NETWORK = IPv4Network("10.0.2.0/24")

# A pool of leases; a smaller network has fewer.
MOST_LEASES = 16


@dataclass(frozen=True)
class Forward:
    """A port of the host that leads to one of the guest; *guest* None is the first DHCP address, port 0 any free."""

    protocol: str
    host: IPv4Address
    host_port: int
    guest: IPv4Address | None
    guest_port: int

    @classmethod
    def parse(cls, text: str) -> Forward:
        """From ``tcp:[addr]:port-[guestaddr]:port``. Raises UsageError."""
        try:
            protocol, rest = text.split(":", 1)
            outside, inside = rest.split("-", 1)
            host, host_port = outside.rsplit(":", 1)
            guest, guest_port = inside.rsplit(":", 1)
            made = cls(
                protocol or "tcp",
                IPv4Address(host or "0.0.0.0"),
                _port(host_port, 0),
                IPv4Address(guest) if guest else None,
                _port(guest_port, 1),
            )
        except ValueError as error:
            raise UsageError(f"hostfwd={text}: write it as tcp:[addr]:port-[guestaddr]:port ({error})") from error
        if made.protocol not in ("tcp", "udp"):
            raise UsageError(f"hostfwd={text}: the protocol is tcp or udp, not {made.protocol!r}")
        return made

    def __str__(self) -> str:
        return f"{self.protocol}:{self.host}:{self.host_port}-{self.guest or ''}:{self.guest_port}"


def _port(text: str, least: int) -> int:
    number = int(text)
    if not least <= number <= 65535:
        raise ValueError(f"port {number} is outside {least} to 65535")
    return number


@dataclass(frozen=True)
class UserConfig:
    """A user network. Raises UsageError for one that cannot be.

    *restrict* keeps the guest from the host and the world; forwarded ports still reach it. *tftp* is a directory
    that is served read-only, *bootfile* the name that DHCP gives. *ipv6* adds fec0::/64, with the host at fec0::2.
    """

    net: IPv4Network = DEFAULT_NETWORK
    host: IPv4Address | None = None
    dns: IPv4Address | None = None
    dhcpstart: IPv4Address | None = None
    hostname: str = ""
    domainname: str = ""
    restrict: bool = False
    ipv6: bool = True
    tftp: Path | None = None
    bootfile: str = ""
    forwards: tuple[Forward, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.net.prefixlen > 28:
            raise UsageError(f"net={self.net}: the user network needs 16 addresses, so /28 at least")
        # Three fixed places, as QEMU has them: .2, .3 and .15 of the network.
        for name, offset in (("host", 2), ("dns", 3), ("dhcpstart", min(15, self.net.num_addresses - 2))):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.net[offset])
            address = getattr(self, name)
            if address not in self.net or address in (self.net.network_address, self.net.broadcast_address):
                raise UsageError(f"{name}={address}: it must be a host of the network {self.net}")
        if len({self.host, self.dns, self.dhcpstart}) != 3:
            raise UsageError("host=, dns= and dhcpstart= must be three different addresses")
        if not self.hostname.isascii() or len(self.hostname) > MOST_HOSTNAME:
            raise UsageError(f"hostname=: at most {MOST_HOSTNAME} ASCII characters")
        if not self.domainname.isascii() or len(self.domainname) > MOST_HOSTNAME:
            raise UsageError(f"domainname=: at most {MOST_HOSTNAME} ASCII characters")
        if len(self.bootfile.encode()) > MOST_BOOTFILE:
            raise UsageError(f"bootfile=: at most {MOST_BOOTFILE} bytes")
        if self.tftp is not None and not self.tftp.is_dir():
            raise UsageError(f"tftp={self.tftp}: there is no such directory")
        for forward in self.forwards:
            if forward.guest is not None and forward.guest not in self.net:
                raise UsageError(f"hostfwd={forward}: the guest's address is not in {self.net}")

    @property
    def leases(self) -> tuple[IPv4Address, ...]:
        """The addresses that DHCP gives, in order."""
        first = int(self.dhcpstart or 0)
        last = min(first + MOST_LEASES, int(self.net.broadcast_address))
        return tuple(a for a in map(IPv4Address, range(first, last)) if a not in (self.host, self.dns))

    @classmethod
    def parse(cls, text: str) -> UserConfig:
        """From the options behind ``user,``. Raises UsageError that names the option."""
        values: dict[str, object] = {}
        forwards = []
        for option in filter(None, text.split(",")):
            name, equals, value = option.partition("=")
            if not equals and name != "restrict":
                raise UsageError(f"the user network's option {option!r} has no value; there are: {OPTIONS}")
            try:
                match name:
                    case "net":
                        values[name] = IPv4Network(value if "/" in value else f"{value}/24", strict=False)
                    case "host" | "dns" | "dhcpstart":
                        values[name] = IPv4Address(value)
                    case "hostname" | "domainname" | "bootfile":
                        values[name] = value
                    case "restrict" | "ipv6":
                        values[name] = _switch(value or "on")
                    case "tftp":
                        values[name] = Path(value)
                    case "hostfwd":
                        forwards.append(Forward.parse(value))
                    case _:
                        raise UsageError(f"the user network has no option {name!r}; there are: {OPTIONS}")
            except (AddressValueError, NetmaskValueError, ValueError) as error:
                raise UsageError(f"the user network's option {option!r}: {error}") from error
        return cls(**values, forwards=tuple(forwards))  # type: ignore[arg-type]


def _switch(text: str) -> bool:
    known = {"on": True, "yes": True, "y": True, "off": False, "no": False, "n": False}
    if text not in known:
        raise ValueError("say on or off")
    return known[text]
