"""What is done about the exits of a block that has just been translated.

An exit that is linked when it is first taken costs a way through the dispatcher, and patches code that has just run,
for which the processor stops and fetches it anew. So exits within the page are linked at once to what is translated
already, and what a block goes on with unless a conditional jump is taken is translated before it runs: an eighth more
blocks in a boot of Linux, of which none was slower. In 64-bit mode only.
"""

import cython
from cython.cimports.vmonty.cpu.codecache import CodeCache, Link, block_find, link_to
from cython.cimports.vmonty.cpu.translate import cache_full, translate_block


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _is_within(target: uint64_t) -> cython.int:
    """Tell whether the instruction there surely ends in its page: the fetch of another one may fault."""
    return (target & 0xFFF) <= 4096 - 15


def look_ahead(s, b, page, first):
    """Link the block's exits, and translate what follows it."""
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    e: cython.pointer(Link)
    t: cython.pointer(Block) = b
    n: uint32_t
    last: uint32_t
    why: cython.int = 0
    ahead: cython.int = 0
    while t != cython.NULL:
        b = t
        t = cython.NULL
        last = c.links_used
        for n in range(first, last):
            e = cython.address(c.links[n])
            if e.cross_page:
                continue
            t = block_find(c, e.target, e.target, ~cython.cast(uint64_t, 0), b.host_page, b.key)
            if t != cython.NULL:
                if not t.host_page2:
                    link_to(s, n, t)
                t = cython.NULL
            elif n == last - 1 and last - first <= 2 and ahead < AHEAD and _is_within(e.target) and not cache_full(c):
                t = translate_block(s, e.target, page, 0, 0, cython.address(why))
                if t != cython.NULL and not t.host_page2:
                    link_to(s, n, t)
                ahead += 1
        first = last
