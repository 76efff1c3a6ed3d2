/* From clone3 to pid 1: open what the guest needs, build, confine, become the guest. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "sandbox.h"

/* Below this nothing is open while the guest's fds are moved to their places (enum guest_fd). */
#define FDS_HIGH 2048

static int control_fd;

void report_failures_on(int control) {
    control_fd = control;
}

void fail(const char *step) {
    struct message report = {.length = 0};
    int error = errno;
    put_u32(&report, MSG_FAILED);
    put_u32(&report, NO_SLOT);
    put_string(&report, step);
    put_u32(&report, (uint32_t)error);
    send_message(control_fd, &report, -1);
    _exit(1);
}

static char *title, *title_end;

void remember_title(char *start, char *end) {
    title = start;
    title_end = end;
}

void hide_title(void) {
    memset(title, 0, (size_t)(title_end - title));
    strncpy(title, "init", (size_t)(title_end - title));
}

static int lift(int fd, const char *step) {
    int lifted = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, FDS_HIGH);
    if (lifted < 0) fail(step);
    return lifted;
}

static int open_in(const struct sandbox_setup *setup, uint32_t hierarchy, const char *path, int flags) {
    return openat(setup->hierarchies->fds[hierarchy], path, flags | O_CLOEXEC);
}

static void place(int lifted, int target) {
    if (dup3(lifted, target, O_CLOEXEC) < 0) fail("place a fd");
}

static int open_tasks(const struct sandbox_setup *setup, uint32_t hierarchy, const char *group) {
    char path[64];
    snprintf(path, sizeof path, "%stasks", group);
    return lift(open_in(setup, hierarchy, path, O_WRONLY), "open a tasks file");
}

static void join(int tasks) {
    if (write(tasks, "0", 1) < 0) fail("join a cgroup");
}

/* A cgroup namespace shows what was ours when it was made as the root: made inside the sandbox's
 * groups, it hides the host's names.  Then back out to our own directory, free of limits. */
static void hide_cgroup_names(const struct sandbox_setup *setup, const int *joins, int joins_count) {
    for (int i = 0; i < joins_count; i++) join(joins[i]);
    if (unshare(CLONE_NEWCGROUP) < 0) fail("unshare the cgroup namespace");
    for (int i = 0; i < joins_count; i++) {
        int outside = open_tasks(setup, (uint32_t)i + 1, "");
        join(outside);
        close(outside);
    }
}

/* Opens with the host's credentials what the guest will use with its own few; the cgroup checks
 * look at who opened.  Returns the count of v1 groups to join. */
static int arrange_fds(const struct create_request *request, struct sandbox_setup *setup) {
    int joins[HIERARCHIES_COUNT_MAX], joins_count = 0;
    control_fd = lift(setup->control, "lift the control fd");
    setup->control = control_fd;
    setup->user_namespace = lift(setup->user_namespace, "lift the user namespace");
    int group = lift(open_in(setup, 0, request->command_group, O_RDONLY | O_DIRECTORY), "open the command group");
    int oom = lift(open_in(setup, request->oom_hierarchy, request->oom_file, O_RDONLY), "open the oom counter");
    for (uint32_t i = 1; i < setup->hierarchies->count; i++) {
        char box[32];
        snprintf(box, sizeof box, "s%u/", request->slot);
        joins[joins_count++] = open_tasks(setup, i, box);
    }
    hide_cgroup_names(setup, joins, joins_count);
    if (syscall(SYS_close_range, 0, FDS_HIGH - 1, 0) < 0) fail("close_range");
    place(control_fd, FD_CONTROL);
    place(group, FD_COMMAND_GROUP);
    place(oom, FD_OOM);
    for (int i = 0; i < joins_count; i++) place(joins[i], FD_JOIN_FIRST + i);
    return joins_count;
}

/* 0, 1 and 2 are the sandbox's own /dev/null, opened before any command could replace it. */
static void open_null(void) {
    if (open("/dev/null", O_RDWR) != FD_NULL || dup(FD_NULL) != 1 || dup(FD_NULL) != 2) fail("open /dev/null");
}

void become_sandbox(const struct create_request *request, const struct sandbox_setup *given) {
    struct sandbox_setup setup = *given;
    control_fd = setup.control;
    enter_network(&setup);
    int joins_count = arrange_fds(request, &setup);
    build_rootfs(request, &setup);
    open_null();
    confine(request->hostname, &setup);
    control_fd = FD_CONTROL;
    if (syscall(SYS_close_range, FD_JOIN_FIRST + joins_count, ~0U, 0) < 0) fail("close_range");
    hide_title();
    int joins[HIERARCHIES_COUNT_MAX];
    for (int i = 0; i < joins_count; i++) joins[i] = FD_JOIN_FIRST + i;
    guest_main(FD_CONTROL, FD_COMMAND_GROUP, FD_OOM, joins, joins_count);
}
