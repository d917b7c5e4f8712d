"""The page walker: linear address → guest-physical address → address in this process.

    4-level entry   63 NX | 51..12 address | 11..9 ignored | 8 G | 7 PS/PAT | 6 D | 5 A | 4 PCD | 3 PWT | 2 U/S | 1
    R/W | 0 P
    EPT entry       51..12 address | 9 D | 8 A | 7 large | 6 ignore PAT | 5..3 memory type | 2 X | 1 W | 0 R

Sources: SDM, "Paging"; SDM, "The Extended Page-Table Mechanism (EPT)"; APM, "Nested Paging".

Accessed and dirty flags are set after all permission checks, by compare-and-swap; when another processor changed an
entry meanwhile, the walk starts again.
"""

import cython
from cython.cimports.vmonty.cpu.state import (
    ACCESS_EXEC,
    ACCESS_IMPLICIT,
    ACCESS_USER,
    ACCESS_WRITE,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_NXE,
    FLAG_AC,
    GO_ON,
    LARGE_BYTES,
    NESTED_ENTRIES,
    TABLE_ENTRIES,
    NestedEntry,
    TableEntry,
    paging_enabled,
    raise_page_fault,
)
from cython.cimports.vmonty.cpu.svm_exit import svm_of
from cython.cimports.vmonty.cpu.vmx_exit import nested_page_fault, vmx_of


def translate(s, va, access, t):
    """Walk and record the fault, if any: GO_ON with ``t`` filled in, or LEAVE_*."""
    if walk(s, va, access, t) == WALK_OK:
        return GO_ON
    if not access & ACCESS_EXEC and _missing_memory(s, t):
        t.host = 0
        t.physical = t.fault_physical & ~cython.cast(uint64_t, 0xFFF)
        return GO_ON
    return record_fault(s, t)


def _missing_memory(s, t):
    """Host software executes an instruction for its guest, and the second dimension has nothing for an operand."""
    if s.nested == 1 and vmx_of(s).emulating:
        return t.fault == WALK_EPT_MISCONFIG or (t.fault == WALK_EPT_VIOLATION and (t.qualification & NESTED_FINAL))
    if s.nested == 2 and svm_of(s).emulating:
        return t.fault == WALK_NESTED_FAULT and ((t.qualification >> 32) & 1)
    return False


def walk(s, va, access, t):
    """Describe what a linear address is for one kind of access; Translation.fault is returned."""
    fault: uint32_t = WALK_RETRY
    known: cython.pointer(TableEntry) = cython.address(s.tables[(va >> 21) & (TABLE_ENTRIES - 1)])
    cached: cython.bint
    while fault == WALK_RETRY:
        t.linear = va
        t.user = 0
        t.is_global = 0
        t.fault = WALK_OK
        if not paging_enabled(s):
            t.physical = va & cython.cast(uint64_t, 0xFFFFFFFF)
            t.user = 1
            fault = _finish(s, t, access, cython.cast(uint64_t, 1) << 30, True, True)
        elif s.cr4 & CR4_PAE:
            cached = known.tag & 1 and (known.tag ^ va) >> 21 == 0
            fault = _walk_wide(s, va, access, t)
            if fault == WALK_PAGE_FAULT and cached:
                # A page fault forgets what is cached for its address. SDM, "Operations that Invalidate TLBs and
                # Paging-Structure Caches"
                known.tag = 0
                fault = WALK_RETRY
        else:
            fault = _walk_32(s, va & cython.cast(uint64_t, 0xFFFFFFFF), access, t)
    return fault


def record_fault(s, t):
    """Turn a described fault into an exception or a VM exit."""
    if t.fault == WALK_OK:
        return GO_ON
    if t.fault == WALK_PAGE_FAULT:
        return raise_page_fault(s, t.linear, t.error_code)
    return nested_page_fault(s, t.fault, t.qualification, t.fault_physical, t.linear)


# ---- the second dimension, or the bare processor's physical map ------------------------------------------------


def physical_to_host(s, physical, write):
    """Give the host address of a physical address, or 0 when no RAM (or, to write, only ROM) is there."""
    size: uint64_t
    granted: uint32_t
    return _region_host(
        s, physical, NESTED_WRITE if write else NESTED_READ, cython.address(size), cython.address(granted)
    )


