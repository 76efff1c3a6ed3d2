/* The guest's two halves: the loop (guest.c), and groups and the child side of a command. */
#ifndef DSEC_GUEST_H
#define DSEC_GUEST_H

#include "wire.h"

/* A cgroup of the command's process tree; made by the guest below its delegated group. */
struct exec_group {
    uint32_t number;
    int directory, events; /* fds; -1: none */
    int was_killed;
};

/* -- groups.c */
void open_groups(int command_group);
int acquire_group(struct exec_group *out);    /* an empty group; 0, or -1 with errno */
void release_group(struct exec_group *group); /* kept for the next command if empty, else left */
int is_populated(const struct exec_group *group);
void kill_group(struct exec_group *group);
int is_crowded(void); /* whether the commands have as many processes as the sandbox may have */

/* -- supervisor.c: the same where there is no cgroup to be had.  attribute_end: whose end (a pid of ours, or 0:
 * nobody's) the end of `reaped` is. */
int start_supervising(void); /* 0, or -1 with errno */
int is_supervising(void);
int acquire_supervised(struct exec_group *out);
void release_supervised(const struct exec_group *group);
int has_supervised(const struct exec_group *group);
void kill_supervised(const struct exec_group *group);
pid_t launch_supervised(const struct exec_group *group); /* 0 in the command's process, -1 with errno */
void forget_supervised(const struct exec_group *group);  /* it was refused after it was launched */
pid_t attribute_end(pid_t reaped, int *status);
void shed_privileges(void);

/* -- command.c: runs in the guest; the fds are the command's, closed by the caller */
struct command_fds {
    int in, out, err;
};
struct launch {
    const struct exec_body *body;
    struct command_fds fds;
    const struct exec_group *group;
    const int *joins;
    int joins_count;
};
struct refusal {
    uint32_t stage; /* 0: started */
    int error;
};
void open_launchpad(void);
pid_t launch(const struct launch *what, struct refusal *refusal); /* pid, or -1 and the refusal */

#endif
