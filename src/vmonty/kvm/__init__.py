"""KVM, whoever provides it: ``open(name)`` gives a System of Linux's KVM (``linux``).

Providers are looked up by name, and imported only then, so that one that cannot be used costs nothing.
"""

from __future__ import annotations

from importlib import import_module

from vmonty.base.errors import UsageError
from vmonty.kvm.api import Provider, System

__all__ = ["PROVIDERS", "open", "provider"]

# Name → where its class is.
PROVIDERS = {
    "linux": ("vmonty.kvm.linux", "LinuxKvm"),
    "soft": ("vmonty.kvm.soft.provider", "SoftKvm"),
    "soft-svm": ("vmonty.kvm.soft.provider", "SoftSvm"),
    "soft-vmx-restricted": ("vmonty.kvm.soft.provider", "SoftVmxRestricted"),
    "soft-vmx-shadow": ("vmonty.kvm.soft.provider", "SoftVmxShadow"),
    "soft-svm-shadow": ("vmonty.kvm.soft.provider", "SoftSvmShadow"),
}


def provider(name: str) -> Provider:
    """The provider called *name*. Raises UsageError for an unknown name."""
    if name not in PROVIDERS:
        raise UsageError(f"unknown KVM provider {name!r}; there are: {', '.join(sorted(PROVIDERS))}")
    module, attribute = PROVIDERS[name]
    made: Provider = getattr(import_module(module), attribute)()
    return made


def open(name: str) -> System:  # noqa: A001  # kvm.open() is what it is: the field's word for this
    """Open the KVM called *name*. Raises UsageError (unknown name) or KvmUnavailable (with the remedy)."""
    return System(provider(name))
