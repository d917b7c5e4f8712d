"""The dispatcher of one logical processor.

It looks up or makes the translation of rip, enters it, and sees why it came back: an exit to link, an
instruction for a helper, an exception to deliver, a reason to return to the caller. It is compiled without vector
registers, as the guest's are live from the first block to the last.
"""

from __future__ import annotations

import cython
from cython.cimports.vmonty.cpu.ahead import look_ahead
from cython.cimports.vmonty.cpu.boundary import (
    attention,
    data_trap,
    instruction_done,
    instruction_in,
    note_step,
    poll,
    stepping,
)
from cython.cimports.vmonty.cpu.breakpoints import breakpoint_fault
from cython.cimports.vmonty.cpu.careful import careful_access, careful_commit
from cython.cimports.vmonty.cpu.codecache import (
    OUT_FAULT,
    OUT_INDIRECT,
    OUT_LINK,
    OUT_NEXT,
    OUT_POLL,
    OUT_SYSTEM,
    OUT_TRAP,
    Block,
    CodeCache,
    block_at_host,
    block_find,
    block_invalidate,
    cache_flush,
    cache_free,
    cache_new,
    drain_writes,
    enter_function,
    guard_function,
    link_to,
    lock_drop,
    lock_take,
    put_vectors,
    register_processor,
    shadow_reset,
    take_vectors,
    unregister_processor,
)
from cython.cimports.vmonty.cpu.decode import C_CALL, C_CALLI, C_JMP, C_JMPI, C_LOOP, C_RET, ROW, Insn
from cython.cimports.vmonty.cpu.events import deliver
from cython.cimports.vmonty.cpu.exclusive import (
    exclusive_aside,
    exclusive_back,
    exclusive_end,
    exclusive_lock,
    exclusive_wait,
)
from cython.cimports.vmonty.cpu.hosttraps import (
    SIGFPE,
    SIGILL,
    SIGSEGV,
    memory_is_gone,
    prepare_thread,
    pthread_self,
    unwatch,
    watch,
)
from cython.cimports.vmonty.cpu.mmio import mmio_answer, mmio_done, mmio_report
from cython.cimports.vmonty.cpu.paging import swap32
from cython.cimports.vmonty.cpu.ports import complete
from cython.cimports.vmonty.cpu.preemption import preemption_free, preemption_thread
from cython.cimports.vmonty.cpu.resume import cached_code, execute_system, new_key
from cython.cimports.vmonty.cpu.startup import reset_registers
from cython.cimports.vmonty.cpu.state import (
    CS,
    EXIT_BUDGET,
    EXIT_DEBUG,
    EXIT_HOST_FAULT,
    EXIT_INTERNAL,
    EXIT_MMIO,
    EXIT_NONE,
    EXIT_PIO,
    EXIT_RUN_FLAG,
    EXIT_VM,
    FLAG_RF,
    FLAG_TF,
    JUMP_CACHE_BITS,
    JUMP_CACHE_ENTRIES,
    LEAVE_CAREFUL,
    LEAVE_EVENT,
    LEAVE_EXIT,
    LEAVE_JUMP,
    LEAVE_NEXT,
    LEAVE_PLAIN,
    LEAVE_RETRY,
    LOCAL_JUMP,
    MODE_LONG64,
    OBSERVE_DONE,
    OBSERVE_EVENT,
    OBSERVE_INSTRUCTION,
    OBSERVE_MEMORY,
    RCX,
    RSP,
    SHADOW_MOV_SS,
    SHADOW_STI,
    FetchEntry,
    is_canonical,
    note_local,
    observer_function,
    raise_error,
    raise_exception,
    state_free,
    state_new,
)
from cython.cimports.vmonty.cpu.svm_code import svm_return
from cython.cimports.vmonty.cpu.svm_exit import svm_of
from cython.cimports.vmonty.cpu.system import execute
from cython.cimports.vmonty.cpu.tlb import (
    SLOW_OFFSET,
    fetch_ahead,
    fetch_page,
    flush_all,
    memory_slow,
    mode_changed,
    to_linear,
)
from cython.cimports.vmonty.cpu.translate import KEY_PLAIN, KEY_SINGLE, translate_block
from cython.cimports.vmonty.cpu.vmx_code import vmx_return
from cython.cimports.vmonty.cpu.vmx_exit import GUEST_SVM, GUEST_VMX, vmx_of


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _call_helper(s: cython.pointer(CpuState), number: uint64_t, host_rip: uint64_t) -> cython.int:
    """What translated code calls for an instruction that a helper executes."""
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    i: cython.pointer(Insn) = cython.address(c.side[number])
    r: cython.int
    s.rip = i.rip
    s.slow_host_rip = 0
    s.watch_hits = 0
    r = execute(s, i)
    if r == 0 or r == LEAVE_NEXT:
        mmio_done(s)
        if r == 0 and (s.code_page_written | s.mmio_writes_count | s.watch_hits) == 0:
            return 0
        data_trap(s)
        s.rip = i.rip + i.length
        return LEAVE_JUMP
    return r


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _trap(s: cython.pointer(CpuState)) -> cython.int:
    """Turn a host trap into the guest's exception. Gives 0, or -1 when it is a defect of ours."""
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    b: cython.pointer(Block) = block_at_host(c, s.trap_rip)
    offset: uint64_t
    k: uint32_t
    n: uint32_t = 0
    if b == cython.NULL:
        return -1
    offset = s.trap_rip - cython.cast(uint64_t, c.executable) - b.entry
    if offset >= b.body_size:
        return -1
    for k in range(b.pairs):
        if c.offsets[b.offsets + 2 * k] <= offset:
            n = k
    s.rip = b.rip + c.offsets[b.offsets + 2 * n + 1]
    if s.trap_signal == SIGFPE:
        if s.trap_code == 1 or s.trap_code == 2:
            raise_exception(s, 0)
        elif s.trap_vector == 16:
            raise_exception(s, 16)
        else:
            raise_exception(s, 19)
        return 0
    if s.trap_signal == SIGSEGV and s.trap_code == 128:
        raise_error(s, 13, 0)
        return 0
    if s.trap_signal == SIGILL:
        raise_exception(s, 6)
        return 0
    if memory_is_gone(s.trap_signal, s.trap_code):
        s.host_fault = 1
    return -1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _remember(s: cython.pointer(CpuState), is_global: uint64_t, rip: uint64_t, code: uint64_t) -> cython.void:
    """Enter a block into the jump cache of the current TLB set."""
    h: cython.int = (rip >> 2) & (JUMP_CACHE_ENTRIES - 1)
    s.jump_negated[s.tlb_set][h] = 0 - rip
    s.jump_code[s.tlb_set][h] = code
    s.jump_used[s.tlb_set] = 1
    if not is_global:
        note_local(s, LOCAL_JUMP, cython.address(s.local_jump[0]), s.tlb_set << JUMP_CACHE_BITS | h)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _observe(s: cython.pointer(CpuState), kind: uint32_t) -> cython.void:
    """Call the observer, which is Python: the guest's vector state is put away meanwhile."""
    if not s.observe:
        return
    put_vectors(s)
    s.guard_thread = 0  # what Python meets is its own
    exclusive_aside(s)
    cython.cast(observer_function, s.observer)(s, kind)
    exclusive_back(s)
    s.guard_thread = pthread_self()
    take_vectors(s)
    s.access_count = 0
    s.access_bytes = 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _resume_mmio(s: cython.pointer(CpuState)) -> cython.void:
    """Take the caller's answer to an EXIT_MMIO that stopped an instruction in its middle."""
    if s.exit.reason == EXIT_MMIO and s.mmio_count:
        mmio_answer(s)
        s.careful_next = 1
    s.mmio_at = 0
    s.exit.reason = EXIT_NONE


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _after_helper(s: cython.pointer(CpuState), i: cython.pointer(Insn), r: cython.int, shadow: uint32_t) -> cython.void:
    """Finish an instruction that the dispatcher had executed."""
    if r == 0 or r == LEAVE_NEXT:
        s.rip = i.rip + i.length
    if r == 0 or r in (LEAVE_NEXT, LEAVE_JUMP):
        mmio_done(s)
        data_trap(s)
        s.interruptibility &= ~shadow


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _translation(s: cython.pointer(CpuState), single: uint32_t, plain: uint32_t, link: cython.long,
                 why: cython.p_int) -> uint64_t:  # fmt: skip
    """Find or make the translation of rip, and connect the exit ``link`` or the jump cache to it.

    Gives 0 with an exception recorded, when it is to be tried again, or with LEAVE_EXIT in ``why``.
    """
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    page: cython.pointer(FetchEntry)
    ahead: cython.pointer(FetchEntry)
    b: cython.pointer(Block)
    linear: uint64_t = s.rip
    limit: uint64_t = ~cython.cast(uint64_t, 0)
    flushes: uint64_t = c.flushes
    code: uint64_t
    first: uint32_t
    why[0] = 0
    if s.mode != MODE_LONG64:
        limit = s.segs[CS].limit
        if s.rip > limit:
            raise_error(s, 13, 0)
            return 0
        linear = cython.cast(uint32_t, s.rip + s.segs[CS].base)
    page = fetch_page(s, linear, why)
    if page == cython.NULL or page.host == 0:
        if page != cython.NULL:
            s.exit.reason = EXIT_INTERNAL
            s.exit.data = 1
            why[0] = LEAVE_EXIT
        return 0
    b = block_find(
        c,
        s.rip,
        linear,
        limit,
        page.host,
        s.block_key | (KEY_SINGLE if single else (KEY_PLAIN if plain else 0)),
    )
    if b != cython.NULL and b.host_page2 and b.count > 1:  # a loop whose end may be mapped elsewhere by now
        ahead = fetch_ahead(s, (linear | 0xFFF) + 1)
        if ahead == cython.NULL or ahead.host != b.host_page2:
            block_invalidate(s, b)
            b = cython.NULL
    if b == cython.NULL:
        first = c.links_used
        b = translate_block(s, s.rip, page, single, plain, why)
        if b == cython.NULL:
            if why[0] == 0:
                s.exit.reason = EXIT_INTERNAL
                s.exit.data = 1
                why[0] = LEAVE_EXIT
            return 0
        if flushes != c.flushes:
            link = -1
        elif not single and not plain and s.mode == MODE_LONG64:
            look_ahead(s, b, page, first)
    if b.host_page2 and b.count == 1 and not _second_page(s, b, why):  # it may be mapped elsewhere by now
        return 0
    s.fetch_second = b.host_page2
    code = cython.cast(uint64_t, c.executable) + b.entry
    if not single and not plain:
        if link >= 0:
            if not c.links[link].cross_page or page.is_global:
                link_to(s, link, b)
        elif s.mode == MODE_LONG64:
            _remember(s, page.is_global and not b.host_page2, s.rip, code)
    return code


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _dispatch(s: cython.pointer(CpuState)) -> cython.void:
    """Run until there is something to report in ``exit``."""
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    i: cython.pointer(Insn)
    why: cython.int = 0
    out: cython.int
    r: cython.int
    single: uint32_t
    plain: uint32_t = 0
    before: uint64_t
    shadow: uint32_t
    link: cython.long
    code_base: uint64_t = 1
    code: uint64_t
    enter: enter_function = cython.cast(enter_function, cython.cast(cython.p_void, c.enter))
    link = -1
    while True:
        if s.mmio_writes_count and mmio_report(s):
            return
        if s.event.pending:
            link = -1
            if s.stop_events:
                s.exit.reason = EXIT_DEBUG
                return
            if s.observe:
                s.access_count = 0  # of an instruction that faulted
                s.access_bytes = 0
                s.observe_again = 0
                s.observed_rip = s.rip
                if s.observe & OBSERVE_EVENT:
                    _observe(s, OBSERVE_EVENT)
            if deliver(s) == LEAVE_EXIT:
                return
            if s.observe & OBSERVE_MEMORY:
                _observe(s, OBSERVE_DONE)
            continue
        if s.run == 0:
            # A locked operation: what the kicker wrote before it cleared the flag is seen below.
            swap32(cython.address(s.run), 0, 1)
            link = -1
            exclusive_wait(s)
            if s.code_queue_count | s.fresh_count:
                drain_writes(s)
            if s.kick:
                s.kick = 0
                s.exit.reason = EXIT_RUN_FLAG
                return
        if attention(s):
            r = poll(s)
            if r == LEAVE_EXIT:
                return
            if r:
                link = -1
                continue
        if s.block_key != s.last_key:
            link = -1
            new_key(s)
        shadow = s.interruptibility & (SHADOW_STI | SHADOW_MOV_SS)
        single = 1 if s.careful_next or s.budget or shadow or stepping(s) else 0
        before = s.rflags
        if s.breakpoints:
            if breakpoint_fault(s):
                continue
        else:
            s.rflags &= ~cython.cast(uint64_t, FLAG_RF)  # it has nothing to suppress
        s.watch_hits = 0
        s.careful_next = 0
        if single:
            plain = 0
        code = 0
        if link < 0 and not single and not plain:
            code = cached_code(s)
        if code == 0:
            if s.segs[CS].base != code_base and s.mode != MODE_LONG64:  # return predictions hold offsets
                code_base = s.segs[CS].base
                shadow_reset(s)
            code = _translation(s, single, plain, link, cython.address(why))
        if code == 0:
            if why == LEAVE_EXIT:
                return
            continue
        if single:
            s.careful_count = 0
            if before & FLAG_TF:
                note_step(s, code)
            if s.observe:
                s.access_count = 0
                s.access_bytes = 0
                s.exit.reason = EXIT_NONE
                s.observed_rip = s.rip
                if not s.observe_again:
                    _observe(s, OBSERVE_INSTRUCTION)
                s.observe_again = 0
                if s.exit.reason == EXIT_DEBUG:
                    return
        link = -1
        plain = 0
        s.code_page_written = 0
        s.branch_at = 0
        out = enter(s, cython.cast(cython.p_void, code))
        s.slow_host_rip = 0
        if out == OUT_LINK:
            link = s.leave_argument
            s.rip = c.links[link].target
            if _check_target(s, c.links[link].patch):
                link = -1
        elif out == OUT_INDIRECT:
            _check_target(s, s.branch_at)
        elif out == OUT_POLL:
            pass
        elif out in (OUT_SYSTEM, OUT_FAULT):
            i = cython.address(c.side[s.leave_argument])
            s.rip = i.rip
            if out == OUT_FAULT:
                if i.fault == 13:
                    raise_error(s, 13, 0)
                else:
                    raise_exception(s, i.fault)
                continue
            r = execute(s, i)
            _after_helper(s, i, r, shadow)
            if r == LEAVE_EXIT:
                if s.exit.reason == EXIT_PIO:
                    _observe(s, OBSERVE_DONE)
                return
            if i.map == 1 and i.opcode == 0x05:  # SYSCALL: no step into a kernel that masks TF
                before &= s.rflags | ~cython.cast(uint64_t, FLAG_TF)
            if single and _stepped(s, r, before):
                return
        elif out == OUT_NEXT:
            if _check_target(s, code - cython.cast(uint64_t, c.executable)):
                continue
            mmio_done(s)
            data_trap(s)
            s.interruptibility &= ~shadow
            if s.code_page_written:
                shadow_reset(s)
            if _stepped(s, 0, before):
                return
        elif out == OUT_TRAP:
            if _trap(s) < 0:
                s.exit.reason = EXIT_INTERNAL
                s.exit.data = 2
                return
        elif out == LEAVE_PLAIN:
            plain = 1
        elif out == LEAVE_CAREFUL:
            s.careful_next = 1
        elif out == LEAVE_EXIT:
            return
        elif out == LEAVE_JUMP:
            s.interruptibility &= ~shadow
            if s.code_page_written:
                shadow_reset(s)
            if single and _stepped(s, 0, before):
                return
        elif out == LEAVE_RETRY and s.observe_again:
            _observe(s, OBSERVE_DONE)
        # LEAVE_EVENT, LEAVE_RETRY: go round again


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _check_target(s: cython.pointer(CpuState), at: uint64_t) -> cython.int:
    """Raise #GP(0) for a branch to an address that is not canonical; ``at`` is its place in the code cache, or 0.

    Near branches fault themselves, with nothing popped; what CALL pushed is in memory. That is what Intel's processors
    do. Code that runs on over the border faults there. No VM entry takes such a rip: there must be no exit in between.
    """
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    b: cython.pointer(Block)
    i: Insn
    k: uint32_t
    n: uint32_t = 0
    cls: cython.int
    if s.mode != MODE_LONG64 or is_canonical(s, s.rip):
        return 0
    b = block_at_host(c, cython.cast(uint64_t, c.executable) + at)
    if at and b != cython.NULL:
        for k in range(b.pairs):
            if c.offsets[b.offsets + 2 * k] <= at - b.entry:
                n = k
        if instruction_in(s, b, c.offsets[b.offsets + 2 * n + 1], cython.address(i)):
            cls = ROW[i.row].cls
            if cls in (C_CALL, C_CALLI):
                s.gpr[RSP] += 8
            elif cls == C_RET:
                s.gpr[RSP] -= 8 + i.immediate
            elif cls == C_LOOP and i.opcode != 0xE3 and s.rip != i.rip + i.length:
                s.gpr[RCX] += 1
                if i.address_size == 4:
                    s.gpr[RCX] &= cython.cast(uint64_t, 0xFFFFFFFF)
            if cls in (C_CALL, C_CALLI, C_RET, C_JMP, C_JMPI) or s.rip != i.rip + i.length:
                s.rip = i.rip
    return raise_error(s, 13, 0)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _second_page(s: cython.pointer(CpuState), b: cython.pointer(Block), why: cython.p_int) -> cython.int:
    """Check the page that the block's last instruction reaches into; drops the block when it has moved."""
    page: cython.pointer(FetchEntry) = fetch_page(s, (b.linear | 0xFFF) + 1, why)
    if page == cython.NULL:
        return 0
    if page.host != b.host_page2:
        block_invalidate(s, b)
        why[0] = 0
        return 0
    return 1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _stepped(s: cython.pointer(CpuState), r: cython.int, before: uint64_t) -> cython.int:
    """Count an instruction that ran alone; 1 when the budget is used up."""
    if r in (LEAVE_EVENT, LEAVE_RETRY):
        return 0
    instruction_done(s, before)
    _observe(s, OBSERVE_DONE)
    if s.budget:
        s.budget -= 1
        if s.budget == 0:
            if not mmio_report(s):
                s.exit.reason = EXIT_BUDGET
            return 1
    return 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _returns_to_code(s: cython.pointer(CpuState)) -> cython.int:
    """A VM exit whose hypervisor is code of this processor: go on there. 0: the caller of run() is the hypervisor."""
    if s.guest_mode == GUEST_SVM and svm_of(s).guest_code:
        svm_return(s)
        return 1
    if s.guest_mode == GUEST_VMX and vmx_of(s).guest_code:
        vmx_return(s)
        return 1
    return 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _begin(s: cython.pointer(CpuState)) -> cython.void:
    """Finish what the last exit left open."""
    if s.exit.reason == EXIT_PIO:
        complete(s)
    _resume_mmio(s)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _run(s: cython.pointer(CpuState)) -> cython.void:
    _dispatch(s)
    while s.exit.reason == EXIT_VM and _returns_to_code(s):
        _dispatch(s)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _host_fault(s: cython.pointer(CpuState)) -> cython.void:
    """Put the processor before the instruction, or the delivery, that met host memory which is gone."""
    b: cython.pointer(Block)
    if s.slow_host_rip:
        b = block_at_host(cython.cast(cython.pointer(CodeCache), s.translator), s.slow_host_rip)
        if b != cython.NULL:
            s.rip = b.rip + (s.slow_what & SLOW_OFFSET)
        s.slow_host_rip = 0
    cache_flush(s)  # perhaps it was about to translate
    s.mmio_count = 0
    s.mmio_writes_count = 0
    s.mmio_writes_at = 0
    s.event.pending = 0
    if s.vectoring >> 31 and s.guest_mode == 0:  # else the VM exit reports it
        s.event.pending = 1
        s.vectoring = 0
    s.host_fault = 0
    s.exit.reason = EXIT_HOST_FAULT
    s.exit.address = s.trap_address


