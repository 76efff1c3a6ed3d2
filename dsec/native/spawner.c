/* The spawner: one root process that makes, counts and ends sandboxes for one Python process.
 *
 * A create is a few file writes and one clone3; the child builds its sandbox by itself and reports
 * to Python on the guest socket, so creates run side by side and nothing here waits for them.
 * The spawner outlives no owner: at EOF on the control socket, or when the owner has died (a fork of it
 * may still hold the socket), it kills every guest (pid 1, and with it the pid namespace), removes
 * the cgroups and exits.  If it is killed itself, PR_SET_PDEATHSIG
 * ends the guests and only empty cgroups are left, which the next start sweeps.
 *
 * Invariants:
 *   1. A slot is reported GONE after its last process was reaped and its last cgroup removed.
 *   2. The user namespace of a slot is used by one sandbox at a time; while a sandbox runs it is the
 *      guest that keeps it, so that the fd table, which every child copies, does not grow with N.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "sandbox.h"

enum slot_state { SLOT_FREE = 0, SLOT_ALIVE, SLOT_REMOVING };

struct slot {
    enum slot_state state;
    pid_t pid;
    int user_namespace; /* -1: none kept */
};

static struct {
    int control, signals, owner, proc, claim, own_users;
    uint32_t first_uid;
    struct hierarchies hierarchies;
    int parents[HIERARCHIES_COUNT_MAX];
    char names[HIERARCHIES_COUNT_MAX][128];
    struct slot slots[SLOTS_COUNT_MAX];
    uint32_t removing_count;
    uint8_t packet[PACKET_BYTES_MAX];
} host;

static int report_failure(uint32_t slot, const char *step, int error) {
    struct message out = {.length = 0};
    put_u32(&out, MSG_FAILED);
    put_u32(&out, slot);
    put_string(&out, step);
    put_u32(&out, (uint32_t)error);
    return send_message(host.control, &out, -1);
}

static int report(enum message_type type, uint32_t value) {
    struct message out = {.length = 0};
    put_u32(&out, type);
    put_u32(&out, value);
    return send_message(host.control, &out, -1);
}

/* -- start ------------------------------------------------------------------------------------ */

