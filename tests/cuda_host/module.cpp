// The module that binds the CUDA launchers for CPU memory.
#include <pybind11/pybind11.h>

#include "ops.h"

PYBIND11_MODULE(_cuda_host, m) {
  m.attr("built_with_cuda") = true;
  fastppo::bind_cuda(m);
}
