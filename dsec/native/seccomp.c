/* The seccomp filter: an allowlist, compiled at start into a short program.
 *
 * Three answers.  Calls of ALLOWED pass.  Calls of REFUSED get EPERM: they exist and we say no.
 * Every other number gets ENOSYS, those of ABSENT by name, so that a libc newer than this list falls back to
 * what it used before (clone3 -> clone, new futex calls -> futex), and a program to plain reads (io_setup).  The numbers are turned into runs of equal
 * answers, because the kernel walks the program once per system call number when it is installed.
 *
 * Some calls depend on arguments: clone (no new namespaces), socket (only families that the
 * network namespace isolates: AF_VSOCK would reach the hypervisor), ioctl (no TIOCSTI), personality.
 *
 * clone3 takes its flags behind a pointer, where a filter cannot look.  The guest needs it for
 * CLONE_INTO_CGROUP, so the filter lets it pass with a 128 bit random key in the two argument
 * registers that the call does not use.  Commands do not know the key: it is wiped by execve, the guest
 * is not dumpable, and reading a filter back takes CAP_SYS_ADMIN.
 */
#define _GNU_SOURCE
#include "seccomp.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "syscalls.h"

#if defined(__x86_64__)
#define THIS_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define THIS_ARCH AUDIT_ARCH_AARCH64
#else
#error "the sandbox filter knows x86_64 and aarch64"
#endif

#define NUMBERS_COUNT 512
#define PROGRAM_MAX 768

enum answer { ANSWER_UNKNOWN = 0, ANSWER_ALLOWED, ANSWER_REFUSED };

static const uint32_t VERDICTS[] = {
    [ANSWER_UNKNOWN] = SECCOMP_RET_ERRNO | ENOSYS,
    [ANSWER_ALLOWED] = SECCOMP_RET_ALLOW,
    [ANSWER_REFUSED] = SECCOMP_RET_ERRNO | EPERM,
};

#define NAMESPACE_FLAGS \
    (CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET)

static uint64_t clone3_key[2];

struct program {
    struct sock_filter code[PROGRAM_MAX];
    unsigned short length;
};

static void emit(struct program *out, uint16_t code, uint32_t k, uint8_t if_true, uint8_t if_false) {
    if (out->length == PROGRAM_MAX) __builtin_trap(); /* a bug in the tables */
    out->code[out->length++] = (struct sock_filter){code, if_true, if_false, k};
}

static void load(struct program *out, size_t offset) {
    emit(out, BPF_LD | BPF_W | BPF_ABS, (uint32_t)offset, 0, 0);
}

static void answer(struct program *out, uint32_t verdict) {
    emit(out, BPF_RET | BPF_K, verdict, 0, 0);
}

/* Little endian: the low half of an argument lies first. */
static size_t argument(int index, int high) {
    return offsetof(struct seccomp_data, args) + (size_t)index * 8 + (high ? 4 : 0);
}

/* "If the loaded word is `value`, answer `verdict`." */
static void answer_if(struct program *out, uint32_t value, uint32_t verdict) {
    emit(out, BPF_JMP | BPF_JEQ | BPF_K, value, 0, 1);
    answer(out, verdict);
}

/* Begins a section for one call; returns where to patch the jump over it. */
static unsigned short begin_call(struct program *out, uint32_t number) {
    load(out, offsetof(struct seccomp_data, nr));
    emit(out, BPF_JMP | BPF_JEQ | BPF_K, number, 0, 0);
    return out->length;
}

static void end_call(struct program *out, unsigned short start) {
    out->code[start - 1].jf = (uint8_t)(out->length - start);
}

static void filter_clone(struct program *out) {
    unsigned short start = begin_call(out, __NR_clone);
    load(out, argument(0, 0));
    emit(out, BPF_JMP | BPF_JSET | BPF_K, NAMESPACE_FLAGS, 0, 1);
    answer(out, VERDICTS[ANSWER_REFUSED]);
    answer(out, SECCOMP_RET_ALLOW);
    end_call(out, start);
}

