/* The spawner: one root process that makes, counts and ends sandboxes (slots.c) for one Python process.
 *
 * It outlives no owner: at EOF on the control socket it kills every guest (pid 1, and with it the pid
 * namespace), removes the cgroups and exits.  Without INIT_KEPT it does so too when the process that started
 * it has died, since a fork of that may still hold the socket; with it, a keeper holds the socket, and
 * the next Python process goes on with what is there.  If the spawner is killed itself, PR_SET_PDEATHSIG
 * ends the guests and only empty cgroups are left, which the next start sweeps.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "spawner.h"

/* Ours: the control socket, cgroups, spare namespaces, an image while it is mounted, and some while a child is made. */
#define FILES_COUNT_MAX 4096

/* How long the death of a guest that nobody killed may go unnoticed, where its signal merged with another's. */
#define STRAYS_MS 500

struct spawner spawner;
static struct {
    int signals, owner; /* owner: -1 if we outlive it */
    uint64_t strays_ms; /* when to look at every child; 0: none died lately */
    int parents[HIERARCHIES_COUNT_MAX];
    char names[HIERARCHIES_COUNT_MAX][128];
    uint8_t packet[PACKET_BYTES_MAX];
} host;

int report_failure(enum message_type type, uint32_t number, const char *step, int error) {
    struct message out = {.length = 0};
    put_u32(&out, type);
    put_u32(&out, number);
    put_string(&out, step);
    put_u32(&out, (uint32_t)error);
    return send_message(spawner.control, &out, -1);
}

int report_start(void) {
    struct message out = {.length = 0};
    put_u32(&out, MSG_INITED);
    put_u32(&out, spawner.first_uid);
    put_u32(&out, spawner.slots_count);
    put_u32(&out, PROTOCOL_VERSION);
    return send_message(spawner.control, &out, -1);
}

int report(enum message_type type, uint32_t value) {
    struct message out = {.length = 0};
    put_u32(&out, type);
    put_u32(&out, value);
    return send_message(spawner.control, &out, -1);
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
        spawner.hierarchies.fds[i] = openat(host.parents[i], name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (spawner.hierarchies.fds[i] < 0) return "open our cgroup";
        spawner.hierarchies.count = i + 1;
    }
    return in->bad || in->at != in->end ? (errno = EPROTO, "read INIT") : NULL;
}

/* With INIT_KEPT there is no owner to watch. */
static void watch_owner(uint32_t flags) {
    host.owner = flags & INIT_KEPT ? -1 : (int)syscall(SYS_pidfd_open, getppid(), 0);
}

static const char *note_own_namespaces(void) {
    spawner.proc = open("/base/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (spawner.proc < 0) return "open /proc";
    if (fstatat(spawner.proc, "self/ns/user", &spawner.own_users, 0) < 0) return "look at our user namespace";
    if (fstatat(spawner.proc, "self/ns/net", &spawner.own_network, 0) < 0) return "look at our network namespace";
    spawner.uts = openat(spawner.proc, "self/ns/uts", O_RDONLY | O_CLOEXEC);
    return spawner.uts < 0 ? "open our uts namespace" : NULL;
}

static const char *initialise(void) {
    int fds[PACKET_FDS_MAX], fds_count;
    ssize_t length = receive_packet(spawner.control, host.packet, sizeof host.packet, fds, &fds_count);
    if (length <= 0 || fds_count != 1) return errno = EPROTO, "receive INIT";
    struct reader in = {host.packet, host.packet + length, 0};
    if (take_u32(&in) != MSG_INIT) return errno = EPROTO, "receive INIT";
    watch_owner(take_u32(&in));
    spawner.slots_count = take_u32(&in);
    if (spawner.slots_count == 0 || spawner.slots_count > SLOTS_COUNT_MAX) return errno = EPROTO, "read INIT";
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) < 0) return "look at RLIMIT_NOFILE";
    files.rlim_cur = FILES_COUNT_MAX;
    if (files.rlim_max < files.rlim_cur) files.rlim_max = files.rlim_cur; /* never lower: guests may need all of it */
    if (setrlimit(RLIMIT_NOFILE, &files) < 0) return "raise RLIMIT_NOFILE";
    const char *step = open_hierarchies(&in);
    if (step) return step;
    if (claim_uids(spawner.slots_count, &spawner.first_uid) < 0) return "claim uids for the sandboxes";
    step = build_base(fds[0]);
    close(fds[0]);
    return step ? step : note_own_namespaces();
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

/* -- the loop and the end --------------------------------------------------------------------- */

static int on_control(void) {
    int fds[PACKET_FDS_MAX], fds_count, result;
    ssize_t length = receive_packet(spawner.control, host.packet, sizeof host.packet, fds, &fds_count);
    if (length <= 0) return -1;
    struct reader in = {host.packet, host.packet + length, 0};
    switch (take_u32(&in)) {
    case MSG_CREATE: result = on_create(&in); break;
    case MSG_ATTACH: result = on_attach(&in); break;
    case MSG_DESTROY: result = on_destroy(&in); break;
    case MSG_MOUNT: result = on_mount(&in, fds_count == 1 ? fds[0] : -1); break;
    case MSG_UNMOUNT: result = on_unmount(&in); break;
    case MSG_SYNC: result = on_sync(); break;
    default: result = -1;
    }
    for (int i = 0; i < fds_count; i++) close(fds[i]);
    return result;
}

static uint64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static int on_signal(void) {
    struct signalfd_siginfo info;
    while (read(host.signals, &info, sizeof info) == (ssize_t)sizeof info) {
        if (info.ssi_signo != SIGCHLD) return -1;
        reap((pid_t)info.ssi_pid);
        if (host.strays_ms == 0) host.strays_ms = now_ms() + STRAYS_MS;
    }
    return 0;
}

static int poll_timeout(void) {
    if (is_removing()) return 2;
    return host.strays_ms ? STRAYS_MS : -1;
}

static void serve(void) {
    for (;;) {
        if (host.strays_ms && now_ms() >= host.strays_ms) {
            host.strays_ms = 0;
            reap_strays();
        }
        if (finish_removals() < 0) return;
        struct pollfd ready[3] = {{spawner.control, POLLIN, 0}, {host.signals, POLLIN, 0}, {host.owner, POLLIN, 0}};
        if (poll(ready, 3, poll_timeout()) < 0 && errno != EINTR) return;
        if (ready[2].revents) return;
        if (ready[1].revents && on_signal() < 0) return;
        if (ready[0].revents && on_control() < 0) return;
    }
}

/* Two seconds are for a busy kernel. */
static void remove_own_cgroups(void) {
    for (int attempt = 0; attempt < 400; attempt++) {
        int left = 0;
        for (uint32_t i = 0; i < spawner.hierarchies.count; i++)
            if (remove_cgroup_tree(host.parents[i], host.names[i]) < 0) left = 1;
        if (!left) return;
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
    }
}

int spawner_main(int control) {
    drop_other_files(control);
    spawner.control = control;
    fcntl(control, F_SETFD, FD_CLOEXEC);
    prctl(PR_SET_NAME, "dsec-spawner");
    take_signals();
    const char *step = initialise();
    if (!step) step = open_slots();
    if (step) {
        report_failure(MSG_FAILED, NO_SLOT, step, errno);
    } else {
        if (report_start() == 0) serve();
        end_slots();
    }
    remove_own_cgroups();
    return step ? 1 : 0;
}
