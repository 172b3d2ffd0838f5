/* Runs a network that `qcfs-fast export` wrote as a header, with the bytes of qcfs_fast: C99, no memory from the
 * system, nothing but libm. It is written to be read, as a model for other hardware; libqcfs is the fast one.
 *
 *     cc -std=c99 -O2 -DQCFS_HEADER='"network.h"' network.c -o network -lm
 *     ./network < images.raw > answers.raw          float32 [C, H, W] each in, float32 [classes] or [O, H, W] each out
 *
 * -DQCFS_NO_MAIN leaves the function qcfs_run alone. Keep -std=c99: with it compilers round each operation on floats by
 * itself, and do not contract two of them to one.
 *
 * Layers run one after the other, each for all time steps. What travels between two layers is a map [steps, height,
 * width, channels] of small integers in one array, the arena: spikes 0 and 1, -1 of signed neurons, or sums of spikes.
 * A layer computes the current of a neuron at each step, in 32-bit integers that cannot overflow, and then the neuron
 * integrates, fires and resets over the steps. Doubles stand at the two ends: in the current of the image, and in the
 * answer. docs/format.md has all rules; the names here are those of that page.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

struct qcfs_map { /* what a layer sends: qcfs_value (or, after counting, int32) from byte `at` of the arena on */
  int32_t at, steps, height, width, channels;
};
struct qcfs_kernel { /* of a convolution */
  int32_t height, width, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
};
struct qcfs_weight { /* [kernel height, kernel width, channels / groups, outputs] of 1, 2 or 4 bytes, in units of `unit`
                      */
  const void* data;
  int32_t bytes, unit;
};
struct qcfs_product {
  struct qcfs_map x;
  struct qcfs_weight weight;
  struct qcfs_kernel kernel;
};
struct qcfs_residual {
  struct qcfs_map x;
  const int32_t* amplitude;
};
struct qcfs_image { /* current = clamp(round(sum * gain * 2^exponent + offset), low, high); `low_digit` may be null */
  const int16_t *weight, *low_digit;
  struct qcfs_kernel kernel;
  const double *gain, *offset;
  const int32_t *low, *high;
};
struct qcfs_fire {
  struct qcfs_map out;
  int32_t products, residuals;
  const struct qcfs_product* product;
  const struct qcfs_residual* residual;
  const struct qcfs_image* image; /* or null */
  const int32_t *bias, *threshold;
  int32_t bias_step; /* from a step's biases to the next step's; 0: all steps have the same */
  int32_t first;     /* a layer of the image alone */
};
struct qcfs_pool { /* rows, columns: first, end and divisor of each window */
  struct qcfs_map x, out;
  const int32_t *rows, *columns;
  int32_t maximum, multiple, counts; /* counts: of int32 */
};
struct qcfs_copy { /* into channels from `channel` on */
  struct qcfs_map x, out;
  int32_t channel;
};
struct qcfs_count {
  struct qcfs_map x, out;
};
struct qcfs_term {
  struct qcfs_map x;
  const int16_t* weight; /* null: the counts themselves */
  struct qcfs_kernel kernel;
  const double* gain;
  double divisor; /* T times the multiples of the pools */
};
struct qcfs_answer {
  int32_t height, width, channels, terms;
  const struct qcfs_term* term;
  const double* offset;
};
struct qcfs_operation {
  int kind; /* which of these `what` is */
  const void* what;
};
enum { QCFS_FIRE, QCFS_POOL, QCFS_COPY, QCFS_COUNT, QCFS_ANSWER };
enum { QCFS_PLAIN, QCFS_OFFSET, QCFS_MASKED, QCFS_SIGNED, QCFS_SUM };

#ifndef QCFS_HEADER
#define QCFS_HEADER "network.h"
#endif
#include QCFS_HEADER /* defines qcfs_value, the sizes QCFS_.. and the list qcfs_operations */

static union { /* aligned for both */
  char bytes[QCFS_ARENA];
  int32_t whole;
} arena;
static int32_t image[QCFS_HEIGHT * QCFS_WIDTH * QCFS_SOURCES]; /* the quantised image, [height, width, sources] */
static int image_exponent;

