/* Double precision log, sine and cosine of our own, and the rotary tables built from them.
 *
 * The tables follow the oracle: angles are rounded to float first, so that a late position has the
 * angle transformers would use. Accuracy is a few 1e-16, far below
 * the float it is rounded to.
 */
#include <string.h>

#include "model.h"

static const double LN2_HIGH = 0.693147180369123816490, LN2_LOW = 1.90821492927058770002e-10;

/* Natural logarithm of a positive normal number. */
double v4_log(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    int exponent = (int)(bits >> 52) - 1023;
    bits = (bits & 0xfffffffffffffULL) | 0x3ff0000000000000ULL;
    memcpy(&x, &bits, sizeof x);
    if (x > 1.4142135623730951) {
        x *= 0.5;
        exponent++;
    }
    double s = (x - 1.0) / (x + 1.0), t = s * s, p = 1.0 / 23;
    for (int k = 21; k >= 1; k -= 2) p = p * t + 1.0 / k;
    return exponent * LN2_HIGH + (2.0 * s * p + exponent * LN2_LOW);
}

/* Sine and cosine of 0 <= x <= 2^20. */
static void sine_cosine(double x, double *sine, double *cosine) {
    int quarter = (int)(x * 0.63661977236758134 + 0.5);
    double r = x - quarter * 1.57079632673412561417 - quarter * 6.07710050650619224932e-11;
    double t = r * r, s = 1.0, c = 1.0;
    for (int k = 16; k >= 2; k -= 2) {
        s = 1.0 - s * t / (k * (k + 1));
        c = 1.0 - c * t / (k * (k - 1));
    }
    s *= r;
    switch (quarter & 3) {
    case 0: *sine = s, *cosine = c; break;
    case 1: *sine = c, *cosine = -s; break;
    case 2: *sine = -s, *cosine = -c; break;
    default: *sine = -c, *cosine = s; break;
    }
}

static float *rope_table(v4_model *model, const float *frequencies, int pairs, float scale) {
    int positions = model->config.context_tokens_max;
    float *table = v4_take(model, (size_t)positions * (size_t)pairs * 2 * sizeof(float)), *row = table;
    for (int position = 0; table && position < positions; position++, row += 2 * pairs)
        for (int i = 0; i < pairs; i++) {
            double sine, cosine;
            float angle = (float)position * frequencies[i];
            sine_cosine((double)angle, &sine, &cosine);
            row[2 * i] = (float)cosine * scale;
            row[2 * i + 1] = (float)sine * scale;
        }
    return table;
}

int v4_rope_create(v4_model *model) {
    const v4_config *c = &model->config;
    model->rope_main = rope_table(model, c->frequencies_main, c->rope_dim_main / 2, c->rope_scale_main);
    model->rope_compress = rope_table(model, c->frequencies_compress, c->rope_dim_compress / 2, c->rope_scale_compress);
    return model->rope_main && model->rope_compress ? 0 : -1;
}
