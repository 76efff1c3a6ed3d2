/* What a sandbox that was made ahead becomes when it is handed out, besides its cgroups: the size of its disk, its name.
 *
 * It has run nothing yet, but its guest lives: what is changed is reached through that process.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "spawner.h"

static int set_disk(int context, const char *name, const char *value) {
    return (int)syscall(SYS_fsconfig, context, FSCONFIG_SET_STRING, name, value, 0);
}

const char *resize_disk(pid_t pid, uint64_t bytes) {
    char path[64];
    struct disk_bounds bounds = bound_disk(bytes);
    snprintf(path, sizeof path, "%d/fd/%d", pid, FD_DISK);
    int disk = openat(spawner.proc, path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (disk < 0) return "open the disk";
    int context = (int)syscall(SYS_fspick, disk, "", FSPICK_CLOEXEC | FSPICK_EMPTY_PATH);
    int result = context < 0 ? -1 : set_disk(context, "size", bounds.size);
    if (result == 0) result = set_disk(context, "nr_inodes", bounds.inodes);
    if (result == 0) result = (int)syscall(SYS_fsconfig, context, FSCONFIG_CMD_RECONFIGURE, NULL, NULL, 0);
    int error = errno;
    if (context >= 0) close(context);
    close(disk);
    errno = error;
    return result < 0 ? "resize the disk" : NULL;
}

const char *rename_host(pid_t pid, const char *hostname) {
    char path[64];
    snprintf(path, sizeof path, "%d/ns/uts", pid);
    int theirs = openat(spawner.proc, path, O_RDONLY | O_CLOEXEC);
    int result = theirs < 0 ? -1 : setns(theirs, CLONE_NEWUTS), error = errno;
    if (theirs >= 0) close(theirs);
    errno = error;
    if (result < 0) return "enter the uts namespace";
    result = sethostname(hostname, strlen(hostname));
    error = errno;
    if (setns(spawner.uts, CLONE_NEWUTS) < 0) _exit(1); /* all that we make from here on would be in another's */
    errno = error;
    return result < 0 ? "sethostname" : NULL;
}
