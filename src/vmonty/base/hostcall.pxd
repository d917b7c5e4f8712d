from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EFAULT, errno
from libc.string cimport memset
from posix.signal cimport sigaction, sigaction_t

cdef extern from "sys/ioctl.h" nogil:
    int sys_ioctl "ioctl" (int fd, unsigned long request, unsigned long argument)
