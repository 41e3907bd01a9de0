"""Checkpoints of small nets, what can go wrong with them, and what each of them says, read without this package."""

import io
import random
import zipfile
from collections import OrderedDict

import torch
from mmengine.model import BaseModule
from torch import nn

from bnet_mm import BNET, CBN, SN2d
from helpers import reference

C = 4
KINDS = {
    'BNET': lambda: BNET(C, 3),
    'BNET-5': lambda: BNET(C, 5),
    'BNET over SN': lambda: BNET(C, 3, norm='SN'),
    'BNET over CBN': lambda: BNET(C, 3, norm='CBN'),
    'BNET over GN': lambda: BNET(C, 3, norm=dict(type='GN', num_groups=2)),
    'SN': lambda: SN2d(C),
    'CBN': lambda: CBN(C),
}
OPTIONAL = ('num_batches_tracked', '_extra_state')  # a counter; the history of CBN, which inference does not use
STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')


class Net(BaseModule):
    """Two convolutions with a norm of this kind, and a linear layer."""

    def __init__(self, kind, init_cfg=None):
        super().__init__(init_cfg)
        self.conv1, self.bn1 = nn.Conv2d(3, C, 3), KINDS[kind]()
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3), KINDS[kind]()
        self.fc = nn.Linear(C, 3)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


def make(kind, seed):
    """A random state dict; of BNET-5 the outer taps are 0, so that a smaller kernel says the same."""
    torch.manual_seed(seed)
    state_dict = reference.randomise(Net(kind)).state_dict()
    for name, value in state_dict.items():
        if kind == 'BNET-5' and name.endswith('bnconv.weight'):
            inner = value[:, :, 1:4, 1:4].clone()
            value.zero_()[:, :, 1:4, 1:4] = inner
    return OrderedDict(state_dict)


# What leaves the function as it is: name -> function of state dict and random numbers.


def shuffled(state_dict, rng):
    items = list(state_dict.items())
    rng.shuffle(items)
    return OrderedDict(items)


def official(state_dict, rng):
    """bnet1.bnconv.weight, bnet1.running_mean; in the older form bnconv1.weight, bn1.running_mean."""
    old = rng.random() < 0.5
    renamed = OrderedDict()
    for name, value in state_dict.items():
        if name.startswith('bn'):
            layer, index, rest = name[:3], name[2], name[4:].removeprefix('norm.')
            layer = f'bnet{index}'
            if old:
                layer = f'bnconv{index}' if rest.startswith('bnconv.') else f'bn{index}'
                rest = rest.removeprefix('bnconv.')
            name = f'{layer}.{rest}'
        renamed[name] = value
    return renamed


def smaller_kernel(state_dict, rng):
    return OrderedDict(
        (name, value[:, :, 1:4, 1:4].clone() if name.endswith('bnconv.weight') else value)
        for name, value in state_dict.items()
    )


def wider(state_dict, rng):
    return OrderedDict(
        (name, value.double() if value.is_floating_point() else value) for name, value in state_dict.items()
    )


def official_sn(state_dict, rng):
    """(1, C, 1, 1), statistics without bn., no counter."""
    renamed = OrderedDict()
    for name, value in state_dict.items():
        if name.startswith('bn') and not name.endswith(OPTIONAL):
            name = name.replace('.bn.', '.')
            value = value.view(1, -1, 1, 1) if value.numel() == C else value
        if not name.endswith(OPTIONAL):
            renamed[name] = value
    return renamed


HARMLESS = {
    'shuffled': (KINDS, shuffled),
    'official': (('BNET', 'BNET-5'), official),
    'smaller kernel': (('BNET-5',), smaller_kernel),
    'float64': (KINDS, wider),
    'official SN': (('SN',), official_sn),
}


# What does not, or may not.


def _some(state_dict, rng):
    return rng.choice(list(state_dict))


def dropped(state_dict, rng):
    del state_dict[_some(state_dict, rng)]


