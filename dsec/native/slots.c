/* The spawner's sandboxes: made, ended, and reported gone, by slot.
 *
 * A create is a few file writes and one clone3; the child builds its sandbox by itself and reports
 * to Python on the guest socket, so creates run side by side and nothing here waits for them.
 *
 * What is costly to make is kept for the next sandbox, up to a bound: the user namespace and the cgroups stay with the
 * slot, network namespaces go to a pool.  The kernel walks every file system of the host when a memory cgroup
 * ends, so with thousands of sandboxes its end costs more than all of a create.
 *
 * Invariants:
 *   1. A slot is reported GONE after its last process was reaped, and its cgroups removed or emptied for the next.
 *   2. Cgroups are used again only where the operations write each file that those before wrote: no limit of another
 *      sandbox is left.
 *   3. The user namespace of a slot is used by one sandbox at a time; while a sandbox runs it is the guest that keeps
 *      it (and its network), so that the fd table, which every child copies, does not grow with N.
 *   4. No child has the table of the slots, whose pages in use grow with N.
 *   5. No step looks at all slots, or waits for any child, but `end_slots`, SYNC, and now and then `reap_strays`.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "spawner.h"

#define USERS_KEPT_MAX 128   /* user namespaces of free slots */
#define CGROUPS_KEPT_MAX 128 /* free slots that have cgroups */
#define PID_BUCKETS_COUNT 8192
#define PLAN_BYTES_MAX 2044

enum slot_state { SLOT_FREE = 0, SLOT_ALIVE, SLOT_DYING, SLOT_REMOVING };

struct slot {
    enum slot_state state;
    pid_t pid;
    int users, network; /* namespaces of a dead sandbox; -1: none kept */
    struct slot *next;  /* with the same pid bucket */
    char command_group[64]; /* of hierarchy 0 */
};

struct plan {
    uint32_t bytes; /* 0: the slot has no cgroups, or not all that a plan says */
    uint8_t operations[PLAN_BYTES_MAX];
};

/* Apart from our other memory: its pages would be paid for by each child that had them, and by us when we write. */
static struct table {
    struct slot slots[SLOTS_COUNT_MAX];
    struct plan plans[SLOTS_COUNT_MAX]; /* what the cgroups of each slot are as of */
    struct slot *by_pid[PID_BUCKETS_COUNT];
} *table;
static struct slot *slots; /* of the table */
static uint32_t removing[SLOTS_COUNT_MAX], removing_count; /* in no order */
static uint32_t dying[SLOTS_COUNT_MAX], dying_count;       /* killed by DESTROY, not reaped; in no order */
static uint32_t users_kept, cgroups_kept;

