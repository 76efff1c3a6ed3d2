/* Operations on one path.  Only regular files are read and written: a pipe would hang, a device surprise. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "toolbox.h"

#define MODE_DIRECTORY 0755
#define MODE_FILE 0644
#define OPEN_FLAGS (O_CLOEXEC | O_NOCTTY | O_NONBLOCK)

static uint8_t buffer[COPY_BYTES];

static void require_regular(int fd, const char *path) {
    struct stat status;
    if (fstat(fd, &status) < 0) give_up(path);
    if (S_ISDIR(status.st_mode)) errno = EISDIR, give_up(path);
    if (!S_ISREG(status.st_mode)) errno = EINVAL, give_up(path);
}

void read_file(char **argv) {
    uint64_t offset = parse_number(argv[1], 10);
    uint64_t left = strcmp(argv[2], "-") == 0 ? INT64_MAX : parse_number(argv[2], 10);
    int fd = open(argv[0], O_RDONLY | OPEN_FLAGS);
    if (fd < 0) give_up(argv[0]);
    require_regular(fd, argv[0]);
    while (left > 0) {
        ssize_t count = pread(fd, buffer, left < sizeof buffer ? (size_t)left : sizeof buffer, (off_t)offset);
        if (count < 0) give_up(argv[0]);
        if (count == 0) return;
        emit(buffer, (size_t)count);
        offset += (uint64_t)count;
        left -= (uint64_t)count;
    }
}

/* Every directory above the last name of `path`. */
void make_parents(const char *path) {
    char *copy = strdup(path);
    if (!copy) give_up(path);
    for (char *at = copy + 1; (at = strchr(at, '/')); at++) {
        *at = 0;
        if (mkdir(copy, MODE_DIRECTORY) < 0 && errno != EEXIST) give_up(copy);
        *at = '/';
    }
    free(copy);
}

/* -- write ------------------------------------------------------------------------------------ */

/* A name that takes over `path` when it is whole; removed by whatever goes wrong before. */
static char *scratch;

static _Noreturn void abandon(const char *path) {
    int error = errno;
    if (scratch) unlink(scratch);
    errno = error;
    give_up(path);
}

/* Whoever gives up a write says so by SIGTERM. */
static void on_term(int number) {
    unlink(scratch);
    _exit(128 + number);
}

static int open_scratch(const char *path, mode_t mode) {
    uint64_t number;
    const char *slash = strrchr(path, '/');
    if (getrandom(&number, sizeof number, 0) != (ssize_t)sizeof number) give_up(path);
    int folder_bytes = slash ? (int)(slash - path) + 1 : 0;
    if (asprintf(&scratch, "%.*s.dsec-%016llx", folder_bytes, path, (unsigned long long)number) < 0) give_up(path);
    struct stat old; /* the file that is replaced hands on its mode */
    if (lstat(path, &old) == 0 && S_ISREG(old.st_mode)) mode = old.st_mode & 07777;
    signal(SIGTERM, on_term); /* before there is a file, or the signal may come between the two */
    int fd = open(scratch, O_WRONLY | O_CREAT | O_EXCL | OPEN_FLAGS, 0600);
    if (fd >= 0 && fchmod(fd, mode) < 0) abandon(path);
    return fd;
}

static uint64_t copy_stdin(int fd, const char *path) {
    uint64_t total = 0;
    for (;;) {
        ssize_t count = read(0, buffer, sizeof buffer);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) abandon("stdin");
        if (count == 0) return total;
        for (ssize_t at = 0; at < count;) {
            ssize_t written = write(fd, buffer + at, (size_t)(count - at));
            if (written < 0) abandon(path);
            at += written;
        }
        total += (uint64_t)count;
    }
}

