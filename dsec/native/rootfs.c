/* A sandbox's file system, built in its own mount namespace while still root of the host.
 *
 * One tmpfs holds everything written, so that a quota holds and destroying is forgetting: the root
 * is a directory of it, filled with the skeleton, and /usr is an overlay with its upper there and
 * the host's /usr below, idmapped so that root inside owns what the host's root owns.
 * The mounts belong to the host's user namespace: no capability inside can change them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <stdio.h>
#include <sys/fsuid.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "sandbox.h"

#define MUST(step, expression) \
    if ((expression) < 0) fail(step)

static void mount_lower(int user_namespace) {
    int tree = (int)syscall(SYS_open_tree, AT_FDCWD, "/base/usr", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    MUST("clone the base", tree);
    struct mount_attr attributes = {.attr_set = MOUNT_ATTR_IDMAP, .userns_fd = (uint64_t)user_namespace};
    MUST("idmap the base", syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &attributes, sizeof attributes));
    MUST("attach the base", syscall(SYS_move_mount, tree, "", AT_FDCWD, "/lower", MOVE_MOUNT_F_EMPTY_PATH));
    close(tree);
}

static void mount_disk(uint64_t disk_bytes, uint32_t uid) {
    /* An inode costs about 1 KiB of kernel memory; half the bytes in files of 2 KiB is generous. */
    char options[96];
    snprintf(options, sizeof options, "mode=755,size=%llu,nr_inodes=%llu", (unsigned long long)disk_bytes,
             (unsigned long long)(disk_bytes / 4096 + 1024));
    MUST("mount the disk", mount("disk", "/work", "tmpfs", MS_NOSUID | MS_NODEV, options));
    static const char *const directories[] = {"/work/root", "/work/usr", "/work/usr.work", "/work/shm"};
    for (size_t i = 0; i < sizeof directories / sizeof *directories; i++)
        MUST("mkdir on the disk", mkdir(directories[i], 0755));
    MUST("own /", chown("/work/root", uid, uid));
    MUST("own the upper of /usr", chown("/work/usr", uid, uid));
    MUST("own /dev/shm", chown("/work/shm", uid, uid));
    MUST("open /dev/shm to all", chmod("/work/shm", 01777));
}

static void mount_root(uint32_t uid) {
    MUST("mount /", mount("/work/root", "/root", NULL, MS_BIND, NULL));
    setfsgid(uid);
    setfsuid(uid);
    int result = unpack_skeleton("/root"), error = errno;
    setfsuid(0);
    setfsgid(0);
    errno = error;
    MUST("unpack the skeleton", result);
    MUST("mount overlay /usr", mount("overlay", "/root/usr", "overlay", MS_NOSUID | MS_NODEV,
                                     "lowerdir=/lower,upperdir=/work/usr,workdir=/work/usr.work"));
}

static void make_devices(uint32_t uid) {
    static const struct {
        const char *path;
        unsigned minor, major;
    } nodes[] = {{"null", 3, 1}, {"zero", 5, 1}, {"full", 7, 1}, {"random", 8, 1}, {"urandom", 9, 1}, {"tty", 0, 5}};
    static const char *const links[][2] = {{"/proc/self/fd", "fd"},
                                           {"/proc/self/fd/0", "stdin"},
                                           {"/proc/self/fd/1", "stdout"},
                                           {"/proc/self/fd/2", "stderr"},
                                           {"pts/ptmx", "ptmx"}};
    MUST("mount /dev", mount("dev", "/root/dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755,size=64k,nr_inodes=64"));
    MUST("chdir /dev", chdir("/root/dev"));
    for (size_t i = 0; i < sizeof nodes / sizeof *nodes; i++) {
        MUST("mknod in /dev", mknod(nodes[i].path, S_IFCHR | 0666, makedev(nodes[i].major, nodes[i].minor)));
        MUST("chown in /dev", chown(nodes[i].path, uid, uid));
    }
    for (size_t i = 0; i < sizeof links / sizeof *links; i++)
        MUST("symlink in /dev", symlink(links[i][0], links[i][1]));
    MUST("own /dev", chown(".", uid, uid));
    MUST("mkdir /dev/pts", mkdir("pts", 0755));
    MUST("mkdir /dev/shm", mkdir("shm", 0755));
    MUST("mount /dev/pts", mount("devpts", "pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"));
    MUST("mount /dev/shm", mount("/work/shm", "shm", NULL, MS_BIND, NULL));
}

/* Files of /proc that all may read and that tell of the host or of the moment: they read as empty.
 * What ordinary programs need stays (meminfo, cpuinfo, stat, uptime, loadavg, version), and what only
 * root may read needs no mask, since root inside is not. */
static const char *const hidden_files[] = {
    "cmdline", "kcore", "keys", "key-users", "timer_list", "modules", "interrupts", "sysrq-trigger", "kallsyms",
    "buddyinfo", "cgroups", "config.gz", "diskstats", "locks", "mdstat", "mtrr", "partitions", "schedstat",
    "softirqs", "swaps", "vmstat", "zoneinfo", "sys/kernel/random/boot_id"};
static const char *const hidden_directories[] = {"bus", "fs", "irq", "pressure", "scsi"};

/* One bind each, where the kernel has such a file. */
static void hide(const char *mask, const char *const names[], size_t count) {
    for (size_t i = 0; i < count; i++)
        if (mount(mask, names[i], NULL, MS_BIND, NULL) < 0 && errno != ENOENT) fail("hide in /proc");
}

static void mount_proc(void) {
    MUST("mount /proc", mount("proc", "/root/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL));
    MUST("chdir /proc", chdir("/root/proc"));
    int ports = open("sys/net/ipv4/ip_unprivileged_port_start", O_WRONLY | O_CLOEXEC);
    if (ports >= 0) { /* root inside has no capability over its network, but may expect port 80 */
        if (write(ports, "0", 1) < 0) fail("open the low ports");
        close(ports);
    }
    hide("/root/dev/null", hidden_files, sizeof hidden_files / sizeof *hidden_files);
    hide("/empty", hidden_directories, sizeof hidden_directories / sizeof *hidden_directories);
}

/* MS_MOVE and chroot instead of pivot_root, which looks at every process of the host.  What lies
 * beneath is the spawner's empty root, less /base. */
static void enter_root(void) {
    MUST("chdir to the new root", chdir("/root"));
    MUST("detach /base", umount2("/base", MNT_DETACH));
    MUST("detach /lower", umount2("/lower", MNT_DETACH));
    MUST("detach the disk", umount2("/work", MNT_DETACH));
    MUST("move the root", mount(".", "/", NULL, MS_MOVE, NULL));
    MUST("chroot", chroot("."));
    MUST("chdir /", chdir("/"));
}

void build_rootfs(const struct sandbox_setup *setup) {
    umask(0);
    mount_lower(setup->user_namespace);
    mount_disk(setup->request->disk_bytes, setup->first_uid);
    mount_root(setup->first_uid);
    make_devices(setup->first_uid);
    mount_proc();
    enter_root();
}