def nested_host(s, physical, wanted, t, size, granted):
    """Go through the second dimension; t.fault tells why 0 came back."""
    e: cython.pointer(NestedEntry)
    host: uint64_t
    if s.nested:
        e = cython.address(s.nested_pages[(physical >> 12) & (NESTED_ENTRIES - 1)])
        if s.nested == 2 and (wanted & NESTED_FINAL) == 0:
            wanted |= NESTED_WRITE  # APM, "Nested Paging and Guest Page Tables": A and D may be set
        if e.tag == ((physical & ~cython.cast(uint64_t, 0xFFF)) | 1) and (wanted & 7 & ~e.granted) == 0:
            size[0] = e.size
            granted[0] = e.granted
            return e.host + (physical & 0xFFF)
        if s.nested == 1:
            host = _ept_host(s, physical, wanted, t, size, granted)
        else:
            host = _npt_host(s, physical, wanted, t, size, granted)
        if host:
            e.tag = (physical & ~cython.cast(uint64_t, 0xFFF)) | 1
            e.host = host & ~cython.cast(uint64_t, 0xFFF)
            e.size = size[0]
            e.granted = granted[0]
        return host
    if s.direct:
        size[0] = cython.cast(uint64_t, 1) << 30
        granted[0] = NESTED_READ | NESTED_WRITE | NESTED_EXEC
        return physical
    return _region_host(s, physical, wanted, size, granted)


def _region_host(s, physical, wanted, size, granted):
    i: uint32_t
    offset: uint64_t
    low: uint64_t
    if s.a20_off:
        physical &= ~cython.cast(uint64_t, 0x100000)
    for i in range(s.region_count):
        offset = physical - s.regions[i].base
        if offset < s.regions[i].size:
            granted[0] = NESTED_READ | NESTED_WRITE | NESTED_EXEC
            size[0] = 4096
            low = offset - (physical & (LARGE_BYTES - 1))
            if low <= offset and low + LARGE_BYTES <= s.regions[i].size and not s.a20_off:
                size[0] = LARGE_BYTES
            if s.regions[i].readonly:
                granted[0] = NESTED_READ | NESTED_EXEC
                if wanted & NESTED_WRITE:
                    return 0
            return s.regions[i].host + offset
    size[0] = 4096
    granted[0] = NESTED_READ | NESTED_WRITE | NESTED_EXEC
    return 0


def _table_host(s, physical):
    """Where an entry of the second dimension's tables is; 0 where the bare processor has no RAM."""
    size: uint64_t
    granted: uint32_t
    if s.direct:
        return physical
    return _region_host(s, physical, NESTED_WRITE, cython.address(size), cython.address(granted))


def _nested_page(s, physical, host, wanted, t, granted):
    """The end of a nested walk: *host* is a host-physical address, which is ours or the bare processor's."""
    size: uint64_t
    region: uint32_t = 0
    where: uint64_t
    if s.direct:
        return host
    where = _region_host(s, host, wanted, cython.address(size), cython.address(region))
    granted[0] &= region
    if where == 0:
        t.fault_physical = host  # a device of the bare processor
    return where


def _ept_violation(t, physical, wanted, permissions):
    """SDM, "Exit Qualification for EPT Violations"."""
    t.fault = WALK_EPT_VIOLATION
    t.qualification = wanted | (permissions << 3)
    t.fault_physical = physical
    return 0


def _ept_misconfigured(value, level, leaf):
    """SDM, "EPT Misconfigurations"; execute-only entries are offered, and addresses up to bit 51."""
    kind: uint64_t
    if (value & 3) == NESTED_WRITE:
        return True
    if not leaf:
        if level >= 4:
            return (value & 0xF8) != 0
        return (value & 0x78) != 0
    kind = (value >> 3) & 7
    if kind == 2 or kind == 3 or kind == 7:
        return True
    if level == 2:
        return (value & 0x1FF000) != 0
    if level == 3:
        return (value & 0x3FFFF000) != 0
    return False


