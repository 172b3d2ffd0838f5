/* libqcfs: runs a network saved by qcfs_fast from C. Needs neither Python nor torch; docs/c-api.md shows its use.

   A network is loaded once and then run on any number of images, in any number of threads at the same time. A stream is
   a run that goes on from call to call; one thread at a time may use it. The answers are, bit for bit, those of
   qcfs_fast in Python.

   Every function that can fail returns a status and, where `error` is not NULL, writes a sentence into it. Nothing is
   printed, and no C++ exception leaves the library. All memory belongs to networks and streams, but for the kernels'
   workspace, which belongs to the thread that calls, and one pool of threads that the process keeps where threads > 1.

   The first call at a shape, and with a set of options, settles what it needs. Later ones in the same thread allocate
   nothing at all, with two exceptions. A layer takes its engine by the firing rate of its input: where other images
   bring another engine, its weights are packed and the workspace may grow. And a network remembers 16 shapes. */
#ifndef QCFS_H
#define QCFS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define QCFS_API __attribute__((visibility("default")))
#else
#define QCFS_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum qcfs_status {
  QCFS_OK = 0,
  QCFS_BAD_ARGUMENT = 1, /* a null pointer, or a number out of its range */
  QCFS_BAD_FILE = 2,     /* the file cannot be read */
  QCFS_BAD_FORMAT = 3,   /* the bytes are no sound network of a version that this library reads */
  QCFS_BAD_SHAPE = 4,    /* the network cannot take images of this shape, or `out` has another size */
  QCFS_NOT_FINITE = 5,   /* the images hold NaN or infinity */
  QCFS_NO_MEMORY = 6,    /* no memory, or more than `max_bytes` */
  QCFS_INTERNAL = 7      /* a mistake in the library */
} qcfs_status;

typedef struct qcfs_error {
  char text[256]; /* ends with a 0 */
} qcfs_error;

typedef struct qcfs_network qcfs_network;
typedef struct qcfs_stream qcfs_stream;

typedef struct qcfs_info {
  int64_t channels;      /* of an image */
  int is_vector;         /* images are vectors [N, channels], else maps [N, channels, H, W] */
  int64_t height, width; /* of the images that the network was settled for; 0: none */
  int64_t classes;       /* channels of the answer */
  int64_t steps;         /* time steps T of a call that names none */
  int64_t max_steps;     /* for which no integer can overflow, whatever the image */
  int weight_bits;       /* 8, 16 or 24 */
  const char* neuron;    /* plain, offset, masked, signed or sum */
  int64_t layers;        /* that spike */
} qcfs_info;

/* Dense float32 images [N, channels, H, W], or [steps, N, channels, H, W] where each step has its own. Of vectors, H
   and W are 1. */
typedef struct qcfs_images {
  const float* data;
  int64_t steps; /* 0: one image for all steps */
  int64_t batch, channels, height, width;
} qcfs_images;

/* How to run. All zeros, or NULL in its place, is a call with the network's T on one thread. */
typedef struct qcfs_options {
  int64_t steps;      /* 0: the network's T, or those that the images have; of a stream, 1 */
  int64_t skip;       /* leave the first steps out of the answer */
  int per_step;       /* an answer after each step, not only the last */
  int threads;        /* 0: one */
  uint64_t max_bytes; /* of memory that a run may use for intermediates; 0: any */
} qcfs_options;

/* The answer is dense float32: [N, classes], or [N, classes, H, W]; with per_step it has an axis in front. */
typedef struct qcfs_shape {
  int rank;
  int64_t sizes[5];
  size_t count; /* product of the sizes */
} qcfs_shape;

/* Reads a network. qcfs_load_memory copies what it needs. */
QCFS_API qcfs_status qcfs_load_file(const char* path, qcfs_network** network, qcfs_error* error);
QCFS_API qcfs_status qcfs_load_memory(const void* bytes, size_t size, qcfs_network** network, qcfs_error* error);
/* NULL is let pass. Streams of the network may live longer. */
QCFS_API void qcfs_free(qcfs_network* network);

/* The text of `neuron` lives as long as the library. */
QCFS_API qcfs_status qcfs_describe(const qcfs_network* network, qcfs_info* info, qcfs_error* error);

/* The shape of the answer to such images, whose `data` may be NULL. It also settles their shape for the runs that
   follow, which then at their first time only take memory and pack weights. */
QCFS_API qcfs_status qcfs_answer_shape(const qcfs_network* network, const qcfs_images* images,
                                       const qcfs_options* options, qcfs_shape* shape, qcfs_error* error);

/* Runs the network; `count` is the number of floats in `out`. */
QCFS_API qcfs_status qcfs_run(const qcfs_network* network, const qcfs_images* images, const qcfs_options* options,
                              float* out, size_t count, qcfs_error* error);

QCFS_API qcfs_status qcfs_stream_new(const qcfs_network* network, qcfs_stream** stream, qcfs_error* error);
QCFS_API void qcfs_stream_free(qcfs_stream* stream);
/* Runs further steps: `images` may be NULL for those of the call before. The answer is the mean over all steps since
   the start; its shape is that of qcfs_answer_shape. What is refused leaves the stream as it was, `max_bytes` too.
   Where memory ends in the middle of a run (QCFS_NO_MEMORY too), or after QCFS_INTERNAL, it has been reset:
   qcfs_stream_steps is 0. */
QCFS_API qcfs_status qcfs_stream_run(qcfs_stream* stream, const qcfs_images* images, const qcfs_options* options,
                                     float* out, size_t count, qcfs_error* error);
/* Steps since the start or the last reset. */
QCFS_API int64_t qcfs_stream_steps(const qcfs_stream* stream);
QCFS_API void qcfs_stream_reset(qcfs_stream* stream);

#ifdef __cplusplus
}
#endif

#endif
