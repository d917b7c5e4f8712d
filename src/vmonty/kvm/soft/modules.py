"""kvm.ko and the two vendor modules: loaded one at a time, with parameters, and unloaded when nothing uses them.

``load("kvm_intel", ept=True)`` is modprobe. What kvm_init() does is one table of steps, each a context manager: loading
enters them in order, and whatever ends it, a failure or ``unload``, leaves exactly those that were entered, in reverse.
Source: virt/kvm/kvm_main.c, kvm_init(), kvm_exit(); arch/x86/kvm/x86.c, kvm_x86_vendor_init().
"""

from __future__ import annotations

import errno
import os
import shlex
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from vmonty.base.errors import KvmError, KvmUnavailable, UsageError
from vmonty.base.ram import Ram
from vmonty.base.record import Record, made
from vmonty.kvm.soft import pcpu as pcpus
from vmonty.kvm.soft.msrs import MSRS_TO_SAVE
from vmonty.kvm.soft.pcpu import HotplugState, PhysicalCpu, SyscoreOps
from vmonty.kvm.soft.stats import VCPU_STATISTICS, VM_STATISTICS, Statistics

if TYPE_CHECKING:
    from vmonty.kvm.soft.kvm_main import Kvm
    from vmonty.kvm.soft.mmu.shadow import ShadowMmu
    from vmonty.kvm.soft.mmu.tdp import TdpMmu
    from vmonty.kvm.soft.vcpu_state import KvmX86Ops
    from vmonty.kvm.soft.x86 import VcpuX86

# Module → where its KvmX86InitOps is. The first is what opening the device loads when nothing is.
VENDORS = {
    "kvm_intel": ("vmonty.kvm.soft.vmx.main", "KvmIntel"),
    "kvm_amd": ("vmonty.kvm.soft.svm.main", "KvmAmd"),
}
PAGE_SIZE = 4096
# What opening the device loads, as modprobe takes it: "kvm_amd npt=0".
ENVIRONMENT = "VMONTY_KVM_MODULE"


class KvmX86InitOps(Protocol):
    """struct kvm_x86_init_ops: what a vendor module brings. It is made anew each time the module is loaded."""

    name: str
    # The feature that the processor must have, and the vendor parameters: a dataclass of bools and ints, which
    # hardware_setup() corrects where the processor lacks something.
    feature: str
    parameters: Any
    # Whether a guest's TSC can have a frequency of its own.
    tsc_scaling: bool

    def hardware_setup(self) -> None:
        """Once: tables, bitmaps, what the parameters come to. Raises OSError."""

    def hardware_unsetup(self) -> None:
        """Undo it."""

    def check_processor_compatibility(self, pcpu: PhysicalCpu) -> None:
        """Raises OSError with EIO for a processor that differs from what hardware_setup() found."""

    def hardware_enable(self, pcpu: PhysicalCpu) -> None:
        """Turn virtualization on there: VMXON, or EFER.SVME. Raises OSError."""

    def hardware_disable(self, pcpu: PhysicalCpu) -> None:
        """Turn it off. The processor holds no vCPU."""

    def mmu_create(self, kvm: Kvm) -> TdpMmu | ShadowMmu:
        """kvm_mmu_init_vm(): the VM's MMU, two-dimensional or shadow as the parameters say."""

    def vcpu_create(self, vcpu: VcpuX86) -> KvmX86Ops:
        """The vendor's part of a vCPU, in its reset state."""

    def set_tss_addr(self, kvm: Kvm, address: int) -> None:
        """KVM_SET_TSS_ADDR: three pages from there on are the vendor's."""


class KvmParameters(Record):
    """Parameters of kvm itself. Times in nanoseconds; ppm are parts per million."""

    halt_poll_ns: int = 0
    ignore_msrs: bool = False
    report_ignored_msrs: bool = True
    tsc_tolerance_ppm: int = 250
    min_timer_period_us: int = 200