static qcfs_value* values(const struct qcfs_map* m) { return (qcfs_value*)(void*)(arena.bytes + m->at); }
static int32_t* counts(const struct qcfs_map* m) { return (int32_t*)(void*)(arena.bytes + m->at); }
static int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
static int32_t clamp(int32_t x, int32_t low, int32_t high) { return x < low ? low : x > high ? high : x; }

/* The pixel of a map that lies under a place of the kernel for output (y, x); -1 in the padding. */
static int32_t pixel_under(const struct qcfs_kernel* k, int32_t kh, int32_t kw, int32_t y, int32_t x, int32_t height,
                           int32_t width) {
  const int32_t row = y * k->stride_h - k->pad_h + kh * k->dilation_h;
  const int32_t column = x * k->stride_w - k->pad_w + kw * k->dilation_w;
  return row < 0 || row >= height || column < 0 || column >= width ? -1 : row * width + column;
}

/* ------------------------------------------------------------------------------------------------------- the image */

static int quantize(const float* x) {
  float largest = 0;
  static float z[QCFS_HEIGHT * QCFS_WIDTH * QCFS_SOURCES];
  for (int32_t i = 0; i < QCFS_HEIGHT * QCFS_WIDTH * QCFS_SOURCES; ++i) {
    const int32_t c = i % QCFS_SOURCES, pixel = i / QCFS_SOURCES;
    const float product = x[qcfs_source[c] * QCFS_HEIGHT * QCFS_WIDTH + pixel] * qcfs_scale[c];
    z[i] = product + qcfs_shift[c];
    if (!(fabsf(z[i]) <= 3.402823466e38f)) return -1; /* NaN or infinity */
    if (fabsf(z[i]) > largest) largest = fabsf(z[i]);
  }
  const int32_t limit = (INT32_C(1) << (QCFS_IMAGE_BITS - 1)) - 1;
  image_exponent = 0;
  if (largest > 0) {
    (void)frexp((double)largest / limit, &image_exponent);
    if (largest <= ldexp(limit, image_exponent - 1)) --image_exponent;
  }
  for (int32_t i = 0; i < QCFS_HEIGHT * QCFS_WIDTH * QCFS_SOURCES; ++i) {
    image[i] = (int32_t)rint(ldexp(z[i], -image_exponent));
  }
  return 0;
}

static int32_t image_sum_rounded(const struct qcfs_image* a, const int16_t* weight, int32_t outputs, int32_t y,
                                 int32_t x, int32_t o, double gain, double offset, int32_t low, int32_t high) {
  const struct qcfs_kernel* k = &a->kernel;
  const int32_t channels = QCFS_SOURCES / k->groups, first = o / (outputs / k->groups) * channels;
  int64_t sum = 0;
  for (int32_t kh = 0; kh < k->height; ++kh) {
    for (int32_t kw = 0; kw < k->width; ++kw) {
      const int32_t at = pixel_under(k, kh, kw, y, x, QCFS_HEIGHT, QCFS_WIDTH);
      if (at < 0) continue;
      const int32_t* pixel = image + at * QCFS_SOURCES + first;
      const int16_t* w = weight + (kh * k->width + kw) * channels * outputs + o;
      for (int32_t c = 0; c < channels; ++c) sum += (int64_t)pixel[c] * w[c * outputs];
    }
  }
  const double scale = ldexp(gain, image_exponent);
  const double product = (double)sum * scale;
  const double rounded = rint(product + offset);
  return rounded < low ? low : rounded > high ? high : (int32_t)rounded;
}

