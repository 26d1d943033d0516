/* A bundle of tvm_lowrank as a plain C library, for applications in any language.
 *
 *     tlr_model *model = tlr_load("bundle", TLR_COMPRESSED, 1);
 *     if (!model || tlr_run(model, images, count, scores)) fprintf(stderr, "%s\n", tlr_error());
 *     tlr_free(model);
 *
 * Images are float32, NCHW, contiguous; so are outputs, image after image. Of a network with several outputs, those of an
 * image lie one after another. The library runs on a fixed number of images
 * at a time (tlr_input_shape(model)[0]); tlr_run takes any number and calls it as often as that needs.
 *
 * A function that fails returns NULL or a value other than 0, and tlr_error() says why in one line. No input makes it
 * crash: files are compared with the checksums of the manifest before any of their code is loaded, and features that the
 * processor lacks are named before any is run. (Checksums find damage, not malice: whoever can write the bundle can run
 * code in the process that loads it.)
 *
 * A model is used by one thread at a time; several threads load a model each.
 */
#ifndef TVM_LOWRANK_TLR_H_
#define TVM_LOWRANK_TLR_H_

#include <stddef.h>
#include <stdint.h>

#define TLR_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tlr_model tlr_model;

/* Which of a bundle's two networks. */
typedef enum { TLR_COMPRESSED = 0, TLR_DENSE = 1 } tlr_which;

/* The network of a bundle, the folder that `tvm_lowrank search` or `package` wrote.
 *
 * threads: how many it runs on, the calling one included; 0 leaves that to TVM (TVM_NUM_THREADS, or one for each core).
 * It holds for all models of the process that run on the calling thread.
 */
TLR_API tlr_model *tlr_load(const char *bundle, tlr_which which, int threads);

/* Ends a model; NULL is allowed. */
TLR_API void tlr_free(tlr_model *model);

/* Computes outputs for `count` >= 1 images, which need count * tlr_output_size(model) floats. Returns 0 if it did. */
TLR_API int tlr_run(tlr_model *model, const float *images, size_t count, float *outputs);

/* The shape of the library's input: images at a time, channels, height, width. */
TLR_API const int64_t *tlr_input_shape(const tlr_model *model);

/* Floats of one image, and of its output, or its outputs together. */
TLR_API size_t tlr_input_size(const tlr_model *model);
TLR_API size_t tlr_output_size(const tlr_model *model);

/* How many outputs the network has, and the shape of one of them, of a single image; NULL if there is no such output.
 * `dimensions` becomes the length of the shape.
 */
TLR_API size_t tlr_output_count(const tlr_model *model);
TLR_API const int64_t *tlr_output_shape(const tlr_model *model, size_t output, size_t *dimensions);

/* Why the last call of this thread failed; "" if none did. Valid until the thread's next call. */
TLR_API const char *tlr_error(void);

#ifdef __cplusplus
}
#endif

#endif /* TVM_LOWRANK_TLR_H_ */
