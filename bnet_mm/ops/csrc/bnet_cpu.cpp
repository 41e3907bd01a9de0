// The CPU operators behind bnet_mm.ops: checks, choice of the instruction set, registration. Kernels: loops.h.

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

// Hot loops are compiled once, not inlined into every caller.
#if defined(__GNUC__)
#define ONCE __attribute__((noinline))
#else
#define ONCE
#endif

namespace generic {
#define VECTOR_BYTES 16
#include "loops.h"
#undef VECTOR_BYTES
}  // namespace generic

// The headers above are compiled for any CPU; only the kernels are compiled again, for wider vectors.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BNET_MM_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define VECTOR_BYTES 32
#include "loops.h"
#undef VECTOR_BYTES
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#define VECTOR_BYTES 64
#include "loops.h"
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

at::Tensor in_format(const std::optional<at::Tensor>& x, bool channels_last) {
  return x ? in_format(*x, channels_last) : at::Tensor();
}

// Null for an undefined tensor.
template <typename T>
const T* const_data(const at::Tensor& t) { return t.defined() ? t.const_data_ptr<T>() : nullptr; }
template <typename T>
T* data(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr<T>() : nullptr; }

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

// Runs the statement with loops = Loops<S, A, channels_last> of the tensor's dtype and layout, and S, A. float64 is for
// checks and has no kernels for wider vectors, which would only be compiled.
#define WITH_TYPES(X, CHANNELS_LAST, ...)                                                              \
  if (X.scalar_type() == at::kDouble) {                                                                \
    using namespace generic; WITH_LAYOUT(double, double, CHANNELS_LAST, __VA_ARGS__)                   \
  } else {                                                                                             \
    WITH_INSTRUCTIONS(                                                                                 \
      if (X.scalar_type() == at::kFloat) { WITH_LAYOUT(float, float, CHANNELS_LAST, __VA_ARGS__) }     \
      else { WITH_LAYOUT(at::BFloat16, float, CHANNELS_LAST, __VA_ARGS__) })                           \
  }

#define WITH_LAYOUT(STORED, WIDE, CHANNELS_LAST, ...)                                                  \
  using S = STORED; using A = WIDE;                                                                    \
  if (CHANNELS_LAST) { typedef Loops<STORED, WIDE, true> loops; __VA_ARGS__ }                          \
  else { typedef Loops<STORED, WIDE, false> loops; __VA_ARGS__ }

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
  const auto x = in_format(x_, channels_last), residual = in_format(residual_, channels_last);
  const auto mean = mean_.contiguous(), rstd = rstd_.contiguous();
  const auto weight = weight_.contiguous(), bias = bias_.contiguous();
  auto y = LargeMaps::empty_like(x, x.scalar_type());
  if (!x.numel()) return y;
  WITH_TYPES(x, channels_last, WITH_KERNEL_SIZE(k,
    loops::forward<K>(sizes_of(x), x.const_data_ptr<S>(), {const_data<A>(mean), const_data<A>(rstd), sample_stride(mean),
                      const_data<A>(weight), const_data<A>(bias)}, const_data<S>(residual), relu,
                      y.mutable_data_ptr<S>());))
  return y;
}

