"""virtio: rings, transports, and each device against a driver in Python."""
