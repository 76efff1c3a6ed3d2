/* The guest's parts: the loop (guest.c), the groups, and the child side of a command. */
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

/* -- ends.c: the last ENDED_COUNT_MAX answers, for a Python that was not there to hear them */
struct end {
    enum message_type type; /* MSG_EXITED or MSG_REFUSED */
    uint32_t id, first, second;
    uint64_t duration_us; /* of what exited */
};
void remember_end(const struct end *end);
void each_end(void (*visit)(const struct end *end)); /* the oldest first */

/* -- command.c: runs in the guest; the fds are the command's, closed by the caller */
struct command_fds {
    int in, out, err;
};
struct launch {
    const struct exec_body *body;
    uint32_t id, flags;
    struct command_fds fds; /* unused with EXEC_TTY */
    const struct exec_group *group;
    const int *joins;
    int joins_count, control;
};
struct refusal {
    uint32_t stage; /* 0: started */
    int error;
};
/* The pid, or -1 and the refusal.  From `status` a refusal can be read, or its end once the command has executed. */
pid_t launch(const struct launch *what, int *status, struct refusal *refusal);
void abandon(pid_t pid, const struct exec_group *group); /* one that refused: until it is reaped */

/* -- tty.c: in the child */
void open_terminals(void);                                      /* before any command could touch /dev/pts */
int open_terminal(uint32_t rows, uint32_t columns, int *slave); /* the master, or -1 with errno */

/* -- user.c: in the child */
#define USER_GROUPS_COUNT_MAX 64
struct user {
    uint32_t uid, gid;
    uint32_t groups[USER_GROUPS_COUNT_MAX];
    size_t groups_count;
};
int find_user(const char *text, struct user *out); /* 0, or -1 with errno */

#endif
