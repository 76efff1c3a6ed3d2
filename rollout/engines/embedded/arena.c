/* Memory of a model: a few large blocks, freed together.
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

enum { ALIGNMENT = 64, HUGE_PAGE = 2 << 20, BLOCK = 32 << 20 };

static void *block_create(size_t bytes) {
    void *block = aligned_alloc(HUGE_PAGE, bytes);
    if (!block) return NULL;
#ifdef MADV_HUGEPAGE
    (void)madvise(block, bytes, MADV_HUGEPAGE); /* a wish: refused on some kernels, and then merely slower */
#endif
    return memset(block, 0, bytes);
}

void *v4_take(v4_model *model, size_t bytes) {
    bytes = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (model->blocks_count == 0 || model->block_used + bytes + GAP > model->block_bytes) {
        size_t wanted = bytes + GAP > BLOCK ? (bytes + GAP + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE : BLOCK;
        if (model->blocks_count == V4_BLOCKS_MAX) return NULL;
        void *block = block_create(wanted);
        if (!block) return NULL;
        model->blocks[model->blocks_count++] = block;
        model->block_bytes = wanted;
        model->block_used = 0;
    }
    char *start = (char *)model->blocks[model->blocks_count - 1] + model->block_used;
    model->block_used += bytes + GAP;
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(start + bytes, GAP);
#endif
    return start;
}
