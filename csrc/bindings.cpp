// The module fastppo._C: every op binds itself in csrc/cpu/<op>.cpp (bind_<op>) and, with CUDA, in csrc/bindings_cuda.cpp.
#include <pybind11/pybind11.h>

#include "ops.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastppo's C++ and CUDA kernels. Arguments are addresses and sizes; Python wrappers in kernels/ check them.";
#ifdef FASTPPO_CUDA
  m.attr("built_with_cuda") = true;
  fastppo::bind_cuda(m);
#else
  m.attr("built_with_cuda") = false;
#endif
#define BIND(op) fastppo::bind_##op(m);
#include "ops.inc"
#undef BIND
}