def half_of_the_layers(state_dict, rng):
    for name in list(state_dict):
        if name.startswith(rng.choice((('conv1', 'bn1'), ('bn1', 'bn2'), ('bn2', 'fc'), ('conv2', 'bn1')))):
            del state_dict[name]


def renamed(state_dict, rng):
    for _ in range(rng.randint(1, 3)):
        name = _some(state_dict, rng)
        i = rng.randrange(len(name))
        typo = rng.choice(
            (name[:i] + name[i + 1 :], f'{name[:i]}x{name[i + 1 :]}', f'{name}.x', f'x.{name}', name.upper())
        )
        state_dict[rng.choice((typo, _some(state_dict, rng), name.rpartition('.')[2]))] = state_dict.pop(name)


def other_shape(state_dict, rng):
    name = _some(state_dict, rng)
    value = state_dict[name]
    state_dict[name] = rng.choice((
        lambda: value[None], lambda: value.reshape(-1)[: rng.randint(0, 3)], lambda: value.reshape(-1),
        lambda: value.transpose(0, -1) if value.dim() else value.expand(2), lambda: torch.cat([value.reshape(-1)] * 2),
        lambda: value.reshape(-1)[0], lambda: value.new_zeros(0), lambda: value.expand(2, *value.shape),
        lambda: value[..., :-1] if value.dim() else value[None],
    ))()  # fmt: skip


def other_dtype(state_dict, rng):
    dtypes = (torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.uint8, torch.complex64)
    dtype = rng.choice(dtypes)
    for name in rng.sample(list(state_dict), rng.randint(1, len(state_dict))):
        if isinstance(state_dict[name], torch.Tensor):
            state_dict[name] = state_dict[name].to(dtype)


def no_tensor(state_dict, rng):
    name = _some(state_dict, rng)
    state_dict[name] = rng.choice((None, 1.5, 'text', [1, 2], {}, state_dict[name].tolist(), b'bytes', True))


def strange_key(state_dict, rng):
    state_dict[rng.choice((1, None, (1, 2), '', '.', 'bn1', 'bn1.', 'bn1..weight', 2.5, b'bn1.weight'))] = torch.ones(C)


def twice(state_dict, rng):
    name = rng.choice([name for name in state_dict if name.startswith('bn')])
    layer, _, rest = name.partition('.')
    other = rng.choice((f'{layer}.{rest.rpartition(".")[2]}', f'bnet{layer[2]}.{rest.removeprefix("norm.")}'))
    state_dict[other] = state_dict[name] + 1


def swapped(state_dict, rng):
    """Values of two tensors of one shape: nothing can see that, the function is that of the file."""
    one = _some(state_dict, rng)
    other = rng.choice([name for name in state_dict if state_dict[name].shape == state_dict[one].shape])
    state_dict[one], state_dict[other] = state_dict[other], state_dict[one]


def other_prefix(state_dict, rng):
    prefix = rng.choice(('module.', 'model.', 'backbone.', 'module.module.'))
    for name in list(state_dict):
        if isinstance(name, str) and rng.random() < 0.8:
            state_dict[prefix + name] = state_dict.pop(name)


def strange_tensor(state_dict, rng):
    name = _some(state_dict, rng)
    value = state_dict[name]
    state_dict[name] = rng.choice((
        lambda: value.to_sparse() if value.dim() else value, lambda: torch.empty_like(value, device='meta'),
        lambda: nn.Parameter(value) if value.is_floating_point() else value,
        lambda: torch.nested.nested_tensor([value]),
        lambda: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
    ))()  # fmt: skip


DAMAGES = (
    dropped, half_of_the_layers, renamed, other_shape, other_dtype, no_tensor, strange_key, twice, swapped,
    other_prefix, strange_tensor,
)  # fmt: skip


# Of the file's bytes.


def truncated(data, rng):
    return data[: rng.randrange(len(data))]


