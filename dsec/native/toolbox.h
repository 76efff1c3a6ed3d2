/* The guest's own file operations: a command whose argv[0] is TOOLBOX_NAME, run as its user, in its sandbox.
 *
 *   [--paced] read PATH OFFSET LENGTH        from a regular file; LENGTH - : to its end
 *   write PATH [--mode OCTAL] [--offset N | --append] [--parents] [--exclusive] [--atomic] [--bytes N]
 *                                            stdin, to its end, into a regular file; with --bytes an error if there
 *                                            were not N; --atomic: into a new file that then takes the name
 *   [--paced] list PATH DEPTH                records of what is below a directory, links not followed
 *   stat PATH                                the record of a path itself
 *   make_dir PATH [--mode OCTAL] [--parents]
 *   remove PATH [--recursive]
 *   rename PATH PATH [--exclusive]
 *   watch PATH [--recursive]                 events, until it is killed
 *   [--paced] run ARGV...                    a program, its output as ours
 *
 * A record is eight fields, each ended by a zero byte: path (below the listed directory), kind (one of
 * "fdlpsbc"), mode (octal), size, time of change (seconds, a dot, nine digits), uid, gid, target of a link.
 * An event is two fields: kind (EVENT_*) and path.  With --paced nothing is written but what a reader
 * has asked for by a line "<bytes>" on stdin: a slow one needs no memory anywhere.
 *
 * An operation that fails says "<errno> <text>" on stderr in one line and ends with 1.
 */
#ifndef DSEC_TOOLBOX_H
#define DSEC_TOOLBOX_H

#include <stdint.h>
#include <stddef.h>
#include <sys/stat.h>

#define DEPTH_MAX 128
#define WATCHES_COUNT_MAX 8192
#define COPY_BYTES 262144

enum event_kind {
    EVENT_READY = '!', /* what is done from now on is seen */
    EVENT_CREATED = 'c',
    EVENT_WRITTEN = 'w',
    EVENT_CHANGED = 'a', /* mode, owner, times */
    EVENT_REMOVED = 'r',
    EVENT_MOVED_FROM = 'f',
    EVENT_MOVED_TO = 't',
    EVENT_LOST = 'o', /* more happened than was seen */
};

int toolbox_main(char **argv, char **env); /* the exit code */

/* -- toolbox.c, for the operations */
_Noreturn void give_up(const char *what); /* with errno */
void emit(const void *data, size_t count);
void emit_string(const char *text);
void flush_output(void);
int take_flag(char **argv, const char *name);          /* whether it is there; takes it out */
const char *take_value(char **argv, const char *name); /* what follows it, or NULL; takes both out */
uint64_t parse_number(const char *text, int base);
void make_parents(const char *path);

/* -- toolbox_files.c, toolbox_tree.c, toolbox_watch.c; argv begins with the first path and ends with NULL */
void read_file(char **argv);
void write_file(char **argv);
void rename_path(char **argv);
void make_directory(char **argv);
void stat_path(char **argv);
void list_tree(char **argv);
void remove_tree(char **argv);
void watch_tree(char **argv);
void emit_record(int directory, const char *name, const char *shown, const struct stat *status);

#endif