static int32_t image_current(const struct qcfs_image* a, const struct qcfs_fire* f, int32_t y, int32_t x, int32_t o,
                             int32_t low, int32_t high) {
  const int32_t outputs = f->out.channels, n = f->threshold[o];
  if (!a->low_digit) {
    return image_sum_rounded(a, a->weight, outputs, y, x, o, a->gain[o], a->offset[o], low, high);
  }
  const int32_t wide_low = f->first ? -31 * n : a->low[o], wide_high = f->first ? 31 * n : a->high[o];
  const int32_t upper =
      image_sum_rounded(a, a->weight, outputs, y, x, o, 256 * a->gain[o], a->offset[o], wide_low, wide_high);
  const int32_t lower = image_sum_rounded(a, a->low_digit, outputs, y, x, o, a->gain[o], 0, -n / 2, n / 2);
  return clamp(upper + lower, low, high);
}

/* ----------------------------------------------------------------------------------------------------- the neurons */

struct run { /* of a plain neuron */
  int32_t end, fired, least_fired, most_silent;
};

static int32_t hold(int32_t v, int32_t n, int first) { return first ? clamp(v, -32 * n, 32 * n) : v; }

static struct run run_plain(const int32_t* current, int32_t steps, int32_t v, int32_t n, int first, int8_t* spikes) {
  struct run r = {0, 0, INT32_MAX, INT32_MIN};
  for (int32_t t = 0; t < steps; ++t) {
    v = hold(v + current[t], n, first);
    const int fires = v >= n;
    spikes[t] = (int8_t)fires;
    r.fired += fires;
    if (fires) {
      r.least_fired = smaller(r.least_fired, v);
      v -= n;
    } else {
      r.most_silent = larger(r.most_silent, v);
    }
  }
  r.end = v;
  return r;
}

/* The spikes of one neuron from its currents. */
static void fire_neuron(const int32_t* current, int32_t n, int first, int8_t* spikes) {
  int32_t v = n / 2;
  if (QCFS_MODE == QCFS_SIGNED) {
    int32_t sent = 0;
    for (int32_t t = 0; t < QCFS_STEPS; ++t) {
      v = hold(v + current[t], n, first);
      spikes[t] = (int8_t)(v >= n ? 1 : v < 0 && sent > 0 ? -1 : 0);
      v -= n * spikes[t];
      sent += spikes[t];
    }
    return;
  }
  for (int32_t i = 0; QCFS_MODE == QCFS_OFFSET && i < QCFS_ITERATIONS; ++i) {
    const struct run r = run_plain(current, QCFS_WINDOW, v, n, first, spikes);
    const int32_t left = r.end - v + n / 2;
    if (left < 0 && r.fired > 0) v -= larger(n, r.least_fired - n + 1);
    if (left >= n && r.fired < QCFS_WINDOW) v += larger(n, n - r.most_silent);
    v = hold(v, n, first);
  }
  const int silent = QCFS_MODE == QCFS_MASKED && run_plain(current, QCFS_WINDOW, v, n, first, spikes).end <= 0;
  run_plain(current, QCFS_STEPS, v, n, first, spikes);
  if (silent) memset(spikes, 0, QCFS_STEPS);
}

/* Sum mode: how often a neuron fires in T steps, from the sum of its currents. */
static qcfs_value count_of(const int32_t* current, int32_t n, int first) {
  if (!first) return (qcfs_value)clamp(current[0] + n / 2 >= 0 ? (current[0] + n / 2) / n : 0, 0, QCFS_T);
  int32_t v = n / 2, fired = 0;
  for (int32_t t = 0; t < QCFS_T; ++t) {
    v = hold(v + current[t], n, first);
    if (v >= n) v -= n, ++fired;
  }
  return (qcfs_value)fired;
}

/* ------------------------------------------------------------------------------------------------------ the layers */

static int32_t element(struct qcfs_weight w, int32_t i) {
  const int32_t x = w.bytes == 1   ? ((const int8_t*)w.data)[i]
                    : w.bytes == 2 ? ((const int16_t*)w.data)[i]
                                   : ((const int32_t*)w.data)[i];
  return x * w.unit;
}

