"""The Python API: settings, console, life of a VM, and the documentation's examples."""
