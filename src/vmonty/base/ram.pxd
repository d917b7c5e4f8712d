from cpython.buffer cimport PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.unistd cimport close

cdef class Ram:
    cdef readonly unsigned long address
    cdef readonly long long size
    cdef unsigned char *_base
    cdef int _fd
    cdef object _mapping
    # Where the memory begins in it.
    cdef long long _at
    cdef object _view
    cdef unsigned char *_check(self, offset, size) except? NULL
