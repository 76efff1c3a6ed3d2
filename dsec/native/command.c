/* The child side of a command: from the guest's process to execve.
 *
 * A pipe that execve closes tells the guest that the command runs, or why not: a command whose directory is
 * missing never started, and the caller is told so.  The guest does not wait for it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest.h"
#include "seccomp.h"
#include "toolbox.h"

#define CLONE_ATTEMPTS_MAX 16

enum child_fd { FD_STATUS = 3 };

static int status_pipe; /* in the child: where a refusal is written */

static _Noreturn void refuse(uint32_t stage) {
    struct refusal refusal = {stage, errno};
    if (write(status_pipe, &refusal, sizeof refusal) < 0) _exit(127);
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
    if (status_pipe != FD_STATUS && dup3(status_pipe, FD_STATUS, O_CLOEXEC) < 0) refuse(STAGE_REQUEST);
    status_pipe = FD_STATUS;
    if (syscall(SYS_close_range, FD_STATUS + 1, ~0U, 0) < 0) refuse(STAGE_REQUEST);
}

/* The terminal becomes the command's three descriptors, and Python gets the other end. */
static void take_terminal(const struct launch *what, const struct user *user, struct command_fds *fds) {
    setfsgid(user->gid);
    setfsuid(user->uid);
    int slave, master = open_terminal(what->body->rows, what->body->columns, &slave);
    if (master < 0) refuse(STAGE_TTY);
    struct message out = {.length = 0};
    put_u32(&out, MSG_TTY);
    put_u32(&out, what->id);
    if (send_message(what->control, &out, master) < 0) refuse(STAGE_TTY);
    *fds = (struct command_fds){slave, slave, slave};
}

/* The guest was never uid 0, so the kernel takes no capability for leaving that: a user would keep root's until
 * execve, to enter a directory or to use the toolbox. */
static void drop_all_capabilities(void) {
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct none[2] = {{0, 0, 0}, {0, 0, 0}};
    if (syscall(SYS_capset, &header, none) < 0) refuse(STAGE_USER);
}

static void become(const struct user *user) {
    if (setgroups(user->groups_count, user->groups) < 0) refuse(STAGE_USER);
    if (setresgid(user->gid, user->gid, user->gid) < 0 || setresuid(user->uid, user->uid, user->uid) < 0)
        refuse(STAGE_USER);
    if (user->uid != 0) drop_all_capabilities();
}

/* Files are read with the rights of the sandbox's root, not with those of pid 1. */
static void look_up(const char *name, struct user *user) {
    setfsgid(0);
    setfsuid(0);
    if (find_user(name, user) < 0) refuse(STAGE_USER);
}

static _Noreturn void run(const struct launch *what) {
    struct command_fds fds = what->fds;
    struct user user;
    for (int i = 0; i < what->joins_count; i++)
        if (write(what->joins[i], "0", 1) < 0) refuse(STAGE_GROUP);
    setsid();
    look_up(what->body->user, &user);
    if (what->flags & EXEC_TTY) take_terminal(what, &user, &fds);
    take_fds(&fds);
    umask(022);
    become(&user);
    if (chdir(what->body->cwd) < 0) refuse(STAGE_CWD);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (strcmp(what->body->argv[0], TOOLBOX_NAME) == 0) {
        close(FD_STATUS);
        forget_clone3_key();
        _exit(toolbox_main(what->body->argv, what->body->env));
    }
    execute(what->body);
    report_unexecuted(what->body->argv[0]);
}

/* EAGAIN has two causes: the sandbox's own limit, which is the commands' doing, or a limit of the
 * host.  A fork bomb dies and grows, so its count can have fallen when we look: then try again. */
static pid_t clone_command(const struct launch *what, struct refusal *refusal) {
    struct clone_args args = {
        .flags = CLONE_INTO_CGROUP,
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

void abandon(pid_t pid, const struct exec_group *group) {
    kill(pid, SIGKILL); /* it may have been stopped */
    if (is_supervising()) forget_supervised(group);
    else waitpid(pid, NULL, 0);
}

pid_t launch(const struct launch *what, int *status, struct refusal *refusal) {
    int ends[2];
    *refusal = (struct refusal){STAGE_FORK, EMFILE};
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0) return -1;
    status_pipe = ends[1];
    pid_t pid = clone_command(what, refusal);
    if (pid == 0) run(what);
    close(ends[1]);
    if (pid > 0) *status = ends[0];
    else close(ends[0]);
    return pid;
}
