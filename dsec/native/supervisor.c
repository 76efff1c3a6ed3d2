/* Command trees where the guest may make no cgroups (pid 1 of a Docker container).
 *
 * Between the guest and each command's own process stands a supervisor, a child subreaper: whatever
 * forks twice or loses its parent becomes the supervisor's child, and so stays below it.  It waits and
 * does nothing else; the guest, which nobody inside can kill, finds the tree by the parents in /proc.
 * A supervisor ends with its command, and what is left then goes on as background of the sandbox.
 *
 * Weaker than a cgroup in one way: commands have the supervisor's user, and may kill it.  The command
 * then becomes the guest's own child and is still waited for, timed and killed, but not those of its
 * processes that had lost their parents before.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest.h"

#define PROCESSES_MAX 32768
#define STOP_PASSES_MAX 16
/* How long the guest waits for a supervisor to start its command: 500 x 10 ms. */
#define START_POLL_MS 10
#define START_POLLS_MAX 500
#define KILLED_STATUS 9 /* a wait status: death by SIGKILL */
#define NO_LEADER (-1)

/* One page of these is shared with the supervisors.  `supervisor` 0: none, or it was killed.  `leader` is the
 * command's own process, or before it has said that it runs a number below NO_LEADER, another one for each attempt. */
struct supervised {
    pid_t supervisor, leader;
    int is_used, is_dying, error;
};

static struct supervised *table;
static pid_t last_ticket = NO_LEADER;

int is_supervising(void) {
    return table != NULL;
}

int start_supervising(void) {
    void *page = mmap(NULL, EXECS_COUNT_MAX * sizeof *table, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) return -1;
    table = page;
    return 0;
}

int acquire_supervised(struct exec_group *out) {
    for (uint32_t i = 0; i < EXECS_COUNT_MAX; i++) {
        if (table[i].is_used) continue;
        table[i] = (struct supervised){.is_used = 1};
        *out = (struct exec_group){.number = i, .directory = -1, .events = -1, .was_killed = 0};
        return 0;
    }
    errno = EAGAIN;
    return -1;
}

void release_supervised(const struct exec_group *group) {
    table[group->number].is_used = 0;
}

/* The supervisor's life.  With `is_dying` it stays until its whole tree is reaped.  Else it leaves its command's end
 * to the guest, which inherits it: whoever kills us between reaping an end and telling it would make it nobody's. */
static _Noreturn void stay(const struct supervised *entry) {
    siginfo_t child;
    for (;;) {
        int is_found = waitid(P_ALL, 0, &child, WEXITED | WNOWAIT) == 0;
        if (!is_found && errno != EINTR) break;
        if (!is_found) continue;
        if (child.si_pid == entry->leader && !entry->is_dying) break;
        waitpid(child.si_pid, NULL, 0);
    }
    _exit(0);
}

/* Who comes first decides: the command's process before it runs, or the guest when it waits no longer. */
static int claim(struct supervised *entry, pid_t ticket, pid_t leader) {
    return __sync_bool_compare_and_swap(&entry->leader, ticket, leader);
}

/* In the supervisor's process; returns in the command's, with 0.  The command may kill its supervisor before that
 * gets to say anything, so it is the command itself that says that it runs: else it would be started again. */
static pid_t start_leader(struct supervised *entry, pid_t ticket, int started) {
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    pid_t leader = (pid_t)syscall(SYS_clone, SIGCHLD, 0L, 0L, 0L, 0L);
    if (leader == 0) {
        if (!claim(entry, ticket, getpid())) _exit(127);
        close(started);
        return 0;
    }
    if (leader < 0) entry->error = errno;
    syscall(SYS_close_range, 3, ~0U, 0); /* `started` too, which is the word to the guest */
    stay(entry);
}

/* Until the supervisor has started its command, or is no more; whoever stops it on its way is undone. */
static void await_leader(pid_t supervisor, int started) {
    struct pollfd ready = {started, POLLIN, 0};
    for (int i = 0; i < START_POLLS_MAX && poll(&ready, 1, START_POLL_MS) <= 0; i++) kill(supervisor, SIGCONT);
}

