"""What a virtual machine is to be: typed, checked, and the same from Python, a file or the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from vmonty.base.errors import UsageError
from vmonty.base.sizes import parse_size
from vmonty.vm.plan import Plan, usual_firmware
from vmonty.vmm import catalogue, peripherals
from vmonty.vmm import cpu as cpu_model
from vmonty.vmm.block.throttle import Limits
from vmonty.vmm.bootorder import MOST_INDEX
from vmonty.vmm.firmware import NAMES, BootOptions
from vmonty.vmm.machine import MOST_VCPUS
from vmonty.vmm.memory import check_size
from vmonty.vmm.net.user.config import Forward, UserConfig
from vmonty.vmm.optionrom import OptionRom

Checked = TypeVar("Checked")

MOST_SECONDS = 10**9  # Python's timers end somewhat above


def _size(value: object) -> object:
    return _as_value_error(lambda: parse_size(value)) if isinstance(value, str) else value


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


BootIndex = Annotated[int | None, Field(ge=0, le=MOST_INDEX)]


def _options(text: str, first: str, lists: tuple[str, ...] = ()) -> dict[str, object]:
    """``VALUE,name=value,…`` as a dict; the *first* word is the value of the field of that name."""
    head, *rest = text.split(",")
    name, equals, value = head.partition("=")
    made: dict[str, Any] = {name: value} if equals and name == first else {first: head}
    for option in rest:
        name, equals, value = option.partition("=")
        if name in lists:
            made.setdefault(name, []).append(value)
        else:
            made[name] = value if equals else "on"
    return made


def _disk(text: str) -> dict[str, object]:
    found = _options(text, "file")
    if "ro" in found:
        found["readonly"] = found.pop("ro")
    if "if" in found:
        found["bus"] = found.pop("if")
    return found


class Disk(_Model):
    """A disk, on virtio or *bus* ``ide`` or ``sata``; as text ``FILE,format=qcow2,ro,snapshot,if=ide``, as on the
    command line.
    """

    file: Path
    format: Literal["auto", "raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc", "dmg"] = "auto"
    readonly: bool = False
    snapshot: bool = False
    bus: Literal["virtio", "ide", "sata"] = "virtio"
    size: Annotated[int, BeforeValidator(_size)] | None = None
    bootindex: BootIndex = None
    bps: Annotated[int, BeforeValidator(_size)] = 0
    bps_rd: Annotated[int, BeforeValidator(_size)] = 0
    bps_wr: Annotated[int, BeforeValidator(_size)] = 0
    iops: int = 0
    iops_rd: int = 0
    iops_wr: int = 0

    @model_validator(mode="after")
    def _possible(self) -> Disk:
        _as_value_error(self.plan)
        return self

    def plan(self) -> peripherals.Disk:
        """For the machine. Raises UsageError for limits that contradict each other."""
        limits = {name: value for name in peripherals.LIMITS if (value := getattr(self, name))}
        return peripherals.Disk(
            self.file, self.format, self.readonly, self.snapshot, self.bus, self.size, self.bootindex,
            Limits(**limits) if limits else None,
        ).checked()  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        return _disk(str(value)) if isinstance(value, str | Path) else value


class Cdrom(_Model):
    """A disc in a drive of its own; as text ``FILE,bootindex=0``."""

    file: Path
    bootindex: BootIndex = None

    def plan(self) -> peripherals.Cdrom:
        """For the machine."""
        return peripherals.Cdrom(self.file, self.bootindex)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        return _options(str(value), "file") if isinstance(value, str | Path) else value


class UserNetwork(_Model):
    """A card on a network of its own, as ``user,hostfwd=tcp::2222-:22``; the options are QEMU's.

    *mac* is the card's address, *pcap* a capture file of what passes, *romfile* its option ROM (empty: none).
    """

    type: Literal["user"] = "user"
    net: IPv4Network | None = None
    host: IPv4Address | None = None
    dns: IPv4Address | None = None
    dhcpstart: IPv4Address | None = None
    hostname: str = ""
    domainname: str = ""
    restrict: bool = False
    ipv6: bool = True
    tftp: Path | None = None
    bootfile: str = ""
    hostfwd: tuple[str, ...] = ()
    mac: Annotated[str | None, Field(pattern=r"^[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}$")] = None
    pcap: Path | None = None
    bootindex: BootIndex = None
    romfile: Path | None = None

    @model_validator(mode="after")
    def _possible(self) -> UserNetwork:
        _as_value_error(self.config)
        return self

    def config(self) -> UserConfig:
        """For the backend. Raises UsageError."""
        given = self.model_dump(exclude={"type", "hostfwd", "mac", "pcap", "bootindex", "romfile"}, exclude_none=True)
        return UserConfig(**given, forwards=tuple(map(Forward.parse, self.hostfwd)))

    def plan(self) -> peripherals.Network:
        """For the machine."""
        return peripherals.Network(
            "user", self.config(), mac=_mac(self.mac), capture=self.pcap, boot_index=self.bootindex, rom=self.romfile
        )


class TapNetwork(_Model):
    """A card on the host's tap interface *ifname*; as text ``tap,ifname=tap0``."""

    type: Literal["tap"] = "tap"
    ifname: str = "tap%d"
    mac: Annotated[str | None, Field(pattern=r"^[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}$")] = None
    pcap: Path | None = None
    bootindex: BootIndex = None
    romfile: Path | None = None

    def plan(self) -> peripherals.Network:
        """For the machine."""
        return peripherals.Network(
            "tap", interface=self.ifname, mac=_mac(self.mac), capture=self.pcap, boot_index=self.bootindex,
            rom=self.romfile,
        )  # fmt: skip


