from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AsString, PyBytes_FromStringAndSize
from libc.errno cimport EFAULT, ENOMEM, errno
from libc.string cimport memset
from posix.signal cimport sigaction, sigaction_t
from posix.mman cimport MAP_FAILED, MAP_FIXED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap
from posix.unistd cimport getpid, write

cdef extern from "pthread.h" nogil:
    unsigned long pthread_self()

cdef extern from "errno.h" nogil:
    int host_errno "errno"

cdef extern from "sys/mman.h" nogil:
    int madvise(void *address, size_t length, int advice)
    int mincore(void *address, size_t length, unsigned char *pages)

cdef enum:
    MADV_POPULATE_WRITE = 23  # since Linux 5.14, newer than some headers

cdef int _kick_report

cdef extern from "sys/ioctl.h" nogil:
    int sys_ioctl "ioctl" (int fd, unsigned long request, unsigned long argument)

cdef extern from "sys/uio.h" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len

    ssize_t process_vm_readv(int pid, iovec *local, unsigned long count, iovec *remote, unsigned long remotes,
                             unsigned long flags)
    ssize_t process_vm_writev(int pid, iovec *local, unsigned long count, iovec *remote, unsigned long remotes,
                              unsigned long flags)

cdef int _transfer(unsigned long address, char *data, Py_ssize_t size, bint to_memory) except -1

cdef extern from *:
    unsigned long long rdtsc "__builtin_ia32_rdtsc" () noexcept nogil
    bint swap8 "__sync_bool_compare_and_swap" (unsigned long long *at, unsigned long long old,
                                               unsigned long long new) noexcept nogil
    bint swap4 "__sync_bool_compare_and_swap" (unsigned int *at, unsigned int old, unsigned int new) noexcept nogil
