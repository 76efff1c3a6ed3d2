/* See wire.h. */
#define _GNU_SOURCE
#include "wire.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

static const uint8_t *take(struct reader *in, size_t count) {
    if (in->bad || (size_t)(in->end - in->at) < count) {
        in->bad = 1;
        return NULL;
    }
    const uint8_t *start = in->at;
    in->at += count;
    return start;
}

uint32_t take_u32(struct reader *in) {
    uint32_t value = 0;
    const uint8_t *start = take(in, sizeof value);
    if (start) memcpy(&value, start, sizeof value);
    return value;
}

uint64_t take_u64(struct reader *in) {
    uint64_t value = 0;
    const uint8_t *start = take(in, sizeof value);
    if (start) memcpy(&value, start, sizeof value);
    return value;
}

const char *take_string(struct reader *in, uint32_t *length) {
    uint32_t count = take_u32(in);
    const uint8_t *start = take(in, (size_t)count + 1);
    if (start && start[count] != 0) in->bad = 1;
    if (in->bad) {
        if (length) *length = 0;
        return "";
    }
    if (length) *length = count;
    return (const char *)start;
}

static void put(struct message *out, const void *data, size_t count) {
    if (sizeof out->data - out->length < count) abort(); /* a bug: our own messages are short */
    memcpy(out->data + out->length, data, count);
    out->length += count;
}

void put_u32(struct message *out, uint32_t value) {
    put(out, &value, sizeof value);
}

void put_u64(struct message *out, uint64_t value) {
    put(out, &value, sizeof value);
}

void put_string(struct message *out, const char *text) {
    size_t count = strnlen(text, 256);
    put_u32(out, (uint32_t)count);
    put(out, text, count);
    put(out, "", 1);
}

/* Points `vector` (or only counts, if NULL) at `count` strings without inner zeros. */
static void take_strings(struct reader *in, uint32_t count, char **vector) {
    for (uint32_t i = 0; i < count && !in->bad; i++) {
        uint32_t length;
        const char *text = take_string(in, &length);
        if (strlen(text) != length) in->bad = 1;
        if (vector) vector[i] = (char *)text;
    }
}

int parse_exec_body(struct reader *in, struct exec_body *body) {
    body->timeout_ms = take_u64(in);
    body->rows = take_u32(in);
    body->columns = take_u32(in);
    body->cwd = take_string(in, NULL);
    body->user = take_string(in, NULL);
    struct reader first = *in;
    uint32_t argc = take_u32(&first);
    take_strings(&first, argc, NULL);
    uint32_t envc = take_u32(&first);
    take_strings(&first, envc, NULL);
    if (first.bad || first.at != first.end || argc == 0) return -1;
    char **vector = calloc((size_t)argc + envc + 2, sizeof *vector);
    if (!vector) return -1;
    take_u32(in);
    take_strings(in, argc, vector);
    take_u32(in);
    take_strings(in, envc, vector + argc + 1);
    body->argv = vector;
    body->env = vector + argc + 1;
    return 0;
}

union fds_buffer {
    struct cmsghdr header;
    char space[CMSG_SPACE(PACKET_FDS_MAX * sizeof(int))];
};

int send_message(int socket, const struct message *out, int pass_fd) {
    struct iovec part = {(void *)out->data, out->length};
    union fds_buffer control = {0};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
    if (pass_fd >= 0) {
        header.msg_control = &control;
        header.msg_controllen = CMSG_SPACE(sizeof(int));
        struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(rights), &pass_fd, sizeof(int));
    }
    ssize_t sent;
    do sent = sendmsg(socket, &header, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? -1 : 0;
}

ssize_t receive_packet(int socket, void *buffer, size_t capacity, int fds[PACKET_FDS_MAX], int *fds_count) {
    struct iovec part = {buffer, capacity};
    union fds_buffer control;
    struct msghdr header = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t count;
    do count = recvmsg(socket, &header, MSG_CMSG_CLOEXEC);
    while (count < 0 && errno == EINTR);
    *fds_count = 0;
    if (count < 0) return -1;
    for (struct cmsghdr *item = CMSG_FIRSTHDR(&header); item; item = CMSG_NXTHDR(&header, item)) {
        if (item->cmsg_level != SOL_SOCKET || item->cmsg_type != SCM_RIGHTS) continue;
        *fds_count = (int)((item->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(fds, CMSG_DATA(item), (size_t)*fds_count * sizeof(int));
    }
    return count;
}
