"""Independent references, written from the paper's formulas, and helpers that make inputs worth testing on."""

import torch


def depthwise(x_hat, weight, bias, dilation=1):
    """sum_j w_j x_hat_(i+j) + bias as a sum over shifted copies; outside the map x_hat is 0. weight: (C, 1, k, k)."""
    n, c, height, width = x_hat.shape
    k = weight.shape[-1]
    margin = dilation * (k // 2)
    padded = x_hat.new_zeros(n, c, height + 2 * margin, width + 2 * margin)
    padded[:, :, margin : margin + height, margin : margin + width] = x_hat
    y = bias.reshape(1, c, 1, 1).expand(n, c, height, width).clone()
    for i in range(k):
        for j in range(k):
            shifted = padded[:, :, i * dilation : i * dilation + height, j * dilation : j * dilation + width]
            y = y + weight[:, 0, i, j].reshape(1, c, 1, 1) * shifted
    return y


def bnet(x, weight, bias, mean, var, eps=1e-5, dilation=1):
    """Equations 1 and 5 with given statistics (C,)."""
    x_hat = (x - mean.reshape(1, -1, 1, 1)) / (var.reshape(1, -1, 1, 1) + eps).sqrt()
    return depthwise(x_hat, weight, bias, dilation)


def batch_statistics(x):
    """Mean and biased variance (C,) of equation 2."""
    mean = x.mean(dim=(0, 2, 3))
    return mean, ((x - mean.reshape(1, -1, 1, 1)) ** 2).mean(dim=(0, 2, 3))


def randomise(model):
    """Random parameters and running statistics, in place: an untouched BNET is the identity and hides mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 / max(1, parameter[0].numel()) ** 0.5))
            if parameter.dim() == 1:
                parameter.add_(1)
        for name, buffer in model.named_buffers():
            if name.endswith('running_mean'):
                buffer.copy_(torch.randn_like(buffer) * 0.3)
            if name.endswith('running_var'):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model


def randomise_parameters(model):
    """As randomise, but leaves running statistics and frozen parameters alone."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * (0.5 / max(1, parameter[0].numel()) ** 0.5))
    return model
