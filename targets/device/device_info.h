#pragma once

#include <tvm/ffi/string.h>

namespace device {

// What a host should know about this device, as JSON; null stands for what this system does not tell.
tvm::ffi::String DeviceInfo();

// The version of TVM that the server was built for.
const char* TvmVersion();

}  // namespace device
