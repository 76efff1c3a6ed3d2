/* A command's user, looked up in the sandbox's own /etc/passwd and /etc/group.
 *
 * Both are files that a command may have written: only a regular file is read, at most a megabyte of it, and a
 * line that makes no sense is no line.  No NSS: its modules would be code of the sandbox.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "guest.h"

#define FILE_BYTES_MAX (1u << 20)
#define FIELDS_COUNT 4

/* A piece of a file: no zero byte ends it. */
struct text {
    const char *at;
    size_t length;
};

static struct text read_file(const char *path) {
    struct text out = {NULL, 0};
    struct stat status;
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0) return out;
    char *data = fstat(fd, &status) == 0 && S_ISREG(status.st_mode) ? malloc(FILE_BYTES_MAX) : NULL;
    while (data && out.length < FILE_BYTES_MAX) {
        ssize_t count = read(fd, data + out.length, FILE_BYTES_MAX - out.length);
        if (count <= 0) break;
        out.length += (size_t)count;
    }
    close(fd);
    out.at = data;
    return out;
}

/* Cuts `from` at the first `separator`; the piece before it is given, the rest stays. */
static struct text cut(struct text *from, char separator) {
    const char *found = from->length ? memchr(from->at, separator, from->length) : NULL;
    struct text piece = {from->at, found ? (size_t)(found - from->at) : from->length};
    size_t used = found ? piece.length + 1 : piece.length;
    from->at += used;
    from->length -= used;
    return piece;
}

static int is_equal(struct text one, struct text other) {
    return one.length == other.length && memcmp(one.at, other.at, one.length) == 0;
}

static int is_number(struct text text) { return text.length && *text.at >= '0' && *text.at <= '9'; }

/* An id that the user namespace maps; -1 if it is none. */
static int parse_id(struct text text, uint32_t *id) {
    uint32_t value = 0;
    for (size_t i = 0; i < text.length; i++) {
        if (text.at[i] < '0' || text.at[i] > '9') return -1;
        value = value * 10 + (uint32_t)(text.at[i] - '0');
        if (value >= UIDS_MAPPED) return -1;
    }
    *id = value;
    return text.length ? 0 : -1;
}

/* The next line with its first fields. */
static int next_line(struct text *file, struct text fields[FIELDS_COUNT]) {
    if (file->length == 0) return 0;
    struct text line = cut(file, '\n');
    for (int i = 0; i < FIELDS_COUNT; i++) fields[i] = cut(&line, ':');
    return 1;
}

/* The line of /etc/passwd with this name, or if it has none with this uid; its name (in `names`), uid and gid. */
static int find_line(struct text names, struct text name, uint32_t uid, struct text *found, struct user *out) {
    struct text fields[FIELDS_COUNT];
    while (next_line(&names, fields)) {
        uint32_t line_uid, line_gid;
        if (parse_id(fields[2], &line_uid) < 0 || parse_id(fields[3], &line_gid) < 0) continue;
        if (name.at ? !is_equal(fields[0], name) : line_uid != uid) continue;
        *found = fields[0];
        out->uid = line_uid;
        out->gid = line_gid;
        return 0;
    }
    return -1;
}

static void add_groups(struct text name, struct user *out) {
    struct text file = read_file("/etc/group"), fields[FIELDS_COUNT];
    void *data = (void *)file.at;
    while (out->groups_count < USER_GROUPS_COUNT_MAX && next_line(&file, fields)) {
        uint32_t gid;
        if (parse_id(fields[2], &gid) < 0 || gid == out->gid) continue;
        while (fields[3].length) {
            struct text member = cut(&fields[3], ',');
            if (!is_equal(member, name)) continue;
            out->groups[out->groups_count++] = gid;
            break;
        }
    }
    free(data);
}

/* A group by its number, or by its name in /etc/group. */
static int find_group(struct text text, uint32_t *gid) {
    if (is_number(text)) return parse_id(text, gid);
    struct text file = read_file("/etc/group"), fields[FIELDS_COUNT];
    void *data = (void *)file.at;
    int result = -1;
    while (result < 0 && text.length && next_line(&file, fields))
        if (is_equal(fields[0], text)) result = parse_id(fields[2], gid);
    free(data);
    return result;
}

int find_user(const char *text, struct user *out) {
    struct text group = {text, strlen(text)}, user = cut(&group, ':'), none = {NULL, 0}, name = none;
    *out = (struct user){.uid = 0};
    if (!*text) return 0;
    int has_number = is_number(user), has_group = user.at[user.length] == ':';
    if (has_number && parse_id(user, &out->uid) < 0) return errno = EINVAL, -1;
    struct text names = read_file("/etc/passwd");
    int result = user.length && names.length ? find_line(names, has_number ? none : user, out->uid, &name, out) : -1;
    if (result < 0) out->gid = out->uid;
    if (result == 0 && !has_group) add_groups(name, out);
    free((void *)names.at);
    if (result < 0 && !has_number) return errno = ENOENT, -1;
    return has_group && find_group(group, &out->gid) < 0 ? (errno = ENOENT, -1) : 0;
}
