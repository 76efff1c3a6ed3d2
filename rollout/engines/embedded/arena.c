/* Memory of a model: large blocks, as many as it takes, freed together.
 *
 * Weights are read once a token from end to end, so huge pages (asked for, not required) spare
 * most of the address translation misses.
 */
#define _DEFAULT_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "model.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
enum { GAP = 4096 };                 /* what lies there must not be touched, so that an overflow inside of a block shows */
#else
enum { GAP = 0 };
#endif

#ifndef V4_PAGE_BYTES
#define V4_PAGE_BYTES (2 << 20)      /* of a huge page; with tiny ones, a tiny model has as many blocks as a large one */
#endif

enum { ALIGNMENT = 64, PAGE = V4_PAGE_BYTES, BLOCK = 16 * PAGE, SHARED_MAX = BLOCK / 4 };

/* A block of the model, of whole pages. */
static void *add_block(v4_arena *arena, size_t bytes) {
    void **blocks = realloc(arena->blocks, (arena->blocks_count + 1) * sizeof *blocks);
    if (!blocks) return NULL;
    arena->blocks = blocks;
    bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    void *block = aligned_alloc(PAGE, bytes);
    if (!block) return NULL;
    blocks[arena->blocks_count++] = block;
#ifdef MADV_HUGEPAGE
    (void)madvise(block, bytes, MADV_HUGEPAGE); /* a wish: refused on some kernels, and then merely slower */
#endif
    return memset(block, 0, bytes);
}

/* What is large has a block to itself, so that little is left over at the end of a shared one. */
void *v4_take(v4_model *model, size_t bytes) {
    v4_arena *arena = &model->arena;
    bytes = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    size_t taken = bytes + GAP;
    char *start;
    if (taken > SHARED_MAX) {
        start = add_block(arena, taken);
        if (!start) return NULL;
    } else {
        if (arena->left < taken) {
            char *block = add_block(arena, BLOCK);
            if (!block) return NULL;
            arena->next = block;
            arena->left = BLOCK;
        }
        start = arena->next;
        arena->next += taken;
        arena->left -= taken;
    }
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(start + bytes, GAP);
#endif
    return start;
}

void v4_arena_free(v4_arena *arena) {
    for (size_t i = 0; i < arena->blocks_count; i++) free(arena->blocks[i]);
    free(arena->blocks);
}
