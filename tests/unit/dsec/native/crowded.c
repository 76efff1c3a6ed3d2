/* crowded DIRECTORY: why a clone that always fails with EAGAIN is refused, beside the pids files there. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>

#include "guest.h"
#include "seccomp.h"

static int attempts;

pid_t guest_clone3(struct clone_args *args, uint64_t args_bytes) {
    (void)args, (void)args_bytes;
    attempts++;
    errno = EAGAIN;
    return -1;
}

void forget_clone3_key(void) {}

int main(int argc, char **argv) {
    int directory = argc == 2 ? open(argv[1], O_RDONLY | O_DIRECTORY) : -1;
    if (directory < 0) return 2;
    open_groups(directory);
    struct exec_group group = {.directory = directory};
    struct launch what = {.group = &group};
    struct refusal refusal;
    int status;
    if (launch(&what, &status, &refusal) != -1 || refusal.error != EAGAIN) return 1;
    printf("%s %d\n", refusal.stage == STAGE_CROWDED ? "crowded" : "host", attempts);
    return 0;
}
