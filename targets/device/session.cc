#include "session.h"

#include <sched.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>

#include "device_info.h"
#include "needs.h"

namespace device {
namespace {

namespace fs = std::filesystem;
using tvm::ffi::Array;
using tvm::ffi::Bytes;
using tvm::ffi::Function;
using tvm::ffi::Module;
using tvm::ffi::String;

// tvm::runtime::threading::ThreadGroup::AffinityMode::kSpecifyOneCorePerThread
constexpr int kOneCorePerThread = -2;

// Keeps files of different sessions apart and accidents out of the rest of the file system. It is no protection from
// an attacker: whoever may upload a library may run anything.
std::string FileInFolder(const std::string& folder, const std::string& name) {
  if (name.empty() || name == "." || name == ".." || name.find('/') != std::string::npos) {
    TVM_FFI_THROW(ValueError) << "'" << name << "' is not the plain name of a file in the session's folder";
  }
  fs::path path = fs::path(folder) / name;
  if (fs::is_symlink(fs::symlink_status(path))) {
    TVM_FFI_THROW(ValueError) << "'" << name << "' is a link; only files of the session's folder can be used";
  }
  return path.string();
}

// TVM's own function does not notice a full disk, and writes over a library that is in use.
void Upload(const std::string& path, const Bytes& data, size_t limit) {
  if (data.size() > limit) {
    TVM_FFI_THROW(ValueError) << "a file of " << data.size() << " bytes is larger than the " << (limit >> 20)
                              << " MiB that this device accepts; start its server with --max-upload";
  }
  std::string part = path + ".part";
  std::ofstream file(part, std::ios::binary);
  file.write(data.data(), static_cast<std::streamsize>(data.size()));
  file.close();
  if (!file) {
    int error = errno;
    fs::remove(part);
    TVM_FFI_THROW(RuntimeError) << "cannot write " << data.size() << " bytes to " << path << ": "
                                << std::strerror(error);
  }
  fs::rename(part, path);
}

Module Load(const std::string& path) {
  if (fs::path(path).extension() != ".so") {
    TVM_FFI_THROW(ValueError) << "only .so files can be loaded, not " << fs::path(path).filename()
                              << ": there is no linker on the device; link with the cross compiler, "
                                 "e.g. export_library('lib.so', cc='aarch64-linux-gnu-g++')";
  }
  if (!fs::exists(path)) {
    TVM_FFI_THROW(ValueError) << fs::path(path).filename() << " was not uploaded in this session";
  }
  std::string reason = tlr::WhyNot(path);
  if (!reason.empty()) TVM_FFI_THROW(ValueError) << fs::path(path).filename() << " " << reason;
  return Module::LoadFromFile(path);
}

// Run on exactly these cores. TVM makes its threads when it first needs them, and never more afterwards.
void UseCores(const std::vector<int>& cores) {
  cpu_set_t set;
  CPU_ZERO(&set);
  Array<String> names;
  for (int core : cores) {
    CPU_SET(core, &set);
    names.push_back(String(std::to_string(core)));
  }
  if (sched_setaffinity(0, sizeof(set), &set) != 0) {
    TVM_FFI_THROW(RuntimeError) << "cannot pin to cores: " << std::strerror(errno);
  }
  setenv("TVM_NUM_THREADS", std::to_string(cores.size()).c_str(), 1);
  Function::GetGlobalRequired("runtime.config_threadpool")(kOneCorePerThread, static_cast<int>(cores.size()), names);
}

void RegisterFunctions(const std::string& folder, size_t max_upload) {
  auto file = [folder](const String& name) { return FileInFolder(folder, name); };
  auto add = [](const char* name, Function function) { Function::SetGlobal(name, function, /*override=*/true); };
  add("tvm.rpc.server.workpath", Function::FromTyped([file](String name) { return String(file(name)); }));
  add("tvm.rpc.server.upload",
      Function::FromTyped([file, max_upload](String name, Bytes data) { Upload(file(name), data, max_upload); }));
  add("tvm.rpc.server.remove", Function::FromTyped([file](String name) {
        std::error_code ignored;  // as with TVM: clients remove files that may not exist, and "" for the folder
        if (!name.empty()) fs::remove(file(name), ignored);
      }));
  add("tvm.rpc.server.load_module", Function::FromTyped([file](String name) { return Load(file(name)); }));
  add("tvm_lowrank.device_info", Function::FromTyped([] { return DeviceInfo(); }));
  add("tvm_lowrank.use_cores", Function::FromTyped([](String text) {
        try {
          UseCores(ParseCores(text));
        } catch (const OptionError& error) {
          TVM_FFI_THROW(ValueError) << error.what();
        }
      }));
}

}  // namespace

int ServeSession(int connection, const std::string& folder, const Options& options) {
  try {
    fs::current_path(folder);  // what a library writes to its current folder is removed as well
    RegisterFunctions(folder, options.max_upload);
    if (!options.cores.empty()) UseCores(options.cores);
    Function::GetGlobalRequired("rpc.ServerLoop")(connection);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "session: " << error.what() << std::endl;
    return 1;
  }
}

void SendException(int connection, const std::string& message) {
  try {
    // TVM sends one byte after the other, and what still waits to be sent is lost when the client writes to us
    Cork(connection, true);
    Function::GetGlobalRequired("rpc.ReturnException")(connection, String(message));
    Cork(connection, false);
  } catch (const std::exception&) {
    // the client has gone
  }
}

}  // namespace device
