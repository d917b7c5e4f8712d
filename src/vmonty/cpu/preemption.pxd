"""The timer that gets a processor out of translated code when its VMX-preemption timer runs out."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState

cdef extern from "<time.h>" nogil:
    ctypedef void *timer_t
    ctypedef int clockid_t
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    cdef struct itimerspec:
        timespec it_interval
        timespec it_value
    int CLOCK_MONOTONIC
    int clock_gettime(clockid_t clock, timespec *now)
    int timer_settime(timer_t timer, int flags, itimerspec *new, itimerspec *old)
    int timer_delete(timer_t timer)
    int nanosleep(timespec *time, timespec *rest)

cdef extern from "<signal.h>" nogil:
    cdef union sigval:
        void *sival_ptr
    cdef struct sigevent_t "sigevent":
        int sigev_notify
        int sigev_signo
        sigval sigev_value
        int sigev_notify_thread_id "_sigev_un._tid"
    ctypedef struct siginfo_t:
        sigval si_value
    ctypedef struct sigset_t:
        pass
    ctypedef void (*action_t)(int, siginfo_t *, void *) noexcept nogil
    cdef struct sigaction_t "sigaction":
        action_t sa_sigaction
        sigset_t sa_mask
        int sa_flags
    int c_sigaction "sigaction"(int number, sigaction_t *new, sigaction_t *old)
    int sigemptyset(sigset_t *set)
    int SA_SIGINFO
    int SA_ONSTACK
    int SIGEV_THREAD_ID
    int SIGRTMIN
    int SA_RESTART
    int timer_create(clockid_t clock, sigevent_t *event, timer_t *timer)

cdef extern from "<unistd.h>" nogil:
    int gettid()

# To be called before the others by a thread that begins to run the processor.
cdef void preemption_thread(CpuState *s) noexcept nogil
# Clear the run flag of this thread's processor when the TSC, now at ``now``, reaches ``deadline``, or before.
cdef void preemption_arm(CpuState *s, uint64_t now, uint64_t deadline) noexcept nogil
cdef void preemption_free(CpuState *s) noexcept nogil
# A halted guest waits for an event, of which nobody tells but the run flag.
cdef void halted_wait(CpuState *s) noexcept nogil

cdef uint64_t _ticks_per_ms
