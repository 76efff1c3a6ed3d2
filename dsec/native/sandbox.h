/* What the two roles share: a sandbox as the spawner was asked for it, and the calls between the files. */
#ifndef DSEC_SANDBOX_H
#define DSEC_SANDBOX_H

#include <stdint.h>

#include "wire.h"

/* A CREATE message, parsed; the strings point into the packet. */
struct create_request {
    uint32_t slot;
    uint64_t disk_bytes;
    const char *hostname, *guest_group, *command_group, *oom_file;
    uint32_t oom_hierarchy, flags;
    uint32_t layers_count, layers[SANDBOX_LAYERS_COUNT_MAX]; /* mounted ones, the topmost first */
    struct reader operations; /* checked, at its count */
};

/* Our directories in the mounted cgroup hierarchies; 0 is cgroup2, the others are v1. */
struct hierarchies {
    int fds[HIERARCHIES_COUNT_MAX];
    uint32_t count;
};

/* -- spawner.c, keeper.c, docker.c, guest.c: the roles; guest_main never returns */
int spawner_main(int control);
int keeper_main(int listener, int connection, int keep_s);
int docker_main(const char *socket_path);
_Noreturn void guest_main(int control, int command_group, int oom_file, const int *joins, int joins_count);

/* -- main.c: closes what lies above `last`.  A pipe that our parent's parent let us inherit has a reader who waits. */
void drop_other_files(int last);

/* -- base.c: the spawner's own file system view.  Each returns NULL, or the step that failed with errno. */
const char *build_base(int skeleton_fd);
int unpack_skeleton(const char *directory); /* 0, or -1 with errno; the caller's fsuid owns what is made */
#define LAYER_PATH_BYTES_MAX 32
void name_layer(uint32_t layer, char path[LAYER_PATH_BYTES_MAX]); /* where it is mounted */

/* -- cgroups.c */
const char *apply_cgroup_operations(struct reader operations, const struct hierarchies *all, uint32_t owner_uid,
                                    int is_new); /* is_new: the groups are to be made */
int are_alike(struct reader operations, struct reader others); /* of both the check was 0 */
int check_cgroup_operations(struct reader operations, uint32_t hierarchies_count);
int remove_cgroup_tree(int parent, const char *name); /* 0, or -1 with errno (EBUSY: try again) */
int empty_cgroup(int parent, const char *name);       /* removes what is below it; the same */

/* -- rootfs.c: the options of a disk, as mount and fsconfig take them */
struct disk_bounds {
    char size[24], inodes[24];
};
struct disk_bounds bound_disk(uint64_t bytes);

/* -- users.c */
int claim_uids(uint32_t slots_count, uint32_t *first_uid); /* for as long as we live; 0, or -1 */
int create_user_namespace(int proc, uint32_t first_uid);

/* -- sandbox.c: the child between clone3 and pid 1; reports a failing step on `control` and exits */
struct sandbox_setup {
    const struct hierarchies *hierarchies;
    int control, user_namespace;
    int network; /* to be entered; -1: the process was born in one of its own */
    int proc;    /* the host's, as long as the sandbox is not built */
    uint32_t first_uid;
};
_Noreturn void become_sandbox(const struct create_request *request, const struct sandbox_setup *setup);

/* -- networks.c, rootfs.c, confine.c: the steps of that, in order.  They end by `fail`. */
void enter_network(const struct sandbox_setup *setup);
void build_rootfs(const struct create_request *request, const struct sandbox_setup *setup);
void confine(const char *hostname, const struct sandbox_setup *setup);
void set_limits(void);
_Noreturn void fail(const char *step);
void report_failures_on(int control);
void remember_title(char *start, char *end); /* where ps finds our command line */
void hide_title(void);                       /* shows "init" there: the host's paths are not the sandbox's business */

#endif
