// torch.ops.bnet_mm.norm as autograd sees it: one node, whose backward pass is norm_backward.

#include <optional>
#include <tuple>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace bnet_mm {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
typedef std::optional<Tensor> Maybe;
typedef std::tuple<Tensor, Tensor, Tensor> Outputs;

template <typename Signature>
auto operator_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Outputs norm(const Tensor& x, const Maybe& residual, const Tensor& weight, const Tensor& bias, const Maybe& running_mean,
             const Maybe& running_var, bool batch_statistics, double momentum, double eps, bool relu) {
  static const auto kernel = operator_of<decltype(norm)>("bnet_mm::norm");
  const at::AutoDispatchBelowADInplaceOrView guard;
  if (batch_statistics) {
    for (const auto& running : {running_mean, running_var}) {
      if (running) running->unsafeGetTensorImpl()->bump_version();
    }
  }
  return kernel.call(x, residual, weight, bias, running_mean, running_var, batch_statistics, momentum, eps, relu);
}

// Whether derivatives of this gradient are wanted, of any kind, for which the kernels have no rules.
bool is_differentiated(const Tensor& grad) {
  return at::GradMode::is_enabled() || grad._fw_grad(0).defined() || grad.key_set().has(c10::DispatchKey::Batched) ||
         c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// DistributedDataParallel wants gradients in the strides of their parameters, those of a single element too.
Tensor in_strides_of(const Tensor& parameter, const Tensor& grad) {
  return grad.strides() == parameter.strides() ? grad : at::empty_like(parameter).copy_(grad);
}

struct Norm : torch::autograd::Function<Norm> {
  // Tensors in the order of their edges.
  enum Input { X, WEIGHT, BIAS, RESIDUAL };

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& bias,
                               const Maybe& residual, const Maybe& running_mean, const Maybe& running_var,
                               bool batch_statistics, double momentum, double eps, bool relu) {
    auto [y, mean, rstd] =
        norm(x, residual, weight, bias, running_mean, running_var, batch_statistics, momentum, eps, relu);
    ctx->save_for_backward({x, mean, rstd, weight, bias, relu ? y : Tensor()});
    ctx->saved_data["batch_statistics"] = batch_statistics;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["needs_residual"] = residual && residual->requires_grad();
    ctx->mark_non_differentiable({mean, rstd});
    ctx->set_materialize_grads(false);
    return {y, mean, rstd};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto& grad = grads[0];
    variable_list found(10);  // one for each argument of forward
    if (!grad.defined()) return found;
    const auto saved = ctx->get_saved_variables();
    const auto &x = saved[0], &mean = saved[1], &rstd = saved[2], &weight = saved[3], &bias = saved[4], &y = saved[5];
    const bool batch_statistics = ctx->saved_data["batch_statistics"].toBool();
    const bool needs_residual = ctx->saved_data["needs_residual"].toBool();
    if (is_differentiated(grad)) {
      differentiate(ctx, grad, saved, batch_statistics, found);
      return found;
    }
    typedef std::tuple<Tensor, Tensor, Tensor, Maybe> Gradients;
    static const auto kernel = operator_of<Gradients(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                     const Tensor&, const Maybe&, bool, bool, bool)>(
        "bnet_mm::norm_backward");
    const at::AutoDispatchBelowADInplaceOrView guard;
    const bool masks = y.defined();
    auto [grad_x, grad_weight, grad_bias, grad_residual] =
        kernel.call(grad, x, mean, rstd, weight, masks ? Maybe(y) : std::nullopt, batch_statistics,
                    ctx->needs_input_grad(WEIGHT), needs_residual && masks);
    found[X] = grad_x;
    found[WEIGHT] = in_strides_of(weight, grad_weight);
    found[BIAS] = in_strides_of(bias, grad_bias);
    if (needs_residual) found[RESIDUAL] = masks ? *grad_residual : grad;
    return found;
  }

  // The same gradients by torch's own operators, which can be differentiated again, and have rules for every transform.
  static void differentiate(AutogradContext* ctx, const Tensor& grad, const variable_list& saved, bool batch_statistics,
                            variable_list& found) {
    const bool create_graph = at::GradMode::is_enabled();
    const at::AutoGradMode enable(true);
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto &x = saved[0], &mean = saved[1], &rstd = saved[2], &weight = saved[3], &bias = saved[4], &y = saved[5];
    const auto alias = [&](const Tensor& t) { return t.to(mean.scalar_type()).view_as(t); };
    const auto per_map = [](const Tensor& t) { return t.view({-1, 1, 1}); };
    const auto wide = alias(x), taps = alias(weight);
    Tensor x_hat;
    if (batch_statistics) {
      const auto [var, centre] = at::var_mean(wide, at::OptionalIntArrayRef({0, 2, 3}), at::Scalar(0));
      x_hat = (wide - per_map(centre)) * per_map((var + ctx->saved_data["eps"].toDouble()).rsqrt());
    } else {
      x_hat = (wide - per_map(mean)) * per_map(rstd);
    }
    const auto half = weight.size(3) / 2;
    const auto z = at::conv2d(x_hat, taps, {}, 1, half, 1, weight.size(0));
    const auto masked = y.defined() ? grad.masked_fill(y <= 0, 0) : grad;
    std::vector<std::pair<Input, Tensor>> wanted;
    for (const auto& [input, tensor] : {std::pair(X, wide), std::pair(WEIGHT, taps)}) {
      if (ctx->needs_input_grad(input)) wanted.emplace_back(input, tensor);
    }
    if (!wanted.empty()) {
      variable_list inputs;
      for (const auto& [input, tensor] : wanted) inputs.push_back(tensor);
      const auto gradients =
          torch::autograd::grad({z}, inputs, {masked.to(z.scalar_type())}, std::nullopt, create_graph);
      for (size_t i = 0; i < wanted.size(); ++i) found[wanted[i].first] = gradients[i];
    }
    if (found[X].defined()) found[X] = found[X].to(x.scalar_type());
    if (ctx->needs_input_grad(BIAS)) found[BIAS] = masked.to(bias.scalar_type()).sum({0, 2, 3});
    if (ctx->saved_data["needs_residual"].toBool()) found[RESIDUAL] = masked;
  }
};

bool any_requires_grad(std::initializer_list<Tensor> tensors) {
  for (const auto& tensor : tensors) {
    if (tensor.defined() && tensor.requires_grad()) return true;
  }
  return false;
}

Outputs norm_autograd(const Tensor& x, const Maybe& residual, const Tensor& weight, const Tensor& bias,
                      const Maybe& running_mean, const Maybe& running_var, bool batch_statistics, double momentum,
                      double eps, bool relu) {
  if (!at::GradMode::is_enabled() || !any_requires_grad({x, weight, bias, residual.value_or(Tensor())})) {
    return norm(x, residual, weight, bias, running_mean, running_var, batch_statistics, momentum, eps, relu);
  }
  const auto outputs = Norm::apply(x, weight, bias, residual, running_mean, running_var, batch_statistics, momentum, eps,
                                   relu);
  return {outputs[0], outputs[1], outputs[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(bnet_mm, AutogradCPU, m) { m.impl("norm", norm_autograd); }

}  // namespace bnet_mm
