/* A sandbox's file system, built in its own mount namespace while still root of the host.
 *
 * One tmpfs, the disk, holds everything written, so that a quota holds and destroying is forgetting.  What lies below
 * is read only and shared: layers, and the host's /usr, each idmapped so that root inside owns what the
 * host's root owns.  Three forms:
 *
 *   host, no layers    / is a directory of the disk with the skeleton, /usr an overlay over the host's
 *   host, layers       / is an overlay over the layers and the skeleton, /usr one over the layers' and the host's
 *   layers only        / is an overlay over the layers
 *
 * The upper of / is root/ on the disk, and that of /usr is root/usr in it, so that one directory has all that was
 * written.  The mounts belong to the host's user namespace: no capability inside can change them.
 * A layer is hostile: no path of it is followed through a link before the process is inside.
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

#define LOWER_BYTES_MAX 2048 /* SANDBOX_LAYERS_COUNT_MAX paths */

static void mount_lower(const char *source, uint32_t place, int user_namespace) {
    char target[64];
    snprintf(target, sizeof target, "/base/lower/%u", place);
    int tree = (int)syscall(SYS_open_tree, AT_FDCWD, source, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    MUST("clone a layer", tree);
    struct mount_attr attributes = {.attr_set = MOUNT_ATTR_IDMAP, .userns_fd = (uint64_t)user_namespace};
    MUST("idmap a layer", syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &attributes, sizeof attributes));
    MUST("attach a layer", syscall(SYS_move_mount, tree, "", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH));
    close(tree);
}

static void mount_lowers(const struct create_request *request, int user_namespace) {
    for (uint32_t i = 0; i < request->layers_count; i++) {
        char source[LAYER_PATH_BYTES_MAX];
        name_layer(request->layers[i], source);
        mount_lower(source, i, user_namespace);
    }
    if (request->flags & CREATE_HOST_USR) mount_lower("/base/usr", request->layers_count, user_namespace);
}

static int is_directory(const char *path) {
    struct stat status;
    return lstat(path, &status) == 0 && S_ISDIR(status.st_mode);
}

static void make_owned(const char *path, uint32_t uid) {
    MUST("mkdir on the disk", mkdir(path, 0755));
    MUST("own a directory of the disk", chown(path, uid, uid));
}

/* An inode costs about 1 KiB of kernel memory; half the bytes in files of 2 KiB is generous. */
struct disk_bounds bound_disk(uint64_t bytes) {
    struct disk_bounds bounds;
    snprintf(bounds.size, sizeof bounds.size, "%llu", (unsigned long long)bytes);
    snprintf(bounds.inodes, sizeof bounds.inodes, "%llu", (unsigned long long)(bytes / 4096 + 1024));
    return bounds;
}

static void mount_disk(uint64_t disk_bytes, uint32_t uid) {
    struct disk_bounds bounds = bound_disk(disk_bytes);
    char options[96];
    snprintf(options, sizeof options, "mode=755,size=%s,nr_inodes=%s", bounds.size, bounds.inodes);
    MUST("mount the disk", mount("disk", "/work", "tmpfs", MS_NOSUID | MS_NODEV, options));
    make_owned("/work/root", uid);
    make_owned("/work/shm", uid);
    MUST("open /dev/shm to all", chmod("/work/shm", 01777));
    MUST("mkdir on the disk", mkdir("/work/root.work", 0755));
    MUST("mkdir on the disk", mkdir("/work/usr.work", 0755));
    int disk = open("/work", O_PATH | O_DIRECTORY | O_CLOEXEC);
    MUST("open the disk", disk);
    MUST("place the disk", dup3(disk, FD_DISK, O_CLOEXEC));
    close(disk);
}

static void unpack_as(uint32_t uid, const char *directory) {
    setfsgid(uid);
    setfsuid(uid);
    int result = unpack_skeleton(directory), error = errno;
    setfsuid(0);
    setfsgid(0);
    errno = error;
    MUST("unpack the skeleton", result);
}

