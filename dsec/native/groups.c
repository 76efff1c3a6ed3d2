/* One cgroup2 directory for each running command, so that its whole tree can be killed at once.
 *
 * A process cannot leave its cgroup (nothing inside has a cgroup file system), however often it
 * forks, calls setsid or loses its parent.  Making a directory costs more than reusing one:
 * empty groups are kept.  A group whose command ended while background processes live on is left
 * to them; its directory is removed when they are gone, at the latest with the sandbox.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "guest.h"

#define SPARE_MAX 4
#define LEFT_MAX 512

static int parent;
static uint32_t next_number;
static struct exec_group spare[SPARE_MAX];
static int spare_count;
static uint32_t left[LEFT_MAX];
static int left_count;

void open_groups(int command_group) {
    parent = command_group;
}

static void name_group(uint32_t number, char out[32]) {
    snprintf(out, 32, "e%u", number);
}

static void close_group(struct exec_group *group) {
    if (group->events >= 0) close(group->events);
    if (group->directory >= 0) close(group->directory);
}

static void sweep_left(void) {
    int kept = 0;
    for (int i = 0; i < left_count; i++) {
        char name[32];
        name_group(left[i], name);
        if (unlinkat(parent, name, AT_REMOVEDIR) < 0) left[kept++] = left[i];
    }
    left_count = kept;
}

int acquire_group(struct exec_group *out) {
    if (is_supervising()) return acquire_supervised(out);
    if (spare_count > 0) {
        *out = spare[--spare_count];
        return 0;
    }
    char name[32];
    *out = (struct exec_group){.number = next_number++, .directory = -1, .events = -1, .was_killed = 0};
    name_group(out->number, name);
    if (mkdirat(parent, name, 0755) < 0) return -1;
    out->directory = openat(parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (out->directory >= 0) out->events = openat(out->directory, "cgroup.events", O_RDONLY | O_CLOEXEC);
    if (out->events >= 0) return 0;
    close_group(out);
    unlinkat(parent, name, AT_REMOVEDIR);
    return -1;
}

void release_group(struct exec_group *group) {
    if (is_supervising()) return release_supervised(group);
    /* The kernel counts the kills of a group, and ends a process cloned into it whose parent's own
     * group has another count: a killed group takes no command any more. */
    if (!group->was_killed && !is_populated(group) && spare_count < SPARE_MAX) {
        spare[spare_count++] = *group;
        return;
    }
    close_group(group);
    if (left_count < LEFT_MAX) left[left_count++] = group->number;
    sweep_left();
}

int is_populated(const struct exec_group *group) {
    if (is_supervising()) return has_supervised(group);
    char text[128] = "";
    ssize_t count = pread(group->events, text, sizeof text - 1, 0);
    return count <= 0 || strstr(text, "populated 0") == NULL;
}

void kill_group(struct exec_group *group) {
    if (is_supervising()) return kill_supervised(group);
    group->was_killed = 1;
    int fd = openat(group->directory, "cgroup.kill", O_WRONLY | O_CLOEXEC);
    if (fd < 0) return;
    if (write(fd, "1", 1) < 0) {
        /* the group was removed with the sandbox: nothing left to kill */
    }
    close(fd);
}

/* -1: no such file (the limit lies in a v1 hierarchy, which does not refuse a clone), or "max" */
static long read_count(const char *file) {
    char text[32] = "", *end = text;
    int fd = openat(parent, file, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    ssize_t length = read(fd, text, sizeof text - 1);
    close(fd);
    long count = strtol(text, &end, 10);
    return length <= 0 || end == text ? -1 : count;
}

int is_crowded(void) {
    long limit = read_count("pids.max");
    return limit >= 0 && read_count("pids.current") + is_supervising() >= limit; /* a supervisor is one more */
}
