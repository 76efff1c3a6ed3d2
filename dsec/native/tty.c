/* A command's terminal: a pair of the sandbox's own /dev/pts, whose master goes to Python.
 *
 * The child opens it as the command's user, so that programs inside own their terminal and may open
 * it again by name.  The directory is a descriptor from before the first command, and the slave
 * comes from the master (TIOCGPTPEER), not from a path: nothing inside chooses what is opened.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "guest.h"

static int terminals = -1;

void open_terminals(void) {
    terminals = open("/dev/pts", O_PATH | O_DIRECTORY | O_CLOEXEC);
}

int open_terminal(uint32_t rows, uint32_t columns, int *slave) {
    struct winsize size = {.ws_row = (unsigned short)rows, .ws_col = (unsigned short)columns};
    int unlocked = 0, master = openat(terminals, "ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (master < 0) return -1;
    *slave = -1;
    if (ioctl(master, TIOCSPTLCK, &unlocked) == 0 && ioctl(master, TIOCSWINSZ, &size) == 0)
        *slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (*slave >= 0 && ioctl(*slave, TIOCSCTTY, 0) == 0) return master;
    int error = errno;
    if (*slave >= 0) close(*slave);
    close(master);
    errno = error;
    return -1;
}
