"""Serves a process's missing memory from a copy, as the source of a post-copy migration does; a program of its own.

python postcopy.py USERFAULTFD COPY ADDRESS SIZE: COPY is a file of SIZE bytes, for the memory from ADDRESS on. It ends
when the other process has closed its end of standard input.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import struct
import sys
import time

UFFDIO_COPY, EEXIST = 0xC028AA03, 17
PAGE, MESSAGE = 4096, 32
NETWORK_S = 0.001


def main(userfault: int, copy: int, address: int, size: int) -> None:
    source = mmap.mmap(copy, size)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(source))
    ready = select.poll()
    ready.register(userfault, select.POLLIN)
    ready.register(0, select.POLLIN)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        if any(fd == 0 for fd, _ in ready.poll()):
            return
        try:
            message = os.read(userfault, MESSAGE)
        except BlockingIOError:
            continue
        time.sleep(NETWORK_S)
        wanted = struct.unpack_from("<Q", message, 16)[0] & ~(PAGE - 1)
        request = bytearray(struct.pack("<QQQQq", wanted, begin + wanted - address, PAGE, 0, 0))
        try:
            fcntl.ioctl(userfault, UFFDIO_COPY, request)
        except OSError as error:
            if error.errno != EEXIST:  # two have asked for it
                raise


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
