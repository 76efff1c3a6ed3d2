/* Uids: each spawner claims some, each slot has a range of it, each range a user namespace. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/securebits.h>
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
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

/* What is counted for each user (inotify's instances and watches, pending signals, locked memory) is counted for
 * each user inside, and then for the namespace's creator outside.  So the creator is the sandbox's own guest uid and
 * not root, whose share one sandbox could otherwise take from the host and from all others.  A limit written to
 * the namespace would not do: it holds for each of its 65,535 users, and their sum would still be root's.
 *
 * Capabilities are kept, for hosts that let root alone make user namespaces.  Says a byte when it is there, and stays
 * until the other end is closed. */
static _Noreturn void hold_user_namespace(int other, uid_t owner) {
    char byte = 0;
    if (prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP) < 0) _exit(errno);
    if (setresuid((uid_t)-1, owner, (uid_t)-1) < 0 || unshare(CLONE_NEWUSER) < 0) _exit(errno);
    if (write(other, &byte, 1) != 1) _exit(errno);
    _exit(read(other, &byte, 1) < 0 ? errno : 0);
}

static int map_user_namespace(int proc, pid_t pid, uint32_t first_uid) {
    char path[64];
    snprintf(path, sizeof path, "%d/ns/user", pid);
    if (write_map(proc, pid, "uid_map", first_uid) < 0 || write_map(proc, pid, "gid_map", first_uid) < 0) return -1;
    return openat(proc, path, O_RDONLY | O_CLOEXEC);
}

/* The namespace needs a process to be born and mapped; the fd then keeps it. */
int create_user_namespace(int proc, uint32_t first_uid) {
    int ends[2], status = 0, fd = -1;
    char byte;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0) return -1;
    pid_t pid = fork();
    if (pid == 0) {
        close(ends[0]); /* else it would wait for itself if we die */
        hold_user_namespace(ends[1], first_uid + GUEST_UID);
    }
    int error = errno;
    close(ends[1]);
    int is_there = pid > 0 && read(ends[0], &byte, 1) == 1;
    if (is_there) {
        fd = map_user_namespace(proc, pid, first_uid);
        error = errno;
    }
    close(ends[0]);
    if (pid > 0) waitpid(pid, &status, 0);
    errno = pid < 0 || is_there ? error : WIFEXITED(status) && WEXITSTATUS(status) ? WEXITSTATUS(status) : EIO;
    return fd;
}
