/* The kernels for vectors of eight: AVX2, or whatever the compiler makes of them. */
#define LANES 8
#include "kernels.h"
