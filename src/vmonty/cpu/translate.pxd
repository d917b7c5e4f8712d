"""The translator: guest blocks to host code."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from vmonty.cpu.assembler cimport Assembler
from vmonty.cpu.codecache cimport Block, CodeCache
from vmonty.cpu.decode cimport Insn
from vmonty.cpu.state cimport CpuState, FetchEntry

cdef enum:
    MAX_INSNS = 60
    MAX_STUBS = 400
    # block keys beyond CpuState.block_key
    KEY_SINGLE = 0x80000000  # one instruction, every memory access through careful_access
    KEY_PLAIN = 0x40000000   # each memory operand has a TLB check of its own
    MAX_GROUPS = 8
    MAX_STREAMS = 6
    MAX_DRIVERS = 3

# How an effective address is made besides base, index, displacement.
cdef enum:
    EA_PLAIN = 0
    EA_BIT = 1               # BT family: plus the bit offset in a register
    EA_XLAT = 2              # plus AL

cdef enum:
    STUB_MEMORY = 1
    STUB_MEMORY_LIVE = 2
    STUB_LINK = 3
    STUB_LOOKUP = 4
    STUB_SLOT = 5
    STUB_POLL = 6

# An effective address in guest terms, so that it can be computed again in a slow path.
cdef struct Ea:
    int base                 # guest register, NONE, or RIP_BASE (displacement is then the linear address)
    int index
    int scale
    int segment              # FS, GS or NONE
    int address_size
    int special
    int bit_register
    int operand_size
    uint32_t what            # word for to_linear and memory_slow
    int64_t displacement

cdef struct Stub:
    int kind
    uint8_t *patch           # the rel32 that goes to the stub
    uint8_t *back
    int slot                 # STUB_SLOT: its number, and whether it is for writes
    int write
    uint32_t what            # memory: word for memory_slow; link: its number
    uint64_t target
    Ea ea

# Operands at constant distances from each other, which share one TLB check.
cdef struct Group:
    int base
    int index
    int scale
    int base_version
    int index_version
    int members
    int write                # uses the write table
    int stack
    int64_t low
    int64_t high
    int first                # its leader

# Strips (see there): a register that moves in a loop, and operands by the same registers.
cdef struct Driver:
    int reg
    int kind
    int by                   # the register that it moves by
    int32_t limit            # displacement of its limit
    int64_t step

cdef struct Stream:
    int base
    int index
    int scale
    int driver               # its number, or NONE
    int write
    int slot
    int reg                  # host register that holds what the others come to, or NONE: it is in the slot
    int64_t low
    int64_t high

cdef struct Work:
    CpuState *s
    CodeCache *c
    Assembler *a
    Block *block
    uint32_t single
    uint32_t is_global
    int code_size            # 8 in 64-bit mode, else 4 or 2
    int stack_size           # address size of the stack: 8, 4, 2
    uint64_t code_base       # of CS outside 64-bit mode
    int count
    int ended                # by its last instruction
    int total                # with the rounds of a loop that stand there again
    int stubs
    int base                 # of the memory operand after emit_access
    int index
    int scale
    int disp
    int groups
    int held                 # group whose host address held_base has, + 1
    int held_base
    int kept                 # held, as the instruction finds it
    int pending              # what guest rsp has still to be moved by; 0 wherever the block may be left
    int operands             # that may belong to a group
    uint32_t plain
    uint32_t in_loop         # the block jumps back to itself or close before: accesses remember their page
    uint32_t loaded          # registers that the block loads from memory
    Group group[8]
    int closed               # the block has its exits
    int has_strip            # it is a loop with a strip
    int strip                # which is being emitted
    int strip_rounds         # how often its body stands in a row
    int streams
    int drivers
    uint8_t *setup           # of the strip
    uint8_t *turn            # the rel32 that goes to it
    Stream stream[6]
    Driver driver[3]
    uint8_t stream_of[64]    # of each instruction's operand, + 1
    int slot_of[64]          # or NONE
    uint16_t *pairs          # of the host and guest offsets of each instruction, the next one
    uint8_t *entry           # of the block, in the writable mapping
    uint8_t *window          # the bytes of the first page
    uint32_t window_size
    Insn insns[64]
    Stub stub[400]

cdef bint cache_full(CodeCache *c) noexcept nogil
cdef Block *translate_block(CpuState *s, uint64_t rip, FetchEntry *page, uint32_t single, uint32_t plain,
                            int *why) noexcept nogil
