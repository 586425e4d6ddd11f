#pragma once
#include "packed_linear.h"

namespace fastppo {

// packed_linear on AMX tiles; only where amx_works().
void amx_linear(const Linear& linear, const float* x, float* out, int64_t rows);

}  // namespace fastppo
