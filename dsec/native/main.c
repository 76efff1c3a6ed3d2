/* The roles: dsec-sandbox spawner FD serves the control socket FD until its other end is closed; dsec-sandbox
 * keeper LISTENER CONNECTION SECONDS holds descriptors for a Python process and its successors; dsec-sandbox guest SOCKET
 * is pid 1 of a container that somebody else made; called as toolbox, it is that (toolbox.h). */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "sandbox.h"
#include "toolbox.h"

void drop_other_files(int last) {
    syscall(SYS_close_range, (unsigned)last + 1, ~0U, 0);
}

int main(int argc, char **argv, char **env) {
    const char *slash = strrchr(argv[0], '/');
    if (strcmp(slash ? slash + 1 : argv[0], "toolbox") == 0) return toolbox_main(argv, env);
    if (argc == 3) remember_title(argv[0], argv[argc - 1] + strlen(argv[argc - 1]));
    if (argc == 3 && strcmp(argv[1], "spawner") == 0) return spawner_main(atoi(argv[2]));
    if (argc == 5 && strcmp(argv[1], "keeper") == 0) return keeper_main(atoi(argv[2]), atoi(argv[3]), atoi(argv[4]));
    if (argc == 3 && strcmp(argv[1], "guest") == 0) return docker_main(argv[2]);
    fprintf(stderr, "usage: dsec-sandbox spawner FD   (started by the dsec Python package, see protocol.h)\n");
    return 2;
}
