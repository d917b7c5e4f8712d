/* What the benchmark payloads share. Each payload is a function of a repeat count that gives a checksum; they run
 * without a C library, natively, on vmonty's CPU and in QEMU alike. */
#pragma once
#include <stdint.h>

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;

#define BUFFER_SIZE (8u << 20)
#define WORDS (2u << 20)

extern u8 buffer[BUFFER_SIZE];
extern u32 words[WORDS];

/* A linear congruential generator: reproducible everywhere. */
static inline u32 next_random(u32 *seed) {
    *seed = *seed * 1664525u + 1013904223u;
    return *seed >> 8;
}

static inline void fill_random(u8 *at, u64 size, u32 seed) {
    for (u64 i = 0; i < size; i++)
        at[i] = (u8)next_random(&seed);
}
