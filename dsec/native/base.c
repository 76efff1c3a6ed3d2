/* The spawner's file system: an empty tmpfs as root, and below /base what every sandbox is made from.
 *
 *   /base/usr    the host's /usr, read only, without what is mounted below it
 *   /base/skel   the skeleton (etc, root, home, tmp ... ) that Python sent
 *   /base/proc   the host's /proc, to write uid maps and to open namespaces
 *   /lower/usr, /lower/skel, /work, /root   empty mount points that each sandbox uses in its own copy
 *
 * The host's root is left behind for good, so a sandbox that broke out of its root would find
 * nothing.  The mounts live in a private namespace: they vanish with the spawner, however it dies.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
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

static int unpack_skeleton(int skeleton_fd, const char *directory) {
    struct stat status;
    if (fstat(skeleton_fd, &status) < 0) return -1;
    size_t size = (size_t)status.st_size;
    uint8_t *data = mmap(NULL, size, PROT_READ, MAP_PRIVATE, skeleton_fd, 0);
    if (data == MAP_FAILED) return -1;
    int root = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC), result = root < 0 ? -1 : 0;
    struct reader in = {data, data + size, 0};
    while (result == 0 && in.at != in.end) {
        uint32_t kind = take_u32(&in), mode = take_u32(&in), length;
        const char *path = take_string(&in, NULL), *content = take_string(&in, &length);
        if (in.bad) errno = EBADMSG, result = -1;
        else result = make_entry(root, kind, mode, path, content, length);
    }
    if (root >= 0) close(root);
    munmap(data, size);
    return result;
}

#define STEP(name, expression) \
    if ((expression) < 0) return name

static const char *fill_base(int skeleton_fd) {
    static const char *const directories[] = {"lower", "lower/usr", "lower/skel", "work", "root", "base"};
    STEP("chdir to the staging directory", chdir(STAGING));
    for (size_t i = 0; i < sizeof directories / sizeof *directories; i++)
        STEP("mkdir in the spawner's root", mkdir(directories[i], 0755));
    STEP("mount /base", mount("base", "base", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=64k"));
    STEP("mkdir /base/usr", mkdir("base/usr", 0755));
    STEP("mkdir /base/skel", mkdir("base/skel", 0755));
    STEP("mkdir /base/proc", mkdir("base/proc", 0755));
    STEP("bind /usr", mount("/usr", "base/usr", NULL, MS_BIND, NULL));
    STEP("make /usr read only",
         mount(NULL, "base/usr", NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV, NULL));
    STEP("mount the skeleton", mount("skel", "base/skel", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=16m"));
    STEP("unpack the skeleton", unpack_skeleton(skeleton_fd, "base/skel"));
    STEP("make the skeleton read only", mount(NULL, "base/skel", NULL, MS_REMOUNT | MS_RDONLY, NULL));
    STEP("bind /proc", mount("/proc", "base/proc", NULL, MS_BIND, NULL));
    return NULL;
}

const char *build_base(int skeleton_fd) {
    umask(022);
    STEP("unshare the mount namespace", unshare(CLONE_NEWNS));
    STEP("make mounts private", mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL));
    STEP("mount the spawner's root",
         mount("dsec", STAGING, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=755,size=64k"));
    const char *step = fill_base(skeleton_fd);
    if (step) return step;
    STEP("pivot_root", syscall(SYS_pivot_root, ".", "."));
    STEP("leave the host's root", umount2(".", MNT_DETACH));
    STEP("chdir to the empty root", chdir("/"));
    STEP("make the spawner's root read only",
         mount(NULL, "/", NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL));
    return NULL;
}
