/* The guest: pid 1 of a sandbox.  Runs commands, reaps every orphan, answers when a command ended.
 *
 * One loop over two fds.  It moves no output (the pipes are Python's and the command's), so no
 * reader can block it.  A command has ended when its own process was reaped; background children
 * live on.  A command that is killed (time, or KILL) has ended when its cgroup is empty: nobody
 * scores a workspace while a killed tree still writes to it.
 *
 * Invariants:
 *   1. Each accepted EXEC is answered by one EXITED or REFUSED, and by the same again at a SYNC soon after.
 *   2. At EOF on the control socket the guest exits, and the kernel kills everything in its pid namespace.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"
#include "sandbox.h"

/* A killed tree that the kernel cannot end within this (a stuck file system) is answered anyway; a
 * command that must be alone is then refused. */
#define DYING_MS_MAX 5000
#define DYING_POLL_MS 10
#define START_POLL_MS 10

enum command_state { COMMAND_NONE = 0, COMMAND_RUNNING, COMMAND_DYING };

struct command {
    enum command_state state;
    uint32_t id, flags;
    pid_t pid;  /* 0 once reaped */
    int status; /* the pipe that tells whether it gave up before execve; -1: it has executed */
    int wait_status;
    uint64_t started_us; /* moves on with pauses, as the deadline does */
    uint64_t deadline_ms;
    uint64_t oom_kills_before;
    struct exec_group group;
};

static int control, oom_file, joins_count;
static const int *joins;
static struct command commands[EXECS_COUNT_MAX];
static uint8_t packet[PACKET_BYTES_MAX];

static uint64_t now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

static uint64_t now_ms(void) {
    return now_us() / 1000;
}

/* "oom_kill N" in memory.oom_control (v1) and memory.events (v2). */
static uint64_t count_oom_kills(void) {
    char text[512] = "";
    if (pread(oom_file, text, sizeof text - 1, 0) <= 0) return 0;
    const char *line = strstr(text, "oom_kill ");
    return line ? strtoull(line + 9, NULL, 10) : 0;
}

static void reply(enum message_type type, const uint32_t *values, size_t count) {
    struct message out = {.length = 0};
    put_u32(&out, type);
    for (size_t i = 0; i < count; i++) put_u32(&out, values[i]);
    if (send_message(control, &out, -1) < 0) _exit(0);
}

static void answer(const struct end *end) {
    struct message out = {.length = 0};
    put_u32(&out, end->type);
    put_u32(&out, end->id);
    put_u32(&out, end->first);
    put_u32(&out, end->second);
    if (end->type == MSG_EXITED) put_u64(&out, end->duration_us);
    if (send_message(control, &out, -1) < 0) _exit(0);
}

static void end_with(struct end end) {
    remember_end(&end);
    answer(&end);
}

static void refuse(uint32_t id, enum refusal_stage stage, int error) {
    end_with((struct end){MSG_REFUSED, id, stage, (uint32_t)error, 0});
}

/* Whether a command that was started gave up before execve; then it is answered, and is no more. */
static int has_given_up(struct command *command) {
    struct refusal refusal;
    ssize_t count = read(command->status, &refusal, sizeof refusal);
    if (count < 0 && errno == EAGAIN) return 0;
    close(command->status);
    command->status = -1;
    if (count != sizeof refusal) return 0;
    if (command->pid) abandon(command->pid, &command->group);
    release_group(&command->group);
    command->state = COMMAND_NONE;
    refuse(command->id, refusal.stage, refusal.error);
    return 1;
}

static void finish(struct command *command) {
    if (command->status >= 0 && has_given_up(command)) return;
    if (command->status >= 0) close(command->status);
    uint64_t now = now_us(), started = command->started_us; /* later than now, where it was still to start as a pause began */
    if (count_oom_kills() > command->oom_kills_before) command->flags |= EXIT_OOM_KILLED;
    release_group(&command->group);
    command->state = COMMAND_NONE;
    end_with((struct end){MSG_EXITED, command->id, (uint32_t)command->wait_status, command->flags,
                          now > started ? now - started : 0});
}

static void kill_tree(struct command *command, uint64_t now) {
    kill_group(&command->group);
    command->state = COMMAND_DYING;
    command->deadline_ms = now + DYING_MS_MAX;
}

/* Returns whether children are left. */
static int reap(void) {
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        pid_t ended = attribute_end(pid, &status);
        for (int i = 0; i < EXECS_COUNT_MAX; i++) {
            struct command *command = &commands[i];
            if (command->state == COMMAND_NONE || !ended || command->pid != ended) continue;
            command->pid = 0;
            command->wait_status = status;
            if (command->state == COMMAND_RUNNING) finish(command);
            break;
        }
    }
    return pid == 0;
}

