/* The kernels for vectors of sixteen, chosen at run time on processors that have AVX-512. */
#include "simd.h"

#ifdef V4_X86
#pragma GCC target("avx512f")
#define LANES 16
#include "kernels.h"
#else
typedef int v4_nothing_here; /* C wants a declaration */
#endif
