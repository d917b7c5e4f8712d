"""From the X Window System's names of keys (keysyms), which VNC viewers send, to a PC keyboard's scan codes.

Source: X11's "keysymdef.h" for the numbers (Latin-1 is itself), IBM's scan code set 1 for the codes; a US layout, as
QEMU's default. Viewers that send scan codes themselves (QEMU's extended key event) need none of it.
"""

from __future__ import annotations

from vmonty.vmm.hw.ps2 import EXTENDED_KEY, KEY_PAUSE

SHIFT_L = 0xFFE1
KEYPAD_DIGITS = range(0xFFB0, 0xFFBA)

# Unshifted and shifted characters of each key, from the scan code that begins the row.
_ROWS = (
    (0x02, "1234567890-=", "!@#$%^&*()_+"),
    (0x10, "qwertyuiop[]", "QWERTYUIOP{}"),
    (0x1E, "asdfghjkl;'`", 'ASDFGHJKL:"~'),
    (0x2B, "\\zxcvbnm,./", "|ZXCVBNM<>?"),
    (0x39, " ", ""),
)  # fmt: skip
_E = EXTENDED_KEY
_NAMED = {
    0xFF08: 0x0E, 0xFF09: 0x0F, 0xFE20: 0x0F, 0xFF0D: 0x1C, 0xFF1B: 0x01, 0xFFFF: _E | 0x53,  # editing
    0xFF50: _E | 0x47, 0xFF51: _E | 0x4B, 0xFF52: _E | 0x48, 0xFF53: _E | 0x4D, 0xFF54: _E | 0x50,  # Home, arrows
    0xFF55: _E | 0x49, 0xFF56: _E | 0x51, 0xFF57: _E | 0x4F, 0xFF63: _E | 0x52,  # pages, End, Insert
    0xFF13: KEY_PAUSE, 0xFF6B: KEY_PAUSE, 0xFF61: _E | 0x37, 0xFF15: 0x54,  # Pause, with Ctrl; Print, with Alt
    0xFF14: 0x46, 0xFF7F: 0x45, 0xFFE5: 0x3A, 0xFF67: _E | 0x5D,
    SHIFT_L: 0x2A, 0xFFE2: 0x36, 0xFFE3: 0x1D, 0xFFE4: _E | 0x1D, 0xFFE9: 0x38, 0xFFEA: _E | 0x38, 0xFE03: _E | 0x38,
    0xFFE7: 0x38, 0xFFE8: _E | 0x38, 0xFFEB: _E | 0x5B, 0xFFEC: _E | 0x5C,  # Meta, Super
    0xFFAA: 0x37, 0xFFAB: 0x4E, 0xFFAD: 0x4A, 0xFFAE: 0x53, 0xFFAF: _E | 0x35, 0xFF8D: _E | 0x1C,  # the keypad
    0xFF95: 0x47, 0xFF97: 0x48, 0xFF9A: 0x49, 0xFF96: 0x4B, 0xFF9D: 0x4C, 0xFF98: 0x4D, 0xFF9C: 0x4F, 0xFF99: 0x50,
    0xFF9B: 0x51, 0xFF9E: 0x52, 0xFF9F: 0x53,
    **dict(zip(KEYPAD_DIGITS, (0x52, 0x4F, 0x50, 0x51, 0x4B, 0x4C, 0x4D, 0x47, 0x48, 0x49), strict=True)),
    **{0xFFBE + number: 0x3B + number for number in range(10)}, 0xFFC8: 0x57, 0xFFC9: 0x58,  # F1 to F12
}  # fmt: skip


def _characters() -> tuple[dict[int, int], frozenset[int]]:
    codes: dict[int, int] = {}
    shifted: set[int] = set()
    for first, plain, upper in _ROWS:
        for number, character in enumerate(plain):
            codes[ord(character)] = first + number
        for number, character in enumerate(upper):
            codes[ord(character)] = first + number
            shifted.add(ord(character))
    return codes, frozenset(shifted)


_CHARACTERS, SHIFTED = _characters()


def scan_code(keysym: int) -> int | None:
    """The key that makes *keysym*, as ``Ps2Keyboard.key`` takes it; None for one that this keyboard lacks."""
    found = _NAMED.get(keysym)
    return _CHARACTERS.get(keysym) if found is None else found


def type_keys(text: str) -> list[tuple[int, bool]]:
    """The presses and releases that write *text*: scan codes, each with whether it goes down.

    Raises ValueError for a character that the US layout lacks; a line's end is Enter.
    """
    events: list[tuple[int, bool]] = []
    shift = _NAMED[SHIFT_L]
    for character in text:
        keysym = {"\n": 0xFF0D, "\t": 0xFF09, "\x1b": 0xFF1B, "\b": 0xFF08}.get(character, ord(character))
        if (code := scan_code(keysym)) is None:
            raise ValueError(f"no key of a US keyboard writes {character!r}")
        held = [(shift, True)] if keysym in SHIFTED else []
        events += [*held, (code, True), (code, False), *((key, False) for key, _ in held)]
    return events