static void filter_clone3(struct program *out) {
    unsigned short start = begin_call(out, __NR_clone3);
    for (int i = 0; i < 2; i++) {
        for (int high = 0; high < 2; high++) {
            load(out, argument(4 + i, high));
            emit(out, BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)(clone3_key[i] >> (high ? 32 : 0)), 1, 0);
            answer(out, VERDICTS[ANSWER_UNKNOWN]);
        }
    }
    answer(out, SECCOMP_RET_ALLOW);
    end_call(out, start);
}

static void filter_socket(struct program *out) {
    unsigned short start = begin_call(out, __NR_socket);
    load(out, argument(0, 0));
    answer_if(out, AF_UNIX, SECCOMP_RET_ALLOW);
    answer_if(out, AF_INET, SECCOMP_RET_ALLOW);
    answer_if(out, AF_INET6, SECCOMP_RET_ALLOW);
    emit(out, BPF_JMP | BPF_JEQ | BPF_K, AF_NETLINK, 1, 0);
    answer(out, SECCOMP_RET_ERRNO | EAFNOSUPPORT);
    /* Only routing: kernel events (15) of the host are sent to every network namespace it owns. */
    load(out, argument(2, 0));
    answer_if(out, 0, SECCOMP_RET_ALLOW);
    answer(out, SECCOMP_RET_ERRNO | EPROTONOSUPPORT);
    end_call(out, start);
}

static void filter_ioctl(struct program *out) {
    unsigned short start = begin_call(out, __NR_ioctl);
    load(out, argument(1, 0));
    answer_if(out, TIOCSTI, VERDICTS[ANSWER_REFUSED]);
    answer_if(out, TIOCLINUX, VERDICTS[ANSWER_REFUSED]);
    answer(out, SECCOMP_RET_ALLOW);
    end_call(out, start);
}

static void filter_personality(struct program *out) {
    static const uint32_t harmless[] = {0, 0x0008, 0x20000, 0x20008, 0x40000, 0xffffffff};
    unsigned short start = begin_call(out, __NR_personality);
    load(out, argument(0, 0));
    for (size_t i = 0; i < sizeof harmless / sizeof *harmless; i++) answer_if(out, harmless[i], SECCOMP_RET_ALLOW);
    answer(out, VERDICTS[ANSWER_REFUSED]);
    end_call(out, start);
}

static void filter_numbers(struct program *out) {
    static const int allowed[] = ALLOWED_CALLS, refused[] = REFUSED_CALLS, absent[] = ABSENT_CALLS;
    uint8_t answers[NUMBERS_COUNT] = {0};
    for (size_t i = 0; i < sizeof allowed / sizeof *allowed; i++) answers[allowed[i]] = ANSWER_ALLOWED;
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) answers[refused[i]] = ANSWER_REFUSED;
    for (size_t i = 0; i < sizeof absent / sizeof *absent; i++) answers[absent[i]] = ANSWER_UNKNOWN;
    load(out, offsetof(struct seccomp_data, nr));
    for (uint32_t number = 0; number < NUMBERS_COUNT;) {
        uint32_t next = number + 1;
        while (next < NUMBERS_COUNT && answers[next] == answers[number]) next++;
        emit(out, BPF_JMP | BPF_JGE | BPF_K, next, 1, 0);
        answer(out, VERDICTS[answers[number]]);
        number = next;
    }
    answer(out, VERDICTS[ANSWER_UNKNOWN]); /* beyond the table, and the x32 numbers */
}

int install_seccomp(void) {
    if (getrandom(clone3_key, sizeof clone3_key, 0) != (ssize_t)sizeof clone3_key) return -1;
    struct program out = {.length = 0};
    load(&out, offsetof(struct seccomp_data, arch));
    emit(&out, BPF_JMP | BPF_JEQ | BPF_K, THIS_ARCH, 1, 0);
    answer(&out, VERDICTS[ANSWER_UNKNOWN]);
    filter_clone(&out);
    filter_clone3(&out);
    filter_socket(&out);
    filter_ioctl(&out);
    filter_personality(&out);
    filter_numbers(&out);
    struct sock_fprog program = {.len = out.length, .filter = out.code};
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
}

pid_t guest_clone3(struct clone_args *args, uint64_t args_bytes) {
    return (pid_t)syscall(SYS_clone3, args, args_bytes, 0L, 0L, clone3_key[0], clone3_key[1]);
}

void forget_clone3_key(void) {
    explicit_bzero(clone3_key, sizeof clone3_key);
}
