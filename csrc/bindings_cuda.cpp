// Python bindings of the CUDA launchers: addresses, sizes and a stream handle in, RuntimeError with CUDA's text out.
#ifdef FASTPPO_CUDA
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/gae.h"
#include "cuda/launchers.h"
#include "ops.h"

namespace fastppo {

const char* sampling_cuda(uintptr_t x, int dtype, int64_t x_stride, uintptr_t y, int64_t y_stride, int64_t B, int64_t V,
                          uintptr_t seeds, uintptr_t positions, float temperature, int64_t top_k, float top_p,
                          float log_min_p, float logprob_temperature, uintptr_t tokens, uintptr_t numbers_3B, uintptr_t stream);
const char* paged_attention_cuda(uintptr_t q, int64_t q_token, int64_t q_head, uintptr_t k, uintptr_t v, int dtype,
                                 uintptr_t tables, int64_t M, uintptr_t lens, uintptr_t out, uintptr_t workspace, int64_t B,
                                 int64_t H, int64_t KV, int64_t D, int64_t block, float scale, int64_t window, float softcap,
                                 uintptr_t stream);
const char* cache_write_cuda(uintptr_t k, uintptr_t v, int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head,
                             int dtype, uintptr_t k_cache, uintptr_t v_cache, uintptr_t slots, int64_t N, int64_t KV, int64_t D,
                             uintptr_t stream);

// A launcher returns nullptr or the error's text.
static void raise_if(const char* op, const char* error) {
  if (error) throw std::runtime_error(std::string(op) + ": CUDA says: " + error);
}

template <typename T>
static T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

static LogprobRows rows_of(const std::array<int64_t, 4>& t) { return {t[0], t[1], t[2], t[3]}; }

static void logprob_forward(uintptr_t logits, int dtype, const std::array<int64_t, 4>& rows, int64_t vocab,
                            float temperature, uintptr_t tokens, const std::array<uintptr_t, 3>& out, uintptr_t stream) {
  LogprobForward a{pointer<const void>(logits), dtype, rows_of(rows), vocab, temperature, pointer<const int64_t>(tokens),
                   pointer<float>(out[0]), pointer<float>(out[1]), pointer<float>(out[2])};
  raise_if("logprob", fastppo_logprob_forward(&a, pointer<void>(stream)));
}

static void logprob_backward(uintptr_t logits, uintptr_t grads, int dtype, const std::array<int64_t, 4>& rows,
                             const std::array<int64_t, 4>& grad_rows, int64_t vocab, float temperature, uintptr_t tokens,
                             const std::array<uintptr_t, 4>& in, uintptr_t stream) {
  LogprobBackward a{pointer<const void>(logits), pointer<void>(grads), dtype, rows_of(rows), rows_of(grad_rows), vocab,
                    temperature, pointer<const int64_t>(tokens), pointer<const float>(in[0]), pointer<const float>(in[1]),
                    pointer<const float>(in[2]), pointer<const float>(in[3])};
  raise_if("logprob", fastppo_logprob_backward(&a, pointer<void>(stream)));
}

static void gae_from_python(const std::vector<uint64_t>& address, int64_t B, int64_t T, float gamma, float lam, float kl_coef,
                            int kind, int masked, uint64_t stream) {
  auto floats = [&](int i) { return reinterpret_cast<float*>(address[i]); };
  const GAEArgs args = {floats(0), floats(1), floats(2), floats(3), reinterpret_cast<uint8_t*>(address[4]), floats(5),
                        reinterpret_cast<int32_t*>(address[6]), floats(7), floats(8), floats(9), floats(10),
                        reinterpret_cast<int*>(address[11]), floats(12), B, T, gamma, lam, kl_coef, kind, masked, false};
  raise_if("gae", gae_cuda(args, reinterpret_cast<void*>(stream)));
}

template <typename... Args>
static auto checked(const char* op, const char* (*launcher)(Args...)) {
  return [=](Args... args) { raise_if(op, launcher(args...)); };
}

void bind_cuda(pybind11::module_& m) {
  m.def("cuda_logprob_forward", &logprob_forward);
  m.def("cuda_logprob_backward", &logprob_backward);
  m.def("gae_cuda", &gae_from_python, "as gae, with (work [3, B], ticket, moments) after the outputs, and a stream");
  m.def("sampling_cuda", checked("sampling", &sampling_cuda));
  m.def("paged_attention_cuda", checked("paged_attention", &paged_attention_cuda));
  m.def("cache_write_cuda", checked("cache_write", &cache_write_cuda));
}

}  // namespace fastppo
#endif