/* Adds a product to the currents of one neuron. */
static void add_product(const struct qcfs_product* p, int32_t outputs, int32_t y, int32_t x, int32_t o,
                        int32_t* current) {
  const struct qcfs_kernel* k = &p->kernel;
  const struct qcfs_map* m = &p->x;
  const int32_t channels = m->channels / k->groups, first = o / (outputs / k->groups) * channels;
  const int32_t plane = m->height * m->width * m->channels;
  for (int32_t kh = 0; kh < k->height; ++kh) {
    for (int32_t kw = 0; kw < k->width; ++kw) {
      const int32_t pixel = pixel_under(k, kh, kw, y, x, m->height, m->width);
      if (pixel < 0) continue;
      const qcfs_value* at = values(m) + pixel * m->channels + first;
      for (int32_t c = 0; c < channels; ++c, ++at) {
        for (int32_t t = 0; t < m->steps; ++t) {
          const int32_t s = at[t * plane];
          if (s != 0) current[t] += s * element(p->weight, ((kh * k->width + kw) * channels + c) * outputs + o);
        }
      }
    }
  }
}

static void fire(const struct qcfs_fire* f) {
  const struct qcfs_map* out = &f->out;
  const int32_t plane = out->height * out->width * out->channels, sum = QCFS_MODE == QCFS_SUM;
  /* Neurons of the image run over all steps to be counted. */
  const int32_t steps = sum && f->first ? QCFS_T : QCFS_STEPS;
  int32_t current[QCFS_CURRENTS];
  int8_t spikes[QCFS_CURRENTS];
  for (int32_t i = 0; i < plane; ++i) {
    const int32_t o = i % out->channels, x = i / out->channels % out->width, y = i / out->channels / out->width;
    const int wide = f->first && f->bias != 0;
    const int32_t n = f->threshold[o];
    const int32_t of_image = !f->image ? 0
                             : wide    ? image_current(f->image, f, y, x, o, -31 * n, 31 * n)
                                       : image_current(f->image, f, y, x, o, f->image->low[o], f->image->high[o]);
    for (int32_t t = 0; t < steps; ++t) {
      current[t] = of_image + (f->bias ? f->bias[t * f->bias_step + o] : 0);
      if (sum && !f->first) current[t] *= QCFS_T; /* a total; there are no biases by step */
    }
    for (int32_t j = 0; j < f->products; ++j) add_product(f->product + j, out->channels, y, x, o, current);
    for (int32_t j = 0; j < f->residuals; ++j) {
      const struct qcfs_residual* r = f->residual + j;
      for (int32_t t = 0; t < r->x.steps; ++t) {
        current[t] += values(&r->x)[t * plane + i] * r->amplitude[o];
      }
    }
    if (sum) {
      values(out)[i] = count_of(current, n, f->first);
    } else {
      fire_neuron(current, n, f->first, spikes);
      for (int32_t t = 0; t < steps; ++t) values(out)[t * plane + i] = (qcfs_value)spikes[t];
    }
  }
}

static void pool(const struct qcfs_pool* p) {
  const struct qcfs_map *in = &p->x, *out = &p->out;
  for (int32_t i = 0; i < out->steps * out->height * out->width * out->channels; ++i) {
    const int32_t c = i % out->channels, x = i / out->channels % out->width;
    const int32_t y = i / out->channels / out->width % out->height, t = i / out->channels / out->width / out->height;
    const int32_t *rows = p->rows + 3 * y, *columns = p->columns + 3 * x;
    int32_t sum = 0, most = -1, seen = 0;
    for (int32_t row = rows[0]; row < rows[1]; ++row) {
      for (int32_t column = columns[0]; column < columns[1]; ++column, ++seen) {
        const int32_t at = ((t * in->height + row) * in->width + column) * in->channels + c;
        const int32_t found = p->counts ? counts(in)[at] : values(in)[at];
        sum += found;
        most = larger(most, found);
      }
    }
    const int32_t pooled = !p->maximum ? sum * (p->multiple / (rows[2] * columns[2])) : seen ? most : 0;
    if (p->counts) {
      counts(out)[i] = pooled;
    } else {
      values(out)[i] = (qcfs_value)pooled;
    }
  }
}

