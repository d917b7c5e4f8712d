"""What changed between two pictures of four bytes a pixel: tiles, and how far lines were scrolled.

Fenced: it works on raw pointers, after a check that both pictures have the size that the caller says.
"""

from __future__ import annotations

import cython

TILE = (TILE_WIDTH, TILE_HEIGHT)


def changed_tiles(before, after, width, height):  # type: ignore[no-untyped-def]
    """For each row of tiles (64 by 16 pixels) a number whose bit *n* says that the *n*-th tile of it differs."""
    old: cython.const[cython.uchar][::1] = before
    new: cython.const[cython.uchar][::1] = after
    across: cython.int = width
    down: cython.int = height
    if across <= 0 or down <= 0 or min(old.shape[0], new.shape[0]) < 4 * across * down:
        raise ValueError("a picture is smaller than its size says")
    first: cython.pointer[cython.const[uint8_t]] = cython.address(old[0])
    second: cython.pointer[cython.const[uint8_t]] = cython.address(new[0])
    stride: cython.size_t = cython.cast(cython.size_t, across) * 4
    y: cython.int
    x: cython.int
    line: cython.int
    found = []
    for y in range(0, down, TILE_HEIGHT):
        mask = 0
        lines: cython.int = min(TILE_HEIGHT, down - y)
        if memcmp(first + y * stride, second + y * stride, lines * stride) != 0:
            for x in range(0, across, TILE_WIDTH):
                size: cython.size_t = 4 * min(TILE_WIDTH, across - x)
                for line in range(lines):
                    place: cython.size_t = (y + line) * stride + 4 * cython.cast(cython.size_t, x)
                    if memcmp(first + place, second + place, size) != 0:
                        mask |= 1 << x // TILE_WIDTH
                        break
        found.append(mask)
    return found


def _hash_line(line, size):  # type: ignore[no-untyped-def]
    """Four sums side by side, as one would wait for each multiplication."""
    words: cython.pointer[cython.const[uint64_t]] = cython.cast(cython.pointer[cython.const[uint64_t]], line)
    prime: uint64_t = 0x100000001B3
    one: uint64_t = 0x9E3779B9
    two: uint64_t = 1
    three: uint64_t = 2
    four: uint64_t = 3
    at: cython.size_t = 0
    end: cython.size_t = size // 8
    while at + 4 <= end:
        one = (one ^ words[at]) * prime
        two = (two ^ words[at + 1]) * prime
        three = (three ^ words[at + 2]) * prime
        four = (four ^ words[at + 3]) * prime
        at += 4
    while at < end:
        one = (one ^ words[at]) * prime
        at += 1
    if size & 4:
        one = (one ^ cython.cast(cython.pointer[cython.const[uint32_t]], line)[size // 4 - 1]) * prime
    one = ((one ^ two >> 7) * prime ^ three >> 5) * prime ^ four
    return one ^ one >> 29


def find_scroll(before, after, width, height):  # type: ignore[no-untyped-def]
    """The block of whole lines that moved upwards the furthest way down the screen.

    Returns (first line now, lines, how far up), when at least a quarter of all lines moved alike; else None. Lines that
    are all alike, such as empty ones, move nowhere. That the lines are equal is checked, not only their hashes.
    """
    old: cython.const[cython.uchar][::1] = before
    new: cython.const[cython.uchar][::1] = after
    across: cython.int = width
    down: cython.int = height
    if across <= 0 or down <= 0 or min(old.shape[0], new.shape[0]) < 4 * across * down:
        raise ValueError("a picture is smaller than its size says")
    stride: cython.size_t = cython.cast(cython.size_t, across) * 4
    first: cython.pointer[cython.const[uint8_t]] = cython.address(old[0])
    second: cython.pointer[cython.const[uint8_t]] = cython.address(new[0])
    hashes: cython.pointer[uint64_t] = cython.cast(cython.pointer[uint64_t], calloc(2 * down, 8))
    if hashes == cython.NULL:
        raise MemoryError
    y: cython.int
    shift: cython.int
    best_shift: cython.int = 0
    best_first: cython.int = 0
    best_lines: cython.int = 0
    try:
        for y in range(down):
            hashes[y] = _hash_line(first + y * stride, stride)
            hashes[down + y] = _hash_line(second + y * stride, stride)
        for shift in range(1, down // 2):
            run: cython.int = 0
            telling: cython.int = 0
            for y in range(down - shift):
                if hashes[down + y] == hashes[y + shift]:
                    run += 1
                    # A line that is like the one it replaces tells nothing of a movement.
                    telling += hashes[down + y] != hashes[y]
                    if telling * 4 > down and run > best_lines:
                        best_shift, best_first, best_lines = shift, y - run + 1, run
                else:
                    run = telling = 0
        if best_lines == 0:
            return None
        for y in range(best_first, best_first + best_lines):
            if memcmp(second + y * stride, first + (y + best_shift) * stride, stride) != 0:
                return None
        return best_first, best_lines, best_shift
    finally:
        free(hashes)
