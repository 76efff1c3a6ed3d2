/* The keeper: a process that holds copies of Python's descriptors, so that nothing sees end of file while Python is dead.
 *
 * It understands nothing of what it keeps.  One Python process is served at a time, and the next waits in the
 * backlog until that one has closed its connection or died (its pidfd says so where a fork of it still
 * holds the connection); what it had sent is read to the end before.  With nobody to serve for
 * `keep_s`, or nothing kept, the keeper ends, and with it, by end of file, the spawner and all its sandboxes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "sandbox.h"

#define SEND_S_MAX 30 /* for a process that neither reads nor dies */

struct kept {
    int fd;
    char *key; /* NULL: nothing here */
};

static struct kept table[KEPT_COUNT_MAX];
static uint32_t kept_count;
static int listener, connection = -1, peer = -1; /* peer: a pidfd */
static uint8_t packet[PACKET_BYTES_MAX];

static void hang_up(void) {
    if (connection >= 0) close(connection);
    if (peer >= 0) close(peer);
    connection = peer = -1;
}

static void serve_connection(int fd) {
    struct ucred who;
    socklen_t length = sizeof who;
    struct timeval patience = {.tv_sec = SEND_S_MAX};
    connection = fd;
    if (fd < 0 || getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &length) < 0) return hang_up();
    peer = (int)syscall(SYS_pidfd_open, who.pid, 0);
    if (peer < 0 || setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience) < 0) hang_up();
}

static void drop(struct kept *item) {
    if (!item->key) return;
    close(item->fd);
    free(item->key);
    item->key = NULL;
    kept_count--;
}

/* Takes the fd out of `fd` if it keeps it.  -1: the message makes no sense. */
static int put_one(struct reader *in, int *fd) {
    uint32_t token = take_u32(in), length;
    const char *key = take_string(in, &length);
    if (in->bad || token >= KEPT_COUNT_MAX || length > KEY_BYTES_MAX) return -1;
    char *copy = strdup(key);
    if (!copy) return -1;
    drop(&table[token]);
    table[token] = (struct kept){*fd, copy};
    kept_count++;
    *fd = -1;
    return 0;
}

static int on_put(struct reader *in, int *fds, int fds_count) {
    uint32_t count = take_u32(in);
    if (in->bad || count != (uint32_t)fds_count) return -1;
    for (int i = 0; i < fds_count; i++)
        if (put_one(in, &fds[i]) < 0) return -1;
    return 0;
}

static int on_drop(struct reader *in) {
    for (uint32_t count = take_u32(in); count > 0; count--) {
        uint32_t token = take_u32(in);
        if (in->bad || token >= KEPT_COUNT_MAX) return -1;
        drop(&table[token]);
    }
    return in->bad ? -1 : 0;
}

static int on_list(void) {
    struct message out;
    for (uint32_t token = 0; token < KEPT_COUNT_MAX; token++) {
        if (!table[token].key) continue;
        out.length = 0;
        put_u32(&out, MSG_KEPT);
        put_u32(&out, token);
        put_string(&out, table[token].key);
        if (send_message(connection, &out, table[token].fd) < 0) return -1;
    }
    out.length = 0;
    put_u32(&out, MSG_SYNCED);
    put_u32(&out, PROTOCOL_VERSION);
    return send_message(connection, &out, -1);
}

static int on_message(void) {
    int fds[PACKET_FDS_MAX], fds_count, result;
    ssize_t length = receive_packet(connection, packet, sizeof packet, fds, &fds_count);
    if (length < 0 && errno == ECONNRESET) return 0; /* it left before it had read all: what it sent is still there */
    if (length <= 0) return -1;
    struct reader in = {packet, packet + length, 0};
    switch (take_u32(&in)) {
    case MSG_PUT: result = on_put(&in, fds, fds_count); break;
    case MSG_DROP: result = on_drop(&in); break;
    case MSG_LIST: result = on_list(); break;
    default: result = -1;
    }
    for (int i = 0; i < fds_count; i++)
        if (fds[i] >= 0) close(fds[i]);
    return result;
}

/* Suspended time counts: who does not come back is gone. */
static int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Waits for the next connection; -1 when there is nothing to wait for, or `keep_s` has passed. */
static int await_connection(int keep_s) {
    int64_t end = now_ms() + (int64_t)keep_s * 1000, left;
    while (kept_count > 0 && (left = end - now_ms()) > 0) {
        struct pollfd ready = {listener, POLLIN, 0};
        if (poll(&ready, 1, left > 60000 ? 60000 : (int)left) <= 0) continue;
        serve_connection(accept4(listener, NULL, NULL, SOCK_CLOEXEC));
        if (connection >= 0) return 0;
    }
    return -1;
}

/* As many files as the host lets us have; Python looks at this limit (prlimit). */
static int raise_limit(void) {
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) < 0) return -1;
    files.rlim_cur = files.rlim_max;
    return setrlimit(RLIMIT_NOFILE, &files);
}

int keeper_main(int listening, int first, int keep_s) {
    prctl(PR_SET_NAME, "dsec-keeper");
    drop_other_files(listening > first ? listening : first);
    listener = listening;
    fcntl(listener, F_SETFD, FD_CLOEXEC);
    fcntl(first, F_SETFD, FD_CLOEXEC);
    /* listen is called here, so that who connects learns our pid */
    if (raise_limit() < 0 || listen(listener, 16) < 0) return 1;
    /* A batch process wakes without pushing its waker aside: a PUT costs the command that it is for nothing. */
    sched_setscheduler(0, SCHED_BATCH, &(struct sched_param){.sched_priority = 0});
    serve_connection(first);
    while (connection >= 0 || await_connection(keep_s) == 0) {
        struct pollfd ready[2] = {{connection, POLLIN, 0}, {peer, POLLIN, 0}};
        if (poll(ready, 2, -1) < 0) continue;
        if (ready[0].revents ? on_message() < 0 : ready[1].revents != 0) hang_up();
    }
    return 0;
}