def _ept_host(s, physical, wanted, t, size, granted):
    steps: Step[5]
    count: uint32_t = 0
    pointer: uint64_t = s.nested_root
    level: uint32_t = cython.cast(uint32_t, (pointer >> 3) & 7) + 1
    shift: uint32_t = 12 + 9 * (level - 1)
    table: uint64_t = pointer & cython.cast(uint64_t, 0xFFFFFFFFFF000)
    track: cython.bint = (pointer & 0x40) != 0
    permissions: uint64_t = 7
    value: uint64_t
    wish: uint64_t
    access: uint64_t = wanted & 7
    leaf: cython.bint
    i: uint32_t
    if physical >> (shift + 9):
        return _ept_violation(t, physical, wanted, 0)
    while True:
        steps[count].host = _table_host(s, table + (((physical >> shift) & 0x1FF) << 3))
        value = ~cython.cast(uint64_t, 0)  # nothing answers on the bus
        if steps[count].host:
            value = cython.cast(cython.pointer(uint64_t), steps[count].host)[0]
        steps[count].value = value
        if (value & 7) == 0:
            return _ept_violation(t, physical, wanted, 0)
        leaf = level == 1 or (level <= 3 and (value & 0x80) != 0)
        if _ept_misconfigured(value, level, leaf):
            t.fault = WALK_EPT_MISCONFIG
            t.fault_physical = physical
            return 0
        permissions &= value
        count += 1
        if leaf:
            break
        table = value & cython.cast(uint64_t, 0xFFFFFFFFFF000)
        level -= 1
        shift -= 9
    if access & ~permissions:
        return _ept_violation(t, physical, wanted, permissions)
    granted[0] = cython.cast(uint32_t, permissions)
    if track:
        for i in range(count):
            value = steps[i].value
            wish = value | 0x100
            if i == count - 1:
                if access & NESTED_WRITE:
                    wish |= 0x200
                elif (value & 0x200) == 0:
                    granted[0] &= NESTED_READ | NESTED_EXEC
            if wish != value and not swap64(cython.cast(cython.pointer(uint64_t), steps[i].host), value, wish):
                t.fault = WALK_RETRY
                return 0
    value = steps[count - 1].value
    size[0] = cython.cast(uint64_t, 1) << shift
    value = (value & cython.cast(uint64_t, 0xFFFFFFFFFF000) & ~(size[0] - 1)) + (physical & (size[0] - 1))
    return _nested_page(s, physical, value, wanted, t, granted)


def _nested_fault(t, physical, wanted, error_code):
    """APM, "Nested versus Guest Page Faults, Fault Ordering": EXITINFO1 of #VMEXIT(NPF)."""
    where: uint64_t = 1
    if (wanted & NESTED_FINAL) == 0:
        where = 2
    t.fault = WALK_NESTED_FAULT
    t.qualification = error_code | 4 | (where << 32)
    t.fault_physical = physical
    return 0


def _npt_host(s, physical, wanted, t, size, granted):
    """Four-level tables in host format; every nested access is a user access, guest table walks are writes."""
    steps: Step[5]
    count: uint32_t = 0
    level: uint32_t = 4
    shift: uint32_t = 39
    table: uint64_t = s.nested_root & cython.cast(uint64_t, 0xFFFFFFFFFF000)
    rights: uint64_t = 6
    no_execute: uint64_t = 0
    value: uint64_t
    wish: uint64_t
    error: uint64_t = 0
    i: uint32_t
    if (wanted & NESTED_FINAL) == 0:
        wanted |= NESTED_WRITE
    if wanted & NESTED_WRITE:
        error |= 2
    if wanted & NESTED_EXEC:
        error |= 16
    if physical >> 48:
        return _nested_fault(t, physical, wanted, error)
    while True:
        steps[count].host = _table_host(s, table + (((physical >> shift) & 0x1FF) << 3))
        value = ~cython.cast(uint64_t, 0)
        if steps[count].host:
            value = cython.cast(cython.pointer(uint64_t), steps[count].host)[0]
        steps[count].value = value
        if (value & 1) == 0:
            return _nested_fault(t, physical, wanted, error)
        if steps[count].host == 0 or _reserved_address_bits(level, value):
            return _nested_fault(t, physical, wanted, error | 9)
        rights &= value
        no_execute |= value >> 63
        count += 1
        if level == 1 or (value & 0x80):
            break
        table = value & cython.cast(uint64_t, 0xFFFFFFFFFF000)
        level -= 1
        shift -= 9
    if (rights & 4) == 0 or ((wanted & NESTED_WRITE) and (rights & 2) == 0) or ((wanted & NESTED_EXEC) and no_execute):
        return _nested_fault(t, physical, wanted, error | 1)
    granted[0] = NESTED_READ
    if no_execute == 0:
        granted[0] |= NESTED_EXEC
    for i in range(count):
        value = steps[i].value
        wish = value | 0x20
        if i == count - 1 and (wanted & NESTED_WRITE):
            wish |= 0x40
        if wish != value and not swap64(cython.cast(cython.pointer(uint64_t), steps[i].host), value, wish):
            t.fault = WALK_RETRY
            return 0
        steps[i].value = wish
    value = steps[count - 1].value
    if (rights & 2) and (value & 0x40):
        granted[0] |= NESTED_WRITE
    size[0] = cython.cast(uint64_t, 1) << shift
    value = (value & cython.cast(uint64_t, 0xFFFFFFFFFF000) & ~(size[0] - 1)) + (physical & (size[0] - 1))
    return _nested_page(s, physical, value, wanted, t, granted)


