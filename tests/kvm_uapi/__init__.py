"""The declared ABI against the kernel's headers."""
