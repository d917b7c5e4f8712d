/* Deflate and regular expressions: what compressors and text tools do. */
#include "payload.h"

/* ---- RFC 1951, both ways in their simplest form: LZ77 with fixed Huffman codes. ------------------------------ */

static u8 *out;
static u32 bits, bit_count;

static void put(u32 value, int count) {
    bits |= value << bit_count;
    bit_count += count;
    while (bit_count >= 8) {
        *out++ = (u8)bits;
        bits >>= 8;
        bit_count -= 8;
    }
}

static u32 reversed(u32 value, int count) {
    u32 r = 0;
    while (count--) {
        r = r << 1 | (value & 1);
        value >>= 1;
    }
    return r;
}

static void put_symbol(u32 s) { /* 3.2.6 */
    if (s < 144)
        put(reversed(0x30 + s, 8), 8);
    else if (s < 256)
        put(reversed(0x190 + s - 144, 9), 9);
    else if (s < 280)
        put(reversed(s - 256, 7), 7);
    else
        put(reversed(0xC0 + s - 280, 8), 8);
}

static const u32 LENGTH_BASE[29] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                    31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
static const u8 LENGTH_BITS[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};

static u32 distance_base(u32 code) { return code < 2 ? 1 + code : 1 + ((2 + (code & 1)) << (code / 2 - 1)); }
static u32 distance_bits(u32 code) { return code < 2 ? 0 : code / 2 - 1; }

static u64 deflate(const u8 *in, u32 size, u8 *to) {
    u32 *head = words;
    out = to;
    bits = bit_count = 0;
    for (u32 i = 0; i < 32768; i++)
        head[i] = 0;
    put(3, 3);
    for (u32 i = 0; i < size;) {
        u32 length = 0, before = 0;
        if (i + 3 <= size) {
            u32 hash = ((in[i] << 16 | in[i + 1] << 8 | in[i + 2]) * 2654435761u) >> 17;
            before = head[hash];
            head[hash] = i + 1;
            if (before && i + 1 - before <= 32768)
                while (length < 258 && i + length < size && in[before - 1 + length] == in[i + length])
                    length++;
        }
        if (length >= 3) {
            u32 code = 28, distance = i + 1 - before, slot = 29;
            while (LENGTH_BASE[code] > length)
                code--;
            while (distance_base(slot) > distance)
                slot--;
            put_symbol(257 + code);
            put(length - LENGTH_BASE[code], LENGTH_BITS[code]);
            put(reversed(slot, 5), 5);
            put(distance - distance_base(slot), distance_bits(slot));
            i += length;
        } else {
            put_symbol(in[i++]);
        }
    }
    put_symbol(256);
    put(0, 7);
    return out - to;
}

static const u8 *in;

static u32 get(int count) {
    u32 value;
    while (bit_count < (u32)count) {
        bits |= (u32)*in++ << bit_count;
        bit_count += 8;
    }
    value = bits & ((1u << count) - 1);
    bits >>= count;
    bit_count -= count;
    return value;
}

static u32 get_symbol(void) {
    u32 code = reversed(get(7), 7);
    if (code < 24)
        return 256 + code;
    code = code << 1 | get(1);
    if (code < 0xC0)
        return code - 0x30;
    if (code < 0xC8)
        return 280 + code - 0xC0;
    return 144 + (code << 1 | get(1)) - 0x190;
}

static u64 inflate(const u8 *from, u8 *to) {
    u8 *at = to;
    in = from;
    bits = bit_count = 0;
    get(3);
    for (;;) {
        u32 s = get_symbol(), length, distance;
        if (s == 256)
            return at - to;
        if (s < 256) {
            *at++ = (u8)s;
            continue;
        }
        length = LENGTH_BASE[s - 257] + get(LENGTH_BITS[s - 257]);
        s = reversed(get(5), 5);
        distance = distance_base(s) + get(distance_bits(s));
        while (length--) {
            *at = at[-(long)distance];
            at++;
        }
    }
}

static void fill_text(u8 *at, u32 size) {
    static const char *const parts[8] = {"the guest ", "page ", "fault", "s at ", "0x7fff", "; ", "exit reason 48\n", "of a vcpu "};
    u32 seed = 11, i = 0;
    while (i < size)
        for (const char *p = parts[next_random(&seed) & 7]; *p && i < size; p++)
            at[i++] = (u8)*p;
}

u64 zlib(u64 repeats) {
    u32 size = 1 << 20;
    u64 sum = 0;
    fill_text(buffer, size);
    while (repeats--) {
        sum += deflate(buffer, size, buffer + (2 << 20));
        sum = sum * 31 + inflate(buffer + (2 << 20), buffer + (4 << 20));
        for (u32 i = 0; i < size; i++)
            if (buffer[i] != buffer[(4 << 20) + i])
                return 0;
    }
    return sum;
}

/* ---- a backtracking matcher: literals, '.', [a-f] as ranges, with * + ? --------------------------------------- */

static int one(const char *p, char c) {
    if (*p == '[')
        return c >= p[1] && c <= p[3];
    return *p == '.' || *p == c;
}

static const char *match(const char *p, const char *s, const char *end) {
    const char *next, *at = s, *found;
    if (!*p)
        return s;
    next = p + (*p == '[' ? 5 : 1);
    if (*next == '*' || *next == '+') {
        while (at < end && one(p, *at))
            at++;
        for (; at >= s + (*next == '+'); at--)
            if ((found = match(next + 1, at, end)))
                return found;
        return 0;
    }
    if (*next == '?') {
        if (s < end && one(p, *s) && (found = match(next + 1, s + 1, end)))
            return found;
        return match(next + 1, s, end);
    }
    return s < end && one(p, *s) ? match(next, s + 1, end) : 0;
}

u64 regex(u64 repeats) {
    static const char *const patterns[3] = {"0x[0-9]?[a-z]+ *s", "e[a-z]*t r[a-z]+ [0-9]+", "[a-z]+ [a-z]+fault"};
    const char *text = (const char *)buffer, *end = text + (64 << 10);
    u64 sum = 0;
    fill_text(buffer, 64 << 10);
    while (repeats--)
        for (int k = 0; k < 3; k++)
            for (const char *s = text; s < end; s++) {
                const char *found = match(patterns[k], s, end);
                if (found)
                    sum += found - s;
            }
    return sum;
}