# ---- the guest's own tables --------------------------------------------------------------------------------------


def _reserved_address_bits(level, value):
    """PS where none may be, or address bits inside a large page. SDM, "4-Level Paging and 5-Level Paging"."""
    if (value & 0x80) == 0 or level == 1:
        return False
    if level >= 4:
        return True
    if level == 3:
        return (value & 0x3FFFE000) != 0
    return (value & 0x1FE000) != 0


def _page_fault(s, t, access, present_reserved):
    """SDM, "Page-Fault Exceptions": P 1, W/R 2, U/S 4, RSVD 8, I/D 16."""
    t.fault = WALK_PAGE_FAULT
    t.error_code = present_reserved
    if access & ACCESS_WRITE:
        t.error_code |= 2
    if (access & (ACCESS_USER | ACCESS_IMPLICIT)) == ACCESS_USER:
        t.error_code |= 4
    if (access & ACCESS_EXEC) and ((s.cr4 & CR4_SMEP) or ((s.cr4 & CR4_PAE) and (s.efer & EFER_NXE))):
        t.error_code |= 16
    return t.fault


def _entry_host(s, physical, t):
    """Where a paging-structure entry lies; 0 with t.fault, or 0 without when the bare processor has nothing there."""
    size: uint64_t
    granted: uint32_t
    host: uint64_t
    wanted: uint32_t = NESTED_READ | NESTED_LINEAR
    if s.nested == 1 and (s.nested_root & 0x40):
        # With EPT A/D flags such an access counts as a write. SDM, "Accessed and Dirty Flags for EPT".
        wanted |= NESTED_WRITE
    host = known_host(s, physical, wanted)
    if host:
        return host
    return nested_host(s, physical, wanted, t, cython.address(size), cython.address(granted))


def _set_flags(s, step, wish, t, wide):
    """Set A and D in one entry of the guest; WALK_OK, WALK_RETRY, or the fault that the write meets."""
    size: uint64_t
    granted: uint32_t
    host: uint64_t
    if wish == step.value:
        return WALK_OK
    host = nested_host(
        s, step.physical, NESTED_READ | NESTED_WRITE | NESTED_LINEAR, t, cython.address(size), cython.address(granted)
    )
    if host == 0:
        return t.fault
    if wide:
        if not swap64(cython.cast(cython.pointer(uint64_t), host), step.value, wish):
            t.fault = WALK_RETRY
    elif not swap32(
        cython.cast(cython.pointer(uint32_t), host),
        cython.cast(uint32_t, step.value),
        cython.cast(uint32_t, wish),
    ):
        t.fault = WALK_RETRY
    return t.fault


def _finish(s, t, access, size, may_write, may_execute):
    """The last step: the page itself in the second dimension."""
    nested_size: uint64_t = 0
    granted: uint32_t = 0
    wanted: uint32_t = NESTED_READ | NESTED_LINEAR | NESTED_FINAL
    if access & ACCESS_WRITE:
        wanted = NESTED_WRITE | NESTED_LINEAR | NESTED_FINAL
    elif access & ACCESS_EXEC:
        wanted = NESTED_EXEC | NESTED_LINEAR | NESTED_FINAL
    t.host = nested_host(s, t.physical, wanted, t, cython.address(nested_size), cython.address(granted))
    if t.fault != WALK_OK:
        return t.fault
    if t.host == 0 and s.nested:
        t.physical = t.fault_physical
    t.physical &= ~cython.cast(uint64_t, 0xFFF)
    t.host &= ~cython.cast(uint64_t, 0xFFF)
    t.size = size
    if nested_size < size:
        t.size = nested_size
    t.may_write = may_write and (granted & NESTED_WRITE) != 0
    t.may_execute = may_execute and (granted & NESTED_EXEC) != 0
    return WALK_OK