/* Nothing that a layer says of itself is believed: no redirects, no metadata without its data. */
static void mount_overlay(const char *step, const char *target, const char *lower, const char *upper, const char *work) {
    char options[LOWER_BYTES_MAX + 256];
    snprintf(options, sizeof options, "lowerdir=%s,upperdir=%s,workdir=%s,redirect_dir=nofollow,metacopy=off,index=off",
             lower, upper, work);
    MUST(step, mount("overlay", target, "overlay", MS_NOSUID | MS_NODEV, options));
}

/* The lower directories of an overlay, the topmost first: `below` ("", "/usr") of each layer that has it. */
static void list_lowers(const struct create_request *request, const char *below, const char *last, char *out) {
    size_t length = 0;
    for (uint32_t i = 0; i < request->layers_count; i++) {
        char path[64];
        snprintf(path, sizeof path, "/base/lower/%u%s", i, below);
        if (!is_directory(path)) continue;
        length += (size_t)snprintf(out + length, LOWER_BYTES_MAX - length, "%s%s", length ? ":" : "", path);
    }
    if (last) snprintf(out + length, LOWER_BYTES_MAX - length, "%s%s", length ? ":" : "", last);
}

static void mount_usr(const struct create_request *request, const char *target) {
    char last[64], lower[LOWER_BYTES_MAX];
    snprintf(last, sizeof last, "/base/lower/%u", request->layers_count);
    list_lowers(request, "/usr", last, lower);
    mount_overlay("mount overlay /usr", target, lower, "/work/root/usr", "/work/usr.work");
}

static void mount_plain_root(const struct create_request *request, uint32_t uid) {
    MUST("mount /", mount("/work/root", "/root", NULL, MS_BIND, NULL));
    unpack_as(uid, "/root");
    mount_usr(request, "/root/usr");
}

/* /usr is mounted aside, and first: its upper lies in that of /, and the kernel warns when it finds an upper below
 * another one that is in use. */
static void mount_layered_root(const struct create_request *request, uint32_t uid) {
    char lower[LOWER_BYTES_MAX];
    int has_host_usr = (request->flags & CREATE_HOST_USR) != 0;
    if (has_host_usr) {
        make_owned("/work/skeleton", uid);
        unpack_as(uid, "/work/skeleton");
        make_owned("/work/root/usr", uid);
        mount_usr(request, "/usr");
    }
    list_lowers(request, "", has_host_usr ? "/work/skeleton" : NULL, lower);
    mount_overlay("mount overlay /", "/root", lower, "/work/root", "/work/root.work");
    if (has_host_usr) MUST("move /usr", mount("/usr", "/root/usr", NULL, MS_MOVE, NULL));
}

/* What is mounted upon must be a directory, and not a link that leads elsewhere. */
static void require_places(uint32_t uid) {
    static const struct {
        const char *path;
        mode_t mode;
    } places[] = {{"/root/dev", 0755}, {"/root/proc", 0555}, {"/root/sys", 0555}, {"/root/tmp", 01777}};
    setfsgid(uid);
    setfsuid(uid);
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        if (mkdir(places[i].path, places[i].mode) < 0 && errno != EEXIST) fail("make a directory of the root");
        if (is_directory(places[i].path)) continue;
        errno = ENOTDIR;
        fail("look at /dev, /proc, /sys and /tmp of the layers");
    }
    setfsuid(0);
    setfsgid(0);
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
    /* The kernel has some 3,000 terminals for all sandboxes together (kernel.pty.max). */
    MUST("mount /dev/pts",
         mount("devpts", "pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,max=64"));
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
    MUST("detach the disk", umount2("/work", MNT_DETACH));
    MUST("move the root", mount(".", "/", NULL, MS_MOVE, NULL));
    MUST("chroot", chroot("."));
    MUST("chdir /", chdir("/"));
}

void build_rootfs(const struct create_request *request, const struct sandbox_setup *setup) {
    umask(0);
    mount_lowers(request, setup->user_namespace);
    mount_disk(request->disk_bytes, setup->first_uid);
    if (request->layers_count == 0) mount_plain_root(request, setup->first_uid);
    else mount_layered_root(request, setup->first_uid);
    require_places(setup->first_uid);
    make_devices(setup->first_uid);
    mount_proc();
    enter_root();
}