const char *open_slots(void) {
    table = mmap(NULL, sizeof *table, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (table == MAP_FAILED) return "make the table of slots";
    if (madvise(table, sizeof *table, MADV_DONTFORK) < 0) return "keep the table of slots from the sandboxes";
    slots = table->slots;
    for (uint32_t i = 0; i < spawner.slots_count; i++) slots[i].users = slots[i].network = -1;
    return NULL;
}

static uint32_t index_of(const struct slot *slot) {
    return (uint32_t)(slot - slots);
}

/* -- create ------------------------------------------------------------------------------------ */

static int parse_create(struct reader *in, struct create_request *out) {
    out->slot = take_u32(in);
    out->disk_bytes = take_u64(in);
    out->hostname = take_string(in, NULL);
    out->guest_group = take_string(in, NULL);
    out->command_group = take_string(in, NULL);
    out->oom_hierarchy = take_u32(in);
    out->oom_file = take_string(in, NULL);
    out->flags = take_u32(in);
    out->layers_count = take_u32(in);
    if (in->bad || out->layers_count > SANDBOX_LAYERS_COUNT_MAX) return -1;
    for (uint32_t i = 0; i < out->layers_count; i++)
        if (!is_mounted(out->layers[i] = take_u32(in))) return -1;
    out->operations = *in;
    if (in->end - in->at > PLAN_BYTES_MAX) return -1;
    if (in->bad || out->slot >= spawner.slots_count || slots[out->slot].state != SLOT_FREE) return -1;
    if (strlen(out->command_group) >= sizeof slots->command_group) return -1;
    if (!(out->flags & CREATE_HOST_USR) && out->layers_count == 0) return -1;
    if (out->oom_hierarchy >= spawner.hierarchies.count) return -1;
    return check_cgroup_operations(out->operations, spawner.hierarchies.count);
}

static int take_users(struct slot *slot, uint32_t uid) {
    int users = slot->users;
    if (users < 0) return create_user_namespace(spawner.proc, uid);
    slot->users = -1;
    users_kept--;
    return users;
}

static struct plan *plan_of(const struct slot *slot) {
    return &table->plans[index_of(slot)];
}

static int remove_cgroups(struct slot *slot) {
    char name[32];
    int result = 0;
    snprintf(name, sizeof name, "s%u", index_of(slot));
    for (uint32_t i = 0; i < spawner.hierarchies.count; i++)
        if (remove_cgroup_tree(spawner.hierarchies.fds[i], name) < 0) result = -1;
    if (result < 0) return -1;
    plan_of(slot)->bytes = 0;
    return 0;
}

/* Remembers what the cgroups are, if all of it could be written. */
static const char *apply_plan(struct slot *slot, struct reader operations, uint32_t owner_uid, int is_new) {
    struct plan *plan = plan_of(slot);
    const char *step = apply_cgroup_operations(operations, &spawner.hierarchies, owner_uid, is_new);
    plan->bytes = step ? 0 : (uint32_t)(operations.end - operations.at);
    memcpy(plan->operations, operations.at, plan->bytes);
    return step;
}

/* Cgroups that are there get other limits; where a step failed, they are not to be used again. */
static const char *adjust_cgroups(struct slot *slot, struct reader operations) {
    const struct plan *plan = plan_of(slot);
    if (!plan->bytes) return errno = ENOENT, "look at the limits that there are";
    struct reader present = {plan->operations, plan->operations + plan->bytes, 0};
    size_t bytes = (size_t)(operations.end - operations.at);
    if (plan->bytes == bytes && memcmp(plan->operations, operations.at, bytes) == 0) return NULL;
    if (!are_alike(present, operations)) return errno = EINVAL, "compare the limits with those that there are";
    return apply_plan(slot, operations, 0, 0);
}

/* A free slot may have its cgroups still. */
static const char *make_cgroups(struct slot *slot, const struct create_request *request, uint32_t uid) {
    if (plan_of(slot)->bytes) {
        cgroups_kept--;
        if (adjust_cgroups(slot, request->operations) == NULL) return NULL;
        if (remove_cgroups(slot) < 0) return "remove the cgroups of the last sandbox";
    }
    strcpy(slot->command_group, request->command_group);
    return apply_plan(slot, request->operations, uid + GUEST_UID, 1);
}

/* The process itself, with its namespaces' fds open; they are the caller's. */
static pid_t clone_guest(const struct create_request *request, struct sandbox_setup *setup, int group) {
    uint64_t flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_INTO_CGROUP;
    struct clone_args args = {
        .flags = setup->network < 0 ? flags | CLONE_NEWNET : flags,
        .exit_signal = SIGCHLD,
        .cgroup = (uint64_t)group,
    };
    pid_t pid = (pid_t)syscall(SYS_clone3, &args, sizeof args);
    if (pid == 0) become_sandbox(request, setup);
    return pid;
}

/* Steps of a create; on failure gives the step, with errno, and leaves the slot's cgroups to the caller. */
static const char *spawn(const struct create_request *request, int *guest_socket) {
    struct slot *slot = &slots[request->slot];
    uint32_t uid = spawner.first_uid + request->slot * UIDS_PER_SLOT;
    const char *step = make_cgroups(slot, request, uid);
    if (step) return step;
    int group = openat(spawner.hierarchies.fds[0], request->guest_group, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (group < 0) return "open the guest's cgroup";
    int pair[2] = {-1, -1}, users = take_users(slot, uid), network = -1;
    pid_t pid = -1;
    if (users < 0) {
        step = "create a user namespace";
    } else if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) {
        step = "make the guest socket";
    } else {
        network = take_network();
        struct sandbox_setup setup = {&spawner.hierarchies, pair[1], users, network, spawner.proc, uid};
        pid = clone_guest(request, &setup, group);
        if (pid < 0) step = "clone3";
    }
    int error = errno, used[] = {group, users, network, pair[1], pid < 0 ? pair[0] : -1};
    for (size_t i = 0; i < sizeof used / sizeof *used; i++)
        if (used[i] >= 0) close(used[i]);
    errno = error;
    if (step) return step;
    slot->pid = pid;
    slot->state = SLOT_ALIVE;
    struct slot **bucket = &table->by_pid[pid % PID_BUCKETS_COUNT];
    slot->next = *bucket;
    *bucket = slot;
    *guest_socket = pair[0];
    return NULL;
}

static void begin_removal(struct slot *slot) {
    slot->state = SLOT_REMOVING;
    removing[removing_count++] = index_of(slot);
}

int on_create(struct reader *in) {
    struct create_request request;
    if (parse_create(in, &request) < 0) return -1;
    int guest_socket;
    const char *step = spawn(&request, &guest_socket);
    if (step) {
        int result = report_failure(MSG_FAILED, request.slot, step, errno);
        begin_removal(&slots[request.slot]);
        return result;
    }
    struct message out = {.length = 0};
    put_u32(&out, MSG_CREATED);
    put_u32(&out, request.slot);
    put_u32(&out, (uint32_t)slots[request.slot].pid);
    int result = send_message(spawner.control, &out, guest_socket);
    close(guest_socket);
    return result;
}

/* -- attach ------------------------------------------------------------------------------------ */

static const char *attach(struct slot *slot, uint64_t disk_bytes, const char *hostname, struct reader operations) {
    if (slot->state != SLOT_ALIVE) return errno = ESRCH, "find the sandbox";
    const char *step = adjust_cgroups(slot, operations);
    if (!step) step = resize_disk(slot->pid, disk_bytes);
    return step ? step : rename_host(slot->pid, hostname);
}

int on_attach(struct reader *in) {
    uint32_t index = take_u32(in);
    uint64_t disk_bytes = take_u64(in);
    const char *hostname = take_string(in, NULL);
    if (in->bad || index >= spawner.slots_count) return -1;
    if (in->end - in->at > PLAN_BYTES_MAX || check_cgroup_operations(*in, spawner.hierarchies.count) < 0) return -1;
    const char *step = attach(&slots[index], disk_bytes, hostname, *in);
    return step ? report_failure(MSG_FAILED, index, step, errno) : report(MSG_ATTACHED, index);
}

/* -- destroy ----------------------------------------------------------------------------------- */

/* A namespace of the guest, to be used again: -1 if it has not left ours yet. */
static int open_namespace(pid_t pid, const char *kind, const struct stat *ours) {
    char path[64];
    struct stat theirs;
    snprintf(path, sizeof path, "%d/ns/%s", pid, kind);
    int fd = openat(spawner.proc, path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0 && (fstat(fd, &theirs) < 0 || theirs.st_ino == ours->st_ino)) {
        close(fd);
        fd = -1;
    }
    return fd;
}

int on_destroy(struct reader *in) {
    uint32_t index = take_u32(in), flags = take_u32(in);
    if (in->bad || index >= spawner.slots_count) return -1;
    struct slot *slot = &slots[index];
    if (slot->state != SLOT_ALIVE) return 0; /* GONE was sent, or will be */
    if (slot->users < 0 && users_kept < USERS_KEPT_MAX) {
        slot->users = open_namespace(slot->pid, "user", &spawner.own_users);
        users_kept += slot->users >= 0;
    }
    if (slot->network < 0 && !(flags & DESTROY_NETWORK))
        slot->network = open_namespace(slot->pid, "net", &spawner.own_network);
    kill(slot->pid, SIGKILL);
    slot->state = SLOT_DYING;
    dying[dying_count++] = index;
    return 0;
}

/* -- the dead ---------------------------------------------------------------------------------- */

static struct slot *take_by_pid(pid_t pid) {
    for (struct slot **at = &table->by_pid[pid % PID_BUCKETS_COUNT]; *at; at = &(*at)->next) {
        struct slot *found = *at;
        if (found->pid != pid) continue;
        *at = found->next;
        return found;
    }
    return NULL;
}

static void bury(pid_t pid) {
    struct slot *slot = take_by_pid(pid);
    if (!slot) return;
    if (slot->network >= 0) keep_network(slot->network);
    slot->network = -1;
    begin_removal(slot);
}

/* Signals merge, so each of those that we killed is looked at, and whoever died by itself waits for `reap_strays`. */
void reap(pid_t pid) {
    if (waitpid(pid, NULL, WNOHANG) == pid) bury(pid);
    for (uint32_t i = 0; i < dying_count;) {
        struct slot *slot = &slots[dying[i]];
        if (slot->state == SLOT_DYING && waitpid(slot->pid, NULL, WNOHANG) == slot->pid) bury(slot->pid);
        if (slot->state == SLOT_DYING) i++;
        else dying[i] = dying[--dying_count];
    }
}

void reap_strays(void) {
    pid_t pid;
    while ((pid = waitpid(-1, NULL, WNOHANG)) > 0) bury(pid);
}

/* Empties the cgroups for the next sandbox of the slot; -1 if they cannot be used again. */
static int keep_cgroups(struct slot *slot) {
    if (!plan_of(slot)->bytes || cgroups_kept == CGROUPS_KEPT_MAX) return -1;
    char file[64];
    snprintf(file, sizeof file, "s%u/cgroup.freeze", index_of(slot));
    int freeze = openat(spawner.hierarchies.fds[0], file, O_WRONLY | O_CLOEXEC);
    int thawed = freeze >= 0 && write(freeze, "0", 1) == 1;
    if (freeze >= 0) close(freeze);
    if (!thawed || empty_cgroup(spawner.hierarchies.fds[0], slot->command_group) < 0) return -1;
    cgroups_kept++;
    return 0;
}

int finish_removals(void) {
    for (uint32_t i = 0; i < removing_count;) {
        struct slot *slot = &slots[removing[i]];
        if (keep_cgroups(slot) < 0 && remove_cgroups(slot) < 0) {
            i++;
            continue;
        }
        removing[i] = removing[--removing_count];
        slot->state = SLOT_FREE;
        if (report(MSG_GONE, index_of(slot)) < 0) return -1;
    }
    return 0;
}

int is_removing(void) {
    return removing_count > 0;
}

/* -- all of them ------------------------------------------------------------------------------- */

int on_sync(void) {
    if (report_start() < 0 || report_layers() < 0) return -1;
    for (uint32_t i = 0; i < spawner.slots_count; i++) {
        if (slots[i].state == SLOT_FREE) continue;
        struct message out = {.length = 0};
        put_u32(&out, MSG_ALIVE);
        put_u32(&out, i);
        put_u32(&out, slots[i].state == SLOT_ALIVE ? (uint32_t)slots[i].pid : 0);
        if (send_message(spawner.control, &out, -1) < 0) return -1;
    }
    return report(MSG_SYNCED, 0);
}

void end_slots(void) {
    for (uint32_t i = 0; i < spawner.slots_count; i++)
        if (slots[i].state == SLOT_ALIVE) kill(slots[i].pid, SIGKILL); /* the dying are killed already */
    while (waitpid(-1, NULL, 0) > 0 || errno == EINTR) {
    }
}
