"""The registers of a local APIC in xAPIC mode, as far as they need nothing of lapic.py."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.kvm.soft.kvm_host cimport KvmArch, KvmLapic, KvmVcpuArch

# Offsets in the register page. SDM, "Local APIC Register Address Map".
cdef enum:
    XAPIC_ID = 0x20
    XAPIC_LVR = 0x30
    XAPIC_PPR = 0xA0
    XAPIC_EOI = 0xB0
    XAPIC_LDR = 0xD0
    XAPIC_DFR = 0xE0
    XAPIC_SVR = 0xF0
    XAPIC_ISR = 0x100
    XAPIC_IRR_LAST = 0x270
    XAPIC_ICR = 0x300
    XAPIC_ICR2 = 0x310
    XAPIC_LVTT = 0x320

cdef enum:
    FLAT_TARGETS = 8         # as many have a bit of their own in a logical destination
    BROADCAST = 0xFF

# 32 bits at an offset; False: nothing has happened, and Python must see it.
cdef bint xapic_read(KvmLapic *l, uint32_t offset, uint32_t *value) noexcept nogil
cdef bint xapic_write(KvmVcpuArch *a, uint32_t offset, uint32_t value) noexcept nogil
cdef bint _send_ipi(KvmVcpuArch *a, uint32_t icr, uint32_t destination) noexcept nogil
cdef bint _is_for(KvmLapic *l, uint32_t icr, uint32_t destination) noexcept nogil
