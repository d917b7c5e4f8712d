"""A network of the guest's own behind this process's sockets: NAT without privileges, with DHCP, DNS and TFTP.

One file per protocol; ``backend.UserBackend`` is the whole. Addresses are as in QEMU's user network.
"""
