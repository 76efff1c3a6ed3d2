/* The wire between Python, the spawner, the guests and the keeper.  This header is its document.
 *
 * Four parties, three kinds of socket, all AF_UNIX SOCK_SEQPACKET (a packet is a message):
 *
 *     Python <-- one control socket --> spawner          (root, one per substrate)
 *     Python <-- one guest socket each --> guest         (pid 1 of a sandbox)
 *     Python <-- one, listening ------> keeper           (holds copies of Python's descriptors while Python is dead)
 *
 * Numbers are little endian: u32, u64.  A string is u32 length, the bytes, one zero byte that
 * the length does not count.  A list is u32 count, then its items.  The first u32 of a message
 * is its type.  A message that does not parse ends the connection: both ends are ours.  Both are of one build, too: who
 * finds a keeper or spawner of another PROTOCOL_VERSION leaves it alone.
 *
 * Python -> spawner
 *   INIT     u32 flags (INIT_*), u32 slots count, u32 count, count x (string parent, string name)     + fd: the base skeleton
 *            Hierarchy i is the directory parent/name of a mounted cgroup file system, made by
 *            Python.  Hierarchy 0 is cgroup2; the others are v1 controllers.
 *   CREATE   u32 slot, u64 disk_bytes, string hostname, string guest_group, string command_group,
 *            u32 oom_hierarchy, string oom_file, u32 flags (CREATE_*), list of u32 layer (the topmost first),
 *            list of cgroup operations:
 *            u32 operation (MKDIR, WRITE, WRITE_IF_PRESENT, CHOWN, RESTORE), u32 hierarchy, string path, string value
 *            Paths are relative to the hierarchy.  The groups are directories of hierarchy 0.
 *            CHOWN gives the path to the guest's user.  RESTORE writes what a new group has, where the group is none.
 *   ATTACH   u32 slot, u64 disk_bytes, string hostname, list of cgroup operations
 *            A sandbox that is READY and has run nothing becomes what a CREATE with these would have made; ATTACHED or
 *            FAILED answers.  The operations are those of its CREATE with other values.
 *   DESTROY  u32 slot, u32 flags (DESTROY_*)
 *   MOUNT    u32 layer      + fd: an EROFS image; the number is Python's, below LAYERS_COUNT_MAX
 *   UNMOUNT  u32 layer      no later CREATE names it; sandboxes that have it keep it
 *   SYNC                    asks what there is: INITED again, MOUNTED for each layer, ALIVE for each sandbox, then SYNCED
 *
 * spawner -> Python
 *   INITED   u32 the first host uid of slot 0, u32 slots count, u32 PROTOCOL_VERSION
 *   FAILED   u32 slot (NO_SLOT: INIT failed), string step, u32 errno
 *   CREATED  u32 slot, u32 host pid of the guest                 + fd: Python's end of the guest socket
 *   ATTACHED u32 slot
 *   GONE     u32 slot        every process dead, every cgroup removed or empty; the slot may be used again
 *   MOUNTED  u32 layer
 *   UNMOUNTED u32 layer
 *   MOUNT_FAILED u32 layer, string step, u32 errno
 *   ALIVE    u32 slot, u32 host pid (0: it is being removed, and GONE follows)
 *   SYNCED
 *
 * guest -> Python
 *   READY
 *   FAILED   u32 NO_SLOT, string step, u32 errno                 a step of the setup failed; EOF follows
 *   EXITED   u32 exec_id, u32 wait status, u32 flags (EXIT_*), u64 duration_us
 *            The duration is that of the command, whoever was there: from when the guest turned to its EXEC to its end
 *            (the last of its tree, if that was killed), on CLOCK_MONOTONIC, less what EXTEND told meanwhile.
 *   REFUSED  u32 exec_id, u32 stage (STAGE_*), u32 errno         the command did not start
 *   TTY      u32 exec_id     + fd: the master of the command's terminal; comes before its EXITED
 *   RUNNING  u32 exec_id     an answer to SYNC
 *   SYNCED
 *
 * Python -> guest
 *   EXEC     u32 exec_id, u32 flags (EXEC_*), body               + fds, in this order:
 *            [memfd with the body, if EXEC_BODY_IN_FD] [stdin, if EXEC_HAS_STDIN] stdout
 *            [stderr, unless EXEC_MERGE_STDERR]; none of the three with EXEC_TTY
 *            body: u64 timeout_ms, u32 rows, u32 columns (of the terminal), string cwd, string user,
 *            list of string argv, list of string env
 *            argv[0] of TOOLBOX_NAME is no program: the guest's own file operations (toolbox.c)
 *   KILL     u32 exec_id     kills the whole tree; EXITED answers
 *   SIGNAL   u32 exec_id, u32 number     to the command's process group
 *   EXTEND   u64 ms          the sandbox was paused for so long, which counts for no command: neither its deadline nor
 *            its duration
 *   SYNC     asks what there is: RUNNING for each running command, EXITED or REFUSED again for each of the last
 *            ENDED_COUNT_MAX that ended, then SYNCED
 *
 * Python -> keeper   (one connection is served at a time; the next waits until its process has closed it, or died)
 *   PUT      list of (u32 token, string key)     + as many fds, each kept under its token (below KEPT_COUNT_MAX),
 *            replacing what was there
 *   DROP     list of u32 token
 *   LIST     KEPT for each, then SYNCED
 * keeper -> Python
 *   KEPT     u32 token, string key     + fd
 *   SYNCED   u32 PROTOCOL_VERSION
 * LIST, KEPT and SYNCED stay as they are for ever: by them builds find out about each other.
 *
 * The skeleton (a memfd; each sandbox unpacks it as its own root) is a list without a count, to the end of the file:
 *   u32 kind ('d' directory, 'f' file, 'l' symbolic link), u32 mode, string path, string content
 */