static void copy(const struct qcfs_copy* a) {
  for (int32_t i = 0; i < a->x.steps * a->x.height * a->x.width; ++i) {
    memcpy(values(&a->out) + i * a->out.channels + a->channel, values(&a->x) + i * a->x.channels,
           (size_t)a->x.channels * sizeof(qcfs_value));
  }
}

static void count(const struct qcfs_count* a) {
  const int32_t plane = a->x.height * a->x.width * a->x.channels;
  for (int32_t i = 0; i < plane; ++i) {
    int32_t sum = 0;
    for (int32_t t = 0; t < a->x.steps && t < QCFS_T; ++t) sum += values(&a->x)[t * plane + i];
    counts(&a->out)[i] = sum;
  }
}

static int64_t term_sum(const struct qcfs_term* a, int32_t outputs, int32_t y, int32_t x, int32_t o) {
  const struct qcfs_kernel* k = &a->kernel;
  const struct qcfs_map* m = &a->x;
  if (!a->weight) return counts(m)[(y * m->width + x) * m->channels + o];
  const int32_t channels = m->channels / k->groups, first = o / (outputs / k->groups) * channels;
  int64_t sum = 0;
  for (int32_t kh = 0; kh < k->height; ++kh) {
    for (int32_t kw = 0; kw < k->width; ++kw) {
      const int32_t pixel = pixel_under(k, kh, kw, y, x, m->height, m->width);
      if (pixel < 0) continue;
      for (int32_t c = 0; c < channels; ++c) {
        const int64_t s = counts(m)[pixel * m->channels + first + c];
        sum += s * a->weight[((kh * k->width + kw) * channels + c) * outputs + o];
      }
    }
  }
  return sum;
}

static void answer(const struct qcfs_answer* a, float* out) {
  for (int32_t i = 0; i < a->height * a->width * a->channels; ++i) {
    const int32_t o = i % a->channels, x = i / a->channels % a->width, y = i / a->channels / a->width;
    double total = 0;
    for (int32_t j = 0; j < a->terms; ++j) {
      const double product = (double)term_sum(a->term + j, a->channels, y, x, o) * a->term[j].gain[o];
      const double quotient = product / a->term[j].divisor;
      total += quotient;
    }
    out[(o * a->height + y) * a->width + x] = (float)(total + a->offset[o]);
  }
}

/* The answer, float32 [QCFS_ANSWERS], for an image float32 [channels, height, width]; -1 if it holds NaN or infinity.
 */
int qcfs_run(const float* pixels, float* out);

int qcfs_run(const float* pixels, float* out) {
  if (quantize(pixels) != 0) return -1;
  for (int32_t i = 0; i < (int32_t)(sizeof qcfs_operations / sizeof qcfs_operations[0]); ++i) {
    const void* what = qcfs_operations[i].what;
    switch (qcfs_operations[i].kind) {
      case QCFS_FIRE:
        fire(what);
        break;
      case QCFS_POOL:
        pool(what);
        break;
      case QCFS_COPY:
        copy(what);
        break;
      case QCFS_COUNT:
        count(what);
        break;
      case QCFS_ANSWER:
        answer(what, out);
        break;
    }
  }
  return 0;
}

#ifndef QCFS_NO_MAIN
#include <stdio.h>

int main(void) {
  static float pixels[QCFS_CHANNELS * QCFS_HEIGHT * QCFS_WIDTH], out[QCFS_ANSWERS];
  const size_t size = sizeof pixels / sizeof pixels[0];
  for (int images = 0;; ++images) {
    const size_t got = fread(pixels, sizeof pixels[0], size, stdin);
    if (got == 0 && images > 0) return 0;
    if (got != size) return fprintf(stderr, "needs images of %d float32 each\n", (int)size), 1;
    if (qcfs_run(pixels, out) != 0) return fputs("the image holds NaN or infinity\n", stderr), 1;
    if (fwrite(out, sizeof out[0], QCFS_ANSWERS, stdout) != QCFS_ANSWERS) return 1;
  }
}
#endif
