/* The child side of a command: from the guest's process to execve.
 *
 * The guest waits (CLONE_VFORK) until the child has executed or given up, and learns why from one
 * shared page: a command whose directory is missing never started, and the caller is told so.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest.h"
#include "seccomp.h"

#define CLONE_ATTEMPTS_MAX 16

static struct refusal *shared;

void open_launchpad(void) {
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) _exit(1);
}

static _Noreturn void refuse(uint32_t stage) {
    *shared = (struct refusal){stage, errno};
    _exit(127);
}

static const char *search_path(char **env) {
    for (; *env; env++)
        if (strncmp(*env, "PATH=", 5) == 0) return *env + 5;
    return "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
}

/* execve along PATH; returns with the errno that says most (EACCES before ENOENT). */
static void execute(const struct exec_body *body) {
    const char *name = body->argv[0];
    if (strchr(name, '/') || !*name) {
        execve(name, body->argv, body->env);
        return;
    }
    int error = ENOENT;
    for (const char *at = search_path(body->env); at; at = *at ? at + 1 : NULL) {
        size_t length = strcspn(at, ":");
        char path[4352];
        if (length + strlen(name) + 2 <= sizeof path) {
            snprintf(path, sizeof path, "%.*s%s%s", (int)length, at, length ? "/" : "./", name);
            execve(path, body->argv, body->env);
            if (errno == EACCES) error = EACCES;
            else if (errno != ENOENT && errno != ENOTDIR) return;
        }
        at += length;
    }
    errno = error;
}

/* The shell's answers: 127 not found, 126 found but not executable, with a line on stderr.  What a
 * command can bring about (a busy file, a full memory) is such an answer; refused is what the caller
 * asked for (E2BIG) and what the host lacks. */
static _Noreturn void report_unexecuted(const char *name) {
    int missing = errno == ENOENT || errno == ENOTDIR;
    if (errno == E2BIG || errno == ENFILE || errno == EIO) refuse(STAGE_EXEC);
    char line[512];
    int length = snprintf(line, sizeof line, "exec: %.400s: %s\n", name, strerror(errno));
    if (write(2, line, (size_t)length) < 0) _exit(missing ? 127 : 126);
    _exit(missing ? 127 : 126);
}

static void take_fds(const struct command_fds *fds) {
    if (dup2(fds->in, 0) < 0 || dup2(fds->out, 1) < 0 || dup2(fds->err, 2) < 0) refuse(STAGE_REQUEST);
    if (syscall(SYS_close_range, 3, ~0U, 0) < 0) refuse(STAGE_REQUEST);
}

static _Noreturn void run(const struct launch *what) {
    if (is_supervising()) shed_privileges();
    for (int i = 0; i < what->joins_count; i++)
        if (write(what->joins[i], "0", 1) < 0) refuse(STAGE_GROUP);
    setsid();
    take_fds(&what->fds);
    umask(022);
    if (setgroups(0, NULL) < 0 || setresgid(0, 0, 0) < 0 || setresuid(0, 0, 0) < 0) refuse(STAGE_REQUEST);
    if (chdir(what->body->cwd) < 0) refuse(STAGE_CWD);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    execute(what->body);
    report_unexecuted(what->body->argv[0]);
}

/* EAGAIN has two causes: the sandbox's own limit, which is the commands' doing, or a limit of the
 * host.  A fork bomb dies and grows, so its count can have fallen when we look: then try again. */
static pid_t clone_command(const struct launch *what, struct refusal *refusal) {
    struct clone_args args = {
        .flags = CLONE_INTO_CGROUP | CLONE_VFORK,
        .exit_signal = SIGCHLD,
        .cgroup = (uint64_t)what->group->directory,
    };
    for (int attempt = 0; attempt < CLONE_ATTEMPTS_MAX; attempt++) {
        pid_t pid = is_supervising() ? launch_supervised(what->group) : guest_clone3(&args, sizeof args);
        if (pid >= 0) return pid;
        *refusal = (struct refusal){STAGE_FORK, errno};
        if (refusal->error != EAGAIN) return -1;
        if (is_crowded()) {
            refusal->stage = STAGE_CROWDED;
            return -1;
        }
    }
    return -1;
}

pid_t launch(const struct launch *what, struct refusal *refusal) {
    *shared = (struct refusal){0, 0};
    pid_t pid = clone_command(what, refusal);
    if (pid == 0) run(what);
    if (pid < 0) return -1;
    *refusal = *shared;
    if (refusal->stage == 0) return pid;
    if (is_supervising()) forget_supervised(what->group);
    else waitpid(pid, NULL, 0);
    return -1;
}