/* As pid 1, kill(-1) reaches every other process of the namespace, and all of them become our
 * children.  0, or -1 if one of them is still there after DYING_MS_MAX. */
static int kill_others(void) {
    uint64_t deadline = now_ms() + DYING_MS_MAX;
    kill(-1, SIGKILL);
    while (reap()) {
        if (now_ms() >= deadline) return -1;
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    return 0;
}

/* Deadlines, dying trees, and commands that have not executed yet: root inside may stop any process but pid 1,
 * and whoever stands still before execve is not what it asked for.  Returns how long poll may sleep. */
static int advance(void) {
    uint64_t now = now_ms(), next = UINT64_MAX;
    for (int i = 0; i < EXECS_COUNT_MAX; i++) {
        struct command *command = &commands[i];
        if (command->state == COMMAND_RUNNING && command->deadline_ms <= now) {
            command->flags |= EXIT_TIMED_OUT;
            kill_tree(command, now);
        }
        if (command->state == COMMAND_DYING) {
            int is_gone = command->pid == 0 && !is_populated(&command->group);
            if (is_gone || command->deadline_ms <= now) finish(command);
            else if (now + DYING_POLL_MS < next) next = now + DYING_POLL_MS;
        }
        if (command->state == COMMAND_RUNNING && command->deadline_ms < next) next = command->deadline_ms;
        if (command->state != COMMAND_RUNNING || command->status < 0) continue;
        if (now >= command->started_us / 1000 + START_POLL_MS) kill(command->pid, SIGCONT);
        if (now + START_POLL_MS < next) next = now + START_POLL_MS;
    }
    if (next == UINT64_MAX) return -1;
    return next - now > 60000 ? 60000 : (int)(next - now);
}

/* The fds of an EXEC in order; 0, or -1 if their count is not what the flags say. */
static int sort_fds(uint32_t flags, const int *fds, int count, int *body, struct command_fds *out) {
    int at = 0;
    int streams = flags & EXEC_TTY ? 0 : 1 + !!(flags & EXEC_HAS_STDIN) + !(flags & EXEC_MERGE_STDERR);
    if (count != streams + !!(flags & EXEC_BODY_IN_FD)) return -1;
    *body = flags & EXEC_BODY_IN_FD ? fds[at++] : -1;
    if (flags & EXEC_TTY) return 0;
    out->in = flags & EXEC_HAS_STDIN ? fds[at++] : 0;
    out->out = fds[at++];
    out->err = flags & EXEC_MERGE_STDERR ? out->out : fds[at];
    return 0;
}

static uint8_t *read_body(int fd, size_t *length) {
    struct stat status;
    if (fstat(fd, &status) < 0 || status.st_size > (off_t)EXEC_BODY_BYTES_MAX) return NULL;
    uint8_t *data = malloc((size_t)status.st_size + 1);
    for (*length = 0; data && *length < (size_t)status.st_size;) {
        ssize_t count = pread(fd, data + *length, (size_t)status.st_size - *length, (off_t)*length);
        if (count <= 0) break;
        *length += (size_t)count;
    }
    return data;
}

static void start(uint32_t id, uint32_t flags, struct reader *in, const struct command_fds *fds) {
    struct exec_body body;
    struct command *command = NULL;
    if ((flags & EXEC_KILL_OTHERS) && kill_others() < 0) return refuse(id, STAGE_ALONE, EBUSY);
    for (int i = 0; i < EXECS_COUNT_MAX && !command; i++)
        if (commands[i].state == COMMAND_NONE) command = &commands[i];
    if (!command) return refuse(id, STAGE_COMMANDS, EAGAIN);
    if (parse_exec_body(in, &body) < 0) return refuse(id, STAGE_REQUEST, EBADMSG);
    *command = (struct command){.id = id, .status = -1, .started_us = now_us(), .oom_kills_before = count_oom_kills()};
    if (acquire_group(&command->group) < 0) {
        refuse(id, STAGE_GROUP, errno);
    } else {
        struct launch what = {&body, id, flags, *fds, &command->group, joins, joins_count, control};
        struct refusal refusal;
        command->pid = launch(&what, &command->status, &refusal);
        if (command->pid > 0) {
            command->state = COMMAND_RUNNING;
            command->deadline_ms = command->started_us / 1000 + body.timeout_ms;
        } else {
            release_group(&command->group);
            refuse(id, refusal.stage, refusal.error);
        }
    }
    free(body.argv);
}

static void on_exec(struct reader *in, const int *fds, int fds_count) {
    uint32_t id = take_u32(in), flags = take_u32(in);
    struct command_fds own = {0, 1, 2};
    int body_fd;
    if (in->bad || sort_fds(flags, fds, fds_count, &body_fd, &own) < 0)
        return refuse(id, STAGE_REQUEST, EPROTO);
    if (body_fd < 0) return start(id, flags, in, &own);
    size_t length = 0;
    uint8_t *data = read_body(body_fd, &length);
    if (!data) return refuse(id, STAGE_REQUEST, E2BIG);
    struct reader body = {data, data + length, 0};
    start(id, flags, &body, &own);
    free(data);
}

static struct command *find_running(uint32_t id) {
    for (int i = 0; i < EXECS_COUNT_MAX; i++)
        if (commands[i].state == COMMAND_RUNNING && commands[i].id == id) return &commands[i];
    return NULL;
}

static void on_kill(struct reader *in) {
    struct command *command = find_running(take_u32(in));
    if (command) kill_tree(command, now_ms());
}

static void on_signal(struct reader *in) {
    struct command *command = find_running(take_u32(in));
    uint32_t number = take_u32(in);
    if (!command || number == 0 || number >= NSIG) return;
    /* Before its setsid it leads no group; what it is sent then waits until it has unblocked signals. */
    if (kill(-command->pid, (int)number) < 0 && errno == ESRCH) kill(command->pid, (int)number);
}

static void on_extend(struct reader *in) {
    uint64_t span = take_u64(in);
    for (int i = 0; i < EXECS_COUNT_MAX; i++) {
        commands[i].deadline_ms += span;
        commands[i].started_us += span * 1000;
    }
}

static void on_sync(void) {
    for (int i = 0; i < EXECS_COUNT_MAX; i++)
        if (commands[i].state != COMMAND_NONE) reply(MSG_RUNNING, &commands[i].id, 1);
    each_end(answer);
    reply(MSG_SYNCED, NULL, 0);
}

/* One packet; 0 if there was none. */
static int on_control(void) {
    struct pollfd ready = {control, POLLIN, 0};
    if (poll(&ready, 1, 0) <= 0) return 0;
    int fds[PACKET_FDS_MAX], fds_count;
    ssize_t length = receive_packet(control, packet, sizeof packet, fds, &fds_count);
    if (length <= 0) _exit(0);
    struct reader in = {packet, packet + length, 0};
    switch (take_u32(&in)) {
    case MSG_EXEC: on_exec(&in, fds, fds_count); break;
    case MSG_KILL: on_kill(&in); break;
    case MSG_SIGNAL: on_signal(&in); break;
    case MSG_EXTEND: on_extend(&in); break;
    case MSG_SYNC: on_sync(); break;
    default: _exit(1);
    }
    for (int i = 0; i < fds_count; i++) close(fds[i]);
    return 1;
}

static int block_signals(void) {
    sigset_t all, children;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    return signalfd(-1, &children, SFD_CLOEXEC | SFD_NONBLOCK);
}

void guest_main(int control_fd, int command_group, int oom_fd, const int *join_fds, int join_fds_count) {
    control = control_fd, oom_file = oom_fd, joins = join_fds, joins_count = join_fds_count;
    prctl(PR_SET_NAME, "init");
    int signals = block_signals();
    open_groups(command_group);
    open_terminals();
    if (signals < 0) _exit(1);
    reply(MSG_READY, NULL, 0);
    for (;;) {
        int rest_ms = advance();
        struct pollfd fds[2 + EXECS_COUNT_MAX] = {{control, POLLIN, 0}, {signals, POLLIN, 0}};
        for (int i = 0; i < EXECS_COUNT_MAX; i++)
            fds[2 + i] = (struct pollfd){commands[i].state == COMMAND_RUNNING ? commands[i].status : -1, POLLIN, 0};
        poll(fds, 2 + EXECS_COUNT_MAX, rest_ms);
        for (int i = 0; i < EXECS_COUNT_MAX; i++)
            if (fds[2 + i].revents) has_given_up(&commands[i]);
        struct signalfd_siginfo info[16];
        if (fds[1].revents)
            while (read(signals, info, sizeof info) > 0) {
            }
        /* All that was sent, before time is looked at: after a pause EXTEND lies here, and the deadlines are long over. */
        while (on_control()) continue;
        reap();
    }
}
