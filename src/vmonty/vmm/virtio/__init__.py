"""Virtual I/O devices, their rings and their transports. Source: Virtual I/O Device (VIRTIO) Version 1.2."""
