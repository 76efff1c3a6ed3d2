/* Messages: reading without trust in lengths, writing into a fixed buffer, packets with fds. */
#ifndef DSEC_WIRE_H
#define DSEC_WIRE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "protocol.h"

/* A cursor; `bad` is set for good by the first field that does not fit, and reads then give zeros. */
struct reader {
    const uint8_t *at, *end;
    int bad;
};

uint32_t take_u32(struct reader *in);
uint64_t take_u64(struct reader *in);
const char *take_string(struct reader *in, uint32_t *length);

struct message {
    uint8_t data[512];
    size_t length;
};

void put_u32(struct message *out, uint32_t value);
void put_u64(struct message *out, uint64_t value);
void put_string(struct message *out, const char *text);

/* What EXEC asks for; the strings point into the body, `argv` and `env` are one allocation. */
struct exec_body {
    uint64_t timeout_ms;
    uint32_t rows, columns; /* of its terminal */
    const char *cwd, *user;
    char **argv, **env;
};

/* 0, or -1 if the body is malformed (then there is nothing to free); free(body->argv) after use. */
int parse_exec_body(struct reader *in, struct exec_body *body);

/* Both retry EINTR.  `pass_fd` -1: none.  receive gives the byte count, 0 at EOF, -1 on error. */
int send_message(int socket, const struct message *out, int pass_fd);
ssize_t receive_packet(int socket, void *buffer, size_t capacity, int fds[PACKET_FDS_MAX], int *fds_count);

#endif