def _permitted(s, access, rights, no_execute):
    """SDM, "Determination of Access Rights". rights: R/W and U/S of all entries together."""
    user_page: cython.bint = (rights & 4) != 0
    if (access & (ACCESS_USER | ACCESS_IMPLICIT)) == ACCESS_USER:
        if not user_page:
            return False
        if (access & ACCESS_WRITE) and (rights & 2) == 0:
            return False
        return (access & ACCESS_EXEC) == 0 or no_execute == 0
    if access & ACCESS_EXEC:
        if no_execute:
            return False
        return not (user_page and (s.cr4 & CR4_SMEP) != 0)
    if user_page and (s.cr4 & CR4_SMAP) and ((access & ACCESS_IMPLICIT) or (s.rflags & FLAG_AC) == 0):
        return False
    return (access & ACCESS_WRITE) == 0 or (rights & 2) != 0 or (s.cr0 & CR0_WP) == 0


def _complete(s, access, t, steps, count, rights, no_execute, shift, wide):
    """Check rights, set A and D, translate the page: the common end of both walks."""
    i: uint32_t
    wish: uint64_t
    size: uint64_t = cython.cast(uint64_t, 1) << shift
    if not _permitted(s, access, rights, no_execute):
        return _page_fault(s, t, access, 1)
    for i in range(count):
        wish = steps[i].value | 0x20
        if i == count - 1 and (access & ACCESS_WRITE):
            wish |= 0x40
        if _set_flags(s, cython.address(steps[i]), wish, t, wide) != WALK_OK:
            return t.fault
        steps[i].value = wish
    t.user = (rights & 4) != 0
    t.is_global = (s.cr4 & CR4_PGE) != 0 and (steps[count - 1].value & 0x100) != 0
    return _finish(
        s,
        t,
        access,
        size,
        (steps[count - 1].value & 0x40) != 0
        and (access & ACCESS_EXEC) == 0
        and _permitted(s, access | ACCESS_WRITE, rights, no_execute),
        _permitted(s, (access & (ACCESS_USER | ACCESS_IMPLICIT)) | ACCESS_EXEC, rights, no_execute),
    )


def _remember_table(known, va, step, rights, no_execute):
    """Cache where the last table for an address is. All entries above it are present and accessed.

    SDM, "Paging-Structure Caches".
    """
    if step.host == 0:
        return
    known.tag = (va & ~cython.cast(uint64_t, 0x1FFFFF)) | 1
    known.host = step.host & ~cython.cast(uint64_t, 0xFFF)
    known.physical = step.physical & ~cython.cast(uint64_t, 0xFFF)
    known.rights = rights
    known.no_execute = no_execute


