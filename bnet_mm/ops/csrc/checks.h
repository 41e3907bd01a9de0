// Checks of what comes from Python: each names the argument, what came and what is allowed, and runs before any pointer
// is touched.
#pragma once

#include <ATen/ATen.h>

namespace bnet_mm {

inline void check_map(const at::Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.device().is_cpu(), "bnet: ", name, " must be on the CPU, got ", x.device());
  TORCH_CHECK_VALUE(x.dim() == 4, "bnet: ", name, " must be 4-D (N, C, H, W), got shape ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble || x.scalar_type() == at::kBFloat16,
                   "bnet: ", name, " must be float32, float64 or bfloat16, got ", x.scalar_type());
}

// The dtype of statistics and parameters.
inline at::ScalarType wide(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

inline void check_like(const at::Tensor& y, const at::Tensor& x, at::ScalarType dtype, const char* name) {
  TORCH_CHECK_VALUE(y.sizes() == x.sizes() && y.device() == x.device(), "bnet: ", name, " must have the shape ",
                    x.sizes(), " and device of x, got ", y.sizes(), " on ", y.device());
  TORCH_CHECK_TYPE(y.scalar_type() == dtype, "bnet: ", name, " must be ", dtype, " for x of ", x.scalar_type(), ", got ",
                   y.scalar_type());
}

inline void check_like(const at::Tensor& y, const at::Tensor& x, const char* name) {
  check_like(y, x, x.scalar_type(), name);
}

inline void check_numbers(const at::Tensor& t, const at::Tensor& x, bool per_sample, const char* name) {
  const bool shape = (t.dim() == 1 && t.size(0) == x.size(1)) ||
                     (per_sample && t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == x.size(1));
  TORCH_CHECK_VALUE(shape && t.device() == x.device(), "bnet: ", name, " must be (C,)", per_sample ? " or (N, C)" : "",
                    " on the CPU for x of shape ", x.sizes(), ", got ", t.sizes(), " on ", t.device());
  TORCH_CHECK_TYPE(t.scalar_type() == wide(x), "bnet: ", name, " must be ", wide(x), " for x of ", x.scalar_type(),
                   ", got ", t.scalar_type());
}

inline void check_statistics(const at::Tensor& mean, const at::Tensor& rstd, const at::Tensor& x) {
  check_numbers(mean, x, true, "mean");
  check_numbers(rstd, x, true, "rstd");
  TORCH_CHECK_VALUE(mean.sizes() == rstd.sizes(), "bnet: mean and rstd must have one shape, got ", mean.sizes(), " and ",
                    rstd.sizes());
}

inline int64_t check_weight(const at::Tensor& weight, const at::Tensor& x) {
  const int64_t k = weight.dim() == 4 ? weight.size(3) : 0;
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1 && weight.size(2) == k &&
                        (k == 1 || k == 3 || k == 5 || k == 7) && weight.device() == x.device(),
                    "bnet: weight must be (C, 1, k, k) with k 1, 3, 5 or 7, on the CPU, for x of shape ", x.sizes(),
                    ", got ", weight.sizes(), " on ", weight.device());
  TORCH_CHECK_TYPE(weight.scalar_type() == wide(x), "bnet: weight must be ", wide(x), " for x of ", x.scalar_type(),
                   ", got ", weight.scalar_type());
  return k;
}

}  // namespace bnet_mm
