"""What the taps learned: how far a BNET is from BN, and in which direction."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 12  # channels of a layer in the picture


def tap_layers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The taps (C, k, k) of each BNET with k > 1 in a state dict, ours or a released one, by the layer's name."""
    found = ((re.fullmatch(r'(.*?)\.?bnconv\d*\.weight', key), value) for key, value in state_dict.items())
    return {match[1]: value.detach()[:, 0].float() for match, value in found if match and value.shape[-1] > 1}


def stage_of(name: str) -> str:
    """What stands before the number of the block: ``backbone.layer1`` of ``backbone.layer1.0.bn3``."""
    return re.split(r'\.\d+(?:\.|$)', name)[0]


def off_centre(taps: Tensor) -> Tensor:
    """Copy of the taps (C, k, k) with 0 at the centre: what BN does not have."""
    taps = taps.clone()
    taps[:, taps.shape[1] // 2, taps.shape[2] // 2] = 0
    return taps


def energy_off_centre(taps: Tensor) -> Tensor:
    """Share (C,) of each channel's sum of squares that is not at the centre; 0 for BN and for taps that are all 0."""
    total = taps.square().sum((1, 2))
    return off_centre(taps).square().sum((1, 2)) / total.clamp_min(torch.finfo(taps.dtype).tiny)


def share_off_centre(*layers: Tensor) -> float:
    """Share of the sum of squares of all taps of these layers that is not at the centre; 0 if all are 0."""
    total = sum(float(taps.square().sum()) for taps in layers)
    return sum(float(off_centre(taps).square().sum()) for taps in layers) / total if total else 0.0


def tap_statistics(taps: Tensor) -> dict[str, float]:
    """Of a layer's taps (C, k, k).

    Returns:
        ``off centre``: the share of all energy (sum of squares) off the centre; ``symmetric`` and ``antisymmetric``:
        the shares of the off-centre energy in the parts that stay, and that change their sign, when a kernel is turned
        by 180 degrees (smoothing and sharpening; derivatives), which add up to 1, or are 0 for BN; ``mean tap``: the
        mean of all taps; ``changed``: the channels in which more than half of the energy is off the centre.
    """
    others = off_centre(taps)
    energy = float(others.square().sum())
    even = float(((others + others.flip(1, 2)) / 2).square().sum())
    symmetric = even / energy if energy else 0.0
    return {
        'off centre': share_off_centre(taps),
        'symmetric': symmetric,
        'antisymmetric': 1 - symmetric if energy else 0.0,
        'mean tap': float(taps.mean()),
        'changed': int((energy_off_centre(taps) > 0.5).sum()),
    }


def stage_shares(layers: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of tap energy off the centre of each stage, by the stage's name."""
    stages: dict[str, list[Tensor]] = {}
    for name, taps in layers.items():
        stages.setdefault(stage_of(name), []).append(taps)
    return {stage: share_off_centre(*members) for stage, members in stages.items()}


def draw_taps(layers: Mapping[str, Tensor]) -> Figure:
    """The most changed channels of each layer, one row per layer: red taps are positive, blue ones negative.

    Colours are relative to the largest tap of each channel; above each stands the share of energy off the centre.
    """
    from matplotlib.figure import Figure  # here: NormStatisticsHook uses the rest, in every import of bnet_mm

    figure = Figure(figsize=(1.6 + 0.62 * SHOWN, 0.85 * len(layers) + 0.6), layout='constrained')
    axes = figure.subplots(len(layers), SHOWN, squeeze=False)
    for (name, taps), row in zip(layers.items(), axes):
        energy = energy_off_centre(taps)
        for axis in row:
            axis.set_axis_off()
        for axis, channel in zip(row, energy.argsort(descending=True).tolist()):
            most = float(taps[channel].abs().max()) or 1.0
            axis.imshow(taps[channel].cpu(), cmap='RdBu_r', vmin=-most, vmax=most)
            axis.set_title(f'#{channel}\n{100 * energy[channel]:.0f}%', fontsize=6, pad=2)
        place = dict(xycoords='axes fraction', ha='right', va='center')
        row[0].annotate(f'{name}\n{100 * share_off_centre(taps):.1f}% off centre', (-0.2, 0.5), fontsize=6, **place)
    figure.supxlabel('the most changed channels of each layer; %: share of energy off the centre', fontsize=7)
    return figure
