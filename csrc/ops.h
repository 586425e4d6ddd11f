// Declarations of each op's binder; the list is ops.inc.
#pragma once
#include <pybind11/pybind11.h>

namespace fastppo {
#define BIND(op) void bind_##op(pybind11::module_& m);
#include "ops.inc"
#undef BIND
void bind_cuda(pybind11::module_& m);  // bindings_cuda.cpp, in builds with CUDA
}  // namespace fastppo
