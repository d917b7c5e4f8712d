"""Signals that translated code raises on the host, turned into exits of the block."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState

# Linux's selectors of 64-bit user code and of its data: arch/x86/include/asm/segment.h, __USER_CS, __USER_DS.
cdef enum:
    USER_CS = 0x33
    USER_DS = 0x2B
    KEPT_WORDS = 4  # of a full shadow stack: more than translated code pushes besides predictions

cdef extern from "<signal.h>" nogil:
    ctypedef struct siginfo_t:
        int si_code
        void *si_addr
    ctypedef struct sigset_t:
        pass
    ctypedef struct stack_t:
        void *ss_sp
        int ss_flags
        size_t ss_size
    ctypedef void (*action_t)(int, siginfo_t *, void *) noexcept nogil
    cdef struct sigaction_t "sigaction":
        action_t sa_sigaction
        sigset_t sa_mask
        int sa_flags
    int c_sigaction "sigaction"(int number, sigaction_t *new, sigaction_t *old)
    int sigaltstack(stack_t *new, stack_t *old)
    int sigemptyset(sigset_t *set)
    int SA_SIGINFO
    int SA_ONSTACK
    int SA_NODEFER
    int SS_DISABLE
    int SIGSEGV
    int SIGBUS
    int SIGFPE
    int SIGILL
    int SIGTRAP
    int SEGV_MAPERR
    int SEGV_ACCERR
    int BUS_ADRALN

cdef extern from "<pthread.h>" nogil:
    unsigned long pthread_self()

cdef extern from "<ucontext.h>" nogil:
    ctypedef struct mcontext_t:
        long long gregs[23]
    ctypedef struct ucontext_t:
        mcontext_t uc_mcontext

cdef CpuState *_watched[256]
cdef int _watched_count
cdef sigaction_t _previous[65]

cdef int watch(CpuState *s) noexcept nogil
cdef void unwatch(CpuState *s) noexcept nogil
# Is there such a processor? Safe in signal handlers.
cdef bint is_watched(CpuState *s) noexcept nogil
cdef int prepare_thread() noexcept nogil
cdef bint memory_is_gone(int number, int code) noexcept nogil
