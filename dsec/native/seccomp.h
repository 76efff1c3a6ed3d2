/* The system calls that commands may make, and the one that only the guest may make. */
#ifndef DSEC_SECCOMP_H
#define DSEC_SECCOMP_H

#include <stdint.h>
#include <sys/types.h>

/* Installs the filter for the caller and all its children; 0 or -1 with errno.
 * Makes `guest_clone3` usable by this process image only. */
int install_seccomp(void);

/* clone3 with the key that the filter asks for; commands get ENOSYS and fall back to clone. */
struct clone_args;
pid_t guest_clone3(struct clone_args *args, uint64_t args_bytes);
void forget_clone3_key(void); /* in a child that goes on without execve */

#endif
