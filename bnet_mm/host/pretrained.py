"""``init_cfg=dict(type='Pretrained')`` that does not accept a file of another network."""

from __future__ import annotations

from mmengine.model import PretrainedInit
from torch import Tensor, nn

from bnet_mm.checkpoint.layouts import CheckpointError, StateDict
from bnet_mm.messages import first_of

Shapes = dict[str, tuple[int, ...]]


class CheckedPretrainedInit(PretrainedInit):
    """mmengine's initialiser, which only logs what does not fit; here one convolution or linear layer at least must.

    Raises:
        CheckpointError: If none does, or no key has the prefix; the module is as it was.
    """

    def __call__(self, module: nn.Module) -> None:
        # A BNET layer takes other names and shapes, and refuses what does not fit by itself.
        own = {name: value for name, value in module.state_dict().items() if not name.endswith('bnconv.weight')}
        wanted = {name: tuple(value.shape) for name, value in own.items() if value.dim() > 1}

        def check(state_dict: StateDict, *_) -> None:
            found = {name: tuple(value.shape) for name, value in state_dict.items() if isinstance(value, Tensor)}
            if wanted and not any(found.get(name) == shape for name, shape in wanted.items()):
                raise CheckpointError(
                    f'pretrained weights {self.checkpoint}: nothing in this file fits {type(module).__name__}, which '
                    f'looked for {_some(wanted)}; the file has {_some(found)}{_hint(wanted, found)}'
                )

        handle = module._register_load_state_dict_pre_hook(check)
        try:
            super().__call__(module)
        except AssertionError as error:  # mmengine's answer to a prefix that no key has
            raise CheckpointError(f'pretrained weights {self.checkpoint}: {error}') from error
        finally:
            handle.remove()


def _some(shapes: Shapes) -> str:
    return first_of((f'{name} {shape}' for name, shape in shapes.items()), 3) or 'no tensor'


def _hint(wanted: Shapes, found: Shapes) -> str:
    """How to read what is there, but below another name."""
    for name, shape in wanted.items():
        for key in found:
            if key.endswith(f'.{name}') and found[key] == shape:
                prefix = key[: -len(name) - 1]
                return f'. To read what is below {prefix}, say prefix={prefix!r} in init_cfg'
    return ''
