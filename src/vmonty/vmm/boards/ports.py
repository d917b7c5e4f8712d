"""Where ISA devices stand that more than the legacy boards have."""

# Base port and interrupt of COM1 to COM4.
COM_PORTS = ((0x3F8, 4), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3))