// Without torch's operators, which would take as long as a small map.
template <typename A>
void write_statistics(const std::optional<at::Tensor>& running_mean, const std::optional<at::Tensor>& running_var,
                      double eps, at::Tensor& mean, at::Tensor& rstd) {
  A *to_mean = data<A>(mean), *to_rstd = data<A>(rstd);
  if (!running_mean) {
    std::fill_n(to_mean, mean.numel(), A(0));
    std::fill_n(to_rstd, mean.numel(), A(1));
    return;
  }
  const A *from_mean = running_mean->const_data_ptr<A>(), *from_var = running_var->const_data_ptr<A>();
  const int64_t mean_step = running_mean->stride(0), var_step = running_var->stride(0);
  for (int64_t c = 0; c < mean.numel(); ++c) {
    to_mean[c] = from_mean[c * mean_step];
    to_rstd[c] = static_cast<A>(1 / std::sqrt(from_var[c * var_step] + eps));
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm(
    const at::Tensor& x_, const std::optional<at::Tensor>& residual_, const at::Tensor& weight_, const at::Tensor& bias_,
    const std::optional<at::Tensor>& running_mean, const std::optional<at::Tensor>& running_var, bool batch_statistics,
    double momentum, double eps, bool relu) {
  check_map(x_, "x");
  TORCH_CHECK_VALUE(running_mean.has_value() == running_var.has_value(),
                    "bnet: running_mean and running_var must be given, both or neither");
  if (running_mean) check_numbers(*running_mean, x_, false, "running_mean");
  if (running_var) check_numbers(*running_var, x_, false, "running_var");
  if (!batch_statistics) {
    auto mean = at::empty({x_.size(1)}, x_.options().dtype(wide(x_))), rstd = at::empty_like(mean);
    if (mean.scalar_type() == at::kDouble) write_statistics<double>(running_mean, running_var, eps, mean, rstd);
    else write_statistics<float>(running_mean, running_var, eps, mean, rstd);
    return {forward(x_, mean, rstd, weight_, bias_, residual_, relu), mean, rstd};
  }
  TORCH_CHECK_VALUE(x_.numel(), "bnet: x must not be empty for statistics of it, got ", x_.sizes());
  const int64_t k = check_weight(weight_, x_);
  check_numbers(bias_, x_, false, "bias");
  if (residual_) check_like(*residual_, x_, "residual");
  const bool channels_last = is_channels_last(x_);
  const auto x = in_format(x_, channels_last), residual = in_format(residual_, channels_last);
  const auto weight = weight_.contiguous(), bias = bias_.contiguous();
  auto y = LargeMaps::empty_like(x, x.scalar_type());
  auto mean = at::empty({x.size(1)}, weight.options()), rstd = at::empty_like(mean);
  WITH_TYPES(x, channels_last, WITH_KERNEL_SIZE(k,
    const typename loops::Running running{
        data<A>(running_mean.value_or(at::Tensor())), data<A>(running_var.value_or(at::Tensor())),
        running_mean ? running_mean->stride(0) : 0, running_var ? running_var->stride(0) : 0, momentum, eps};
    loops::norm<K>(sizes_of(x), x.const_data_ptr<S>(), running, mean.mutable_data_ptr<A>(), rstd.mutable_data_ptr<A>(),
                   const_data<A>(weight), const_data<A>(bias), const_data<S>(residual), relu, y.mutable_data_ptr<S>());))
  return {y, mean, rstd};
}

// The maps of a backward pass in one format; y and grad_residual may be undefined.
struct Maps {
  at::Tensor grad, x, y, grad_x, grad_residual;
  bool channels_last;
};

// What it gives beside the maps: the sums, if they are needed, are of g^ and of g^ * x^, where g^ is the gradient of x^, in
// double.
struct Sums {
  at::Tensor grad_weight, grad_bias, sum, product;
};

Sums backward_sweeps(Maps maps, const at::Tensor& mean_, const at::Tensor& rstd_, const at::Tensor& weight_,
              bool batch_statistics, bool needs_weight, bool needs_statistics) {
  const auto mean = mean_.contiguous(), rstd = rstd_.contiguous(), weight = weight_.contiguous();
  const auto& x = maps.x;
  const auto empty = [&](at::IntArrayRef sizes, at::ScalarType dtype) {
    return x.numel() ? at::empty(sizes, weight.options().dtype(dtype)) : at::zeros(sizes, weight.options().dtype(dtype));
  };
  Sums sums{empty(weight.sizes(), weight.scalar_type()), empty({weight.size(0)}, weight.scalar_type()), {}, {}};
  if (batch_statistics || needs_statistics) {
    sums.sum = empty(mean.sizes(), at::kDouble), sums.product = empty(mean.sizes(), at::kDouble);
  }
  if (!x.numel()) return sums;
  WITH_TYPES(x, maps.channels_last, WITH_KERNEL_SIZE(weight.size(3),
    const auto run = [&](auto* grad_x) {
      loops::template backward<K>(
          sizes_of(x), x.const_data_ptr<S>(),
          {const_data<A>(mean), const_data<A>(rstd), sample_stride(mean), const_data<A>(weight), nullptr},
          {const_data<S>(maps.grad), const_data<S>(maps.y), data<S>(maps.grad_residual), data<A>(sums.grad_weight),
           data<A>(sums.grad_bias), data<double>(sums.sum), data<double>(sums.product)},
          batch_statistics, needs_weight, needs_statistics, grad_x);
    };
    if (maps.grad_x.scalar_type() == x.scalar_type()) run(data<S>(maps.grad_x));
    else run(data<A>(maps.grad_x));))
  return sums;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& rstd,
    const at::Tensor& weight, bool needs_weight, bool needs_statistics, bool wide_grad_x) {
  check_map(x, "x");
  check_like(grad, x, "grad");
  check_statistics(mean, rstd, x);
  check_weight(weight, x);
  const bool last = is_channels_last(x);
  Maps maps{in_format(grad, last), in_format(x, last), {}, {}, {}, last};
  maps.grad_x = LargeMaps::empty_like(maps.x, wide_grad_x ? wide(x) : x.scalar_type());
  const auto sums = backward_sweeps(maps, mean, rstd, weight, false, needs_weight, needs_statistics);
  if (!needs_statistics) {
    return {maps.grad_x, sums.grad_weight, sums.grad_bias, at::zeros_like(mean), at::zeros_like(rstd)};
  }
  // d/d mean = -rstd * sum(g^); d/d rstd = sum(g^ * (x - mean)) = sum(g^ * x^) / rstd
  return {maps.grad_x, sums.grad_weight, sums.grad_bias, (-sums.sum * rstd).to(wide(x)), (sums.product / rstd).to(wide(x))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, std::optional<at::Tensor>> norm_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& rstd,
    const at::Tensor& weight, const std::optional<at::Tensor>& y, bool batch_statistics, bool needs_weight,
    bool needs_residual) {
  check_map(x, "x");
  check_like(grad, x, "grad");
  check_numbers(mean, x, false, "mean");
  check_numbers(rstd, x, false, "rstd");
  check_weight(weight, x);
  if (y) check_like(*y, x, "y");
  const bool last = is_channels_last(x);
  Maps maps{in_format(grad, last), in_format(x, last), in_format(y, last), {}, {}, last};
  maps.grad_x = LargeMaps::empty_like(maps.x, x.scalar_type());
  if (needs_residual && y) maps.grad_residual = LargeMaps::empty_like(maps.x, x.scalar_type());
  const auto sums = backward_sweeps(maps, mean, rstd, weight, batch_statistics, needs_weight, false);
  std::optional<at::Tensor> grad_residual;
  if (needs_residual) grad_residual = y ? maps.grad_residual : grad.clone();
  return {maps.grad_x, sums.grad_weight, sums.grad_bias, grad_residual};
}

std::tuple<at::Tensor, at::Tensor> moments(const at::Tensor& x_, bool over_batch) {
  check_map(x_, "x");
  const bool channels_last = is_channels_last(x_);
  const auto x = in_format(x_, channels_last);
  const auto size = sizes_of(x);
  auto mean = at::zeros(over_batch ? x.sizes().slice(1, 1) : x.sizes().slice(0, 2), x.options().dtype(wide(x)));
  auto var = at::zeros_like(mean);
  if (x.numel()) {
    WITH_TYPES(x, channels_last, loops::moments(size, x.const_data_ptr<S>(), over_batch, data<A>(mean), data<A>(var));)
  }
  return {mean, var};
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
  m.impl("norm", norm);
  m.impl("norm_backward", norm_backward);
  m.impl("moments", moments);
  m.impl("moments_backward", moments_backward);
  m.impl("moments_backward_rounded", moments_backward_rounded);
}

}  // namespace bnet_mm
