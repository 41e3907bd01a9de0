"""The paper's counter-example (section 4.5, Table 11): batch norm, ReLU, then an ordinary depthwise convolution."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnet_mm.checkpoint.layouts import move_key
from bnet_mm.layers.arguments import check_positive_int


class BNConv(nn.Module):
    """``DWConv_k(ReLU(BN(x)))``, with the parameters of BNET and none of its gain. A norm for ``norm_cfg``.

    Args:
        num_features: Number of channels C.
        k: Size of the depthwise kernel, odd. It has no bias, and starts as the host initialises convolutions.
        eps, momentum, device, dtype: As in ``torch.nn.BatchNorm2d``.

    Shapes:
        input and output: (N, C, H, W).

    Raises:
        ValueError: For an even k, or a k or num_features below 1.

    State dict: ``norm.*`` of BatchNorm2d and ``conv.weight`` (C, 1, k, k). A BN checkpoint fills ``norm``.
    """

    _abbr_ = 'bn'

    def __init__(
        self,
        num_features: int,
        k: int = 3,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = dict(device=device, dtype=dtype)
        check_positive_int('BNConv', 'num_features', num_features)
        check_positive_int('BNConv', 'k', k, odd=True)
        self.norm = nn.BatchNorm2d(num_features, eps, momentum, **options)
        options.update(padding=k // 2, groups=num_features, bias=False)
        self.conv = nn.Conv2d(num_features, num_features, k, **options)

    @classmethod
    def from_norm(cls, norm: nn.BatchNorm2d, k: int = 3) -> BNConv:
        """A BNConv around ``norm`` itself."""
        like = next((t for t in (norm.weight, *norm.buffers()) if t is not None), torch.empty(0))
        layer = cls(norm.num_features, k, device=like.device, dtype=like.dtype)
        layer.norm = norm
        return layer.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.norm(x)))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for name, own in self.norm.state_dict().items():
            if prefix + name in state_dict:
                move_key(state_dict, prefix + name, f'{prefix}norm.{name}', own)
        super()._load_from_state_dict(state_dict, prefix, *args)