class Firmware(Record):
    """What the firmware's setup has left on: a vendor's extension that it disables cannot be used."""

    vmx: bool = True
    svm: bool = True


FIRMWARE = Firmware()


class Module(Record):
    """A loaded vendor module, kvm with it."""

    ops: KvmX86InitOps
    kvm: KvmParameters
    asked: dict[str, int | bool] = made(factory=dict)
    references: int = 0
    vm_list: list[Kvm] = made(factory=list)
    debugfs: dict[str, Callable[[], int]] = made(factory=dict)
    msrs_to_save: tuple[int, ...] = ()
    bad_page: Ram | None = None
    device: bool = False
    _steps: ExitStack = made(factory=ExitStack)
    _lock: threading.Lock = made(factory=threading.Lock)

    @property
    def name(self) -> str:
        """kvm_intel or kvm_amd."""
        return self.ops.name

    @property
    def parameters(self) -> dict[str, int | bool]:
        """As /sys/module/*/parameters shows them: what they came to on this processor."""
        mine: dict[str, int | bool] = vars(self.kvm) | vars(self.ops.parameters)
        return mine

    def get(self) -> None:
        """try_module_get(): one more user. Raises OSError with ENODEV when it is being unloaded."""
        with self._lock:
            if not self.device:
                raise OSError(errno.ENODEV, "the module is not loaded")
            self.references += 1

    def put(self) -> None:
        """module_put()."""
        with self._lock:
            self.references -= 1

    def shrink(self, pages: int) -> int:
        """mmu_shrink_scan(): free page-table pages until it is *pages*, VM by VM; how many were freed."""
        freed = 0
        for vm in list(self.vm_list):
            if freed >= pages:
                break
            freed += vm.zap_all()
            # It is the last to be asked next time.
            self.vm_list.remove(vm)
            self.vm_list.append(vm)
        return freed

    def init(self) -> None:
        """kvm_init(). Raises OSError, with everything as it was before."""
        with ExitStack() as done:
            for step in STEPS:
                done.enter_context(step(self))
            self._steps = done.pop_all()

    def exit(self) -> None:
        """kvm_exit()."""
        self._steps.close()


# ---- kvm_init's steps -----------------------------------------------------------------------------------------


@contextmanager
def init_debug(module: Module) -> Iterator[None]:
    """kvm_init_debug(): a file per statistic, with its sum over all VMs and vCPUs."""

    def file(name: str, of_vcpu: bool) -> Callable[[], int]:
        def total() -> int:
            vms = list(module.vm_list)
            counted = [vcpu.stats for vm in vms for vcpu in list(vm.vcpus.values())] if of_vcpu else vms_stats(vms)
            return sum(stats.get(name) for stats in counted)

        return total

    def vms_stats(vms: list[Kvm]) -> list[Statistics]:
        return [vm.stats for vm in vms]

    for table, of_vcpu in ((VM_STATISTICS, False), (VCPU_STATISTICS, True)):
        for entry in table:
            module.debugfs[entry.name] = file(entry.name, of_vcpu)
    try:
        yield
    finally:
        module.debugfs.clear()


@contextmanager
def arch_init(module: Module) -> Iterator[None]:
    """kvm_arch_init(): the processor must have the extension, and the firmware must have left it on."""
    feature = module.ops.feature
    (first, *_) = pcpus.POOL
    if feature not in first.features:
        raise OSError(errno.EOPNOTSUPP, f"the processor has no {feature.upper()}")
    if not getattr(FIRMWARE, feature):
        raise OSError(errno.EOPNOTSUPP, f"{feature.upper()} is disabled by the firmware")
    module.msrs_to_save = MSRS_TO_SAVE
    try:
        yield
    finally:
        module.msrs_to_save = ()


@contextmanager
def bad_page(module: Module) -> Iterator[None]:
    """The page that stands for frames which have none."""
    module.bad_page = Ram(PAGE_SIZE, "vmonty-bad-page")
    try:
        yield
    finally:
        module.bad_page = None


