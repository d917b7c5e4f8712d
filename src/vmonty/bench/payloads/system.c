/* What an operating system does all day, as payloads for a bare machine; and the main program there. */
#include "payload.h"

typedef u64 payload(u64);
extern payload *const payload_table[];
u64 user_call(payload *, u64);
extern char syscall_entry[], page_fault_entry[];

/* ---- the machine ----------------------------------------------------------------------------------------------- */

static inline void out8(u32 port, u8 value) { __asm__ volatile("outb %0, %w1" : : "a"(value), "d"(port)); }
static inline void write_msr(u32 index, u64 value) {
    __asm__ volatile("wrmsr" : : "c"(index), "a"((u32)value), "d"((u32)(value >> 32)));
}
static inline u64 read_cr3(void) {
    u64 value;
    __asm__ volatile("mov %%cr3, %0" : "=r"(value));
    return value;
}
static inline void write_cr3(u64 value) { __asm__ volatile("mov %0, %%cr3" : : "r"(value) : "memory"); }

enum { LSTAR = 0xC0000082, STAR = 0xC0000081, FMASK = 0xC0000084, DEBUG_PORT = 0xE9 };

static u64 idt[2 * 32] __attribute__((aligned(16)));
static u64 page_table[512] __attribute__((aligned(4096))), directory[512] __attribute__((aligned(4096)));
static u64 other_root[512] __attribute__((aligned(4096)));
#define WINDOW 0x40000000ul

static void set_up(void) {
    struct __attribute__((packed)) { unsigned short limit; u64 base; } pointer = {sizeof idt - 1, (u64)idt};
    u64 handler = (u64)page_fault_entry, *root = (u64 *)read_cr3();
    idt[28] = (handler & 0xFFFF) | 8ul << 16 | 0x8E00ul << 32 | (handler >> 16 & 0xFFFF) << 48;
    idt[29] = handler >> 32;
    __asm__ volatile("lidt %0" : : "m"(pointer));
    write_msr(STAR, 0x0010ul << 48 | 0x0008ul << 32);
    write_msr(LSTAR, (u64)syscall_entry);
    write_msr(FMASK, 0x700);
    ((u64 *)(root[0] & ~0xFFFul))[1] = (u64)directory | 7;
    directory[0] = (u64)page_table | 7;
    for (int i = 0; i < 512; i++)
        other_root[i] = root[i];
}

/* ---- payloads -------------------------------------------------------------------------------------------------- */

static u64 system_call_count;

void null_system_call(void) { system_call_count++; }

static u64 calls_in_user(u64 count) {
    for (u64 i = 0; i < count; i++) {
        u64 number = 0;
        __asm__ volatile("syscall" : "+a"(number) : : "rcx", "r11", "rdi", "rsi", "rdx", "r8", "r9", "r10", "memory");
    }
    return system_call_count;
}

u64 system_calls(u64 repeats) {
    system_call_count = 0;
    return user_call(calls_in_user, repeats * 100000);
}

u64 context_switches(u64 repeats) {
    u64 first = read_cr3(), second = (u64)other_root, sum = 0;
    for (u64 i = 0; i < repeats * 10000; i++) {
        write_cr3(i & 1 ? first : second);
        for (u32 page = 0; page < 16; page++)
            sum += buffer[page << 12]++;
    }
    write_cr3(first);
    return sum;
}

void map_page(u64 address) {
    page_table[(address >> 12) & 511] = ((u64)buffer + (address & 0x1FF000)) | 7;
}

static u64 touch(u64 repeats) {
    u64 sum = 0;
    for (u32 page = 0; page < 512; page++)
        sum += *(volatile u8 *)(WINDOW + (page << 12)) += (u8)repeats;
    return sum;
}

static u64 fault(u64 repeats, u64 (*run)(u64)) {
    u64 sum = 0;
    while (repeats--) {
        for (int i = 0; i < 512; i++)
            page_table[i] = 0;
        write_cr3(read_cr3());
        sum += run(repeats);
    }
    return sum;
}

static u64 touch_in_user(u64 repeats) { return user_call(touch, repeats); }

u64 page_faults(u64 repeats) { return fault(repeats * 20, touch); }
u64 page_faults_user(u64 repeats) { return fault(repeats * 20, touch_in_user); }

/* ---- on a bare machine: "index repeats" on the command line; S, then E and the checksum, on the debug port; HLT -- */

static u64 number(const char **at) {
    u64 value = 0;
    while (**at && (**at < '0' || **at > '9'))
        ++*at;
    while (**at >= '0' && **at <= '9')
        value = value * 10 + (u64)(*(*at)++ - '0');
    return value;
}

void guest_main(const u32 *multiboot) {
    const char *line = (const char *)(u64)multiboot[4];
    u64 index, repeats, sum;
    for (const char *space = line; *space; space++) /* QEMU puts the file's name in front */
        if (*space == ' ' && space[1] >= '0' && space[1] <= '9') {
            line = space;
            break;
        }
    index = number(&line);
    repeats = number(&line);
    set_up();
    out8(DEBUG_PORT, 'S');
    sum = payload_table[index](repeats);
    out8(DEBUG_PORT, 'E');
    for (int shift = 60; shift >= 0; shift -= 4)
        out8(DEBUG_PORT, (u8)"0123456789abcdef"[sum >> shift & 15]);
}