void write_file(char **argv) {
    const char *path = argv[0];
    const char *mode = take_value(argv, "--mode"), *offset = take_value(argv, "--offset");
    const char *bytes = take_value(argv, "--bytes");
    int is_append = take_flag(argv, "--append"), is_exclusive = take_flag(argv, "--exclusive");
    int is_atomic = take_flag(argv, "--atomic");
    if (take_flag(argv, "--parents")) make_parents(path);
    if (argv[1] || (is_atomic && (is_append || offset))) errno = EINVAL, give_up("arguments of write");
    int flags = O_WRONLY | O_CREAT | OPEN_FLAGS | (is_append ? O_APPEND : 0) | (is_exclusive ? O_EXCL : 0);
    if (!is_append && !offset) flags |= O_TRUNC;
    int fd = is_atomic ? open_scratch(path, MODE_FILE) : open(path, flags, MODE_FILE);
    if (fd < 0) give_up(path);
    require_regular(fd, path);
    if (offset && lseek(fd, (off_t)parse_number(offset, 10), SEEK_SET) < 0) give_up(path);
    if (mode && fchmod(fd, (mode_t)parse_number(mode, 8) & 07777) < 0) abandon(path);
    uint64_t total = copy_stdin(fd, path);
    if (bytes && total != parse_number(bytes, 10)) errno = ENODATA, abandon(path);
    if (close(fd) < 0) abandon(path);
    if (is_atomic && renameat2(AT_FDCWD, scratch, AT_FDCWD, path, is_exclusive ? RENAME_NOREPLACE : 0) < 0) abandon(path);
}

/* -- the others ------------------------------------------------------------------------------- */

void rename_path(char **argv) {
    unsigned flags = take_flag(argv, "--exclusive") ? RENAME_NOREPLACE : 0;
    if (renameat2(AT_FDCWD, argv[0], AT_FDCWD, argv[1], flags) < 0) give_up(errno == ENOENT ? argv[0] : argv[1]);
}

void make_directory(char **argv) {
    const char *text = take_value(argv, "--mode");
    int with_parents = take_flag(argv, "--parents");
    mode_t mode = text ? (mode_t)parse_number(text, 8) & 07777 : MODE_DIRECTORY;
    struct stat status;
    if (with_parents) make_parents(argv[0]);
    if (mkdir(argv[0], mode) < 0) {
        int is_there = with_parents && errno == EEXIST && stat(argv[0], &status) == 0 && S_ISDIR(status.st_mode);
        if (!is_there) give_up(argv[0]);
    } else if (text && chmod(argv[0], mode) < 0) { /* past the umask */
        give_up(argv[0]);
    }
}

static char kind_of(mode_t mode) {
    static const struct {
        mode_t type;
        char kind;
    } kinds[] = {{S_IFDIR, 'd'}, {S_IFLNK, 'l'}, {S_IFIFO, 'p'}, {S_IFSOCK, 's'}, {S_IFBLK, 'b'}, {S_IFCHR, 'c'}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if ((mode & S_IFMT) == kinds[i].type) return kinds[i].kind;
    return 'f';
}

void emit_record(int directory, const char *name, const char *shown, const struct stat *status) {
    char facts[160], target[4097] = "";
    int length = snprintf(facts, sizeof facts, "%c%c%o%c%lld%c%lld.%09ld%c%u%c%u", kind_of(status->st_mode), 0,
                          status->st_mode & 07777, 0, (long long)status->st_size, 0, (long long)status->st_mtim.tv_sec,
                          status->st_mtim.tv_nsec, 0, status->st_uid, 0, status->st_gid);
    if (S_ISLNK(status->st_mode)) {
        ssize_t count = readlinkat(directory, name, target, sizeof target - 1);
        target[count < 0 ? 0 : count] = 0;
    }
    emit_string(shown);
    emit(facts, (size_t)length + 1);
    emit_string(target);
}

void stat_path(char **argv) {
    struct stat status;
    if (lstat(argv[0], &status) < 0) give_up(argv[0]);
    emit_record(AT_FDCWD, argv[0], argv[0], &status);
}
