"""Wrong arguments are named before memory is touched."""

import pytest
import torch

from bnet_mm.ops.bnet import bnet
from helpers.kernels import compiled

GOOD = dict(
    x=torch.ones(2, 3, 4, 5), mean=torch.ones(3), rstd=torch.ones(3), weight=torch.ones(3, 1, 3, 3), bias=torch.ones(3),
    residual=torch.ones(2, 3, 4, 5),
)  # fmt: skip
META = torch.empty(3, device='meta')


@pytest.mark.parametrize('name, value', [
    ('x', torch.ones(3, 4, 5)), ('x', torch.ones(2, 3, 4, 5).int()), ('mean', torch.ones(4)),
    ('rstd', torch.ones(2, 3)), ('mean', torch.ones(3, 1)), ('mean', META), ('rstd', META), ('bias', META),
    ('weight', torch.ones(3, 1, 2, 2)), ('weight', torch.ones(3, 1, 3, 5)), ('weight', torch.ones(4, 1, 3, 3)),
    ('weight', torch.ones(3, 3)), ('weight', torch.ones(3, 3, 3, 3)), ('bias', torch.ones(2)),
    ('weight', torch.ones(3, 1, 3, 3, device='meta')), ('bias', torch.tensor(1.0)),
    ('residual', torch.ones(2, 3, 4, 4)), ('residual', torch.ones(2, 3, 4, 5).double()),
    ('residual', torch.ones(2, 3, 4, 5, device='meta')),
])  # fmt: skip
@pytest.mark.parametrize('backend', ['auto', 'reference'])  # the operators of the others check again
def test_bad_argument_is_named(name, value, backend, monkeypatch):
    monkeypatch.setenv('BNET_MM_BACKEND', backend)
    assert bnet(**GOOD).shape == (2, 3, 4, 5)
    with pytest.raises((ValueError, TypeError), match=rf'bnet: (mean and )?{name} (and rstd )?must'):
        bnet(**{**GOOD, name: value})


# Arguments of the operators themselves, and which tensors are maps, or have one number per channel.
OPERATORS = {
    'forward': dict(GOOD, relu=False),
    'backward': dict(
        grad=GOOD['x'], x=GOOD['x'], mean=GOOD['mean'], rstd=GOOD['rstd'], weight=GOOD['weight'], needs_weight=True,
        needs_statistics=True,
    ),
    'moments': dict(x=GOOD['x'], over_batch=True),
    'moments_backward': dict(
        grad_x=torch.zeros(2, 3, 4, 5), x=GOOD['x'], mean=GOOD['mean'], grad_mean=GOOD['mean'], grad_var=GOOD['mean']
    ),
}  # fmt: skip


def spoiled(name, value):
    """Wrong versions of one argument."""
    yield value[..., :0].sum(-1), 'shape'  # a dimension less
    if name != 'x':
        yield torch.cat([value, value]), 'shape'
        yield value.to('meta'), 'device'
    yield value.half(), 'dtype'
    if name != 'x':
        yield value.double(), 'dtype'


BAD_CALLS = [
    pytest.param(operator, name, wrong, id=f'{operator}-{name}-{what}-{i}')
    for operator, arguments in OPERATORS.items()
    for name, value in arguments.items()
    if isinstance(value, torch.Tensor)
    for i, (wrong, what) in enumerate(spoiled(name, value))
]


@compiled
@pytest.mark.parametrize('operator, name, wrong', BAD_CALLS)
def test_operators_refuse_before_they_touch_memory(operator, name, wrong):
    arguments = {key: v.clone() if isinstance(v, torch.Tensor) else v for key, v in OPERATORS[operator].items()}
    arguments[name] = wrong
    with pytest.raises((ValueError, TypeError), match=rf'bnet: .*{name}.* must'):
        getattr(torch.ops.bnet_mm, operator)(**arguments)
    if operator == 'moments_backward' and name != 'grad_x':
        assert not arguments['grad_x'].any()


@compiled
@pytest.mark.parametrize('k', [2, 9, 0])
def test_operators_refuse_other_kernel_sizes(k):
    with pytest.raises(ValueError, match='bnet: weight must be .* with k 1, 3, 5 or 7'):
        torch.ops.bnet_mm.forward(**{**OPERATORS['forward'], 'weight': torch.ones(3, 1, k, k)})
    grad_x = torch.zeros(2, 3, 5, 4).transpose(2, 3)
    with pytest.raises(ValueError, match='bnet: grad_x must be contiguous'):
        torch.ops.bnet_mm.moments_backward(**{**OPERATORS['moments_backward'], 'grad_x': grad_x})