static const char *open_hierarchies(struct reader *in) {
    uint32_t count = take_u32(in);
    if (count == 0 || count > HIERARCHIES_COUNT_MAX) return errno = EPROTO, "read INIT";
    for (uint32_t i = 0; i < count; i++) {
        const char *parent = take_string(in, NULL), *name = take_string(in, NULL);
        if (in->bad || strlen(name) >= sizeof host.names[i]) return errno = EPROTO, "read INIT";
        strcpy(host.names[i], name);
        host.parents[i] = open(parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (host.parents[i] < 0) return "open a cgroup hierarchy";
        host.hierarchies.fds[i] = openat(host.parents[i], name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (host.hierarchies.fds[i] < 0) return "open our cgroup";
        host.hierarchies.count = i + 1;
    }
    return in->bad || in->at != in->end ? (errno = EPROTO, "read INIT") : NULL;
}

static const char *initialise(void) {
    int fds[PACKET_FDS_MAX], fds_count;
    ssize_t length = receive_packet(host.control, host.packet, sizeof host.packet, fds, &fds_count);
    if (length <= 0 || fds_count != 1) return errno = EPROTO, "receive INIT";
    struct reader in = {host.packet, host.packet + length, 0};
    if (take_u32(&in) != MSG_INIT) return errno = EPROTO, "receive INIT";
    struct rlimit files = {8192, 8192};
    if (setrlimit(RLIMIT_NOFILE, &files) < 0) return "raise RLIMIT_NOFILE";
    const char *step = open_hierarchies(&in);
    if (step) return step;
    host.claim = claim_uid_block(&host.first_uid);
    if (host.claim < 0) return "claim a block of uids";
    step = build_base(fds[0]);
    close(fds[0]);
    if (step) return step;
    host.proc = open("/base/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    host.own_users = host.proc < 0 ? -1 : openat(host.proc, "self/ns/user", O_RDONLY | O_CLOEXEC);
    return host.own_users < 0 ? "open /proc" : NULL;
}

static void take_signals(void) {
    sigset_t handled;
    sigemptyset(&handled);
    for (int number = 1; number < NSIG; number++)
        if (number != SIGKILL && number != SIGSTOP) signal(number, SIG_DFL);
    sigaddset(&handled, SIGCHLD);
    sigaddset(&handled, SIGTERM);
    sigaddset(&handled, SIGINT);
    sigaddset(&handled, SIGHUP);
    sigprocmask(SIG_SETMASK, &handled, NULL);
    host.signals = signalfd(-1, &handled, SFD_CLOEXEC | SFD_NONBLOCK);
}

/* -- create and destroy ----------------------------------------------------------------------- */

static int parse_create(struct reader *in, struct create_request *out) {
    out->slot = take_u32(in);
    out->disk_bytes = take_u64(in);
    out->hostname = take_string(in, NULL);
    out->guest_group = take_string(in, NULL);
    out->command_group = take_string(in, NULL);
    out->oom_hierarchy = take_u32(in);
    out->oom_file = take_string(in, NULL);
    out->operations = *in;
    if (in->bad || out->slot >= SLOTS_COUNT_MAX || host.slots[out->slot].state != SLOT_FREE) return -1;
    if (out->oom_hierarchy >= host.hierarchies.count) return -1;
    return check_cgroup_operations(out->operations, host.hierarchies.count);
}

static uint32_t slot_uid(uint32_t slot) {
    return host.first_uid + slot * UIDS_PER_SLOT;
}

static int remove_cgroups(uint32_t slot) {
    char name[32];
    int result = 0;
    snprintf(name, sizeof name, "s%u", slot);
    for (uint32_t i = 0; i < host.hierarchies.count; i++)
        if (remove_cgroup_tree(host.hierarchies.fds[i], name) < 0) result = -1;
    return result;
}

/* Steps of a create; on failure gives the step, with errno, and leaves the slot's cgroups to the caller. */
static const char *spawn(struct create_request *request, int *guest_socket) {
    struct slot *slot = &host.slots[request->slot];
    uint32_t uid = slot_uid(request->slot);
    if (slot->user_namespace < 0) slot->user_namespace = create_user_namespace(host.proc, uid);
    if (slot->user_namespace < 0) return "create a user namespace";
    const char *step = apply_cgroup_operations(request->operations, &host.hierarchies, uid + GUEST_UID);
    if (step) return step;
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) return "make the guest socket";
    int group = openat(host.hierarchies.fds[0], request->guest_group, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    struct clone_args args = {
        .flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET | CLONE_INTO_CGROUP,
        .exit_signal = SIGCHLD,
        .cgroup = (uint64_t)group,
    };
    pid_t pid = group < 0 ? -1 : (pid_t)syscall(SYS_clone3, &args, sizeof args);
    if (pid == 0) {
        struct sandbox_setup setup = {request, &host.hierarchies, pair[1], slot->user_namespace, uid};
        become_sandbox(&setup);
    }
    int error = errno;
    if (group >= 0) close(group);
    close(pair[1]);
    if (pid < 0) {
        close(pair[0]);
        errno = error;
        return group < 0 ? "open the guest's cgroup" : "clone3";
    }
    slot->pid = pid;
    slot->state = SLOT_ALIVE;
    close(slot->user_namespace);
    slot->user_namespace = -1;
    *guest_socket = pair[0];
    return NULL;
}

static void begin_removal(uint32_t index) {
    host.slots[index].state = SLOT_REMOVING;
    host.removing_count++;
}

static int on_create(struct reader *in) {
    struct create_request request;
    if (parse_create(in, &request) < 0) return -1;
    int guest_socket;
    const char *step = spawn(&request, &guest_socket);
    if (step) {
        int result = report_failure(request.slot, step, errno);
        begin_removal(request.slot);
        return result;
    }
    struct message out = {.length = 0};
    put_u32(&out, MSG_CREATED);
    put_u32(&out, request.slot);
    put_u32(&out, (uint32_t)host.slots[request.slot].pid);
    int result = send_message(host.control, &out, guest_socket);
    close(guest_socket);
    return result;
}

static void kill_guest(struct slot *slot) {
    char path[64];
    snprintf(path, sizeof path, "%d/ns/user", slot->pid);
    int kept = openat(host.proc, path, O_RDONLY | O_CLOEXEC);
    kill(slot->pid, SIGKILL);
    /* Killed before it joined its user namespace, it was still in ours: keep that one not. */
    struct stat theirs, ours;
    if (kept >= 0 && (fstat(kept, &theirs) < 0 || fstat(host.own_users, &ours) < 0 || theirs.st_ino == ours.st_ino)) {
        close(kept);
        kept = -1;
    }
    slot->user_namespace = kept;
}

static int on_destroy(struct reader *in) {
    uint32_t index = take_u32(in);
    if (in->bad || index >= SLOTS_COUNT_MAX) return -1;
    if (host.slots[index].state == SLOT_ALIVE) kill_guest(&host.slots[index]);
    return 0; /* not alive: GONE was sent, or will be */
}

static void reap(void) {
    pid_t pid;
    while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
        for (uint32_t i = 0; i < SLOTS_COUNT_MAX; i++)
            if (host.slots[i].state == SLOT_ALIVE && host.slots[i].pid == pid) begin_removal(i);
}

static int finish_removals(void) {
    for (uint32_t i = 0; i < SLOTS_COUNT_MAX && host.removing_count > 0; i++) {
        if (host.slots[i].state != SLOT_REMOVING || remove_cgroups(i) < 0) continue;
        host.slots[i].state = SLOT_FREE;
        host.removing_count--;
        if (report(MSG_GONE, i) < 0) return -1;
    }
    return 0;
}

/* -- the loop and the end --------------------------------------------------------------------- */

static int on_control(void) {
    int fds[PACKET_FDS_MAX], fds_count;
    ssize_t length = receive_packet(host.control, host.packet, sizeof host.packet, fds, &fds_count);
    for (int i = 0; i < fds_count; i++) close(fds[i]);
    if (length <= 0) return -1;
    struct reader in = {host.packet, host.packet + length, 0};
    switch (take_u32(&in)) {
    case MSG_CREATE: return on_create(&in);
    case MSG_DESTROY: return on_destroy(&in);
    default: return -1;
    }
}

static int on_signal(void) {
    struct signalfd_siginfo info;
    while (read(host.signals, &info, sizeof info) == (ssize_t)sizeof info)
        if (info.ssi_signo != SIGCHLD) return -1;
    reap();
    return 0;
}

static void serve(void) {
    for (;;) {
        if (finish_removals() < 0) return;
        struct pollfd ready[3] = {{host.control, POLLIN, 0}, {host.signals, POLLIN, 0}, {host.owner, POLLIN, 0}};
        if (poll(ready, 3, host.removing_count ? 2 : -1) < 0 && errno != EINTR) return;
        if (ready[2].revents) return;
        if (ready[1].revents && on_signal() < 0) return;
        if (ready[0].revents && on_control() < 0) return;
    }
}

/* Kills and reaps all guests, then removes what they leave; two seconds are for a busy kernel. */
static void end_all(void) {
    for (uint32_t i = 0; i < SLOTS_COUNT_MAX; i++)
        if (host.slots[i].state == SLOT_ALIVE) kill(host.slots[i].pid, SIGKILL);
    while (waitpid(-1, NULL, 0) > 0 || errno == EINTR) {
    }
    for (int attempt = 0; attempt < 400; attempt++) {
        int left = 0;
        for (uint32_t i = 0; i < host.hierarchies.count; i++)
            if (remove_cgroup_tree(host.parents[i], host.names[i]) < 0) left = 1;
        if (!left) return;
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
    }
}

int spawner_main(int control) {
    host.control = control;
    for (uint32_t i = 0; i < SLOTS_COUNT_MAX; i++) host.slots[i].user_namespace = -1;
    fcntl(control, F_SETFD, FD_CLOEXEC);
    host.owner = (int)syscall(SYS_pidfd_open, getppid(), 0);
    prctl(PR_SET_NAME, "dsec-spawner");
    take_signals();
    const char *step = initialise();
    if (step) report_failure(NO_SLOT, step, errno);
    else if (report(MSG_INITED, host.first_uid) == 0) serve();
    end_all();
    return step ? 1 : 0;
}
