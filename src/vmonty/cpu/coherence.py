"""Code that was written unseen: by host software that does not announce what it writes to guest memory.

Each block has digests of the bytes that it was translated from. They are compared when the processor gets a new
translation for the address of a page, once per generation: host software begins one whenever it had control.
"""

import cython
from cython.cimports.vmonty.cpu.codecache import Block, CodeCache, CodePage, drop_page, page_find, shadow_reset


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _digest(at: cython.p_uchar, length: cython.int) -> uint32_t:
    h: uint64_t = cython.cast(uint64_t, length)
    while length >= 8:
        h = (h ^ cython.cast(cython.pointer(uint64_t), at)[0]) * cython.cast(uint64_t, 0x9E3779B97F4A7C15)
        h ^= h >> 29
        at += 8
        length -= 8
    while length > 0:
        h = (h ^ at[0]) * cython.cast(uint64_t, 0x9E3779B97F4A7C15)
        at += 1
        length -= 1
    return cython.cast(uint32_t, h >> 32)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _digest_of(b: cython.pointer(Block), second: cython.int) -> uint32_t:
    """The digest of a block's bytes as they are now, of those in its first or its second page."""
    start: cython.int = b.linear & 0xFFF
    here: cython.int = b.length if start + b.length <= 4096 else 4096 - start
    if second:
        return _digest(cython.cast(cython.p_uchar, b.host_page2), b.length - here)
    return _digest(cython.cast(cython.p_uchar, b.host_page + start), here)


def block_digest(b):
    """Note what a new block was translated from."""
    b.digest = _digest_of(b, 0)
    b.digest2 = _digest_of(b, 1) if b.host_page2 else 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _agrees(p: cython.pointer(CodePage), c: cython.pointer(CodeCache)) -> cython.int:
    n: uint32_t = p.first
    b: cython.pointer(Block)
    while n:
        b = cython.address(c.blocks[n - 1])
        if b.host_page == p.host_page:
            if b.valid and _digest_of(b, 0) != b.digest:
                return 0
            n = b.page_next
        else:
            if b.valid and _digest_of(b, 1) != b.digest2:
                return 0
            n = b.page_next2
    return 1


def page_verify(s, host_page):
    """Drop what was translated from a page if the page holds something else now."""
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    p: cython.pointer(CodePage) = page_find(c, host_page)
    if p == cython.NULL or p.generation == s.host_generation:
        return
    p.generation = s.host_generation
    if p.first and not _agrees(p, c):
        drop_page(s, host_page)
        shadow_reset(s)
