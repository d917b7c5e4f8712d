"""ATA: disks and CD-ROM drives by their command sets, and the controllers that drivers reach them by.

Source: ATA/ATAPI-7 (INCITS 397), volumes 1 and 2; Programming Interface for Bus Master IDE Controllers 1.0.
"""

from vmonty.vmm.hw.ata.cdrom import CdRom
from vmonty.vmm.hw.ata.disk import AtaDisk
from vmonty.vmm.hw.ata.piix_ide import PiixIde

__all__ = ["AtaDisk", "CdRom", "PiixIde"]
