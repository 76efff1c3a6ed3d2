/* Cgroup directories: made and limited as Python says (it knows v1 from v2), removed when empty. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sandbox.h"

struct operation {
    uint32_t code, hierarchy;
    const char *path, *value;
    uint32_t value_bytes;
};

static struct operation take_operation(struct reader *in) {
    struct operation op;
    op.code = take_u32(in);
    op.hierarchy = take_u32(in);
    op.path = take_string(in, NULL);
    op.value = take_string(in, &op.value_bytes);
    return op;
}

int check_cgroup_operations(struct reader in, uint32_t hierarchies_count) {
    uint32_t count = take_u32(&in);
    for (uint32_t i = 0; i < count && !in.bad; i++) {
        struct operation op = take_operation(&in);
        if (op.hierarchy >= hierarchies_count || op.code < OP_MKDIR || op.code > OP_RESTORE) return -1;
        if (op.path[0] == '/' || strstr(op.path, "..")) return -1;
    }
    return in.bad || in.at != in.end ? -1 : 0;
}

static int write_value(int hierarchy, const struct operation *op) {
    int fd = openat(hierarchy, op->path, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return errno == ENOENT && op->code != OP_WRITE ? 0 : -1;
    ssize_t count = write(fd, op->value, op->value_bytes);
    int error = errno;
    close(fd);
    errno = error;
    return count < 0 ? -1 : 0;
}

static int apply(int hierarchy, const struct operation *op, uint32_t owner_uid, int is_new) {
    int is_making = op->code == OP_MKDIR || op->code == OP_CHOWN;
    if (is_new ? op->code == OP_RESTORE : is_making) return 0;
    if (op->code == OP_MKDIR) return mkdirat(hierarchy, op->path, 0755);
    if (op->code == OP_CHOWN) return fchownat(hierarchy, op->path, owner_uid, (gid_t)-1, 0);
    return write_value(hierarchy, op);
}

/* Then the same groups have the same files written, whatever the values. */
int are_alike(struct reader some, struct reader others) {
    uint32_t count = take_u32(&some);
    if (take_u32(&others) != count) return 0;
    for (uint32_t i = 0; i < count; i++) {
        struct operation one = take_operation(&some), other = take_operation(&others);
        if (one.hierarchy != other.hierarchy || strcmp(one.path, other.path) != 0) return 0;
    }
    return 1;
}

const char *apply_cgroup_operations(struct reader in, const struct hierarchies *all, uint32_t owner_uid, int is_new) {
    static char step[160];
    uint32_t count = take_u32(&in);
    for (uint32_t i = 0; i < count; i++) {
        struct operation op = take_operation(&in);
        if (apply(all->fds[op.hierarchy], &op, owner_uid, is_new) == 0) continue;
        int error = errno;
        static const char *const verbs[] = {"", "make", "write", "write", "own", "restore"};
        snprintf(step, sizeof step, "%s cgroup %.100s", verbs[op.code], op.path);
        errno = error;
        return step;
    }
    return NULL;
}

int empty_cgroup(int parent, const char *name) {
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC), result = 0;
    if (fd < 0) return -1;
    DIR *directory = fdopendir(fd);
    if (!directory) return close(fd), -1;
    struct dirent *entry;
    while ((entry = readdir(directory)))
        if (entry->d_type == DT_DIR && entry->d_name[0] != '.' && remove_cgroup_tree(fd, entry->d_name) < 0) result = -1;
    closedir(directory);
    return result;
}

/* Depth first; a cgroup directory holds directories and files, and rmdir ignores the files. */
int remove_cgroup_tree(int parent, const char *name) {
    if (unlinkat(parent, name, AT_REMOVEDIR) == 0 || errno == ENOENT) return 0;
    if (empty_cgroup(parent, name) < 0 && errno != ENOENT) return -1;
    return unlinkat(parent, name, AT_REMOVEDIR) == 0 || errno == ENOENT ? 0 : -1;
}
