#include "tlr.h"

#include <elf.h>
#include <sched.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "needs.h"
#include "sha256.h"

namespace {

using tvm::ffi::Any;
using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Module;
using tvm::ffi::Optional;
using tvm::ffi::String;
using tvm::ffi::Tensor;
namespace json = tvm::ffi::json;

constexpr int64_t kSchema = 1;     // of manifests that can be read
constexpr int kDeepest = 64;       // nesting of a manifest
constexpr size_t kAlignment = 64;  // of tensors, as the compiled code takes for granted
constexpr int kPooled = 2;         // relax.VirtualMachine's allocator that keeps freed memory

thread_local std::string last_error;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::string ContentOf(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Failure("cannot read " + path + "; is it the folder of a bundle?");
  return {std::istreambuf_iterator<char>(file), {}};
}

// Whether JSON is nested so deeply that the parser, which calls itself, could run out of stack.
bool TooDeep(const std::string& text) {
  int depth = 0;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    char c = text[i];
    if (c == '"') {
      quoted = !quoted;
    } else if (quoted) {
      i += c == '\\';
    } else if (c == '[' || c == '{') {
      if (++depth > kDeepest) return true;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return false;
}

// What must be true of a manifest for the bundle to be usable.
struct Manifest {
  explicit Manifest(const std::string& folder) : path(folder + "/manifest.json") {
    std::string text = ContentOf(path);
    if (TooDeep(text)) Fail("is nested too deeply; restore it");
    String error;
    Any parsed = json::Parse(String(text), &error);
    auto entries = parsed.as<json::Object>();
    if (!entries) Fail("is not a JSON object; restore it");
    content = *entries;
    auto schema = Value("schema").as<int64_t>();
    if (!schema || *schema < 1) Fail("has no valid 'schema'; restore it");
    if (*schema > kSchema) Fail("has schema " + std::to_string(*schema) + ", which is newer than this program");
    auto dimensions = Value("input_shape").as<json::Array>();
    if (!dimensions || dimensions->size() != shape.size()) Fail("has no valid 'input_shape'; restore it");
    for (size_t i = 0; i < shape.size(); ++i) {
      auto dimension = (*dimensions)[i].as<int64_t>();
      if (!dimension || *dimension < 1 || *dimension > (1 << 20)) Fail("has no valid 'input_shape'; restore it");
      shape[i] = *dimension;
    }
  }

  std::string Hash(const std::string& name) const {
    auto files = Value("files").as<json::Object>();
    if (!files || files->count(String(name)) == 0) Fail("says nothing of " + name + "; restore it");
    auto hash = files->at(String(name)).as<String>();
    if (!hash) Fail("has no valid checksum of " + name + "; restore it");
    return *hash;
  }

  Any Value(const char* key) const { return content.count(String(key)) ? content.at(String(key)) : Any(); }

  // The folders of the libraries within the bundle, the best for the newest processors first.
  std::vector<std::string> Folders() const {
    auto levels = Value("levels").as<json::Array>();
    if (!levels) return {""};
    std::vector<std::string> folders;
    for (const Any& level : *levels) {
      auto entries = level.as<json::Object>();
      auto folder = entries && entries->count(String("folder")) ? entries->at(String("folder")).as<String>() : std::nullopt;
      if (!folder) Fail("has no valid 'levels'; restore it");
      std::string name = *folder;
      if (name == "." || name == ".." || name.find('/') != std::string::npos) Fail("has no valid 'levels'; restore it");
      folders.push_back(name.empty() ? "" : name + "/");
    }
    if (folders.empty()) folders.emplace_back();
    return folders;
  }

  [[noreturn]] void Fail(const std::string& what) const { throw Failure(path + " " + what); }

  std::string path;
  json::Object content;
  std::array<int64_t, 4> shape{};
};

// The loader neither survives a truncated library nor says what is wrong with one for other processors.
void CheckLibrary(const std::string& path, const std::string& hash) {
  std::string found = tlr::Sha256(path);
  if (found.empty()) throw Failure("cannot read " + path);
  if (found != hash) throw Failure(path + " is not the file that the manifest describes; copy the bundle again");
  auto machine = [](const std::string& name) {
    std::ifstream file(name, std::ios::binary);
    Elf32_Ehdr header{};  // its beginning is that of the 64-bit header
    file.read(reinterpret_cast<char*>(&header), sizeof header);
    bool is_elf = file && std::memcmp(header.e_ident, ELFMAG, SELFMAG) == 0;
    return std::make_pair(is_elf ? header.e_machine : EM_NONE, is_elf ? header.e_ident[EI_CLASS] : 0);
  };
#if defined(__x86_64__)
  auto own = std::make_pair(EM_X86_64, ELFCLASS64);
#elif defined(__aarch64__)
  auto own = std::make_pair(EM_AARCH64, ELFCLASS64);
#elif defined(__arm__)
  auto own = std::make_pair(EM_ARM, ELFCLASS32);
#else
  auto own = machine("/proc/self/exe");
#endif
  if (machine(path) != std::pair<int, int>(own)) {
    throw Failure(path + " is for another kind of processor; make a bundle for this target");
  }
}

struct HostMemory {
  void AllocData(DLTensor* tensor) {
    size_t bytes = sizeof(float);
    for (int i = 0; i < tensor->ndim; ++i) bytes *= static_cast<size_t>(tensor->shape[i]);
    if (posix_memalign(&tensor->data, kAlignment, bytes)) throw std::bad_alloc();
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

size_t Product(const int64_t* first, const int64_t* last) {
  size_t product = 1;
  for (; first != last; ++first) product *= static_cast<size_t>(*first);
  return product;
}

// TVM binds the calling thread to one core, and with it every thread that the application starts later.
void UseThreads(int threads) {
  cpu_set_t cores;
  bool known = sched_getaffinity(0, sizeof cores, &cores) == 0;
  Function::GetGlobalRequired("runtime.config_threadpool")(1, threads);
  if (known) sched_setaffinity(0, sizeof cores, &cores);
}

std::string FirstLine(const char* text) {
  std::string line(text);
  return line.substr(0, line.find('\n'));
}

}  // namespace

struct tlr_model {
  tlr_model(const std::string& folder, const std::string& name, int threads) : manifest(folder) {
    std::string path = Best(folder, name);
    if (threads > 0) UseThreads(threads);
    try {
      library = Module::LoadFromFile(path);
      machine = Get(*library, "vm_load_executable")().cast<Module>();
      Get(*machine, "vm_initialization")(static_cast<int>(kDLCPU), 0, kPooled, static_cast<int>(kDLCPU), 0, kPooled);
      main = Get(*machine, "main");
    } catch (const tvm::ffi::Error& error) {
      throw Failure("cannot load " + path + ": " + FirstLine(error.what()));
    }
    input = Tensor::FromNDAlloc(HostMemory(), tvm::ffi::ShapeView(manifest.shape.data(), manifest.shape.size()),
                                DLDataType{kDLFloat, 32, 1}, DLDevice{kDLCPU, 0});
    std::memset((*input).data_ptr(), 0, Batch() * ImageSize() * sizeof(float));
    for (const Tensor& output : Run()) {  // the manifest does not say it
      shapes.emplace_back(output.shape().begin() + 1, output.shape().end());
      output_size += output.numel() / Batch();
    }
  }

  // The library of the best level that this processor can run, checked; of those whose files are there.
  std::string Best(const std::string& bundle, const std::string& name) const {
    std::string reason = bundle + " has no " + name;
    for (const std::string& level : manifest.Folders()) {
      std::string path = bundle + "/" + level + name;
      if (!level.empty() && access(path.c_str(), F_OK) != 0) continue;
      CheckLibrary(path, manifest.Hash(level + name));
      if (path.find('/') != 0) path = "./" + path;  // without a slash, the loader would look elsewhere
      reason = tlr::WhyNot(path);
      if (reason.empty()) return path;
      reason = path + " " + reason;
    }
    throw Failure(reason);
  }

  static Function Get(Module module, const char* name) {
    Optional<Function> found = module->GetFunction(String(name));
    if (!found.has_value()) throw Failure(std::string("the library has no function ") + name);
    return *found;
  }

  std::vector<Tensor> Run() {
    Any result = main(*input);
    std::vector<Tensor> outputs;
    if (auto several = result.as<Array<Tensor>>()) {
      outputs.assign(several->begin(), several->end());
    } else {
      outputs.push_back(result.cast<Tensor>());
    }
    for (const Tensor& output : outputs) {
      DLDataType type = output.dtype();
      if (type.code != kDLFloat || type.bits != 32 || output.ndim() < 1 || output.size(0) != manifest.shape[0]) {
        throw Failure("the library's output is not float32 with an entry for each image");
      }
    }
    return outputs;
  }

  // The outputs of the first `count` images of a run, image after image.
  void Store(const std::vector<Tensor>& outputs, size_t count, float* to) const {
    size_t before = 0;
    for (const Tensor& output : outputs) {
      size_t size = output.numel() / Batch();
      auto from = static_cast<const float*>(output.data_ptr());
      for (size_t i = 0; i < count; ++i) std::memcpy(to + i * output_size + before, from + i * size, size * sizeof(float));
      before += size;
    }
  }

  size_t Batch() const { return static_cast<size_t>(manifest.shape[0]); }
  size_t ImageSize() const { return Product(manifest.shape.data() + 1, manifest.shape.data() + 4); }

  Manifest manifest;
  Optional<Module> library, machine;  // in the order in which they must go: what came from them is freed first
  Function main;
  Optional<Tensor> input;
  std::vector<std::vector<int64_t>> shapes;  // of the outputs, of one image
  size_t output_size = 0;
};

namespace {

// Calls a function, and turns exceptions into the text of tlr_error.
template <typename F>
bool Guarded(F function) {
  last_error.clear();
  try {
    function();
    return true;
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";
  } catch (const std::exception& error) {
    last_error = FirstLine(error.what());
  } catch (...) {
    last_error = "unknown error";
  }
  return false;
}

}  // namespace

extern "C" {

tlr_model* tlr_load(const char* bundle, tlr_which which, int threads) {
  tlr_model* model = nullptr;
  Guarded([&] {
    if (!bundle) throw Failure("no bundle given");
    if (which != TLR_COMPRESSED && which != TLR_DENSE) throw Failure("which must be TLR_COMPRESSED or TLR_DENSE");
    if (threads < 0) throw Failure("the number of threads must not be negative");
    model = new tlr_model(bundle, which == TLR_DENSE ? "dense.so" : "model.so", threads);
  });
  return model;
}

void tlr_free(tlr_model* model) { delete model; }

int tlr_run(tlr_model* model, const float* images, size_t count, float* outputs) {
  bool done = Guarded([&] {
    if (!model || !images || !outputs || count == 0) throw Failure("tlr_run needs a model, images and room for outputs");
    size_t size = model->ImageSize();
    for (size_t start = 0; start < count; start += model->Batch()) {
      size_t part = std::min(model->Batch(), count - start);
      std::memcpy((*model->input).data_ptr(), images + start * size, part * size * sizeof(float));
      model->Store(model->Run(), part, outputs + start * model->output_size);
    }
  });
  return done ? 0 : 1;
}

const int64_t* tlr_input_shape(const tlr_model* model) { return model->manifest.shape.data(); }

size_t tlr_input_size(const tlr_model* model) { return model->ImageSize(); }

size_t tlr_output_size(const tlr_model* model) { return model->output_size; }

size_t tlr_output_count(const tlr_model* model) { return model->shapes.size(); }

const int64_t* tlr_output_shape(const tlr_model* model, size_t output, size_t* dimensions) {
  bool is_one = output < model->shapes.size();
  if (dimensions) *dimensions = is_one ? model->shapes[output].size() : 0;
  return is_one ? model->shapes[output].data() : nullptr;
}

const char* tlr_error(void) { return last_error.c_str(); }

}  // extern "C"
