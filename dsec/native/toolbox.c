/* See toolbox.h: options, output, and which operation it is. */
#define _GNU_SOURCE
#include "toolbox.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static uint8_t waiting[65536];
static size_t waiting_count;
static int is_paced;
static uint64_t asked_for;

_Noreturn void give_up(const char *what) {
    char line[512];
    int error = errno, length = snprintf(line, sizeof line, "%d %s: %.300s\n", error, strerror(error), what);
    if (write(2, line, (size_t)length) < 0) _exit(1);
    _exit(1);
}

/* The next line of a paced reader; its going away ends us. */
static void await_reader(void) {
    char digit;
    uint64_t bytes = 0;
    for (;;) {
        ssize_t count = read(0, &digit, 1);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) _exit(0);
        if (digit == '\n') break;
        if (digit < '0' || digit > '9') errno = EPROTO, give_up("a pace");
        bytes = bytes * 10 + (uint64_t)(digit - '0');
    }
    asked_for += bytes;
}

void flush_output(void) {
    for (size_t at = 0; at < waiting_count;) {
        while (is_paced && asked_for == 0) await_reader();
        size_t part = waiting_count - at;
        if (is_paced && part > asked_for) part = (size_t)asked_for;
        ssize_t count = write(1, waiting + at, part);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) give_up("stdout");
        at += (size_t)count;
        asked_for -= is_paced ? (uint64_t)count : 0;
    }
    waiting_count = 0;
}

void emit(const void *data, size_t count) {
    for (size_t at = 0; at < count;) {
        size_t part = count - at;
        if (part > sizeof waiting - waiting_count) part = sizeof waiting - waiting_count;
        memcpy(waiting + waiting_count, (const uint8_t *)data + at, part);
        waiting_count += part;
        at += part;
        if (waiting_count == sizeof waiting) flush_output();
    }
}

void emit_string(const char *text) {
    emit(text, strlen(text) + 1);
}

/* -- options ---------------------------------------------------------------------------------- */

static void take_out(char **at, int count) {
    while ((at[0] = at[count])) at++;
}

/* Options come after the first path, so that no path is taken for one. */
static char **find_option(char **argv, const char *name) {
    for (char **at = argv[0] ? argv + 1 : argv; *at; at++)
        if (strcmp(*at, name) == 0) return at;
    return NULL;
}

int take_flag(char **argv, const char *name) {
    char **at = find_option(argv, name);
    if (at) take_out(at, 1);
    return at != NULL;
}

const char *take_value(char **argv, const char *name) {
    char **at = find_option(argv, name);
    if (!at || !at[1]) return NULL;
    const char *value = at[1];
    take_out(at, 2);
    return value;
}

uint64_t parse_number(const char *text, int base) {
    char *end;
    errno = 0;
    uint64_t value = strtoull(text, &end, base);
    if (errno || *text < '0' || *text > '9' || *end || value > INT64_MAX) errno = EINVAL, give_up(text);
    return value;
}

/* -- a program -------------------------------------------------------------------------------- */

static _Noreturn void execute(char **argv, int out) {
    if (dup2(out, 1) < 0) give_up("run");
    if (!freopen("/dev/null", "r", stdin)) give_up("/dev/null");
    execvp(argv[0], argv);
    fprintf(stderr, "%d %s: %.300s\n", errno, strerror(errno), argv[0]);
    _exit(127);
}

static int run_program(char **argv) {
    int ends[2], status;
    char part[16384];
    if (pipe2(ends, O_CLOEXEC) < 0) give_up("pipe");
    pid_t pid = fork();
    if (pid < 0) give_up("fork");
    if (pid == 0) execute(argv, ends[1]);
    close(ends[1]);
    for (ssize_t count; (count = read(ends[0], part, sizeof part)) != 0;) {
        if (count < 0 && errno != EINTR) give_up("pipe");
        if (count > 0) emit(part, (size_t)count);
    }
    flush_output();
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) continue;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

int toolbox_main(char **argv, char **env) {
    static const struct {
        const char *name;
        int paths_count;
        void (*act)(char **argv);
    } operations[] = {{"read", 3, read_file},           {"write", 1, write_file},   {"list", 2, list_tree},
                      {"stat", 1, stat_path},           {"rename", 2, rename_path}, {"remove", 1, remove_tree},
                      {"make_dir", 1, make_directory}, {"watch", 1, watch_tree}};
    int count = 0;
    environ = env;
    argv++;
    if (*argv && strcmp(*argv, "--paced") == 0) is_paced = 1, argv++;
    const char *name = *argv ? *argv++ : "";
    while (argv[count]) count++;
    if (strcmp(name, "run") == 0 && count > 0) return run_program(argv);
    for (size_t i = 0; i < sizeof operations / sizeof *operations; i++) {
        if (strcmp(name, operations[i].name) != 0 || count < operations[i].paths_count) continue;
        operations[i].act(argv);
        flush_output();
        return 0;
    }
    errno = ENOSYS;
    give_up("no such operation, or too few arguments");
}
