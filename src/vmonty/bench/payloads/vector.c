/* Memory and floating-point payloads: scalar doubles, SSE, AVX2 with FMA. */
#include "payload.h"

u64 byte_copy(u64 repeats) {
    volatile u8 *to = buffer;
    const u8 *from = buffer + BUFFER_SIZE / 2;
    fill_random(buffer, BUFFER_SIZE, 3);
    for (u64 k = 0; k < repeats; k++)
        for (u64 i = 0; i < BUFFER_SIZE / 2; i++)
            to[i] = (u8)(from[i] + k);
    return buffer[5];
}

u64 memcpy_rep(u64 repeats) {
    fill_random(buffer, BUFFER_SIZE, 3);
    for (u64 k = 0; k < repeats * 100; k++) {
        void *to = buffer, *from = buffer + BUFFER_SIZE / 2;
        u64 count = 1 << 20;
        __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
    }
    return buffer[77];
}

typedef u8 lane16 __attribute__((vector_size(16)));

u64 memcpy_sse(u64 repeats) {
    fill_random(buffer, BUFFER_SIZE, 3);
    for (u64 k = 0; k < repeats * 100; k++) {
        lane16 *to = (lane16 *)buffer, *from = (lane16 *)(buffer + BUFFER_SIZE / 2);
        for (u64 i = 0; i < (1 << 20) / 16; i += 4) {
            lane16 a = from[i], b = from[i + 1], c = from[i + 2], d = from[i + 3];
            to[i] = a, to[i + 1] = b, to[i + 2] = c, to[i + 3] = d;
            __asm__ volatile("" : : : "memory");
        }
    }
    return buffer[99];
}

struct body {
    double x[3], v[3], mass;
};

static double root(double x) {
    __asm__("sqrtsd %0, %0" : "+x"(x));
    return x;
}

u64 nbody(u64 repeats) {
    static const struct body start[5] = {
        {{0, 0, 0}, {0, 0, 0}, 39.5},
        {{4.84, -1.16, -0.1}, {0.6, 2.81, -0.02}, 0.0377},
        {{8.34, 4.12, -0.4}, {-1.01, 1.82, 0.008}, 0.0113},
        {{12.89, -15.11, -0.22}, {1.08, 0.87, -0.01}, 0.0017},
        {{15.38, -25.9, 0.18}, {0.98, 0.6, -0.03}, 0.002},
    };
    struct body b[5];
    double energy = 0;
    for (int i = 0; i < 5; i++)
        b[i] = start[i];
    for (u64 k = 0; k < repeats * 100000; k++) {
        for (int i = 0; i < 5; i++)
            for (int j = i + 1; j < 5; j++) {
                double d[3], square = 0, factor;
                for (int n = 0; n < 3; n++) {
                    d[n] = b[i].x[n] - b[j].x[n];
                    square += d[n] * d[n];
                }
                factor = 0.01 / (square * root(square));
                for (int n = 0; n < 3; n++) {
                    b[i].v[n] -= d[n] * b[j].mass * factor;
                    b[j].v[n] += d[n] * b[i].mass * factor;
                }
            }
        for (int i = 0; i < 5; i++)
            for (int n = 0; n < 3; n++)
                b[i].x[n] += 0.01 * b[i].v[n];
    }
    for (int i = 0; i < 5; i++)
        energy += b[i].mass * (b[i].v[0] * b[i].v[0] + b[i].v[1] * b[i].v[1] + b[i].v[2] * b[i].v[2]);
    return (u64)(energy * 1e9);
}

#define FLOATS 4096
static float left[FLOATS] __attribute__((aligned(64))), right[FLOATS] __attribute__((aligned(64)));
typedef float lane4 __attribute__((vector_size(16)));
typedef float lane8 __attribute__((vector_size(32)));

static void fill_floats(void) {
    for (int i = 0; i < FLOATS; i++) {
        left[i] = (float)(i % 17) * 0.5f;
        right[i] = (float)(i % 13) * 0.25f;
    }
}

u64 dot_sse(u64 repeats) {
    lane4 sum = {0};
    fill_floats();
    for (u64 k = 0; k < repeats * 10000; k++)
        for (int i = 0; i < FLOATS; i += 4)
            sum += *(lane4 *)(left + i) * *(lane4 *)(right + i);
    return (u64)(sum[0] + sum[1] + sum[2] + sum[3]);
}

__attribute__((target("avx2,fma"))) u64 dot_avx2(u64 repeats) {
    lane8 a = {0}, b = {0};
    fill_floats();
    for (u64 k = 0; k < repeats * 10000; k++)
        for (int i = 0; i < FLOATS; i += 16) {
            a = __builtin_ia32_vfmaddps256(*(lane8 *)(left + i), *(lane8 *)(right + i), a);
            b = __builtin_ia32_vfmaddps256(*(lane8 *)(left + i + 8), *(lane8 *)(right + i + 8), b);
        }
    a += b;
    return (u64)(a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7]);
}

__attribute__((target("sse4.2"))) u64 bytes_sse(u64 repeats) {
    lane16 sum = {0}, *at = (lane16 *)buffer;
    u64 total = 0;
    fill_random(buffer, 1 << 20, 21);
    for (u64 k = 0; k < repeats * 20; k++)
        for (u64 i = 0; i < (1 << 20) / 16; i++)
            sum ^= __builtin_shuffle(at[i], at[i] & 15) + (lane16)(at[i] > sum);
    for (int i = 0; i < 16; i++)
        total = total * 31 + sum[i];
    return total;
}
