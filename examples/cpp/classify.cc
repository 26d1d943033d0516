// Prints the class with the highest score of each image.
//
//     classify BUNDLE IMAGES [THREADS]
//
// IMAGES is a file of float32 values, image after image, as the network takes them (NCHW, normalised): in numpy,
// images.astype("float32").tofile("images.f32").

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <vector>

#include "tlr.hpp"

int main(int argc, char** argv) try {
  if (argc < 3) {
    std::cerr << "usage: " << argv[0] << " BUNDLE IMAGES [THREADS]\n";
    return 2;
  }
  std::ifstream file(argv[2], std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error(std::string("cannot read ") + argv[2]);
  std::vector<float> images(static_cast<size_t>(file.tellg()) / sizeof(float));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(images.data()), static_cast<std::streamsize>(images.size() * sizeof(float)));

  tlr::Model model(argv[1], TLR_COMPRESSED, argc > 3 ? std::atoi(argv[3]) : 1);
  std::vector<float> scores = model(images);
  for (auto first = scores.begin(); first != scores.end(); first += model.output_size()) {
    std::cout << std::max_element(first, first + model.output_size()) - first << '\n';
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << '\n';
  return 1;
}
