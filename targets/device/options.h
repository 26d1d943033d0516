// The command line of the server.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "net.h"

namespace device {

struct Options {
  Address tracker;
  std::string key;
  Address listen{"127.0.0.1", 9090};
  int port_end = 0;
  std::string work_dir;
  double timeout = 0;  // seconds; 0 is without limit
  size_t max_upload = size_t{1024} << 20;
  std::vector<int> cores;  // none: TVM's own choice
  bool until_eof = false;
  bool help = false;
};

extern const char* const kHelp;

class OptionError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

Options ParseOptions(int argc, char** argv);

// "0,2" as numbers of cores; throws OptionError where this process cannot use one of them.
std::vector<int> ParseCores(const std::string& text);

}  // namespace device
