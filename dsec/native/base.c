/* The spawner's file system: an empty tmpfs as root, and below /base what every sandbox is made from.
 *
 *   /base/usr    the host's /usr, read only, without what is mounted below it
 *   /base/proc   the host's /proc, to write uid maps and to open namespaces
 *   /base/layers/<n>       layers (layers.c)
 *   /base/lower/<n>, /work, /usr, /root   empty mount points that each sandbox uses in its own copy
 *   /empty       what hides a directory of /proc
 *
 * The skeleton (etc, root, home, tmp ...) that Python sent stays in memory, and each sandbox unpacks
 * it onto its own disk: a hundred small files cost less than an overlay, and the kernel need not
 * know idmapped tmpfs (6.3).
 *
 * The host's root is left behind for good, so a sandbox that broke out of its root would find
 * nothing.  The mounts live in a private namespace: they vanish with the spawner, however it dies.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "sandbox.h"

/* Any directory of every host will do to hang the new root on. */
#define STAGING "/tmp"

static int write_whole(int fd, const char *data, uint32_t length) {
    while (length > 0) {
        ssize_t count = write(fd, data, length);
        if (count < 0) return -1;
        data += count;
        length -= (uint32_t)count;
    }
    return 0;
}

static int make_entry(int root, uint32_t kind, uint32_t mode, const char *path, const char *content, uint32_t length) {
    if (path[0] == '/' || strstr(path, "..")) return errno = EINVAL, -1;
    if (kind == 'l') return symlinkat(content, root, path);
    if (kind == 'd') {
        if (mkdirat(root, path, 0700) < 0) return -1;
        return fchmodat(root, path, mode, 0);
    }
    if (kind != 'f') return errno = EINVAL, -1;
    int fd = openat(root, path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) return -1;
    int result = write_whole(fd, content, length) < 0 || fchmod(fd, mode) < 0 ? -1 : 0;
    close(fd);
    return result;
}

static uint8_t *skeleton;
static size_t skeleton_bytes;

static int map_skeleton(int fd) {
    struct stat status;
    if (fstat(fd, &status) < 0) return -1;
    skeleton_bytes = (size_t)status.st_size;
    skeleton = mmap(NULL, skeleton_bytes, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
    return skeleton == MAP_FAILED ? -1 : 0;
}

int unpack_skeleton(const char *directory) {
    int root = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC), result = root < 0 ? -1 : 0;
    struct reader in = {skeleton, skeleton + skeleton_bytes, 0};
    while (result == 0 && in.at != in.end) {
        uint32_t kind = take_u32(&in), mode = take_u32(&in), length;
        const char *path = take_string(&in, NULL), *content = take_string(&in, &length);
        if (in.bad) errno = EBADMSG, result = -1;
        else result = make_entry(root, kind, mode, path, content, length);
    }
    if (root >= 0) close(root);
    return result;
}

#define STEP(name, expression) \
    if ((expression) < 0) return name

void name_layer(uint32_t layer, char path[LAYER_PATH_BYTES_MAX]) {
    snprintf(path, LAYER_PATH_BYTES_MAX, "/base/layers/%u", layer);
}

static const char *make_lower_places(void) {
    STEP("mkdir /base/lower", mkdir("base/lower", 0755));
    for (int i = 0; i <= SANDBOX_LAYERS_COUNT_MAX; i++) { /* one more for the host's /usr */
        char path[64];
        snprintf(path, sizeof path, "base/lower/%d", i);
        STEP("mkdir below /base/lower", mkdir(path, 0755));
    }
    return NULL;
}

static const char *fill_base(void) {
    static const char *const directories[] = {"work", "usr", "root", "base", "empty"};
    STEP("chdir to the staging directory", chdir(STAGING));
    for (size_t i = 0; i < sizeof directories / sizeof *directories; i++)
        STEP("mkdir in the spawner's root", mkdir(directories[i], 0755));
    STEP("mount /base", mount("base", "base", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=64k"));
    STEP("mkdir /base/usr", mkdir("base/usr", 0755));
    STEP("mkdir /base/proc", mkdir("base/proc", 0755));
    STEP("mkdir /base/layers", mkdir("base/layers", 0755));
    const char *step = make_lower_places();
    if (step) return step;
    STEP("bind /usr", mount("/usr", "base/usr", NULL, MS_BIND, NULL));
    STEP("make /usr read only",
         mount(NULL, "base/usr", NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV, NULL));
    STEP("bind /proc", mount("/proc", "base/proc", NULL, MS_BIND, NULL));
    return NULL;
}

const char *build_base(int skeleton_fd) {
    umask(022);
    STEP("map the skeleton", map_skeleton(skeleton_fd));
    STEP("unshare the mount namespace", unshare(CLONE_NEWNS));
    STEP("make mounts private", mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL));
    STEP("mount the spawner's root",
         mount("none", STAGING, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=755,size=64k"));
    const char *step = fill_base();
    if (step) return step;
    STEP("pivot_root", syscall(SYS_pivot_root, ".", "."));
    STEP("leave the host's root", umount2(".", MNT_DETACH));
    STEP("chdir to the empty root", chdir("/"));
    STEP("make the spawner's root read only",
         mount(NULL, "/", NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL));
    return NULL;
}