pid_t launch_supervised(const struct exec_group *group) {
    struct supervised *entry = &table[group->number];
    int started[2];
    if (pipe2(started, O_CLOEXEC) < 0) return -1;
    pid_t ticket = --last_ticket;
    entry->leader = ticket;
    entry->error = 0;
    pid_t supervisor = (pid_t)syscall(SYS_clone, SIGCHLD, 0L, 0L, 0L, 0L);
    if (supervisor == 0) {
        close(started[0]);
        return start_leader(entry, ticket, started[1]);
    }
    int error = errno;
    close(started[1]);
    if (supervisor > 0) await_leader(supervisor, started[0]);
    close(started[0]);
    entry->supervisor = supervisor > 0 ? supervisor : 0;
    if (supervisor > 0 && !claim(entry, ticket, NO_LEADER)) return entry->leader;
    if (supervisor > 0) forget_supervised(group);
    errno = supervisor < 0 ? error : entry->error ? entry->error : EAGAIN;
    return -1;
}

void forget_supervised(const struct exec_group *group) {
    struct supervised *entry = &table[group->number];
    kill(entry->supervisor, SIGKILL); /* it may have been stopped */
    waitpid(entry->supervisor, NULL, 0);
    entry->supervisor = 0;
}

pid_t attribute_end(pid_t reaped, int *status) {
    for (int i = 0; table && i < EXECS_COUNT_MAX; i++) {
        struct supervised *entry = &table[i];
        if (!entry->is_used || entry->supervisor != reaped) continue;
        entry->supervisor = 0;
        if (kill(entry->leader, 0) == 0) return 0; /* our own child now, ended or not */
        *status = KILLED_STATUS;
        return entry->leader;
    }
    return reaped;
}

struct process {
    pid_t pid, parent;
    int is_in;
};

static struct process processes[PROCESSES_MAX];

static int read_processes(void) {
    DIR *proc = opendir("/proc");
    struct dirent *item;
    int count = 0;
    while (proc && count < PROCESSES_MAX && (item = readdir(proc))) {
        char path[300], text[512];
        pid_t pid = (pid_t)atoi(item->d_name);
        if (pid <= 1) continue;
        snprintf(path, sizeof path, "/proc/%d/stat", pid);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        ssize_t length = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
        if (fd >= 0) close(fd);
        if (length <= 0) continue;
        text[length] = 0;
        const char *name_end = strrchr(text, ')'); /* a name may hold anything, parentheses too */
        int parent;
        if (name_end && sscanf(name_end + 1, " %*c %d", &parent) == 1)
            processes[count++] = (struct process){pid, parent, 0};
    }
    if (proc) closedir(proc);
    return count;
}

/* Sends `number` to all below the supervisor, or to the orphaned command and all below; returns how many. */
static int signal_tree(const struct supervised *entry, int number) {
    pid_t root = entry->supervisor ? entry->supervisor : entry->leader;
    int count = read_processes(), found = 0, grew = 1;
    for (int i = 0; i < count; i++) processes[i].is_in = !entry->supervisor && processes[i].pid == root;
    while (grew) {
        grew = 0;
        for (int i = 0; i < count; i++) {
            int is_below = processes[i].parent == root;
            for (int j = 0; j < count && !is_below; j++)
                is_below = processes[j].is_in && processes[j].pid == processes[i].parent;
            if (is_below && !processes[i].is_in) processes[i].is_in = grew = 1;
        }
    }
    for (int i = 0; i < count; i++)
        if (processes[i].is_in && kill(processes[i].pid, number) == 0) found++;
    return found;
}

/* Stopped processes do not fork: when a pass finds no more than the one before, the tree is whole. */
void kill_supervised(const struct exec_group *group) {
    struct supervised *entry = &table[group->number];
    entry->is_dying = 1;
    for (int pass = 0, before = -1, found = 0; pass < STOP_PASSES_MAX && found != before; pass++) {
        before = found;
        found = signal_tree(entry, SIGSTOP);
    }
    has_supervised(group);
}

/* Kills what it finds: one that another command set going again, or that was born between two passes. */
int has_supervised(const struct exec_group *group) {
    const struct supervised *entry = &table[group->number];
    if (entry->supervisor) kill(entry->supervisor, SIGCONT);
    return signal_tree(entry, SIGKILL) > 0;
}