def _walk_wide(s, va, access, t):
    """PAE, 4-level and 5-level paging: entries of 8 bytes."""
    steps: Step[5]
    count: uint32_t = 0
    level: uint32_t = 4
    shift: uint32_t
    table: uint64_t = s.cr3 & cython.cast(uint64_t, 0xFFFFFFFFFF000)
    rights: uint64_t = 6
    no_execute: uint64_t = 0
    upper_rights: uint64_t = 0
    upper_no_execute: uint64_t = 0
    accessed: uint64_t = 0x20
    known: cython.pointer(TableEntry)
    reserved: uint64_t
    value: uint64_t
    at: uint64_t
    width: uint64_t = s.physical_bits
    if s.direct and s.nested == 0:
        width = 51  # shadow tables of host software name addresses of this process, which never have bit 51
    reserved = cython.cast(uint64_t, 0xFFFFFFFFFFFFF) & ~((cython.cast(uint64_t, 1) << width) - 1)
    if (s.efer & EFER_NXE) == 0:
        reserved |= cython.cast(uint64_t, 1) << 63
    if s.efer & EFER_LMA:
        if s.cr4 & CR4_LA57:
            level = 5
    else:
        va &= cython.cast(uint64_t, 0xFFFFFFFF)
        reserved |= cython.cast(uint64_t, 0x7FF) << 52
        value = s.pdpte[va >> 30]
        if s.nested == 2:
            # NPT reads them when they are used. APM, "Legacy PAE Mode" under "Nested Paging"
            at = _entry_host(s, (s.cr3 & cython.cast(uint64_t, 0xFFFFFFE0)) + ((va >> 30) << 3), t)
            if at == 0:
                return t.fault if t.fault != WALK_OK else _page_fault(s, t, access, 9)
            value = cython.cast(cython.pointer(uint64_t), at)[0]
            if (value & 1) and value & (cython.cast(uint64_t, 0x1E6) | ~((cython.cast(uint64_t, 1) << 52) - 1)):
                return _page_fault(s, t, access, 9)
        if (value & 1) == 0:
            return _page_fault(s, t, access, 0)
        table = value & cython.cast(uint64_t, 0xFFFFFFFFFF000)
        level = 2
    known = cython.address(s.tables[(va >> 21) & (TABLE_ENTRIES - 1)])
    if known.tag == ((va & ~cython.cast(uint64_t, 0x1FFFFF)) | 1):
        level = 1
        table = known.physical
        rights = known.rights
        no_execute = known.no_execute
    shift = 12 + 9 * (level - 1)
    while True:
        steps[count].physical = table + (((va >> shift) & 0x1FF) << 3)
        if count == 0 and level == 1:
            steps[0].host = known.host + (steps[0].physical & 0xFFF)
        else:
            steps[count].host = _entry_host(s, steps[count].physical, t)
        if steps[count].host == 0:
            if t.fault != WALK_OK:
                return t.fault
            value = ~cython.cast(uint64_t, 0)  # nothing answers on the bus
        else:
            value = cython.cast(cython.pointer(uint64_t), steps[count].host)[0]
        steps[count].value = value
        if (value & 1) == 0:
            if level == 1 and count and accessed:  # the next walk to this table is short, whoever fills it
                _remember_table(known, va, cython.address(steps[count]), rights, no_execute)
            return _page_fault(s, t, access, 0)
        if (value & reserved) or _reserved_address_bits(level, value):
            if level == 1 and count and accessed:
                _remember_table(known, va, cython.address(steps[count]), rights, no_execute)
            return _page_fault(s, t, access, 9)
        upper_rights = rights
        upper_no_execute = no_execute
        rights &= value
        no_execute |= value >> 63
        accessed &= value & 0x20
        count += 1
        if level == 1 or (value & 0x80):
            break
        table = value & cython.cast(uint64_t, 0xFFFFFFFFFF000)
        level -= 1
        shift -= 9
    table = value & cython.cast(uint64_t, 0xFFFFFFFFFF000) & ~((cython.cast(uint64_t, 1) << shift) - 1)
    t.physical = table | (va & ((cython.cast(uint64_t, 1) << shift) - 1))
    if _complete(s, access, t, steps, count, rights, no_execute, shift, True) == WALK_OK and count > 1 and level == 1:
        _remember_table(known, va, cython.address(steps[count - 1]), upper_rights, upper_no_execute)
    return t.fault


def _walk_32(s, va, access, t):
    """32-bit paging, with 4-MByte pages and PSE-36. SDM, "32-Bit Paging"."""
    steps: Step[2]
    count: uint32_t = 0
    shift: uint32_t = 22
    table: uint64_t = s.cr3 & cython.cast(uint64_t, 0xFFFFF000)
    rights: uint64_t = 6
    value: uint64_t
    while True:
        steps[count].physical = table + (((va >> shift) & 0x3FF) << 2)
        steps[count].host = _entry_host(s, steps[count].physical, t)
        if steps[count].host == 0:
            if t.fault != WALK_OK:
                return t.fault
            value = cython.cast(uint64_t, 0xFFFFFFFF)
        else:
            value = cython.cast(cython.pointer(uint32_t), steps[count].host)[0]
        steps[count].value = value
        if (value & 1) == 0:
            return _page_fault(s, t, access, 0)
        rights &= value
        count += 1
        if shift == 12:
            t.physical = (value & cython.cast(uint64_t, 0xFFFFF000)) | (va & 0xFFF)
            break
        if (value & 0x80) and (s.cr4 & CR4_PSE):
            if value & 0x200000:
                return _page_fault(s, t, access, 9)
            t.physical = (value & cython.cast(uint64_t, 0xFFC00000)) | ((value & 0x1FE000) << 19) | (va & 0x3FFFFF)
            break
        table = value & cython.cast(uint64_t, 0xFFFFF000)
        shift = 12
    return _complete(s, access, t, steps, count, rights, 0, shift, False)
