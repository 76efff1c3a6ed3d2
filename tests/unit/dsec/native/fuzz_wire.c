/* Feeds random and damaged bodies of EXEC to the parser; sanitizers say what is wrong with it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "wire.h"

static uint64_t state = 88172645463325252ULL;

static uint32_t next(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)state;
}

static size_t put_text(uint8_t *at, const char *text) {
    uint32_t length = (uint32_t)strlen(text);
    memcpy(at, &length, 4);
    memcpy(at + 4, text, length + 1);
    return 4 + length + 1;
}

static size_t well_formed(uint8_t *at) {
    static const uint32_t counts[] = {3, 2};
    size_t used = 16; /* the time and the terminal's size */
    memset(at, 1, used);
    used += put_text(at + used, "/tmp");
    used += put_text(at + used, "agent");
    for (int list = 0; list < 2; list++) {
        memcpy(at + used, &counts[list], 4);
        used += 4;
        for (uint32_t i = 0; i < counts[list]; i++) used += put_text(at + used, i ? "A=b" : "");
    }
    return used;
}

int main(void) {
    long accepted = 0;
    for (int round = 0; round < 300000; round++) {
        uint8_t base[256];
        size_t length = well_formed(base);
        for (uint32_t damage = next() % 4; damage > 0; damage--) base[next() % length] = (uint8_t)next();
        if (next() % 4 == 0) length = next() % length;
        uint8_t *exact = malloc(length + 1); /* its end is guarded */
        memcpy(exact, base, length);
        struct reader in = {exact, exact + length, 0};
        struct exec_body body;
        if (parse_exec_body(&in, &body) == 0) {
            size_t total = strlen(body.cwd) + strlen(body.user);
            for (char **at = body.argv; *at; at++) total += strlen(*at);
            for (char **at = body.env; *at; at++) total += strlen(*at);
            accepted += total < 4096;
            free(body.argv);
        }
        free(exact);
    }
    printf("%ld\n", accepted);
    return accepted > 1000 && accepted < 299000 ? 0 : 1;
}
