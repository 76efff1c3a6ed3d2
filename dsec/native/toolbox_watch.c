/* Watching a tree with inotify.
 *
 * A directory that appears is watched and then read, and what it holds is reported as created: what was made between its
 * birth and its watch is told once or twice, never not at all.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>

#include "toolbox.h"

#define WATCHED (IN_CREATE | IN_MODIFY | IN_ATTRIB | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO | IN_DELETE_SELF | IN_MOVE_SELF)

struct watch {
    int number; /* inotify's; -1: free */
    char *path;
};

static struct watch watches[WATCHES_COUNT_MAX];
static size_t watches_count;
static int events, top, is_recursive; /* `top`: the number of the path that was asked for */

static void report(enum event_kind kind, const char *path) {
    char text[2] = {(char)kind, 0};
    emit_string(text);
    emit_string(path);
}

static char *join(const char *folder, const char *name) {
    char *path;
    if (asprintf(&path, "%s%s%s", folder, folder[strlen(folder) - 1] == '/' ? "" : "/", name) < 0) give_up(folder);
    return path;
}

static struct watch *find(int number) {
    for (size_t i = 0; i < watches_count; i++)
        if (watches[i].number == number) return &watches[i];
    return NULL;
}

static void forget(struct watch *watch) {
    free(watch->path);
    *watch = watches[--watches_count];
}

/* 1 if this is a new watch, 0 if it was one already, -1 with errno. */
static int add_watch(const char *path, uint32_t flags) {
    if (watches_count == WATCHES_COUNT_MAX) return errno = ENOSPC, -1;
    int number = inotify_add_watch(events, path, WATCHED | flags);
    if (number < 0) return -1;
    struct watch *known = find(number); /* moved, or seen twice: it has a new name now */
    char *copy = strdup(path);
    if (!copy) give_up(path);
    if (known) free(known->path), known->path = copy;
    else watches[watches_count++] = (struct watch){number, copy};
    return !known;
}

static void add_below(const char *path, int is_new, int depth);

/* What is gone already is no loss. */
static void add_tree(const char *path, int is_new, int depth) {
    int result = add_watch(path, IN_ONLYDIR | IN_DONT_FOLLOW | IN_EXCL_UNLINK);
    if (result > 0 && depth < DEPTH_MAX) add_below(path, is_new, depth + 1);
    else if (result != 0 && errno != ENOENT && errno != ENOTDIR) report(EVENT_LOST, path);
}

/* The directories below `path`; with `is_new` all that is found there is reported. */
static void add_below(const char *path, int is_new, int depth) {
    DIR *directory = opendir(path);
    struct dirent *entry;
    while (directory && (entry = readdir(directory))) {
        struct stat status;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        char *below = join(path, entry->d_name);
        if (is_new) report(EVENT_CREATED, below);
        if (lstat(below, &status) == 0 && S_ISDIR(status.st_mode)) add_tree(below, is_new, depth);
        free(below);
    }
    if (directory) closedir(directory);
}

/* A directory that left: what happens in it is no longer told, whatever its place is now. */
static void drop_tree(const char *path) {
    size_t length = strlen(path);
    for (size_t i = 0; i < watches_count;) {
        const char *other = watches[i].path;
        int is_below = strncmp(other, path, length) == 0 && (other[length] == '/' || other[length] == 0);
        if (is_below) inotify_rm_watch(events, watches[i].number), forget(&watches[i]);
        else i++;
    }
}

static void tell(const struct inotify_event *event, const struct watch *watch) {
    static const struct {
        uint32_t mask;
        enum event_kind kind;
    } kinds[] = {{IN_CREATE, EVENT_CREATED},         {IN_MODIFY, EVENT_WRITTEN},   {IN_ATTRIB, EVENT_CHANGED},
                 {IN_DELETE, EVENT_REMOVED},         {IN_MOVED_TO, EVENT_MOVED_TO}, {IN_MOVED_FROM, EVENT_MOVED_FROM},
                 {IN_DELETE_SELF, EVENT_REMOVED},    {IN_MOVE_SELF, EVENT_MOVED_FROM}};
    char *path = event->len ? join(watch->path, event->name) : strdup(watch->path);
    if (!path) give_up("watch");
    int is_top = watch->number == top;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        int is_told_above = !is_top && (kinds[i].mask & (IN_DELETE_SELF | IN_MOVE_SELF));
        if ((event->mask & kinds[i].mask) && !is_told_above) report(kinds[i].kind, path);
    }
    if (is_recursive && (event->mask & IN_ISDIR)) {
        if (event->mask & IN_MOVED_FROM) drop_tree(path);
        if (event->mask & (IN_CREATE | IN_MOVED_TO)) add_tree(path, 1, 0);
    }
    free(path);
}

/* 0 when the watched path itself is gone. */
static int on_event(const struct inotify_event *event) {
    struct watch *watch = find(event->wd);
    if (event->mask & IN_Q_OVERFLOW) report(EVENT_LOST, "");
    if (!watch) return 1;
    if (event->mask & IN_IGNORED) forget(watch);
    else tell(event, watch);
    return !(event->mask & IN_IGNORED) || event->wd != top;
}

void watch_tree(char **argv) {
    _Alignas(struct inotify_event) char buffer[65536];
    struct stat status;
    is_recursive = take_flag(argv, "--recursive");
    events = inotify_init1(IN_CLOEXEC);
    if (events < 0 || stat(argv[0], &status) < 0 || add_watch(argv[0], 0) < 0) give_up(argv[0]);
    top = watches[0].number;
    if (is_recursive && S_ISDIR(status.st_mode)) add_below(argv[0], 0, 1);
    report(EVENT_READY, argv[0]);
    for (int goes_on = 1; goes_on;) {
        flush_output();
        ssize_t count = read(events, buffer, sizeof buffer);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) give_up(argv[0]);
        for (ssize_t at = 0; at < count && goes_on;) {
            const struct inotify_event *event = (const struct inotify_event *)(buffer + at);
            goes_on = on_event(event);
            at += (ssize_t)(sizeof *event + event->len);
        }
    }
}
