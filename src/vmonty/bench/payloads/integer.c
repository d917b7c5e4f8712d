/* Integer payloads. */
#include "payload.h"

u8 buffer[BUFFER_SIZE] __attribute__((aligned(4096)));
u32 words[WORDS] __attribute__((aligned(4096)));

u64 alu(u64 repeats) {
    u64 a = 1, b = 2, c = 3;
    for (u64 i = 0; i < repeats * 100000000; i++) {
        a += b ^ i;
        b = (b << 3) | (b >> 61);
        c -= a & b;
    }
    return a + b + c;
}

u64 sieve(u64 repeats) {
    u64 sum = 0;
    while (repeats--) {
        for (u64 i = 0; i < BUFFER_SIZE; i++)
            buffer[i] = 1;
        for (u64 i = 2; i * i < BUFFER_SIZE; i++)
            if (buffer[i])
                for (u64 j = i * i; j < BUFFER_SIZE; j += i)
                    buffer[j] = 0;
        for (u64 i = 2; i < BUFFER_SIZE; i++)
            sum += buffer[i];
    }
    return sum;
}

static void quicksort(u32 *a, long low, long high) {
    while (low < high) {
        u32 pivot = a[(low + high) / 2];
        long i = low, j = high;
        while (i <= j) {
            while (a[i] < pivot)
                i++;
            while (a[j] > pivot)
                j--;
            if (i <= j) {
                u32 t = a[i];
                a[i++] = a[j];
                a[j--] = t;
            }
        }
        if (j - low < high - i) {
            quicksort(a, low, j);
            low = i;
        } else {
            quicksort(a, i, high);
            high = j;
        }
    }
}

u64 qsort_8mb(u64 repeats) {
    u64 sum = 0;
    while (repeats--) {
        u32 seed = 1;
        for (u32 i = 0; i < WORDS; i++)
            words[i] = next_random(&seed);
        quicksort(words, 0, WORDS - 1);
        for (u32 i = 0; i < WORDS; i += 997)
            sum = sum * 31 + words[i];
    }
    return sum;
}

__attribute__((noinline)) static u64 fibonacci(u64 n) {
    __asm__ volatile("");
    return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2);
}

u64 fib(u64 repeats) {
    u64 sum = 0;
    while (repeats--)
        sum += fibonacci(32);
    return sum;
}

u64 crc32(u64 repeats) {
    u32 table[256], crc = ~0u;
    for (u32 i = 0; i < 256; i++) {
        u32 c = i;
        for (int k = 0; k < 8; k++)
            c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
        table[i] = c;
    }
    fill_random(buffer, BUFFER_SIZE, 5);
    while (repeats--)
        for (u64 i = 0; i < BUFFER_SIZE; i++)
            crc = table[(crc ^ buffer[i]) & 255] ^ (crc >> 8);
    return crc;
}

/* FIPS 180-4, 4.2.2: the cube roots of the first 64 primes. */
static const u32 K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static inline u32 ror(u32 x, int n) { return (x >> n) | (x << (32 - n)); }

static void sha256_block(u32 *h, const u8 *data) {
    u32 w[64], v[8];
    for (int i = 0; i < 16; i++)
        w[i] = __builtin_bswap32(((const u32 *)data)[i]);
    for (int i = 16; i < 64; i++)
        w[i] = w[i - 16] + w[i - 7] + (ror(w[i - 15], 7) ^ ror(w[i - 15], 18) ^ (w[i - 15] >> 3)) +
               (ror(w[i - 2], 17) ^ ror(w[i - 2], 19) ^ (w[i - 2] >> 10));
    for (int i = 0; i < 8; i++)
        v[i] = h[i];
    for (int i = 0; i < 64; i++) {
        u32 t1 = v[7] + (ror(v[4], 6) ^ ror(v[4], 11) ^ ror(v[4], 25)) + ((v[4] & v[5]) ^ (~v[4] & v[6])) + K[i] + w[i];
        u32 t2 = (ror(v[0], 2) ^ ror(v[0], 13) ^ ror(v[0], 22)) + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        v[7] = v[6], v[6] = v[5], v[5] = v[4], v[4] = v[3] + t1;
        v[3] = v[2], v[2] = v[1], v[1] = v[0], v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++)
        h[i] += v[i];
}

u64 sha256(u64 repeats) {
    u32 h[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    fill_random(buffer, BUFFER_SIZE, 6);
    while (repeats--)
        for (u64 at = 0; at < BUFFER_SIZE; at += 64)
            sha256_block(h, buffer + at);
    return h[0] ^ ((u64)h[7] << 32);
}

u64 lz_match(u64 repeats) {
    u32 *head = words, seed = 7;
    u64 size = 1 << 20, matched = 0;
    for (u64 i = 0; i < size; i++)
        buffer[i] = "abcdefgh"[next_random(&seed) % (1 + (i >> 12) % 8)];
    while (repeats--) {
        for (int i = 0; i < 65536; i++)
            head[i] = 0;
        for (u32 i = 0; i < size - 300; i++) {
            u32 hash = (buffer[i] * 2654435761u ^ buffer[i + 1] * 40503u ^ buffer[i + 2] * 77u) & 65535;
            u32 before = head[hash], length = 0;
            head[hash] = i;
            if (before && i - before < 32768) {
                while (length < 258 && buffer[before + length] == buffer[i + length])
                    length++;
                matched += length;
            }
        }
    }
    return matched;
}

static u64 plus(u64 x) { return x + 1; }
static u64 flip(u64 x) { return x ^ 3; }
static u64 times(u64 x) { return x * 5; }
static u64 minus(u64 x) { return x - 7; }

u64 indirect_calls(u64 repeats) {
    u64 (*volatile table[4])(u64) = {plus, flip, times, minus};
    u64 x = 0;
    u32 r = 1;
    for (u64 i = 0; i < repeats * 10000000; i++) {
        r = r * 1103515245u + 12345;
        x = table[(r >> 16) & 3](x);
    }
    return x;
}

u64 pointer_chase(u64 repeats) {
    u32 count = 1 << 20, seed = 3, at = 0;
    for (u32 i = 0; i < count; i++)
        words[i] = i;
    for (u32 i = count - 1; i > 0; i--) { /* Sattolo: one cycle through all */
        u32 j = next_random(&seed) % i, t = words[i];
        words[i] = words[j];
        words[j] = t;
    }
    for (u64 i = 0; i < repeats * 1000000; i++)
        at = words[at];
    return at;
}

struct node {
    struct node *left, *right;
    u32 key;
};

u64 tree(u64 repeats) {
    struct node *pool = (struct node *)buffer, *root;
    u32 count = 100000, seed;
    u64 sum = 0;
    while (repeats--) {
        root = 0;
        seed = 9;
        for (u32 i = 0; i < count; i++) {
            struct node **at = &root, *n = pool + i;
            n->left = n->right = 0;
            n->key = next_random(&seed);
            while (*at)
                at = n->key < (*at)->key ? &(*at)->left : &(*at)->right;
            *at = n;
        }
        seed = 9;
        for (u32 i = 0; i < count; i++) {
            u32 key = next_random(&seed);
            struct node *n = root;
            while (n && n->key != key)
                n = key < n->key ? n->left : n->right;
            sum += n->key;
        }
    }
    return sum;
}
