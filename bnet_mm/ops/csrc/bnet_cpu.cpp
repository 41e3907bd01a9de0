// The CPU operators behind bnet_mm.ops: checks, choice of the instruction set, registration. Kernels: kernels.h.

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include "checks.h"
#include "memory.h"

namespace bnet_mm {

struct Sizes {
  int64_t batch, channels, height, width;
  int64_t pixels() const { return height * width; }
};

namespace generic {
#define VECTOR_BYTES 16
#include "kernels.h"
#undef VECTOR_BYTES
}  // namespace generic

// The headers above are compiled for any CPU; only the kernels are compiled again, for wider vectors.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BNET_MM_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define VECTOR_BYTES 32
#include "kernels.h"
#undef VECTOR_BYTES
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#define VECTOR_BYTES 64
#include "kernels.h"
#undef VECTOR_BYTES
}  // namespace avx512
#pragma GCC pop_options
#endif

namespace {

enum class Instructions { generic, avx2, avx512 };

std::string name_of(Instructions set) {
  switch (set) {
    case Instructions::avx512: return "AVX-512";
    case Instructions::avx2: return "AVX2";
    default: return "generic";
  }
}

// The set for torch's word on its own kernels, on a processor that has these. ATEN_CPU_CAPABILITY can make torch name
// one that the processor does not have, whose first instruction would end the process.
Instructions choose(const std::string& capability, bool avx2, bool avx512) {
  const Instructions has = avx512 ? Instructions::avx512 : avx2 ? Instructions::avx2 : Instructions::generic;
  const Instructions wanted = capability == "AVX512" ? Instructions::avx512
                              : capability == "AVX2" ? Instructions::avx2
                                                     : Instructions::generic;
  if (wanted > has) {
    TORCH_WARN_ONCE("bnet: ATEN_CPU_CAPABILITY asks for ", name_of(wanted), ", this processor has ", name_of(has),
                    ", which is used");
  }
  return std::min(wanted, has);
}

Instructions instructions() {
#ifdef BNET_MM_X86
  static const Instructions set = [] {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return choose(at::get_cpu_capability(), avx2, avx512);
  }();
  return set;
#else
  return Instructions::generic;
#endif
}

bool is_channels_last(const at::Tensor& x) {
  return !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast);
}

