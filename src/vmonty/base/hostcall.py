"""The host's system calls that Python's own modules cannot make safely: ioctl with any argument, and the kick.

Fenced: `ioctl` hands addresses to the kernel. It is safe because a buffer argument is held (its address
cannot move) for the time of the call and must be at least as large as the request number says.
"""

from __future__ import annotations

import signal

import cython

# The signal that gets a thread out of KVM_RUN. Its handler does nothing: the EINTR is the effect.
KICK_SIGNAL: int = int(signal.SIGRTMIN) + 4

_kick_report = -1


def ioctl(fd: int, request: int, argument=None, writable: bool = True) -> int:
    """Make one ioctl(2) without the GIL; return its result, or minus errno when it failed.

    *argument* is an integer passed as it is (a number or an address), or a contiguous buffer whose address is
    passed. It is not retried on EINTR: the caller decides. A buffer that is shorter than the size encoded
    in *request* gives -EFAULT, as memory that ends too early would. A read-only buffer is accepted only when
    *writable* is false.
    """
    c_fd: cython.int = fd
    c_request: cython.ulong = request
    value: cython.ulong = 0
    result: cython.int
    size: cython.Py_ssize_t = (request >> 16) & 0x3FFF
    if argument is None or isinstance(argument, int):
        value = (argument or 0) & 0xFFFFFFFFFFFFFFFF
        with cython.nogil:
            result = _call(c_fd, c_request, value)
        return result
    buffer: Py_buffer
    PyObject_GetBuffer(argument, cython.address(buffer), PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
    try:
        if buffer.len < size:
            return -EFAULT
        value = cython.cast(cython.ulong, buffer.buf)
        with cython.nogil:
            result = _call(c_fd, c_request, value)
        return result
    finally:
        PyBuffer_Release(cython.address(buffer))


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _call(fd: cython.int, request: cython.ulong, value: cython.ulong) -> cython.int:
    result: cython.int = sys_ioctl(fd, request, value)
    return -errno if result < 0 else result


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _on_kick(number: cython.int) -> cython.void:
    # Only what is safe in a signal handler: tell which thread was hit, if anyone wants to know.
    global host_errno
    thread: cython.ulong
    saved: cython.int = host_errno
    if _kick_report >= 0:
        thread = pthread_self()
        write(_kick_report, cython.address(thread), cython.sizeof(thread))
    host_errno = saved


def report_kicks(fd: int) -> None:
    """From now on a KICK_SIGNAL writes the ident of the thread that it hit, 8 bytes, to the non-blocking *fd*."""
    global _kick_report
    _kick_report = fd


def install_kick() -> None:
    """Install the handler of KICK_SIGNAL (from any thread, unlike signal.signal; no SA_RESTART)."""
    action: sigaction_t
    memset(cython.address(action), 0, cython.sizeof(sigaction_t))
    action.sa_handler = _on_kick
    sigaction(KICK_SIGNAL, cython.address(action), cython.NULL)


def address_of(buffer, writable: bool = True) -> int:
    """The address of *buffer*'s first byte. The caller keeps the buffer alive while the address is in use."""
    view: Py_buffer
    PyObject_GetBuffer(buffer, cython.address(view), PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
    address = cython.cast(cython.ulong, view.buf)
    PyBuffer_Release(cython.address(view))
    return address


def read_memory(address: int, size: int) -> bytes:
    """Copy *size* bytes at *address* of this process. Raises OSError with EFAULT where nothing is mapped."""
    data: bytes = PyBytes_FromStringAndSize(cython.NULL, size)
    _transfer(address, cython.cast(cython.p_char, PyBytes_AsString(data)), size, 0)
    return data


def write_memory(address: int, data: bytes) -> None:
    """Copy *data* to *address* of this process. Raises OSError with EFAULT where nothing is mapped writable."""
    _transfer(address, cython.cast(cython.p_char, PyBytes_AsString(data)), len(data), 1)


def _transfer(address, data, size, to_memory):  # type: ignore[no-untyped-def]  # typed in the .pxd
    # Through the kernel, which checks each page: a plain copy would take SIGSEGV.
    local: iovec
    remote: iovec
    local.iov_base = data
    local.iov_len = size
    remote.iov_base = cython.cast(cython.p_void, address)
    remote.iov_len = size
    done: cython.Py_ssize_t
    if to_memory:
        done = process_vm_writev(getpid(), cython.address(local), 1, cython.address(remote), 1, 0)
    else:
        done = process_vm_readv(getpid(), cython.address(local), 1, cython.address(remote), 1, 0)
    if done != size:
        raise OSError(EFAULT, "no memory at this address")


def touch(address: int) -> int:
    """Read the byte at *address* through the kernel, however long its page takes; 0, or errno. The GIL is released."""
    local: iovec
    remote: iovec
    byte: cython.char
    done: cython.Py_ssize_t
    local.iov_base = cython.address(byte)
    local.iov_len = remote.iov_len = 1
    remote.iov_base = cython.cast(cython.p_void, cython.cast(cython.ulong, address))
    with cython.nogil:
        done = process_vm_readv(getpid(), cython.address(local), 1, cython.address(remote), 1, 0)
    return 0 if done == 1 else errno


def resident_pages(address: int, size: int) -> bytes:
    """mincore(2): a byte for each page from *address* on, 1 where it is in memory. Raises OSError: ENOMEM, EAGAIN."""
    count: cython.Py_ssize_t = (size + 4095) >> 12
    found: bytes = PyBytes_FromStringAndSize(cython.NULL, count)
    pages: cython.p_char = PyBytes_AsString(found)
    n: cython.Py_ssize_t
    if (
        mincore(
            cython.cast(cython.p_void, cython.cast(cython.ulong, address)), size, cython.cast(cython.p_uchar, pages)
        )
        < 0
    ):
        raise OSError(errno, "mincore failed")
    for n in range(count):
        pages[n] = pages[n] & 1  # the other bits are reserved
    return found


def compare_exchange(address: int, width: int, old: int, new: int) -> bool:
    """Store *new* at *address* if *old* is there, in one step, as other processors see it: 4 or 8 bytes, aligned.

    False when something else is there. Raises OSError with EFAULT where the memory cannot be written (before Linux 5.14
    that crashes). The caller has just read from the address.
    """
    at: cython.ulong = address
    page: cython.ulong = at & ~cython.cast(cython.ulong, 0xFFF)
    # Through the kernel first, which checks the page: the operation itself would take SIGSEGV or SIGBUS.
    if madvise(cython.cast(cython.p_void, page), 4096, MADV_POPULATE_WRITE) < 0 and errno in (EFAULT, ENOMEM):
        raise OSError(EFAULT, "no memory that can be written at this address")
    if width == 8:
        return bool(swap8(cython.cast(cython.pointer(cython.ulonglong), at), old, new))
    return bool(swap4(cython.cast(cython.pointer(cython.uint), at), old, new))


def read_tsc() -> int:
    """The host's time-stamp counter."""
    return rdtsc()


def map_over(address: int, fd: int, size: int) -> None:
    """Replace *size* bytes of a mapping of ours at *address* by the first bytes of *fd*, shared and writable.

    Raises OSError. The caller owns the mapping at *address*, and nothing uses that part yet.
    """
    result = mmap(
        cython.cast(cython.p_void, cython.cast(cython.ulong, address)), size, PROT_READ | PROT_WRITE,
        MAP_SHARED | MAP_FIXED, fd, 0,
    )  # fmt: skip
    if result == MAP_FAILED:
        raise OSError(errno, "mmap failed")