@contextmanager
def hardware_setup(module: Module) -> Iterator[None]:
    """kvm_arch_hardware_setup()."""
    module.ops.hardware_setup()
    try:
        yield
    finally:
        module.ops.hardware_unsetup()


@contextmanager
def check_processors(module: Module) -> Iterator[None]:
    """kvm_arch_check_processor_compat() on every processor that is online."""
    for pcpu in pcpus.POOL:
        module.ops.check_processor_compatibility(pcpu)
    yield


def _startup(module: Module, pcpu: PhysicalCpu) -> None:
    """kvm_online_cpu()."""
    module.ops.check_processor_compatibility(pcpu)
    module.ops.hardware_enable(pcpu)


def _teardown(module: Module, pcpu: PhysicalCpu) -> None:
    """kvm_offline_cpu(): a reboot, or a wake-up that failed, may have turned it off already."""
    if pcpu.virtualization is not None:
        module.ops.hardware_disable(pcpu)


@contextmanager
def hardware_enable(module: Module) -> Iterator[None]:
    """hardware_enable_all(): on each processor; if one refuses, off again on those before it."""
    with ExitStack() as enabled:
        for pcpu in pcpus.POOL:
            module.ops.hardware_enable(pcpu)
            enabled.callback(_disable, module, pcpu.number)
        rest = enabled.pop_all()
    try:
        yield
    finally:
        rest.close()
        for pcpu in pcpus.POOL:  # those that came up since
            _disable(module, pcpu.number)


def _disable(module: Module, number: int) -> None:
    """hardware_disable_nolock(): if it is still there, and on."""
    for pcpu in pcpus.POOL:
        if pcpu.number == number:
            pcpu.evict()
            _teardown(module, pcpu)


@contextmanager
def cpu_hotplug(module: Module) -> Iterator[None]:
    """CPUHP_AP_KVM_ONLINE: on where a processor comes up, off where one goes down."""
    state = HotplugState("kvm/cpu:online", lambda pcpu: _startup(module, pcpu), lambda pcpu: _teardown(module, pcpu))
    with pcpus.POOL.cpuhp_state(state):
        yield


@contextmanager
def reboot_notifier(module: Module) -> Iterator[None]:
    """kvm_reboot(): off everywhere, since some firmware hangs otherwise."""

    def reboot() -> None:
        for pcpu in pcpus.POOL:
            _disable(module, pcpu.number)

    pcpus.POOL.reboot_notifiers.append(reboot)
    try:
        yield
    finally:
        pcpus.POOL.reboot_notifiers.remove(reboot)


@contextmanager
def syscore(module: Module) -> Iterator[None]:
    """kvm_suspend(), kvm_resume(): the last processor, which is not unplugged."""

    def suspend() -> None:
        for pcpu in pcpus.POOL:
            _disable(module, pcpu.number)

    def resume() -> None:
        for pcpu in pcpus.POOL:
            module.ops.hardware_enable(pcpu)

    ops = SyscoreOps(suspend, resume)
    pcpus.POOL.syscore_ops.append(ops)
    try:
        yield
    finally:
        pcpus.POOL.syscore_ops.remove(ops)


@contextmanager
def misc_device(module: Module) -> Iterator[None]:
    """misc_register(): from here on the device can be opened."""
    module.device = True
    try:
        yield
    finally:
        module.device = False


Step = Callable[[Module], AbstractContextManager[None]]
STEPS: tuple[Step, ...] = (
    init_debug, arch_init, bad_page, hardware_setup, check_processors, hardware_enable, cpu_hotplug, reboot_notifier,
    syscore, misc_device,
)  # fmt: skip

# ---- modprobe -------------------------------------------------------------------------------------------------

_loaded: Module | None = None
_lock = threading.RLock()


def loaded() -> Module | None:
    """The vendor module that is loaded."""
    return _loaded


