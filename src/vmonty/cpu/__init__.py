"""The silicon: an x86-64 CPU in software, by same-ISA binary translation."""
