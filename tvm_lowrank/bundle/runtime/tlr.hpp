// The C interface of a bundle (tlr.h) for C++17: exceptions instead of return values, and no memory to free.
#ifndef TVM_LOWRANK_TLR_HPP_
#define TVM_LOWRANK_TLR_HPP_

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "tlr.h"

namespace tlr {

// A network of a bundle as a function of images. Whatever fails is thrown as std::runtime_error, in one line.
class Model {
 public:
  explicit Model(const std::string& bundle, tlr_which which = TLR_COMPRESSED, int threads = 0)
      : model_(tlr_load(bundle.c_str(), which, threads), tlr_free) {
    if (!model_) throw std::runtime_error(tlr_error());
  }

  // Floats of one image, NCHW, and of its output, or its outputs together.
  size_t input_size() const { return tlr_input_size(model_.get()); }
  size_t output_size() const { return tlr_output_size(model_.get()); }

  // Images at a time, channels, height, width.
  std::vector<int64_t> input_shape() const {
    const int64_t* shape = tlr_input_shape(model_.get());
    return {shape, shape + 4};
  }

  // The shape of each output, of a single image.
  std::vector<std::vector<int64_t>> output_shapes() const {
    std::vector<std::vector<int64_t>> shapes(tlr_output_count(model_.get()));
    for (size_t i = 0; i < shapes.size(); ++i) {
      size_t dimensions = 0;
      const int64_t* shape = tlr_output_shape(model_.get(), i, &dimensions);
      shapes[i].assign(shape, shape + dimensions);
    }
    return shapes;
  }

  // The outputs of any number of images, one after another.
  std::vector<float> operator()(const std::vector<float>& images) {
    if (images.empty() || images.size() % input_size()) {
      throw std::runtime_error("an image has " + std::to_string(input_size()) + " floats; " +
                               std::to_string(images.size()) + " are not a number of images");
    }
    size_t count = images.size() / input_size();
    std::vector<float> outputs(count * output_size());
    if (tlr_run(model_.get(), images.data(), count, outputs.data())) throw std::runtime_error(tlr_error());
    return outputs;
  }

 private:
  std::unique_ptr<tlr_model, decltype(&tlr_free)> model_;
};

}  // namespace tlr

#endif  // TVM_LOWRANK_TLR_HPP_
