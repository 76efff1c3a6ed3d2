/* dsec-sandbox spawner FD: serve the control socket FD until its other end is closed. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sandbox.h"

int main(int argc, char **argv) {
    if (argc != 3 || strcmp(argv[1], "spawner") != 0) {
        fprintf(stderr, "usage: dsec-sandbox spawner FD   (started by the dsec Python package, see protocol.h)\n");
        return 2;
    }
    int control = atoi(argv[2]);
    remember_title(argv[0], argv[argc - 1] + strlen(argv[argc - 1]));
    return spawner_main(control);
}
