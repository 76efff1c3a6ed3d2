/* Uids: each spawner claims some, each slot has a range of it, each range a user namespace. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sandbox.h"

/* A bound abstract socket is a lock that the kernel drops with its holder, however that dies. */
static int claim_block(uint32_t block) {
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    int length = snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "dsec-uids-%u", block);
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    socklen_t size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length);
    if (bind(fd, (struct sockaddr *)&name, size) == 0) return fd;
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

int claim_uids(uint32_t slots_count, uint32_t *first_uid) {
    int claims[UID_BLOCKS_COUNT];
    uint32_t needed = (slots_count + UID_BLOCK_SLOTS - 1) / UID_BLOCK_SLOTS, count = 0;
    for (uint32_t block = 0; block < UID_BLOCKS_COUNT; block++) {
        claims[count] = claim_block(block);
        if (claims[count] >= 0) {
            if (++count < needed) continue;
            *first_uid = UID_FIRST + (block + 1 - needed) * UID_BLOCK;
            return 0;
        }
        if (errno != EADDRINUSE) return -1;
        while (count > 0) close(claims[--count]);
    }
    errno = EUSERS;
    return -1;
}

static int write_map(int proc, pid_t pid, const char *file, uint32_t first_uid) {
    char path[64], map[64];
    snprintf(path, sizeof path, "%d/%s", pid, file);
    int length = snprintf(map, sizeof map, "0 %u %u", first_uid, UIDS_MAPPED);
    int fd = openat(proc, path, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    ssize_t count = write(fd, map, (size_t)length);
    int error = errno;
    close(fd);
    errno = error;
    return count == length ? 0 : -1;
}

/* The namespace needs a process to be born and mapped; the fd then keeps it. */
int create_user_namespace(int proc, uint32_t first_uid) {
    struct clone_args args = {.flags = CLONE_NEWUSER, .exit_signal = SIGCHLD};
    pid_t pid = (pid_t)syscall(SYS_clone3, &args, sizeof args);
    if (pid < 0) return -1;
    if (pid == 0)
        for (;;) pause();
    int fd = -1;
    if (write_map(proc, pid, "uid_map", first_uid) == 0 && write_map(proc, pid, "gid_map", first_uid) == 0) {
        char path[64];
        snprintf(path, sizeof path, "%d/ns/user", pid);
        fd = openat(proc, path, O_RDONLY | O_CLOEXEC);
    }
    int error = errno;
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    errno = error;
    return fd;
}