def _mac(text: str | None) -> bytes | None:
    return bytes.fromhex(text.replace(":", "")) if text is not None else None


def _network(value: object) -> object:
    if not isinstance(value, str):
        return value
    found = _options(value, "type", ("hostfwd",))
    if found["type"] not in ("user", "tap"):
        raise ValueError(f"{found['type']!r} is no kind of network; there are: user, tap")
    return found


Network = Annotated[Annotated[UserNetwork | TapNetwork, Field(discriminator="type")], BeforeValidator(_network)]


class Settings(_Model):
    """A virtual machine. Sizes in bytes, or as text such as 512M.

    Without *kernel* and *firmware* it is the *guest* that vmonty builds itself. *machine*, *cpu* and *devices* are
    text as the command line has it (``q35,root-ports=2``). *disks* and *net* take one or several, as text or as
    tables. *firmware* is ``bios`` or a file, and *boot* its options (``menu=on``). *vnc* is where viewers connect
    (``:0``).
    """

    guest: Literal["busybox", "debian"] | None = None
    kernel: Path | None = None
    initrd: Path | None = None
    append: str | None = None
    firmware: str | None = None
    nvram: Path | None = None
    boot: str = ""
    memory: Annotated[int, BeforeValidator(_size)] = 512 << 20
    cpus: int = 1
    machine: str = "pc"
    cpu: str = cpu_model.DEFAULT
    devices: tuple[str, ...] = ()
    option_roms: tuple[str, ...] = ()
    accel: str = "auto"
    disks: tuple[Disk, ...] = ()
    cdroms: tuple[Cdrom, ...] = ()
    vnc: str | None = None
    net: tuple[Network, ...] = ()
    reboot: bool = True
    timeout: Annotated[float | None, Field(gt=0, le=MOST_SECONDS)] = None
    console_log: Path | None = None

    def plan(self) -> Plan:
        """For the machine."""
        return Plan(
            self.kernel, self.initrd, self.append, self.memory, self.cpus, self.machine, self.cpu, self.devices,
            self.accel, tuple(disk.plan() for disk in self.disks), tuple(network.plan() for network in self.net),
            self.reboot, self.timeout, self.firmware or self._usual_firmware(), self.boot,
            tuple(disc.plan() for disc in self.cdroms), self.nvram, self.vnc,
            tuple(map(OptionRom.parse, self.option_roms)), self.guest,
        )  # fmt: skip

    def _usual_firmware(self) -> str | None:
        return usual_firmware(self.kernel is not None or self.guest is not None, self.cdroms)

    @field_validator("disks", "cdroms", "net", "devices", "option_roms", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        if value is None or value == "none":
            return ()
        return (value,) if isinstance(value, str | Path | dict | _Model) else value

    @field_validator("memory")
    @classmethod
    def _enough(cls, value: int) -> int:
        _as_value_error(lambda: check_size(value))
        return value

    @field_validator("cpus")
    @classmethod
    def _countable(cls, value: int) -> int:
        if not 1 <= value <= MOST_VCPUS:
            raise ValueError(f"{value} vCPUs: a machine has 1 to {MOST_VCPUS}")
        return value

    @field_validator("cpu")
    @classmethod
    def _known_model(cls, value: str) -> str:
        _as_value_error(lambda: cpu_model.check(value))
        return value

    @field_validator("vnc")
    @classmethod
    def _known_display(cls, value: str | None) -> str | None:
        if value is not None:
            from vmonty.vmm.display.vnc.server import VncOptions  # asyncio is only for those who need it

            text = value
            _as_value_error(lambda: VncOptions.parse(text))
        return value

    @field_validator("boot")
    @classmethod
    def _known_options(cls, value: str) -> str:
        _as_value_error(lambda: BootOptions.parse(value))
        return value

    @field_validator("option_roms")
    @classmethod
    def _known_roms(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        _as_value_error(lambda: tuple(map(OptionRom.parse, value)))
        return value

    @field_validator("machine")
    @classmethod
    def _known_board(cls, value: str) -> str:
        _as_value_error(lambda: catalogue.check(value, ()))
        return value

    @model_validator(mode="after")
    def _known_devices(self) -> Settings:
        _as_value_error(lambda: catalogue.check(self.machine, self.devices))
        return self

    @model_validator(mode="after")
    def _one_thing_to_boot(self) -> Settings:
        if self.initrd is not None and self.kernel is None:
            raise ValueError("initrd needs kernel")
        if self.kernel is not None and self.guest is not None:
            raise ValueError("give either guest or kernel")
        if self.firmware is not None and (self.kernel is not None or self.guest is not None):
            raise ValueError("firmware boots what is on the disks: give no guest and no kernel with it")
        if (self.boot or self.nvram) and self.firmware is None and self._usual_firmware() is None:
            raise ValueError("boot and nvram need firmware")
        return self


def _as_value_error(check: Callable[[], Checked]) -> Checked:
    try:
        return check()
    except UsageError as error:
        raise ValueError(str(error)) from error


def settings(fields: dict[str, Any]) -> Settings:
    """Settings from *fields*. Raises UsageError, which names the field that is wrong."""
    try:
        return Settings(**fields)
    except ValidationError as error:
        raise UsageError("; ".join(map(_one_line, error.errors()))) from error


def _one_line(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"] if part not in ("user", "tap"))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "there is no such setting"
    return f"{place}: {message}" if place else message


def read_file(path: Path) -> dict[str, Any]:
    """The fields in a TOML or YAML file, by its suffix; relative paths in it are relative to it. Raises UsageError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the configuration {path} cannot be read: {error}") from error
    match path.suffix.lower():
        case ".toml":
            try:
                fields: object = tomllib.loads(text)
            except tomllib.TOMLDecodeError as error:
                raise UsageError(f"{path} is no TOML: {error}") from error
        case ".yaml" | ".yml":
            import yaml

            try:
                fields = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise UsageError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
        case _:
            raise UsageError(f"{path}: the name must end in .toml, .yaml or .yml")
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise UsageError(f'{path} holds no settings: write lines such as memory = "512M"')
    return {name: _beside(path.parent, name, value) for name, value in fields.items()}


_PATHS = (
    "nvram",
    "cdroms",
    "option_roms",
    "kernel",
    "initrd",
    "firmware",
    "console_log",
    "file",
    "tftp",
    "pcap",
    "romfile",
)


def _beside(folder: Path, name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {inner: _beside(folder, inner, item) for inner, item in value.items()}
    if isinstance(value, list):
        return [_beside(folder, name, item) for item in value]
    if not isinstance(value, str):
        return value
    if name == "disks":
        return {**_disk(value), "file": str(folder / str(_disk(value)["file"]))}
    if name == "firmware" and value in NAMES:
        return value
    return str(folder / value) if name in _PATHS else value
