#include "options.h"

#include <sched.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <sstream>

namespace device {
namespace {

constexpr int kPorts = 65536;

// read once, at the start: afterwards TVM pins the main thread to some of them
const cpu_set_t kAllowed = [] {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  sched_getaffinity(0, sizeof(cores), &cores);
  return cores;
}();

int ParseInt(const std::string& name, const std::string& text, int low, int high) {
  int value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < low || value > high) {
    throw OptionError(name + " " + text + ": a whole number from " + std::to_string(low) + " to " +
                      std::to_string(high) + " is needed");
  }
  return value;
}

double ParseSeconds(const std::string& name, const std::string& text) {
  char* end = nullptr;
  double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !std::isfinite(value) || value < 0) {
    throw OptionError(name + " " + text + ": a number of seconds is needed");
  }
  return value;
}

Address ParseAddress(const std::string& name, const std::string& text) {
  size_t colon = text.rfind(':');
  if (colon == std::string::npos || colon == 0) {
    throw OptionError(name + " " + text + ": an address like 192.168.1.2:9190 is needed");
  }
  std::string host = text.substr(0, colon);
  if (host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  return {host, ParseInt("the port of " + name, text.substr(colon + 1), 1, kPorts - 1)};
}

std::string ParseKey(const std::string& name, const std::string& text) {
  // it travels in JSON and in a handshake that separates words by white space
  auto plain = [](unsigned char c) { return c < 128 && (std::isalnum(c) || std::strchr("-_.:/+", c) != nullptr); };
  if (text.empty() || !std::all_of(text.begin(), text.end(), plain)) {
    throw OptionError(name + " must be made of letters, digits and -_.:/+");
  }
  return text;
}

std::string ParseFolder(const std::string& name, const std::string& text) {
  struct stat status {};
  if (stat(text.c_str(), &status) != 0 || !S_ISDIR(status.st_mode) || access(text.c_str(), W_OK) != 0) {
    throw OptionError(name + " " + text + ": this is no folder that can be written to");
  }
  return text;
}

std::string DefaultWorkDir() {
  const char* chosen = std::getenv("TMPDIR");
  return chosen != nullptr && *chosen != '\0' ? chosen : "/tmp";
}

}  // namespace

const char* const kHelp =
    "usage: server --tracker HOST:PORT --key KEY [options]\n"
    "Offers this device to a TVM RPC tracker and serves one session at a time.\n"
    "  --tracker HOST:PORT   the tracker, waited for if it is not there yet\n"
    "  --key KEY             what clients ask the tracker for\n"
    "  --host ADDRESS        listen on this address (127.0.0.1)\n"
    "  --port N              the first port to try, 0 for any free one (9090)\n"
    "  --port-end N          the port after the last one to try (--port plus 100)\n"
    "  --work-dir DIR        where sessions keep their files until they end ($TMPDIR or /tmp)\n"
    "  --timeout SECONDS     end longer sessions; clients can only ask for less (0: no limit)\n"
    "  --max-upload MIB      refuse larger files (1024)\n"
    "  --cores 0,1,..        run on these cores, one thread on each\n"
    "  --until-eof           end when standard input is closed\n";

std::vector<int> ParseCores(const std::string& text) {
  std::vector<int> cores;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) {
    int core = ParseInt("core", part, 0, CPU_SETSIZE - 1);
    if (!CPU_ISSET(core, &kAllowed)) throw OptionError("core " + part + " is not one that this process may use");
    if (std::count(cores.begin(), cores.end(), core) > 0) throw OptionError("core " + part + " is named twice");
    cores.push_back(core);
  }
  if (cores.empty()) throw OptionError("no cores are named; write them like 0,1");
  return cores;
}

Options ParseOptions(int argc, char** argv) {
  Options options;
  bool has_end = false;
  using Text = const std::string&;
  const std::map<std::string, std::function<void(Text, Text)>> with_value{
      {"--tracker", [&](Text name, Text text) { options.tracker = ParseAddress(name, text); }},
      {"--key", [&](Text name, Text text) { options.key = ParseKey(name, text); }},
      {"--host", [&](Text, Text text) { options.listen.host = text; }},
      {"--port", [&](Text name, Text text) { options.listen.port = ParseInt(name, text, 0, kPorts - 1); }},
      {"--port-end",
       [&](Text name, Text text) {
         options.port_end = ParseInt(name, text, 1, kPorts);
         has_end = true;
       }},
      {"--work-dir", [&](Text name, Text text) { options.work_dir = ParseFolder(name, text); }},
      {"--timeout", [&](Text name, Text text) { options.timeout = ParseSeconds(name, text); }},
      {"--max-upload",
       [&](Text name, Text text) { options.max_upload = size_t(ParseInt(name, text, 1, 2047)) << 20; }},
      {"--cores", [&](Text, Text text) { options.cores = ParseCores(text); }},
  };
  for (int i = 1; i < argc; ++i) {
    std::string name = argv[i];
    if (name == "--help") {
      options.help = true;
      return options;
    }
    if (name == "--until-eof") {
      options.until_eof = true;
      continue;
    }
    auto option = with_value.find(name);
    if (option == with_value.end()) throw OptionError("unknown option " + name + "; --help lists all of them");
    if (++i == argc) throw OptionError(name + " needs a value");
    option->second(name, argv[i]);
  }
  if (options.tracker.host.empty()) throw OptionError("--tracker HOST:PORT is missing");
  if (options.key.empty()) throw OptionError("--key KEY is missing");
  if (options.work_dir.empty()) options.work_dir = ParseFolder("--work-dir", DefaultWorkDir());
  if (!has_end) options.port_end = std::min(options.listen.port + 100, kPorts);
  if (options.port_end <= options.listen.port) throw OptionError("--port-end must be greater than --port");
  return options;
}

}  // namespace device
