#ifndef TVM_LOWRANK_SHA256_H_
#define TVM_LOWRANK_SHA256_H_

#include <string>

namespace tlr {

// The SHA-256 of a file's content (FIPS 180-4) in hexadecimal digits; "" if it cannot be read.
std::string Sha256(const std::string& path);

}  // namespace tlr

#endif  // TVM_LOWRANK_SHA256_H_
