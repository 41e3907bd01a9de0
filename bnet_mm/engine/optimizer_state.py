"""Whether the optimizer's state in a checkpoint is that of this model; torch finds out in the first step, if at all."""

from __future__ import annotations

from typing import Any

from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor, nn

from bnet_mm.checkpoint.layouts import CheckpointError

# The tensors in torch's optimizers that have the shape of their parameter. Others have shapes of their own.
LIKE_PARAMETER = (
    'momentum_buffer', 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'exp_inf', 'square_avg', 'grad_avg', 'acc_delta',
    'sum', 'prev', 'step_size', 'mu_product', 'ax',
)  # fmt: skip


def check_optimizer_state(
    wrapper: OptimWrapper | OptimWrapperDict, state_dict: dict[str, Any], model: nn.Module
) -> None:
    """Refuse the state of another model's optimizer, before anything of it is loaded.

    Args:
        wrapper: What is to go on.
        state_dict: ``checkpoint['optimizer']``.
        model: Whose parameters the wrapper has; for their names.

    Raises:
        CheckpointError: If a number of parameters or a shape differs.
    """
    if isinstance(wrapper, OptimWrapperDict):
        for name, part in wrapper.items():
            if name in state_dict:
                check_optimizer_state(part, state_dict[name], model)
        return
    groups, own = (optimizer['param_groups'] for optimizer in (state_dict, wrapper.optimizer.state_dict()))
    sizes, own_sizes = ([len(group['params']) for group in several] for several in (groups, own))
    if sizes != own_sizes:
        raise _error(f'it has {sum(sizes)} parameters in {len(sizes)} groups, here are {sum(own_sizes)} in {len(own)}')
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in wrapper.optimizer.param_groups for parameter in group['params']]
    for index, parameter in zip((index for group in groups for index in group['params']), parameters):
        for key, value in state_dict['state'].get(index, {}).items():
            if key in LIKE_PARAMETER and isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                name = names.get(id(parameter), 'a parameter')
                raise _error(f'its {key} is {tuple(value.shape)} where {name} is {tuple(parameter.shape)}')


def _error(difference: str) -> CheckpointError:
    return CheckpointError(
        f"cannot resume: the optimizer's state in the checkpoint is another model's ({difference}); to start a new "
        'run from its weights, say load_from=CHECKPOINT and do not resume'
    )
