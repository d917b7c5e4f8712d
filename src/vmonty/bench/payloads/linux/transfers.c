// A Linux program that moves bytes, for vmonty bench block and net. It says [begin] and [end] around what is measured.
//
//   transfers read|write|randread|randwrite FILE TOTAL BLOCK DEPTH     direct I/O, DEPTH requests in flight
//   transfers send ADDRESS PORT TOTAL                                  one TCP connection to ADDRESS
//   transfers sink PORT TOTAL                                          one TCP connection from outside

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MOST_DEPTH = 64, CHUNK = 256 << 10 };

static void fail(const char *what) {
    perror(what);
    puts("[begin]\n[failed]\n[end]");
    exit(1);
}

static void say(const char *mark) {
    puts(mark);
    fflush(stdout);
}

static uint64_t chance = 0x9E3779B97F4A7C15;

static uint64_t next_random(void) {
    chance ^= chance << 13;
    chance ^= chance >> 7;
    chance ^= chance << 17;
    return chance;
}

static void block(const char *kind, const char *path, uint64_t total, uint64_t size, int depth) {
    int is_write = strstr(kind, "write") != NULL, is_random = strncmp(kind, "rand", 4) == 0;
    int file = open(path, O_RDWR | O_DIRECT);
    if (file < 0) fail(path);
    uint64_t blocks = lseek(file, 0, SEEK_END) / size;
    aio_context_t context = 0;
    if (syscall(SYS_io_setup, depth, &context)) fail("io_setup");
    static struct iocb requests[MOST_DEPTH], *wanted[MOST_DEPTH];
    static struct io_event events[MOST_DEPTH];
    char *memory = aligned_alloc(4096, size * depth);
    if (!memory) fail("memory");
    for (uint64_t at = 0; at < size * depth; at += 8) *(uint64_t *)(memory + at) = next_random();
    uint64_t count = total / size, issued = 0, done = 0;
    int ready = 0;
    for (int i = 0; i < depth; i++) {
        requests[i].aio_fildes = file;
        requests[i].aio_lio_opcode = is_write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
        requests[i].aio_buf = (uintptr_t)(memory + i * size);
        requests[i].aio_nbytes = size;
        wanted[ready++] = &requests[i];
    }
    say("[begin]");
    while (done < count) {
        int n = 0;
        for (; n < ready && issued < count; n++, issued++)
            wanted[n]->aio_offset = (is_random ? next_random() % blocks : issued % blocks) * size;
        for (int at = 0; at < n;) {
            int taken = syscall(SYS_io_submit, context, n - at, wanted + at);
            if (taken <= 0) fail("io_submit");
            at += taken;
        }
        ready = syscall(SYS_io_getevents, context, 1, MOST_DEPTH, events, NULL);
        if (ready <= 0) fail("io_getevents");
        for (int i = 0; i < ready; i++) {
            if (events[i].res != (int64_t)size) fail("a transfer");
            wanted[i] = (struct iocb *)(uintptr_t)events[i].obj;
        }
        done += ready;
    }
    if (is_write && fsync(file)) fail("fsync");
    say("[end]");
}

static void send_all(const char *address, int port, uint64_t total) {
    static char data[CHUNK];
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    int link = socket(AF_INET, SOCK_STREAM, 0);
    if (link < 0 || inet_pton(AF_INET, address, &to.sin_addr) != 1 || connect(link, (void *)&to, sizeof to))
        fail("connect");
    say("[begin]");
    for (uint64_t left = total; left;) {
        ssize_t sent = write(link, data, left < CHUNK ? left : CHUNK);
        if (sent <= 0) fail("write");
        left -= sent;
    }
    // The other side answers when it has everything.
    if (shutdown(link, SHUT_WR) || read(link, data, 1) != 1) fail("the answer");
    say("[end]");
}

static void sink(int port, uint64_t total) {
    static char data[CHUNK];
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(port)};
    int on = 1, door = socket(AF_INET, SOCK_STREAM, 0);
    if (door < 0 || setsockopt(door, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) ||
        bind(door, (void *)&here, sizeof here) || listen(door, 1))
        fail("listen");
    say("[ready]");
    int link = accept(door, NULL, NULL);
    if (link < 0) fail("accept");
    say("[begin]");
    for (uint64_t left = total; left;) {
        ssize_t got = read(link, data, CHUNK);
        if (got <= 0 || (uint64_t)got > left) fail("read");
        left -= got;
    }
    if (write(link, "!", 1) != 1) fail("the answer");
    say("[end]");
}

int main(int argc, char **argv) {
    if (argc == 6 && atoi(argv[5]) > 0 && atoi(argv[5]) <= MOST_DEPTH)
        block(argv[1], argv[2], strtoull(argv[3], NULL, 0), strtoull(argv[4], NULL, 0), atoi(argv[5]));
    else if (argc == 5 && !strcmp(argv[1], "send"))
        send_all(argv[2], atoi(argv[3]), strtoull(argv[4], NULL, 0));
    else if (argc == 4 && !strcmp(argv[1], "sink"))
        sink(atoi(argv[2]), strtoull(argv[3], NULL, 0));
    else
        fail("arguments");
    return 0;
}
