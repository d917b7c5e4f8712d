// A Multiboot kernel whose screen is a text console that scrolls: 1024x768, a new line thirty times a second.
#include <stdint.h>

enum { WIDTH = 1024, HEIGHT = 768, CELL = 16, RATE = 30, LETTERS = 64 };

__attribute__((section(".multiboot"), used)) static const uint32_t header[] = {0x1BADB002, 0, -0x1BADB002};

static volatile uint32_t ticks;
static uint64_t gates[256];
static uint16_t font[LETTERS][CELL];
__attribute__((used, aligned(16))) static uint8_t stack[4096];

static void out8(uint16_t port, uint8_t value) { asm volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static void out16(uint16_t port, uint16_t value) { asm volatile("outw %0, %1" ::"a"(value), "Nd"(port)); }
static void out32(uint16_t port, uint32_t value) { asm volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }

static uint32_t in32(uint16_t port) {
    uint32_t value;
    asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static uint32_t pci_read(uint32_t slot, uint32_t at) {
    out32(0xCF8, 0x80000000 | slot << 11 | at);
    return in32(0xCFC);
}

static void dispi(uint16_t index, uint16_t value) {
    out16(0x1CE, index);
    out16(0x1CF, value);
}

asm("tick: incl ticks; pushl %eax; movb $0x20, %al; outb %al, $0x20; popl %eax; iretl");
extern void tick(void);

static void start_clock(void) {
    uint16_t code;
    asm volatile("mov %%cs, %0" : "=r"(code));
    uint32_t address = (uint32_t)tick;
    gates[0x20] = (address & 0xFFFF) | (uint32_t)code << 16 | (uint64_t)(0x8E00 | (address & 0xFFFF0000)) << 32;
    struct { uint16_t limit; uint32_t base; } __attribute__((packed)) table = {sizeof gates - 1, (uint32_t)gates};
    asm volatile("lidt %0" ::"m"(table));
    static const uint8_t words[][2] = {{0x20, 0x11}, {0x21, 0x20}, {0x21, 4}, {0x21, 1}, {0x21, 0xFE}, {0xA1, 0xFF}};
    for (unsigned n = 0; n < sizeof words / 2; n++)
        out8(words[n][0], words[n][1]);
    out8(0x43, 0x34);
    out8(0x40, (1193182 / RATE) & 0xFF);
    out8(0x40, (1193182 / RATE) >> 8);
    asm volatile("sti");
}

// Shapes as dense as letters: strokes of two pixels.
static void make_font(void) {
    uint32_t seed = 1;
    for (unsigned letter = 1; letter < LETTERS; letter++)
        for (unsigned line = 3; line < 13; line++) {
            if (line % 3 == 0)
                seed = seed * 1664525 + 1013904223;
            font[letter][line] = (seed >> 24 & 0x33) | (line % 3 ? 0 : seed >> 16 & 0x7E);
        }
}

static void draw_line(uint32_t *at) {
    static uint32_t seed = 7;
    for (unsigned column = 0; column < WIDTH / 8; column++) {
        seed = seed * 1664525 + 1013904223;
        // One letter in six is a space, and lines end where they end.
        uint16_t *shape = font[column > (seed >> 4 & 127) + 64 || seed >> 29 == 0 ? 0 : seed >> 16 & (LETTERS - 1)];
        for (unsigned line = 0; line < CELL; line++)
            for (unsigned x = 0; x < 8; x++)
                at[line * WIDTH + 8 * column + x] = shape[line] >> x & 1 ? 0xAAAAAA : 0;
    }
}

__attribute__((used)) static void work(void) {
    uint32_t *frame = 0;
    for (uint32_t slot = 0; slot < 32; slot++)
        if (pci_read(slot, 0) == 0x11111234)
            frame = (uint32_t *)(pci_read(slot, 0x10) & ~15u);
    dispi(4, 0);
    dispi(1, WIDTH);
    dispi(2, HEIGHT);
    dispi(3, 32);
    dispi(4, 0x41);
    asm volatile("movw $0x3DA, %%dx; inb %%dx, %%al" ::: "eax", "edx");
    out8(0x3C0, 0x20);  // the attribute controller shows the screen
    make_font();
    for (unsigned row = 0; row < HEIGHT / CELL; row++)
        draw_line(frame + row * CELL * WIDTH);
    start_clock();
    out8(0x3F8, '!');
    for (uint32_t shown = 0;;) {
        if (shown == ticks) {
            asm volatile("hlt");
            continue;
        }
        shown++;
        void *to = frame, *from = frame + CELL * WIDTH;
        uint32_t count = (HEIGHT - CELL) * WIDTH;
        asm volatile("rep movsl" : "+D"(to), "+S"(from), "+c"(count)::"memory");
        draw_line(frame + (HEIGHT - CELL) * WIDTH);
    }
}

// The loader's descriptor table may be gone: one of our own, for interrupts to return to.
asm(".globl _start\n_start: movl $stack + 4096, %esp; lgdt table; ljmp $8, $1f; 1: movl $16, %eax; movl %eax, %ds;"
    "movl %eax, %es; movl %eax, %ss; call work\n"
    ".balign 8\nentries: .quad 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF\ntable: .word 23; .long entries");
