/* enat for C, and for languages that call C: from an engine directory (docs/ENGINE.md) to pictures.
 *
 * Functions return ENAT_OK or what went wrong; enat_last_error() then says it in one line. One pipeline may be used from several
 * threads at once. A pipeline is given back with enat_close(), once, and what the library fills in with enat_free_images(), which
 * leaves the struct empty, so that it may be called again. Both accept NULL and what a call that failed has left. */
#ifndef ENAT_H
#define ENAT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ENAT_C_API __attribute__((visibility("default")))

typedef enum {
    ENAT_OK = 0,
    ENAT_INPUT_ERROR = 1,   /* an argument is out of its range or unknown */
    ENAT_ENGINE_ERROR = 2,  /* the engine is incomplete, altered, too new, or does not hold what was asked of it */
    ENAT_BACKEND_ERROR = 3, /* ONNX Runtime cannot load a graph, run it, or use the device */
    ENAT_STOPPED = 4,       /* the callback stopped the run */
    ENAT_FAILED = 5         /* anything else: memory */
} enat_status;

typedef struct enat_pipeline enat_pipeline;
typedef struct enat_preview enat_preview;

typedef struct {
    const char* device;   /* "cpu", "cuda:0", …; NULL: cpu */
    const char* provider; /* "cpu", "cuda" or "tensorrt"; NULL: by the device */
    int32_t threads;      /* on the CPU, shared by the slots; 0: one for each core that the process may use */
    int32_t verify;       /* 1: hash files over 64 MiB too */
    int32_t slots;        /* batches in flight at once, each with memory of its own; further threads wait in turn; 0: one */
} enat_options;

/* Called after every step; steps are counted from 0, over all batches. Anything but 0 stops the run. `preview` is valid during the
 * call: enat_preview_images(). The pipeline must not be asked for other pictures meanwhile: ENAT_INPUT_ERROR. */
typedef int (*enat_callback)(size_t step, size_t steps, const enat_preview* preview, void* user);

typedef struct {
    int32_t num;                 /* images a class */
    int32_t batch_size;          /* images drawn at once, at most */
    const uint64_t* seeds;       /* one an image; or one: image i of the request has seeds[0] + i (mod 2^64); NULL: at random */
    size_t seed_count;           /* of `seeds` */
    int64_t steps;               /* 1 … length; 0: the engine's own */
    double guidance;             /* scale of the classifier-free guidance, 0 for none; NAN: the engine's own, as below */
    double mask_temperature;     /* at the first step, falling to 0 */
    double sampling_temperature; /* at the first step, falling to 0 */
    int32_t tokens_only;         /* 1: no pictures are made */
    enat_callback callback;      /* or NULL */
    void* user;                  /* passed to the callback */
} enat_settings;

typedef struct {
    size_t count, height, width, grid;
    const uint8_t* pixels; /* [count, height, width, 3], RGB; NULL where only tokens were asked for */
    const int64_t* tokens; /* [count, grid, grid] */
    const uint64_t* seeds; /* [count]; NULL from enat_decode and previews */
    void* owner;           /* of all that; the library's */
} enat_images;

typedef struct {
    int64_t grid, codes, num_classes;
    int64_t steps; /* the engine's own settings */
    double guidance, mask_temperature, sampling_temperature;
    int32_t has_images; /* 0: the engine gives tokens only */
    int32_t has_class_names;
} enat_info;

/* The library's version. One whose first two numbers are others than those of the header has structs of another layout; its file has
 * another name (libenat.so.0.1), so that a program that is linked does not get it, but one that opens it by hand should look. */
ENAT_C_API const char* enat_version(void);

/* What the last call on this thread that did not return ENAT_OK had to say; one line, UTF-8. Valid until the thread's next call. */
ENAT_C_API const char* enat_last_error(void);

/* options: NULL for the CPU. */
ENAT_C_API enat_status enat_open(const char* engine, const enat_options* options, enat_pipeline** pipeline);
ENAT_C_API void enat_close(enat_pipeline* pipeline);

ENAT_C_API enat_status enat_get_info(const enat_pipeline* pipeline, enat_info* info);
/* NULL where the class has no name. Valid as long as the pipeline. */
ENAT_C_API const char* enat_class_name(const enat_pipeline* pipeline, int64_t number);
/* The number of a class given by its name, by its number in digits, or as "#7". */
ENAT_C_API enat_status enat_class_index(const enat_pipeline* pipeline, const char* name, int64_t* number);

/* One image a class, a random seed, the engine's own steps, guidance and temperatures. */
ENAT_C_API enat_settings enat_default_settings(void);
/* settings: NULL for the default ones. */
ENAT_C_API enat_status enat_generate(const enat_pipeline* pipeline, const int64_t* classes, size_t count, const enat_settings* settings,
                                     enat_images* images);
/* The pictures of tokens [count, grid, grid]. */
ENAT_C_API enat_status enat_decode(const enat_pipeline* pipeline, const int64_t* tokens, size_t count, enat_images* images);
/* Inside a callback: the pictures of the batch being drawn, as they would be now. */
ENAT_C_API enat_status enat_preview_images(const enat_preview* preview, enat_images* images);
ENAT_C_API void enat_free_images(enat_images* images);

#ifdef __cplusplus
}
#endif

#endif
