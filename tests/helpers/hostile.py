"""Pickles that try to run code, as objects and as hand-written opcodes; each would make the folder ``mark``."""

import functools
import importlib
import io
import operator
import os
import pathlib
import pickle
import posix
import random
import shutil
import subprocess
import tarfile
import zipfile

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler


class Call:
    """Pickles as function(*arguments), with a state that BUILD would set."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


def objects(mark):
    """Objects whose pickles call something, directly or through what the allow-list has."""
    mark = str(mark)
    code = f'__import__("os").mkdir({mark!r})'
    inner = pickle.dumps(Call(os.mkdir, mark))
    buffer = io.BytesIO()
    torch.save(Call(os.mkdir, mark), buffer)
    history = HistoryBuffer()
    return {
        'os.mkdir': Call(os.mkdir, mark),
        'posix.mkdir': Call(posix.mkdir, mark),
        'eval': Call(eval, code),
        'exec': Call(exec, code),
        'subprocess': Call(subprocess.call, ['mkdir', mark]),
        'pathlib': Call(pathlib.Path.mkdir, pathlib.Path(mark)),
        'shutil': Call(shutil.copytree, '/usr/share/doc/bash', mark),
        'pickle.loads': Call(pickle.loads, inner),
        'torch.load': Call(torch.storage._load_from_bytes, buffer.getvalue()),
        'partial': Call(functools.partial, os.mkdir, mark),
        'called partial': Call(Call(functools.partial, os.mkdir, mark).parts[0], os.mkdir, mark),
        'methodcaller': Call(operator.methodcaller, 'mkdir'),
        'attrgetter': Call(operator.attrgetter, '__init__.__globals__'),
        'import_module': Call(importlib.import_module, 'os'),
        'getattr of a history': Call(getattr, HistoryBuffer, '__init__'),
        'getattr of globals': Call(getattr, HistoryBuffer.__init__, '__globals__'),
        'getattr of subclasses': Call(getattr, object, '__subclasses__'),
        'getattr of a scheduler': Call(getattr, OneCycleParamScheduler, '__init__'),
        'setattr': Call(setattr, HistoryBuffer, 'mean', eval),
        'build of a history': Call(HistoryBuffer, state={'_statistics_methods': {'mean': Call(eval, code)}}),
        'build of a tensor': Call(
            torch._utils._rebuild_tensor_v2, *torch.zeros(2).__reduce_ex__(2)[1], state=Call(eval, code)
        ),
        'object array': np.array([Call(os.mkdir, mark)], dtype=object),
        'object scalar': Call(np.float64(0).__reduce__()[0], np.dtype('O'), Call(os.mkdir, mark)),
        'void scalar': Call(np.float64(0).__reduce__()[0], np.dtype([('a', 'O')]), inner),
        'numpy.frombuffer': Call(np.frombuffer, inner),
        'rebuilt': Call(np.array(0).__reduce__()[0], np.ndarray, (0,), b'O'),
        'codec': Call(__import__('_codecs').encode, code, 'unicode_escape'),
        'unused history': history,
    }  # fmt: skip


RAW = {
    'GLOBAL, REDUCE': b'cos\nmkdir\n(V%s\ntR.',
    'Python 2 name': b'c__builtin__\neval\n(V__import__("os").mkdir("%s")\ntR.',
    'INST': b'(V%s\nios\nmkdir\n.',
    'OBJ': b'(cos\nmkdir\nV%s\no.',
    'STACK_GLOBAL': b'\x80\x04\x8c\x02os\x8c\x05mkdir\x93(V%s\nt R.'.replace(b't R', b'tR'),
    'dotted': b'\x80\x04\x8c\x02os\x8c\x0dpath.os.mkdir\x93(V%s\ntR.',
    'through torch': b'\x80\x04\x8c\x05torch\x8c\x08os.mkdir\x93(V%s\ntR.',
    'through numpy': b'\x80\x04\x8c\x05numpy\x8c\x08os.mkdir\x93(V%s\ntR.',
    'through a history': b'\x80\x04\x8c\x1fmmengine.logging.history_buffer'
    + b'\x8c\x1eHistoryBuffer.mean.__globals__\x93(V%s\ntR.',
    'NEWOBJ': b'\x80\x02cos\nmkdir\n(V%s\nt\x81.',
    'BUILD on a class': b'\x80\x02cmmengine.logging.history_buffer\nHistoryBuffer\n}(Vmean\ncos\nmkdir\nub(V%s\ntR.',
    'memo': b'cos\nmkdir\np0\n0g0\n(V%s\ntR.',
    'EXT': b'\x80\x02\x82\x01(V%s\ntR.',
    'PERSID': b'(Vstorage\ncos\nmkdir\nV%s\nVcpu\nI1\ntQ.',
}  # fmt: skip
OPCODES = [
    b'(', b')', b']', b'}', b't', b'R', b'b', b'o', b'\x81', b'\x93', b'Q', b'0', b'2', b's', b'u', b'a', b'e',
    b'q\x00', b'h\x00', b'q\x01', b'h\x01', b'N', b'K\x01', b'\x85', b'\x86', b'\x87', b'\x88',
]  # fmt: skip
GLOBALS = [
    b'os\nmkdir', b'builtins\neval', b'builtins\ngetattr', b'__builtin__\ngetattr', b'collections\nOrderedDict',
    b'torch._utils\n_rebuild_tensor_v2', b'mmengine.logging.history_buffer\nHistoryBuffer', b'_codecs\nencode',
    b'numpy.core.multiarray\n_reconstruct', b'numpy._core.multiarray\nscalar', b'numpy\nndarray', b'numpy\ndtype',
    b'torch\nFloatStorage', b'torch.nn.parameter\nParameter', b'collections\nCounter', b'torch\nSize', b'torch\ndevice',
    b'torch._tensor\n_rebuild_from_type_v2', b'torch._utils\n_rebuild_parameter', b'torch.serialization\n_get_layout',
]  # fmt: skip


def program(mark, rng: random.Random):
    """Random opcodes: what an attacker who knows the allow-list might find."""
    words = [b'\x80\x02']
    strings = [
        str(mark).encode(),
        b'os',
        b'mkdir',
        b'mean',
        b'__globals__',
        b'__class__',
        b'__init__',
        b'system',
        b'storage',
    ]
    for _ in range(rng.randint(2, 30)):
        kind = rng.random()
        if kind < 0.35:
            words.append(b'c' + rng.choice(GLOBALS) + b'\n')
        elif kind < 0.6:
            words.append(b'V' + rng.choice(strings) + b'\n')
        else:
            words.append(rng.choice(OPCODES))
    return b''.join(words) + b'.'


def as_zip(raw, script=False):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        archive.writestr('a/data.pkl', raw)
        archive.writestr('a/version', '3\n')
        archive.writestr('a/byteorder', 'little')
        if script:
            archive.writestr('a/constants.pkl', raw)
            archive.writestr('a/code/__torch__.py', '')
    return buffer.getvalue()


def as_legacy(raw, position=3):
    """The five pickles of the older format, one of them this."""
    parts = [
        pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2),
        pickle.dumps(dict(protocol_version=1001, little_endian=True, type_sizes=dict(short=2, int=4, long=4)), 2),
        pickle.dumps({}, 2), pickle.dumps([], 2),
    ]  # fmt: skip
    return b''.join(raw if i == position else part for i, part in enumerate(parts))


def as_tar(raw):
    """The format of torch 0.1."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as archive:
        for name in ('storages', 'tensors', 'pickle', 'sys_info'):
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return buffer.getvalue()


CONTAINERS = {
    'zip': as_zip,
    'TorchScript': functools.partial(as_zip, script=True),
    'legacy': as_legacy,
    **{f'legacy, part {i}': functools.partial(as_legacy, position=i) for i in (0, 1, 2, 4)},
    'tar': as_tar,
    'plain pickle': bytes,
}
PLACES = {
    'value': lambda state_dict, evil: dict(state_dict=dict(state_dict, evil=evil)),
    'in place of a tensor': lambda state_dict, evil: dict(state_dict=dict(state_dict, **{'fc.bias': evil})),
    'meta': lambda state_dict, evil: dict(meta=dict(epoch=1, deep=[(evil,)]), state_dict=state_dict),
    'optimizer': lambda state_dict, evil: dict(state_dict=state_dict, optimizer=dict(state={0: evil})),
    'message hub': lambda state_dict, evil: dict(state_dict=state_dict, message_hub=dict(log_scalars={'a': evil})),
    'alone': lambda state_dict, evil: evil,
}
