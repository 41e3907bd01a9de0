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


def group_norm(x, num_groups, eps=1e-5):
    """Arithmetic of GN without affine, group by group; num_groups = C gives IN."""
    out = torch.empty_like(x)
    size = x.shape[1] // num_groups
    for n in range(x.shape[0]):
        for g in range(num_groups):
            group = x[n, g * size : (g + 1) * size]
            mean = group.sum() / group.numel()
            var = ((group - mean) ** 2).sum() / group.numel()
            out[n, g * size : (g + 1) * size] = (group - mean) / (var + eps) ** 0.5
    return out


def switchable_norm(x, mean_weight, var_weight, running=None, eps=1e-5):
    """SN without affine of (N, C, ...), IN variance unbiased; ``running``: (mean, var) (C,) instead of batch ones.

    The mixture has two parts where the weights have two elements. Returns the normalised x and the batch's statistics.
    """
    n, c = x.shape[:2]
    pixels = x.reshape(n, c, -1)
    m = pixels.shape[2]
    mean_in = pixels.sum(2) / m
    var_in = ((pixels - mean_in[..., None]) ** 2).sum(2) / (m - 1)
    square = var_in + mean_in**2
    mean_ln = mean_in.sum(1) / c
    means, variances = [mean_in, mean_ln[:, None]], [var_in, (square.sum(1) / c - mean_ln**2)[:, None]]
    batch = mean_in.sum(0) / n, square.sum(0) / n - (mean_in.sum(0) / n) ** 2
    if len(mean_weight) == 3:
        mean, var = batch if running is None else running
        means.append(mean[None])
        variances.append(var[None])
    mean_share = torch.exp(mean_weight) / torch.exp(mean_weight).sum()
    var_share = torch.exp(var_weight) / torch.exp(var_weight).sum()
    mean = sum(share * value.expand(n, c) for share, value in zip(mean_share, means))
    var = sum(share * value.expand(n, c) for share, value in zip(var_share, variances))
    return ((pixels - mean[..., None]) / (var[..., None] + eps) ** 0.5).reshape(x.shape), batch


class CrossIterationBN:
    """CBN without affine, for a convolution whose past inputs and weights are kept: nothing but sums over patches."""

    def __init__(self, stride, padding, buffer_num, eps=1e-5):
        self.stride, self.padding, self.buffer_num, self.eps = stride, padding, buffer_num, eps
        self.past = []

    def patches(self, inputs, weight):
        unfolded = torch.nn.functional.unfold(inputs, weight.shape[2:], padding=self.padding, stride=self.stride)
        return unfolded.transpose(1, 2).flatten(0, 1)  # (positions, patch)

    def statistics(self, inputs, weight):
        y = self.patches(inputs, weight) @ weight.flatten(1).T
        return y.mean(0), (y**2).mean(0)

    def compensated(self, inputs, old_weight, weight):
        """Mean and mean square of an old batch, moved from the old to the present weights to first order."""
        patches = self.patches(inputs, old_weight)
        y = patches @ old_weight.flatten(1).T
        change = (weight - old_weight).flatten(1)
        mean = y.mean(0) + change @ patches.mean(0)
        return mean, (y**2).mean(0) + 2 * ((y.T @ patches / len(y)) * change).sum(1)

    def __call__(self, inputs, weight):
        """The normalised output of the convolution, and which past iterations counted (T, C)."""
        joint = [self.statistics(inputs, weight)]
        used = torch.ones(1, len(weight), dtype=torch.bool)
        for past_inputs, past_weight in self.past:
            mean, square = self.compensated(past_inputs, past_weight, weight.detach())
            joint.append((mean, square))
            used = torch.cat([used, (square - mean**2 >= 0)[None]])
        number = used.sum(0)
        mean = sum(m * u for (m, _), u in zip(joint, used)) / number
        square = sum(s * u for (_, s), u in zip(joint, used)) / number
        self.past = [(inputs.detach(), weight.detach().clone()), *self.past][: self.buffer_num]
        y = torch.nn.functional.conv2d(inputs, weight, stride=self.stride, padding=self.padding)
        y = (y - mean.reshape(1, -1, 1, 1)) / (square - mean**2 + self.eps).sqrt().reshape(1, -1, 1, 1)
        return y, used
