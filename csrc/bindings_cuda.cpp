// Python bindings of the CUDA launchers: addresses, sizes and a stream handle in, RuntimeError with CUDA's text out.
#ifdef FASTPPO_CUDA
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "ops.h"

namespace fastppo {

// A launcher returns nullptr or the error's text.
[[maybe_unused]] static void raise_if(const char* op, const char* error) {
  if (error) throw std::runtime_error(std::string(op) + ": CUDA says: " + error);
}

void bind_cuda([[maybe_unused]] pybind11::module_& m) {}

}  // namespace fastppo
#endif
