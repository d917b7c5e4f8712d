"""The full virtual machine, in Python."""

__version__ = "0.1.0"
