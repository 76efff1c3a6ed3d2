/* Giving up power, in the order that keeps each next step possible: limits, network, user
 * namespace, uid, capabilities, no_new_privs, seccomp. */
#define _GNU_SOURCE
#include <linux/capability.h>
#include <net/if.h>
#include <sched.h>
#include <grp.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "sandbox.h"
#include "seccomp.h"

#define MUST(step, expression) \
    if ((expression) < 0) fail(step)

#define CAPABILITY(name) (1ULL << (name))
/* What root needs for its own files and processes.  All count within the user namespace only,
 * and the mount, network, pid, uts and ipc namespaces do not belong to that. */
#define KEPT_CAPABILITIES \
    (CAPABILITY(CAP_CHOWN) | CAPABILITY(CAP_DAC_OVERRIDE) | CAPABILITY(CAP_FOWNER) | CAPABILITY(CAP_FSETID) | \
     CAPABILITY(CAP_KILL) | CAPABILITY(CAP_SETUID) | CAPABILITY(CAP_SETGID) | CAPABILITY(CAP_SETFCAP))

/* Fixed, so that no limit of the host shows inside; cgroups are what bounds a sandbox.  Lower only
 * where the host gives us less and we may not raise it (no CAP_SYS_RESOURCE). */
void set_limits(void) {
    static const struct {
        int what;
        rlim_t soft, hard;
    } limits[] = {
        {RLIMIT_CORE, 0, 0},
        {RLIMIT_NOFILE, 1024, 65536},
        {RLIMIT_STACK, 8 << 20, RLIM_INFINITY},
        {RLIMIT_MEMLOCK, 8 << 20, 8 << 20},
        {RLIMIT_NPROC, 32768, 32768},
        {RLIMIT_SIGPENDING, 16384, 16384},
        {RLIMIT_MSGQUEUE, 819200, 819200},
        {RLIMIT_NICE, 0, 0},
        {RLIMIT_RTPRIO, 0, 0},
        {RLIMIT_CPU, RLIM_INFINITY, RLIM_INFINITY},
        {RLIMIT_FSIZE, RLIM_INFINITY, RLIM_INFINITY},
        {RLIMIT_DATA, RLIM_INFINITY, RLIM_INFINITY},
        {RLIMIT_AS, RLIM_INFINITY, RLIM_INFINITY},
    };
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
        __rlimit_resource_t what = (__rlimit_resource_t)limits[i].what;
        struct rlimit limit = {limits[i].soft, limits[i].hard}, given;
        if (setrlimit(what, &limit) == 0) continue;
        MUST("getrlimit", getrlimit(what, &given));
        if (limit.rlim_max > given.rlim_max) limit.rlim_max = given.rlim_max;
        if (limit.rlim_cur > limit.rlim_max) limit.rlim_cur = limit.rlim_max;
        MUST("setrlimit", setrlimit(what, &limit));
    }
}

static void raise_loopback(void) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    MUST("socket for lo", fd);
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    MUST("raise lo", ioctl(fd, SIOCSIFFLAGS, &request));
    close(fd);
}

static void set_capabilities(const char *step, uint64_t wanted) {
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    uint32_t low = (uint32_t)wanted, high = (uint32_t)(wanted >> 32);
    struct __user_cap_data_struct data[2] = {{low, low, 0}, {high, high, 0}};
    MUST(step, syscall(SYS_capset, &header, data));
}

/* The uid comes first: no uid inside the namespace is the guest's.  Only the capability to join is
 * carried over the change, and joining replaces it by those of the namespace. */
static void enter_user_namespace(int user_namespace, uint32_t guest_uid) {
    MUST("keep capabilities", prctl(PR_SET_KEEPCAPS, 1));
    MUST("setgroups", setgroups(0, NULL));
    MUST("setresgid", setresgid(guest_uid, guest_uid, guest_uid));
    MUST("setresuid", setresuid(guest_uid, guest_uid, guest_uid));
    set_capabilities("keep the capability to join", CAPABILITY(CAP_SYS_ADMIN));
    MUST("join the user namespace", setns(user_namespace, CLONE_NEWUSER));
}

static void drop_capabilities(void) {
    for (int capability = 0; prctl(PR_CAPBSET_READ, capability) >= 0; capability++)
        if (!(KEPT_CAPABILITIES & CAPABILITY(capability)))
            MUST("drop a bounding capability", prctl(PR_CAPBSET_DROP, capability));
    set_capabilities("capset", KEPT_CAPABILITIES);
}

void confine(const char *hostname, const struct sandbox_setup *setup) {
    MUST("sethostname", sethostname(hostname, strlen(hostname)));
    set_limits();
    raise_loopback();
    enter_user_namespace(setup->user_namespace, setup->first_uid + GUEST_UID);
    drop_capabilities();
    MUST("not dumpable", prctl(PR_SET_DUMPABLE, 0));
    MUST("die with the spawner", prctl(PR_SET_PDEATHSIG, SIGKILL));
    MUST("no_new_privs", prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    MUST("seccomp", install_seccomp());
}
