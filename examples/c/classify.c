/* Prints the class with the highest score of each image.
 *
 *     cc classify.c -I PACKAGE/include -L PACKAGE/lib -ltlr -Wl,-rpath,PACKAGE/lib -Wl,--allow-shlib-undefined
 *     classify BUNDLE IMAGES [THREADS]
 *
 * PACKAGE is a folder that `tvm_lowrank package BUNDLE --with-runtime` wrote, and a bundle itself. IMAGES is a file of
 * float32 values, image after image, as the network takes them (NCHW, normalised).
 */
#include <stdio.h>
#include <stdlib.h>

#include "tlr.h"

int main(int argc, char **argv) {
  if (argc < 3) {
    fprintf(stderr, "usage: %s BUNDLE IMAGES [THREADS]\n", argv[0]);
    return 2;
  }
  tlr_model *model = tlr_load(argv[1], TLR_COMPRESSED, argc > 3 ? atoi(argv[3]) : 1);
  if (!model) {
    fprintf(stderr, "error: %s\n", tlr_error());
    return 1;
  }
  FILE *file = fopen(argv[2], "rb");
  if (!file) {
    fprintf(stderr, "error: cannot read %s\n", argv[2]);
    return 1;
  }
  size_t size = tlr_input_size(model), classes = tlr_output_size(model);
  float *image = malloc(size * sizeof(float)), *scores = malloc(classes * sizeof(float));
  int status = 0;
  while (!status && fread(image, sizeof(float), size, file) == size) {
    status = tlr_run(model, image, 1, scores);
    if (status) {
      fprintf(stderr, "error: %s\n", tlr_error());
    } else {
      size_t best = 0;
      for (size_t i = 1; i < classes; ++i) {
        if (scores[i] > scores[best]) best = i;
      }
      printf("%zu\n", best);
    }
  }
  free(image);
  free(scores);
  fclose(file);
  tlr_free(model);
  return status;
}