// Any other strides are copied.
at::Tensor in_format(const at::Tensor& x, bool channels_last) {
  return x.contiguous(channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

Sizes sizes_of(const at::Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

int64_t sample_stride(const at::Tensor& numbers) { return numbers.dim() == 2 ? numbers.size(1) : 0; }

#ifdef BNET_MM_X86
#define WITH_INSTRUCTIONS(...)                                                                   \
  switch (instructions()) {                                                                      \
    case Instructions::avx512: { using namespace avx512; __VA_ARGS__ break; }                    \
    case Instructions::avx2: { using namespace avx2; __VA_ARGS__ break; }                        \
    default: { using namespace generic; __VA_ARGS__ }                                            \
  }
#else
#define WITH_INSTRUCTIONS(...) { using namespace generic; __VA_ARGS__ }
#endif

// Runs the statement with loops = Loops<S, A, channels_last> of the tensor's dtype and layout, and S, A.
#define WITH_TYPES(X, CHANNELS_LAST, ...)                                                        \
  if (X.scalar_type() == at::kFloat) { WITH_LAYOUT(float, float, CHANNELS_LAST, __VA_ARGS__) }   \
  else if (X.scalar_type() == at::kDouble) { WITH_LAYOUT(double, double, CHANNELS_LAST, __VA_ARGS__) } \
  else { WITH_LAYOUT(at::BFloat16, float, CHANNELS_LAST, __VA_ARGS__) }

#define WITH_LAYOUT(STORED, WIDE, CHANNELS_LAST, ...)                                            \
  using S = STORED; using A = WIDE;                                                              \
  WITH_INSTRUCTIONS(                                                                             \
    if (CHANNELS_LAST) { typedef Loops<STORED, WIDE, true> loops; __VA_ARGS__ }                  \
    else { typedef Loops<STORED, WIDE, false> loops; __VA_ARGS__ })

#define WITH_KERNEL_SIZE(K_VALUE, ...)                                                           \
  switch (K_VALUE) {                                                                             \
    case 1: { constexpr int K = 1; __VA_ARGS__ break; }                                          \
    case 3: { constexpr int K = 3; __VA_ARGS__ break; }                                          \
    case 5: { constexpr int K = 5; __VA_ARGS__ break; }                                          \
    default: { constexpr int K = 7; __VA_ARGS__ }                                                \
  }

at::Tensor forward(const at::Tensor& x_, const at::Tensor& mean_, const at::Tensor& rstd_, const at::Tensor& weight_,
                   const at::Tensor& bias_, const std::optional<at::Tensor>& residual_, bool relu) {
  check_map(x_, "x");
  check_statistics(mean_, rstd_, x_);
  const int64_t k = check_weight(weight_, x_);
  check_numbers(bias_, x_, false, "bias");
  if (residual_) check_like(*residual_, x_, "residual");
  const bool channels_last = is_channels_last(x_);
  const auto x = in_format(x_, channels_last);
  const auto residual = residual_ ? in_format(*residual_, channels_last) : at::Tensor();
  const auto mean = mean_.contiguous(), rstd = rstd_.contiguous();
  const auto weight = weight_.contiguous(), bias = bias_.contiguous();
  auto y = LargeMaps::empty_like(x, x.scalar_type());
  if (!x.numel()) return y;
  WITH_TYPES(x, channels_last, WITH_KERNEL_SIZE(k,
    loops::forward<K>(sizes_of(x), x.const_data_ptr<S>(), mean.const_data_ptr<A>(), rstd.const_data_ptr<A>(),
                      sample_stride(mean), weight.const_data_ptr<A>(), bias.const_data_ptr<A>(),
                      residual.defined() ? residual.const_data_ptr<S>() : nullptr, relu, y.mutable_data_ptr<S>());))
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& mean_, const at::Tensor& rstd_,
    const at::Tensor& weight_, bool needs_weight, bool needs_statistics, bool wide_grad_x) {
  check_map(x_, "x");
  check_like(grad_, x_, "grad");
  check_statistics(mean_, rstd_, x_);
  const int64_t k = check_weight(weight_, x_), taps = k * k;
  const bool channels_last = is_channels_last(x_);
  const auto x = in_format(x_, channels_last), grad = in_format(grad_, channels_last);
  const auto mean = mean_.contiguous(), rstd = rstd_.contiguous(), weight = weight_.contiguous();
  auto grad_x = LargeMaps::empty_like(x, wide_grad_x ? wide(x) : x.scalar_type());
  const auto size = sizes_of(x);
  auto sums = at::zeros({size.batch, size.channels, taps + 3}, x.options().dtype(at::kDouble));
  if (x.numel()) {
    WITH_TYPES(x, channels_last, WITH_KERNEL_SIZE(k,
      const auto run = [&](auto* out) {
        loops::template backward<K>(size, grad.const_data_ptr<S>(), x.const_data_ptr<S>(), mean.const_data_ptr<A>(),
                                    rstd.const_data_ptr<A>(), sample_stride(mean), weight.const_data_ptr<A>(),
                                    needs_weight, needs_statistics, out, sums.mutable_data_ptr<double>());
      };
      if (wide_grad_x) run(grad_x.mutable_data_ptr<A>());
      else run(grad_x.mutable_data_ptr<S>());))
  }
  const auto total = sums.sum(0);
  // d/d mean = -rstd * sum(g^); d/d rstd = sum(g^ * (x - mean)) = sum(g^ * x^) / rstd
  const auto statistics = mean.dim() == 2 ? sums : total;
  const auto grad_mean = -statistics.select(-1, taps + 1) * rstd;
  const auto grad_rstd = statistics.select(-1, taps + 2) / rstd;
  const auto dtype = wide(x);
  return {grad_x, total.narrow(1, 0, taps).reshape(weight.sizes()).to(dtype).contiguous(), total.select(1, taps).to(dtype).contiguous(),
          grad_mean.to(dtype), grad_rstd.to(dtype)};
}

std::tuple<at::Tensor, at::Tensor> moments(const at::Tensor& x_, bool over_batch) {
  check_map(x_, "x");
  const bool channels_last = is_channels_last(x_);
  const auto x = in_format(x_, channels_last);
  const auto size = sizes_of(x);
  auto mean = at::zeros({size.batch, size.channels}, x.options().dtype(at::kDouble));
  auto var = at::zeros_like(mean);
  if (x.numel()) {
    WITH_TYPES(x, channels_last, loops::moments(size, x.const_data_ptr<S>(), mean.mutable_data_ptr<double>(),
                                                var.mutable_data_ptr<double>());)
  }
  if (over_batch) {
    const auto all = mean.mean(0);
    var = (var + (mean - all).square()).mean(0);
    mean = all;
  }
  return {mean.to(wide(x)), var.to(wide(x))};
}

// grad_x = grad plus what comes through the moments; grad may be grad_x, and both are in the format that is said.
void add_moments(const at::Tensor& grad, at::Tensor& grad_x, const at::Tensor& x_, const at::Tensor& mean_,
                 const at::Tensor& grad_mean, const at::Tensor& grad_var, bool channels_last) {
  check_numbers(mean_, x_, true, "mean");
  check_numbers(grad_mean, x_, true, "grad_mean");
  check_numbers(grad_var, x_, true, "grad_var");
  TORCH_CHECK_VALUE(mean_.sizes() == grad_mean.sizes() && mean_.sizes() == grad_var.sizes(),
                    "bnet: mean, grad_mean and grad_var must have one shape, got ", mean_.sizes(), ", ",
                    grad_mean.sizes(), " and ", grad_var.sizes());
  if (!x_.numel()) return;
  const auto x = in_format(x_, channels_last);
  const auto size = sizes_of(x);
  const double count = static_cast<double>(size.pixels() * (mean_.dim() == 2 ? 1 : size.batch));
  const auto mean = mean_.contiguous(), shift = (grad_mean / count).contiguous();
  const auto scale = (grad_var * (2 / count)).contiguous();
  WITH_TYPES(x, channels_last,
    const auto run = [&](const auto* from) {
      loops::add_moments(size, from, grad_x.mutable_data_ptr<S>(), x.const_data_ptr<S>(), mean.const_data_ptr<A>(),
                         shift.const_data_ptr<A>(), scale.const_data_ptr<A>(), sample_stride(mean));
    };
    if (grad.scalar_type() == x.scalar_type()) run(grad.const_data_ptr<S>());
    else run(grad.const_data_ptr<A>());)
}

void moments_backward(at::Tensor& grad_x, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& grad_mean,
                      const at::Tensor& grad_var) {
  check_map(x, "x");
  check_like(grad_x, x, "grad_x");
  const bool channels_last = is_channels_last(grad_x);
  TORCH_CHECK_VALUE(channels_last || grad_x.is_contiguous(), "bnet: grad_x must be contiguous, NCHW or channels_last");
  add_moments(grad_x, grad_x, x, mean, grad_mean, grad_var, channels_last);
}

at::Tensor moments_backward_rounded(const at::Tensor& grad, const at::Tensor& x_, const at::Tensor& mean,
                                    const at::Tensor& grad_mean, const at::Tensor& grad_var) {
  check_map(x_, "x");
  check_like(grad, x_, wide(x_), "grad");
  const bool channels_last = is_channels_last(x_);
  const auto x = in_format(x_, channels_last);
  auto grad_x = LargeMaps::empty_like(x, x.scalar_type());
  add_moments(in_format(grad, channels_last), grad_x, x, mean, grad_mean, grad_var, channels_last);
  return grad_x;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(bnet_mm, m) {
  m.def("cpu_instruction_set() -> str", [] { return name_of(instructions()); });
  m.def("cpu_instruction_set_for(str capability, bool avx2, bool avx512) -> str",
        [](const std::string& capability, bool avx2, bool avx512) { return name_of(choose(capability, avx2, avx512)); });
  m.def("cpu_memory_held() -> int", LargeMaps::held);
}

// The schemas stand in bnet_mm/ops/schemas.py.
TORCH_LIBRARY_IMPL(bnet_mm, CPU, m) {
  m.impl("forward", forward);
  m.impl("backward", backward);
  m.impl("moments", moments);
  m.impl("moments_backward", moments_backward);
  m.impl("moments_backward_rounded", moments_backward_rounded);
}

}  // namespace bnet_mm
