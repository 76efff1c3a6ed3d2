/* The guest as pid 1 of a Docker container: `dsec-sandbox guest SOCKET`.
 *
 * Docker has made the namespaces, the root and the cgroup, and holds the limits.  What is left is to
 * reach the Edge over the one socket that it listens on for us, and to install our seccomp filter above
 * Docker's own profile.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "guest.h"
#include "sandbox.h"
#include "seccomp.h"

#define MUST(step, expression) \
    if ((expression) < 0) fail(step)

/* The control socket comes over the one that we can reach: both ends of that would show, with the Edge's path,
 * in this network namespace's list of sockets; a pair that the Edge made does not. */
static int reach_edge(const char *path) {
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    int meeting = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (meeting < 0 || strlen(path) >= sizeof name.sun_path) return -1;
    strcpy(name.sun_path, path);
    if (connect(meeting, (struct sockaddr *)&name, sizeof name) < 0) return -1;
    char byte;
    int fds[PACKET_FDS_MAX], count;
    if (receive_packet(meeting, &byte, sizeof byte, fds, &count) < 0 || count != 1) return -1;
    close(meeting);
    return fds[0];
}

/* cgroup v1 has a directory for each controller, cgroup2 one for all. */
static int open_either(const char *first, const char *second, int flags) {
    int fd = open(first, flags | O_CLOEXEC);
    return fd >= 0 || errno != ENOENT ? fd : open(second, flags | O_CLOEXEC);
}

static void open_null(void) {
    int fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    MUST("open /dev/null", fd);
    for (int target = 0; target < 3; target++)
        MUST("place /dev/null", dup2(fd, target));
    if (fd > 2) close(fd);
}

int docker_main(const char *path) {
    int control = reach_edge(path);
    if (control < 0) {
        perror("dsec-sandbox: reach the Edge");
        return 1;
    }
    report_failures_on(control);
    open_null();
    int pids = open_either("/sys/fs/cgroup/pids", "/sys/fs/cgroup", O_RDONLY | O_DIRECTORY);
    MUST("open the cgroup", pids);
    int oom = open_either("/sys/fs/cgroup/memory/memory.oom_control", "/sys/fs/cgroup/memory.events", O_RDONLY);
    MUST("open the oom counter", oom);
    MUST("share a page with the supervisors", start_supervising());
    set_limits();
    MUST("not dumpable", prctl(PR_SET_DUMPABLE, 0));
    MUST("no_new_privs", prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    MUST("seccomp", install_seccomp());
    hide_title();
    guest_main(control, pids, oom, NULL, 0);
}
