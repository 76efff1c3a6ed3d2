/* What ended lately: a ring.  A guest answers once, and again when it is asked by SYNC. */
#include "guest.h"

static struct end ends[ENDED_COUNT_MAX];
static uint32_t ends_count; /* ever */

void remember_end(const struct end *end) {
    ends[ends_count++ % ENDED_COUNT_MAX] = *end;
}

void each_end(void (*visit)(const struct end *end)) {
    uint32_t first = ends_count > ENDED_COUNT_MAX ? ends_count - ENDED_COUNT_MAX : 0;
    for (uint32_t i = first; i != ends_count; i++) visit(&ends[i % ENDED_COUNT_MAX]);
}
