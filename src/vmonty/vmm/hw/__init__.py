"""Devices. They know offsets, never addresses: board code places them."""
