/* Operations on a tree, by descriptor: no link is followed below the path that was given. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "toolbox.h"

#define DESCEND_FLAGS (O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)

static int is_dots(const char *name) {
    return name[0] == '.' && (name[1] == 0 || (name[1] == '.' && name[2] == 0));
}

/* -- list ------------------------------------------------------------------------------------- */

/* What goes away under our eyes is left out; a directory that may not be read is listed, but not into. */
static void list_directory(int fd, const char *shown, uint64_t depth) {
    DIR *directory = fdopendir(fd);
    struct dirent *entry;
    if (!directory) give_up(shown);
    while ((entry = readdir(directory))) {
        struct stat status;
        char *path;
        if (is_dots(entry->d_name)) continue;
        if (fstatat(fd, entry->d_name, &status, AT_SYMLINK_NOFOLLOW) < 0) continue;
        if (asprintf(&path, "%s%s%s", shown, *shown ? "/" : "", entry->d_name) < 0) give_up(shown);
        emit_record(fd, entry->d_name, path, &status);
        if (S_ISDIR(status.st_mode) && depth > 1) {
            int below = openat(fd, entry->d_name, DESCEND_FLAGS);
            if (below >= 0) list_directory(below, path, depth - 1);
            else if (errno == EMFILE || errno == ENFILE || errno == ENOMEM) give_up(path);
        }
        free(path);
    }
    closedir(directory);
}

void list_tree(char **argv) {
    uint64_t depth = parse_number(argv[1], 10);
    if (depth < 1 || depth > DEPTH_MAX) errno = EINVAL, give_up(argv[1]);
    int fd = open(argv[0], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) give_up(argv[0]);
    list_directory(fd, "", depth);
}

/* -- remove ----------------------------------------------------------------------------------- */

/* The directories from the top down to where we are. */
static struct {
    int *fds;
    size_t count, room;
} path_down;

static void descend(int from, const char *name) {
    if (path_down.count == path_down.room) {
        path_down.room = path_down.room ? path_down.room * 2 : 64;
        path_down.fds = realloc(path_down.fds, path_down.room * sizeof *path_down.fds);
        if (!path_down.fds) give_up(name);
    }
    int fd = openat(from, name, DESCEND_FLAGS);
    if (fd < 0) give_up(name);
    path_down.fds[path_down.count++] = fd;
}

struct kernel_dirent {
    uint64_t inode, next;
    uint16_t length;
    uint8_t type;
    char name[];
};

/* 1 if it is gone, 0 if it is a directory with something in it. */
static int remove_entry(int from, const char *name) {
    if (unlinkat(from, name, 0) == 0 || errno == ENOENT) return 1;
    if (errno != EISDIR) give_up(name);
    if (unlinkat(from, name, AT_REMOVEDIR) == 0 || errno == ENOENT) return 1;
    if (errno != ENOTEMPTY && errno != EEXIST) give_up(name);
    return 0;
}

/* Empties a directory until something stands in the way: 1 and its name; 0 if nothing is left. */
static int clear(int fd, char name[256]) {
    _Alignas(struct kernel_dirent) char entries[32768];
    for (int removed = 1; removed;) {
        long count;
        removed = 0;
        if (lseek(fd, 0, SEEK_SET) < 0) give_up("remove");
        while ((count = syscall(SYS_getdents64, fd, entries, sizeof entries)) > 0) {
            struct kernel_dirent *entry;
            for (long at = 0; at < count; at += entry->length) {
                entry = (struct kernel_dirent *)(entries + at);
                if (is_dots(entry->name)) continue;
                if (!remove_entry(fd, entry->name)) return snprintf(name, 256, "%s", entry->name), 1;
                removed = 1;
            }
        }
        if (count < 0 && errno != ENOENT) give_up("remove");
    }
    return 0;
}

void remove_tree(char **argv) {
    const char *path = argv[0];
    int is_recursive = take_flag(argv, "--recursive");
    if (unlink(path) == 0) return;
    if (errno != EISDIR) give_up(path);
    if (rmdir(path) == 0) return;
    if (!is_recursive || (errno != ENOTEMPTY && errno != EEXIST)) give_up(path);
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        if (setrlimit(RLIMIT_NOFILE, &files) < 0) give_up(path);
    }
    char name[256];
    descend(AT_FDCWD, path);
    while (path_down.count > 0) {
        int here = path_down.fds[path_down.count - 1];
        if (clear(here, name)) {
            descend(here, name);
        } else {
            close(here);
            path_down.count--;
        }
    }
    if (rmdir(path) < 0) give_up(path);
}
