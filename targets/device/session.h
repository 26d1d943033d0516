// What a client can do in its session, beyond what TVM's runtime offers anyway.
#pragma once

#include <string>

#include "options.h"

namespace device {

// Serve one client until it leaves; runs in a process of its own. Returns the exit status of that process.
int ServeSession(int connection, const std::string& folder, const Options& options);

// Tell a client that waits for an answer why there will be none.
void SendException(int connection, const std::string& message);

}  // namespace device