#ifndef DSEC_PROTOCOL_H
#define DSEC_PROTOCOL_H

enum message_type {
    MSG_INIT = 1,
    MSG_CREATE = 2,
    MSG_DESTROY = 3,
    MSG_INITED = 4,
    MSG_FAILED = 5,
    MSG_CREATED = 6,
    MSG_GONE = 7,
    MSG_READY = 8,
    MSG_EXEC = 9,
    MSG_KILL = 10,
    MSG_EXITED = 11,
    MSG_REFUSED = 12,
    MSG_MOUNT = 13,
    MSG_UNMOUNT = 14,
    MSG_SYNC = 15,
    MSG_MOUNTED = 16,
    MSG_UNMOUNTED = 17,
    MSG_MOUNT_FAILED = 18,
    MSG_ALIVE = 19,
    MSG_SYNCED = 20,
    MSG_TTY = 21,
    MSG_RUNNING = 22,
    MSG_SIGNAL = 23,
    MSG_EXTEND = 24,
    MSG_PUT = 25,
    MSG_DROP = 26,
    MSG_LIST = 27,
    MSG_KEPT = 28,
    MSG_ATTACH = 29,
    MSG_ATTACHED = 30,
};

/* INIT_KEPT: outlive the process that started us; end at EOF of the control socket only */
enum init_flag { INIT_KEPT = 1 };

/* CREATE_HOST_USR: the host's /usr lies below /usr, and the skeleton is the root where there is no layer */
enum create_flag { CREATE_HOST_USR = 1 };

/* DESTROY_NETWORK: its network namespace had a way out, and is not used again */
enum destroy_flag { DESTROY_NETWORK = 1 };

enum cgroup_operation { OP_MKDIR = 1, OP_WRITE = 2, OP_WRITE_IF_PRESENT = 3, OP_CHOWN = 4, OP_RESTORE = 5 };

/* EXEC_KILL_OTHERS: every other process of the sandbox is killed and reaped before the command starts,
 * or the command is refused */
enum exec_flag { EXEC_HAS_STDIN = 1, EXEC_MERGE_STDERR = 2, EXEC_BODY_IN_FD = 4, EXEC_KILL_OTHERS = 8, EXEC_TTY = 16 };

enum exit_flag { EXIT_TIMED_OUT = 1, EXIT_OOM_KILLED = 2 };

enum refusal_stage {
    STAGE_REQUEST = 1,  /* the message, or a descriptor of it */
    STAGE_GROUP = 2,    /* the command's cgroup */
    STAGE_FORK = 3,     /* a limit of the host */
    STAGE_CWD = 4,      /* the directory to run in */
    STAGE_EXEC = 5,     /* execve, where neither 126 nor 127 says it */
    STAGE_ALONE = 6,    /* EXEC_KILL_OTHERS, but another process lives on */
    STAGE_CROWDED = 7,  /* the sandbox's own limit of processes is reached */
    STAGE_COMMANDS = 8, /* EXECS_COUNT_MAX commands run */
    STAGE_USER = 9,     /* no such user */
    STAGE_TTY = 10,     /* no terminal to be had */
};

/* One more with every change after which a keeper, spawner or guest of before, or what the keeper has (its keys, the
 * facts of a sandbox), is not understood. */
#define PROTOCOL_VERSION 4

#define NO_SLOT 0xffffffffu

#define PACKET_BYTES_MAX 65536u       /* a message without its fds */
#define PACKET_FDS_MAX 4
#define EXEC_BODY_BYTES_MAX (8u << 20) /* more than any execve takes */
#define EXECS_COUNT_MAX 64             /* commands of one sandbox at a time */
#define ENDED_COUNT_MAX 128            /* ends that a guest remembers */
#define SLOTS_COUNT_MAX 4608           /* sandboxes of one spawner */
#define LAYERS_COUNT_MAX 1024          /* mounted by one spawner */
#define SANDBOX_LAYERS_COUNT_MAX 64    /* under one sandbox */
#define KEPT_COUNT_MAX 32768           /* descriptors in a keeper */
#define TOOLBOX_NAME "/.dsec/toolbox"
#define KEY_BYTES_MAX 255              /* of a descriptor in a keeper */
#define HIERARCHIES_COUNT_MAX 5        /* cgroup2 and memory, pids, cpu, blkio of v1 */

/* The descriptors of a guest.  Through FD_DISK Python reaches the sandbox's disk: /proc/<pid>/fd/6 holds root/ (what
 * was written below /, that of /usr in root/usr), root.work/, usr.work/, shm/ and skeleton/. */
enum guest_fd { FD_NULL = 0, FD_CONTROL = 3, FD_COMMAND_GROUP = 4, FD_OOM = 5, FD_DISK = 6, FD_JOIN_FIRST = 7 };

/* The kernel keeps its users in 128 lists, by (uid + uid / 128) % 128, and each setuid walks through one of them: 65,536
 * would have the users of all sandboxes in the same list, 65,664 has those of the next slot in the next one. */
#define UIDS_PER_SLOT 65664u
#define UID_FIRST 0x10000000u
#define UID_BLOCK 0x2000000u
#define UID_BLOCK_SLOTS (UID_BLOCK / UIDS_PER_SLOT) /* a spawner has the blocks that its slots need, one after the other */
#define UID_BLOCKS_COUNT 108                        /* up to 0xe8000000 */

/* A slot's user namespace maps 65,535 uids and gids, and pid 1 has the one behind them: no
 * command can become the guest's user, whatever it may do with CAP_SETUID, and so none reaches pid 1
 * through the rights that users have over their own processes (limits, scheduling, tracing). */
#define UIDS_MAPPED 65535u
#define GUEST_UID UIDS_MAPPED

#endif
