/* Network namespaces that outlive their sandbox, to be used by another: making one costs more than all the rest.
 *
 * Nothing of a sandbox can be left in one: no process inside has a capability over it, so that its
 * settings are as they were made, and its sockets died with the processes.  What the kernel keeps for a
 * while is the end of a TCP connection (TIME_WAIT), which holds a port: the next sandbox looks, and
 * makes a namespace of its own if there is a socket of any kind.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "spawner.h"

#define NETWORKS_KEPT_MAX 64

/* Oldest first: it has had the most time to forget its connections. */
static int ring[NETWORKS_KEPT_MAX];
static uint32_t first, count;

void keep_network(int network) {
    if (count == NETWORKS_KEPT_MAX) {
        close(network);
        return;
    }
    ring[(first + count++) % NETWORKS_KEPT_MAX] = network;
}

int take_network(void) {
    if (count == 0) return -1;
    int network = ring[first];
    first = (first + 1) % NETWORKS_KEPT_MAX;
    count--;
    return network;
}

/* "TCP: inuse 0 orphan 0 tw 0 ...": the number behind `field` on the line of `protocol`; 1 where it is not found. */
static long count_sockets(const char *text, const char *protocol, const char *field) {
    const char *line = strstr(text, protocol), *end = line ? strchr(line, '\n') : NULL;
    const char *at = line ? strstr(line, field) : NULL;
    return at && end && at < end ? strtol(at + strlen(field), NULL, 10) : 1;
}

static int has_sockets(int proc) {
    char text[512] = "";
    int fd = openat(proc, "self/net/sockstat", O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0) close(fd);
    if (length <= 0) return 1;
    return count_sockets(text, "sockets:", " used ") || count_sockets(text, "TCP:", " inuse ") ||
           count_sockets(text, "TCP:", " tw ");
}

void enter_network(const struct sandbox_setup *setup) {
    if (setup->network < 0) return; /* born in one of its own */
    if (setns(setup->network, CLONE_NEWNET) < 0) fail("enter a network namespace");
    if (has_sockets(setup->proc) && unshare(CLONE_NEWNET) < 0) fail("make a network namespace");
}
