"""ioeventfds that stand in guest-physical memory: the write that rings one signals its eventfd, and the guest goes on.

The kernel finds them by the address alone (handle_ept_misconfig(), KVM_FAST_MMIO_BUS), and therefore only those without
a size. Here size and data count too. For one that Python answers, the run ends behind the store.
"""

from __future__ import annotations

import cython
from cython.cimports.posix.unistd import write
from cython.cimports.vmonty.kvm.soft.kvm_host import pthread_mutex_lock, pthread_mutex_unlock


def doorbell_hangs(k, gpa):
    """Whether an eventfd waits there for some write."""
    n: uint32_t
    found: cython.bint = False
    if k.doorbell_count == 0:
        return False
    pthread_mutex_lock(cython.address(k.doorbell_lock))
    for n in range(k.doorbell_count):
        if k.doorbells[n].gpa == gpa:
            found = True
            break
    pthread_mutex_unlock(cython.address(k.doorbell_lock))
    return found


def _ring(a, gpa, size, value):
    """With the lock held."""
    k: cython.pointer(KvmArch) = a.kvm
    n: uint32_t
    one: uint64_t = 1
    ready: pollfd
    bell: cython.pointer(KvmDoorbell)
    for n in range(k.doorbell_count):
        bell = cython.address(k.doorbells[n])
        if bell.gpa != gpa or (bell.size and bell.size != size) or (bell.matches and bell.datamatch != value):
            continue
        if bell.calls:
            a.rung = bell.fd
            return True
        ready.fd = bell.fd
        ready.events = POLLOUT
        if poll(cython.address(ready), 1, 0) == 1:  # else its counter is at the limit: it is loud enough
            write(bell.fd, cython.address(one), 8)
        return True
    return False


def doorbell_ring(a, gpa, size, value):
    """ioeventfd_write() of the first that takes it."""
    rung: cython.bint
    pthread_mutex_lock(cython.address(a.kvm.doorbell_lock))
    rung = _ring(a, gpa, size, value)
    pthread_mutex_unlock(cython.address(a.kvm.doorbell_lock))
    return rung
