"""Physical processors: who is at work there."""


cdef class Seats:
    # Somebody waits for a processor, or all stand still: who gives one back must tell.
    cdef public bint contended


cdef class Seat:
    cdef public bint running
    cdef public bint online
    cdef readonly Seats pool
