/* What the files of the spawner share: itself, its slots, its layers and its spare network namespaces. */
#ifndef DSEC_SPAWNER_H
#define DSEC_SPAWNER_H

#include <sys/stat.h>

#include "sandbox.h"

struct spawner {
    int control, proc, uts; /* proc: the host's /proc; uts: our own namespace */
    uint32_t slots_count, first_uid;
    struct stat own_users, own_network; /* namespaces; what a sandbox must not have */
    struct hierarchies hierarchies;
};
extern struct spawner spawner;

/* -- spawner.c: 0, or -1 when Python is gone */
int report(enum message_type type, uint32_t value);
int report_start(void);
int report_failure(enum message_type type, uint32_t number, const char *step, int error);

/* -- slots.c: the messages of that name; -1 ends the connection */
const char *open_slots(void); /* NULL, or the step that failed with errno */
int on_create(struct reader *in);
int on_attach(struct reader *in);
int on_destroy(struct reader *in);
int on_sync(void);
void reap(pid_t pid);   /* after a SIGCHLD that names it */
void reap_strays(void); /* looks at every child */
int finish_removals(void);
int is_removing(void);
void end_slots(void); /* kills and reaps all */

/* -- attach.c: of a sandbox that lives.  Each returns NULL, or the step that failed with errno */
const char *resize_disk(pid_t pid, uint64_t bytes);
const char *rename_host(pid_t pid, const char *hostname);

/* -- layers.c */
int on_mount(struct reader *in, int image);
int on_unmount(struct reader *in);
int is_mounted(uint32_t layer);
int report_layers(void);

/* -- networks.c: namespaces of dead sandboxes */
void keep_network(int network); /* the fd is ours now */
int take_network(void);         /* an fd, or -1: none */

#endif
