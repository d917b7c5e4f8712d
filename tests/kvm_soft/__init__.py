"""KVM in software: unit tests of its parts, with virtual clocks and fake neighbours."""