def run_cpu(s):
    """Run until the processor has something to report: gives ``exit.reason``. Needs no GIL."""
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    guard: guard_function = cython.cast(guard_function, cython.cast(cython.p_void, c.guard))
    if not s.stack_ready:
        prepare_thread()
        preemption_thread(s)
    if s.code_queue_count | s.fresh_count:
        drain_writes(s)
    s.slow_host_rip = 0
    s.guard_thread = pthread_self()
    guard(s, _begin)
    if not s.host_fault:
        swap32(cython.address(s.in_run), 0, 1)  # seen by who finds code in a page before anything is looked up here
        take_vectors(s)
        guard(s, _run)
        if not s.keep_vectors or s.exit.reason != EXIT_VM or s.host_fault:
            put_vectors(s)
        s.in_run = 0
        if s.exclusive:  # what it did alone met host memory that is gone
            exclusive_end(s)
        s.parked = 0
    s.guard_thread = 0
    if s.host_fault:
        _host_fault(s)
    return s.exit.reason


def cpu_new(cache_size):
    """Make a processor with a code cache of that many bytes; NULL without memory."""
    s: cython.pointer(CpuState) = state_new()
    if s == cython.NULL:
        return cython.NULL
    if (
        cache_new(
            s,
            cache_size,
            cython.cast(cython.p_void, memory_slow),
            cython.cast(cython.p_void, careful_access),
            cython.cast(cython.p_void, careful_commit),
            cython.cast(cython.p_void, _call_helper),
            cython.cast(cython.p_void, to_linear),
            cython.cast(cython.p_void, execute_system),
        )
        == cython.NULL
    ):
        state_free(s)
        return cython.NULL
    cython.cast(cython.pointer(uint32_t), cython.address(s.xsave[24]))[0] = 0x1F80
    cython.cast(cython.pointer(cython.ushort), cython.address(s.xsave[0]))[0] = 0x37F
    s.xsave[512] = 3
    s.last_key = 0xFFFFFFFF
    s.cr0 = 0x60000000
    s.xcr0 = 1
    reset_registers(s)
    s.pat = 0x0007040600070406
    s.linear_bits = 48
    flush_all(s)
    mode_changed(s)
    if watch(s) < 0 or register_processor(s) < 0:
        return cython.NULL
    return s


def cpu_free(s):
    """Give everything back."""
    unwatch(s)
    preemption_free(s)
    while lock_take(cython.address(exclusive_lock), 1):  # who is about to be alone looks at all of them
        pass
    unregister_processor(s)
    lock_drop(cython.address(exclusive_lock))
    cache_free(s)
    state_free(s)
