"""PCI: functions with their configuration space, buses, bridges, and the two ways to reach configuration space.

Source: PCI Local Bus Specification 3.0; PCI Express Base Specification 3.0.
"""

from vmonty.vmm.hw.pci.bridge import PciBridge, PcieRootPort
from vmonty.vmm.hw.pci.bus import PciBus
from vmonty.vmm.hw.pci.config import ConfigSpace
from vmonty.vmm.hw.pci.decode import Decoder, Space, Window
from vmonty.vmm.hw.pci.device import Bar, PciDevice, Slot
from vmonty.vmm.hw.pci.host import ADDRESS, ConfigPorts, Ecam
from vmonty.vmm.hw.pci.msix import Msix

__all__ = [
    "ADDRESS",
    "Bar",
    "ConfigPorts",
    "ConfigSpace",
    "Decoder",
    "Ecam",
    "Msix",
    "PciBridge",
    "PciBus",
    "PciDevice",
    "PcieRootPort",
    "Slot",
    "Space",
    "Window",
]