def bit_flipped(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def block_lost(data, rng):
    start = rng.randrange(len(data))
    end = start + rng.randrange(1, 600)
    return data[:start] + rng.choice((b'', bytes(end - start), rng.randbytes(end - start))) + data[end:]


def block_inserted(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + rng.choice((rng.randbytes(64), data[:512])) + data[at:]


BYTES = (truncated, bit_flipped, block_lost, block_inserted)


def saved(checkpoint, legacy):
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def wrapped(state_dict, rng):
    """A checkpoint with this state dict, or the state dict alone."""
    meta = dict(epoch=3, seed=None, text='some text', rate=0.5)
    return rng.choice((
        dict(meta=meta, state_dict=state_dict), dict(state_dict=state_dict, optimizer=dict(state={}, param_groups=[])),
        state_dict,
    ))  # fmt: skip


# What a file says, without this package.


def reading(data):
    """The state dict of these bytes as torch reads it, or why it says nothing: damage that a checksum shows counts."""
    if data[:4] == b'PK\x03\x04':
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if archive.testzip() is not None:
                    return 'a checksum is wrong'
        except Exception as error:
            return f'no archive: {error}'
    try:
        checkpoint = torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        return f'{type(error).__name__}: {error}'
    state_dict = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else checkpoint
    return state_dict if isinstance(state_dict, dict) else 'no state dict'


def expected(kind, state_dict, said=''):
    """A net with the values of a state dict in any of the layouts, set one by one; names of what it lacks.

    ``said`` is what the host reported; what torch cannot copy (a sparse tensor) is lacking where it is named there.
    """
    net, missing = Net(kind).eval(), []
    given = {str(name).removeprefix('module.'): value for name, value in state_dict.items()}
    own = {name: value for name, value in net.state_dict().items() if not name.endswith('_extra_state')}
    for name, value in own.items():
        found = next((given[other] for other in spellings(name) if other in given), None)
        with torch.no_grad():
            refused = f'parameter named "{name}"' in said or f'size mismatch for {name}:' in said
            refused = refused or not isinstance(found, torch.Tensor)
            if refused or not _put(value, found.detach()):
                missing.append(name)
    return net, [name for name in missing if not name.endswith(OPTIONAL)]


def spellings(name):
    """The keys under which a tensor of a net may stand: ours, the official two, a plain norm's."""
    layer, _, rest = name.partition('.')
    names = [name]
    if layer in ('bn1', 'bn2'):
        bare = rest.removeprefix('norm.')
        last = rest.rpartition('.')[2]
        names += [
            f'bnet{layer[2]}.{bare}',
            f'{layer}.{bare}',
            f'{layer}.{last}',
            f'{layer}.norm.{last}',
            f'bnet{layer[2]}.{last}',
        ]
        if rest.startswith('bnconv.'):
            names.append(f'bnconv{layer[2]}.{last}')
    return names


def _put(own, value):
    """Whether the value fits; a kernel (C,) or of fewer taps goes to the centre, (1, C, 1, 1) is (C,)."""
    if value.is_meta or value.is_nested:
        return False
    value = value.dequantize() if value.is_quantized else value.to_dense() if value.is_sparse else value
    if own.dim() == 4 and own.shape[1] == 1:
        if value.dim() != 4 or value.shape[0] != C:
            if value.numel() != C or max(value.shape, default=0) != C:
                return False
            value = value.reshape(C, 1, 1, 1)
        margin = (own.shape[-1] - value.shape[-1]) // 2
        if value.shape[1] != 1 or margin < 0 or value.shape[2] != value.shape[3] or value.shape[-1] % 2 == 0:
            return False
        value = nn.functional.pad(value, [margin] * 4)
    elif own.dim() == 1 and value.numel() == own.numel() == max(value.shape, default=0):
        value = value.reshape(-1)
    elif own.dim() == 0 and value.numel() == 1:
        value = value.reshape(())
    if value.shape != own.shape:
        return False
    own.copy_(value)
    return True


def random_of(*parts):
    return random.Random(repr(parts))
