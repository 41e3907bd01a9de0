"""Maps of a model's layers, recorded from forward passes: enhancement (paper, Figure 4) and attention (Figure 5)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from bnet_mm.layers import BNET
from bnet_mm.layers.arguments import Duck
from bnet_mm.surgery.positions import norm_names
from bnet_mm.visualization.enhancement import enhancement_map


def attention_map(features: Tensor) -> Tensor:
    """Mean over channels of the squared activations; the paper does not define its maps, this is the common choice.

    Args:
        features: (N, C, H, W).

    Returns:
        (N, H, W).
    """
    return features.float().square().mean(1)


def stage_names(model: Duck) -> list[str]:
    """Names of the stages of ``model.backbone``, or of ``model``: its sequences of residual blocks, in their order."""
    body = getattr(model, 'backbone', None)
    prefix, body = ('', model) if body is None else ('backbone.', body)
    children = ((name, child) for name, child in body.named_children() if isinstance(child, nn.Sequential))
    return [prefix + name for name, child in children if any(norm_names(block) for block in child.modules())]


def last_bnet(model: nn.Module, stage: str) -> str | None:
    """Name of the last BNET in the last residual block of a stage that has any."""
    for name, block in reversed(list(model.get_submodule(stage).named_modules(prefix=stage))):
        for norms in reversed(norm_names(block).values()):
            if isinstance(model.get_submodule(f'{name}.{norms[-1]}'), BNET):
                return f'{name}.{norms[-1]}'
    return None


def default_layers(model: nn.Module) -> tuple[list[str], list[str]]:
    """The last BNET of each stage, which feeds the feature pyramid (H2 to H5 in the paper), and the stages."""
    stages = stage_names(model)
    found = (last_bnet(model, stage) for stage in stages)
    return [name for name in found if name], stages


@contextmanager
def recorded_maps(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """The maps (N, H, W) of these modules in the last forward pass inside the context, by their names.

    Of a BNET it is the enhancement map, of any other module the attention map of its output. Hooks make a BNET run its
    two modules one after the other: the kernels in one pass have no normalised map to show.

    Raises:
        AttributeError: If the model has no module of such a name.
    """
    maps: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module):
        def hook(_: nn.Module, inputs: tuple, output: Tensor) -> None:
            if isinstance(module, BNET):
                maps[name] = enhancement_map(module, inputs[0], output)
            else:
                maps[name] = attention_map(output)

        return hook

    handles = []
    try:
        for name in names:
            module = model.get_submodule(name)
            place = module.bnconv if isinstance(module, BNET) else module
            handles.append(place.register_forward_hook(record(name, module)))
        yield maps
    finally:
        for handle in handles:
            handle.remove()