def load(name: str, **parameters: int | bool) -> Module:
    """modprobe: load a vendor module, kvm with it.

    Raises UsageError for an unknown module or parameter, KvmError with EEXIST when a vendor module is loaded already,
    KvmUnavailable when the processor cannot do it.
    """
    global _loaded
    if name not in VENDORS:
        raise UsageError(f"unknown module {name!r}; there are: {', '.join(VENDORS)}")
    with _lock:
        if _loaded is not None:
            raise KvmError(errno.EEXIST, f"load {name}", f"{_loaded.name} is loaded; unload it first")
        where, attribute = VENDORS[name]
        ops: KvmX86InitOps = getattr(import_module(where), attribute)()
        module = Module(ops, KvmParameters(), dict(parameters))
        for key, value in parameters.items():
            _set_parameter(module, key, value)
        if not len(pcpus.POOL):
            pcpus.POOL.online(0)
        try:
            module.init()
        except OSError as error:
            raise KvmUnavailable(error.errno or errno.EIO, f"load {name}", error.strerror or "") from error
        _loaded = module
        return module


def _set_parameter(module: Module, key: str, value: int | bool) -> None:
    for holder in (module.ops.parameters, module.kvm):
        if hasattr(holder, key):
            kind = type(getattr(holder, key))
            if not isinstance(value, int) or value < 0 or (kind is bool and value > 1):
                raise UsageError(
                    f"{module.name}: {key}={value!r} is not {'a yes or no' if kind is bool else 'a number'}"
                )
            setattr(holder, key, kind(value))
            return
    raise UsageError(f"{module.name} has no parameter {key!r}; there are: {', '.join(module.parameters)}")


def unload(name: str) -> None:
    """rmmod. Raises KvmError: ENOENT when it is not loaded, EBUSY while a file of it is open."""
    global _loaded
    with _lock:
        module = _loaded
        if module is None or module.name != name:
            raise KvmError(errno.ENOENT, f"unload {name}", "it is not loaded")
        if module.references:
            raise KvmError(errno.EBUSY, f"unload {name}", f"{len(module.vm_list)} VMs use it; close them, and it")
        module.exit()
        _loaded = None


def request(line: str | None = None) -> Module:
    """request_module(): what is loaded, else kvm_intel with its defaults, or what VMONTY_KVM_MODULE says.

    With *line*, as ``parse`` takes it, exactly that; a module that is loaded otherwise gives way if nothing uses it.
    Raises KvmUnavailable with EBUSY if something does.
    """
    with _lock:
        if line is None:
            return _loaded or _load_line(os.environ.get(ENVIRONMENT) or next(iter(VENDORS)))
        name, parameters = parse(line)
        if _loaded is not None:
            if _loaded.name == name and _loaded.asked == parameters:
                return _loaded
            if _loaded.references:
                raise KvmUnavailable(errno.EBUSY, f"load {line}", f"{_loaded.name} is in use; close its VMs first")
            unload(_loaded.name)
        return load(name, **parameters)


def _load_line(line: str) -> Module:
    name, parameters = parse(line)
    return load(name, **parameters)


def parse(line: str) -> tuple[str, dict[str, int]]:
    """A line as modprobe takes it, "kvm_intel ept=0 vpid=N", for ``load``. Raises UsageError."""
    words = shlex.split(line)
    if not words:
        raise UsageError(f"no module named; there are: {', '.join(VENDORS)}")
    parameters = {}
    for word in words[1:]:
        key, _, value = word.partition("=")
        number = {"": 1, "y": 1, "n": 0}.get(value.lower())
        try:
            parameters[key] = int(value, 0) if number is None else number
        except ValueError:
            raise UsageError(f"{key}={value} is neither a number nor Y or N") from None
    return words[0].replace("-", "_"), parameters


@contextmanager
def only(name: str, **parameters: int | bool) -> Iterator[Module]:
    """Within the block *name* is the vendor module; afterwards none is. One that is loaded must be unused."""
    with _lock:
        if _loaded is not None:
            unload(_loaded.name)
        module = load(name, **parameters)
    try:
        yield module
    finally:
        unload(name)
