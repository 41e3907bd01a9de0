"""Configs, options and arguments with one thing wrong: (what, tool, text of the config, arguments)."""

import itertools
import random
from typing import NamedTuple

from mmengine.config import Config

from helpers.toy_host import CONFIG


class Wrong(NamedTuple):
    """``text`` is the config beside base.py, or None for base.py itself; '@' in arguments is the folder of both."""

    what: str
    tool: str
    text: 'str | None'
    arguments: tuple = ()


BASE = "_base_ = './base.py'\n"
PLAIN = f"{BASE}model = dict(backbone=dict(_delete_=True, type='ResNet', depth=18))\n"
# What no reader of these would miss: names of variables inside a config, and what the tools fill in themselves.
FREE = ('dataset', 'custom_imports', 'default_scope')
INVALID = {
    'model': ['3', 'text', '[1,2]', 'None'],
    'model.type': ['Nothing', '3', 'toyclassifier', '[1]', 'BNET'],
    'model.backbone': ['3', 'text', '[1]', 'None'],
    'model.backbone.type': ['WithBNETT', 'withbnet', 'BNET', '3', 'None'],
    'model.backbone.base': ['ResNett', '3', 'None', '[1]', 'BNET', 'resnet', ''],
    'model.backbone.bnet': ['3', 'text', '[1,2]', 'True', '5.0', 'C'],
    'model.backbone.bnet.k': [
        '0', '2', '-1', '-3', '4', 'text', '1.5', 'None', 'True', '[3]', '3.0', '(3,3)', "'3'", '1e3',
    ],
    'model.backbone.bnet.where': ['D', '', 'CD', '(', '3', 'None', '[C]', 'nothing', 'True', 'c', '1.5', 'C,B', '*'],
    'model.backbone.bnet.dilation': ['0', '-1', '1.5', 'text', 'None', '[1]', 'True', '2.0'],
    'model.backbone.bnet.type': ['GN', 'bnet', '3', 'None', 'SN', '[BNET]'],
    'model.backbone.frelu': ['no', '[1]', '3', 'None', 'yes', 'off', '0.5'],
    'model.backbone.norm_cfg': ['3', 'text', '[1]'],
    'model.backbone.norm_cfg.type': ['BNN', 'BNETT', 'Conv2d', 'ReLU', 'bnet', 'None', '3', 'WithBNET', 'FReLU'],
    'model.backbone.depth': ['17', 'text', 'None', '-18', '18.5'],
    'model.backbone.base_channels': ['0', '-4', 'text', '1.5', 'None', '[4]'],
    'model.channels': ['31', 'text', '-1', 'None'],
    'train_dataloader': ['3', 'text', '[1]', 'None'],
    'train_dataloader.batch_size': ['0', '-1', 'text', '1.5', '[2]'],
    'train_dataloader.num_workers': ['-1', 'text', '1.5', '[2]'],
    'train_dataloader.sampler': ['3', 'text', '[1]'],
    'train_dataloader.sampler.type': ['Nothing', '3', 'None', 'BNET'],
    'train_dataloader.dataset': ['3', 'text', '[1]', 'None'],
    'train_dataloader.dataset.type': ['Nothing', '3', 'None', 'ToyImage'],
    'train_dataloader.dataset.length': ['0', 'text', '-1', '[2]', '1.5', 'None'],
    'train_dataloader.dataset.size': ['text', '-1', '[2]', '1.5', 'None'],
    'train_cfg': ['3', 'text', '[1]', 'None'],
    'train_cfg.type': ['Nothing', '3', 'IterBasedTrainLop', 'ValLoop'],
    'train_cfg.max_iters': ['text', '1.5', '[2]', 'None', '0', '-1'],
    'train_cfg.val_interval': ['text', '[2]', 'None', '0'],
    'val_dataloader': ['3', 'text', '[1]', 'None'],
    'val_dataloader.batch_size': ['0', '-1', 'text', '1.5'],
    'val_dataloader.dataset.type': ['Nothing', '3', 'None'],
    'val_cfg': ['3', 'text', 'None'],
    'val_cfg.type': ['Nothing', '3'],
    'val_evaluator': ['3', 'text', 'None'],
    'val_evaluator.type': ['Nothing', '3', 'None', 'BNET'],
    'optim_wrapper': ['3', 'text', '[1]', 'None'],
    'optim_wrapper.type': ['Nothing', '3'],
    'optim_wrapper.optimizer': ['3', 'text', '[1]', 'None'],
    'optim_wrapper.optimizer.type': ['Nothing', '3', 'SGDD', 'None'],
    'optim_wrapper.optimizer.lr': ['text', '-1', '[1]', 'None'],
    'optim_wrapper.optimizer.momentum': ['text', '-1', '[1]', 'None'],
    'param_scheduler': ['3', 'text', '[1]'],
    'param_scheduler.0.type': ['Nothing', '3'],
    'param_scheduler.0.milestones': ['3'],
    'param_scheduler.1.gamma': ['0.1'],
    'param_scheduler.a.gamma': ['0.1'],
    'default_hooks': ['3', 'text', '[1]'],
    'default_hooks.checkpoint': ['3', 'text', '[1]'],
    'default_hooks.checkpoint.type': ['Nothing', '3'],
    'default_hooks.checkpoint.interval': ['text', '[1]'],
    'default_hooks.logger.interval': ['text', '[1]'],
    'custom_hooks': ['3', 'text', '[1]', '[{}]'],
    'randomness': ['3', 'text', '[1]'],
    'randomness.seed': ['text', '-1', '1.5', '[1]'],
    'log_level': ['NOTHING', '[1]', 'erorr'],
    'load_from': ['nowhere.pth', '3', '[1]', '/'],
    'resume': ['text', '3'],
    'env_cfg': ['3', 'text', '[1]'],
    'launcher': ['pytorch', 'slurm', 'nothing'],
    'visualizer': ['3', 'text', '[1]'],
    'visualizer.type': ['Nothing'],
    'custom_imports': ['None', '3'],
    'custom_imports.imports': ['[bnet_mm]', 'text'],
}  # fmt: skip
NORMS = [
    dict(type='BNET', k=4), dict(type='BNET', k=0), dict(type='BNET', k='3'), dict(type='BNET', kernel_size=3),
    dict(type='BNET', kk=3), dict(type='BNET', dilation=0), dict(type='BNET', norm='BNN'), dict(type='BNET', norm=3),
    dict(type='BNET', norm=dict(type='GN', num_groups=3)), dict(type='BNET', norm=dict(type='GN', groups=2)),
    dict(type='BNET', norm=dict(type='GN')), dict(type='BNET', norm=dict(num_groups=2)),
    dict(type='BNET', norm=None), dict(type='BNET', norm='GN', momentum=0.2),
    dict(type='BNET', norm='IN', momentum='a'), dict(type='BNET', norm='LN'),
    dict(type='BNET', norm=dict(type='BN', eps='a')),
    dict(type='BNET', norm=dict(type='SN', using_bn=False, using=1)), dict(type='BNET', eps='a'),
    dict(type='BNET', momentum='a'), dict(type='BNET', where='C'), dict(type='BNET', num_features=3),
    dict(type='BNET', norm=dict(type='CBN', buffer_num=-1)), dict(type='BNET', norm=['BN']),
    dict(type='BNET', affine=True), dict(type='SN', eps='a'), dict(type='SN', momentum='a'), dict(type='SN', k=3),
    dict(type='SN', using_moving_avg=True), dict(type='SN', using_bm=False), dict(type='SyncSN', k=3),
    dict(type='CBN', buffer_num=-1), dict(type='CBN', buffer_num='a'), dict(type='CBN', buffer_num=1.5),
    dict(type='CBN', burnin=-1), dict(type='CBN', burnin='a'), dict(type='CBN', k=3), dict(type='CBN', bufer_num=3),
    dict(type='CBN', momentum='a'), dict(type='BNConv', k=2), dict(type='BNConv', kk=3), dict(type='SN1d'),
    dict(type='SN3d'), dict(type='WithBNET', base='ResNet', bnet=None), dict(type='CBN', rho='a'),
]  # fmt: skip
NESTED = [
    'model = dict(bnet=dict(k=3))', 'model = dict(k=3)', "model = dict(where='C')",
    'model = dict(backbone=dict(k=3))', "model = dict(backbone=dict(where='C'))",
    'model = dict(backbone=dict(dilation=2))', 'model = dict(backbone=dict(bnet=dict(bnet=dict(k=3))))',
    'model = dict(backbone=dict(bnet=dict(norm=dict(k=3))))',
    'model = dict(backbone=dict(backbone=dict(bnet=dict(k=3))))', 'model = dict(backbone=dict(norm_cfg=dict(k=3)))',
    'model = dict(backbone=dict(norm_cfg=dict(bnet=dict(k=3))))', 'model = dict(backbone=dict(bnet=dict(depth=18)))',
    'model = dict(backbone=dict(bnet=dict(frelu=True)))', 'model = dict(frelu=True)',
    'model = dict(norm_cfg=dict(k=3))', "model = dict(type='WithBNET', bnet=dict(k=3))",
    "model = dict(type='WithBNET', base='ToyClassifier', bnt=dict(k=3))",
    "model = dict(type='WithBNET', base='WithBNET', bnet=dict(k=3))", 'model = [1]', 'model = None',
    'model = dict(type=None)', "model = dict(_delete_=True, type='WithBNET')",
    "model = dict(_delete_=True, type='WithBNET', base='ResNet')",
    "model = dict(_delete_=True, type='WithBNET', base='ResNet', bnet=dict())", 'model = dict(_delete_=True)',
    'model = dict(backbone=dict(_delete_=True, bnet=dict(k=3)))',
    "model = dict(backbone=dict(_delete_=True, type='WithBNET'))",
    "model = dict(backbone=dict(base=dict(type='ResNet')))",
    "model = dict(backbone=dict(base=dict(type='WithBNET')))",
    "model = dict(init_cfg=dict(type='Pretrained', checkpoint='nowhere.pth'))",
    "model = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='nowhere.pth')))",
    "model = dict(backbone=dict(init_cfg=dict(type='Pretraind', checkpoint='nowhere.pth')))",
    "model = dict(backbone=dict(init_cfg=dict(type='Pretrained')))", 'model = dict(backbone=dict(init_cfg=3))',
    "custom_hooks = [dict(type='CBNBurnInn')]", "custom_hooks = [dict(type='FreezeTransform')]",
    "custom_hooks = [dict(type='FreezeTransform', epoch=0)]",
    "custom_hooks = [dict(type='FreezeTransform', epoch='a')]",
    "custom_hooks = [dict(type='FreezeTransform', epochs=3)]", 'custom_hooks = [dict(epoch=3)]',
    "custom_hooks = ['a']",
    "custom_hooks = [dict(type='FreezeTransform', epoch=1)]\nmodel = dict(backbone=dict(bnet=None))",
    "custom_hooks = [dict(type='CBNBurnIn', epoch=3)]", 'train_dataloader = None', 'optim_wrapper = None',
    'train_cfg = None', 'val_cfg = None', 'val_evaluator = None', 'val_dataloader = None',
]  # fmt: skip
IMPORTS = [
    'custom_imports = None', 'custom_imports = dict(imports=[])',
    "custom_imports = dict(imports=['helpers.toy_host'])",
    "custom_imports = dict(imports=['bnet_mmm'], allow_failed_imports=False)",
    "custom_imports = dict(imports='bnet')",
    "custom_imports = dict(imports=['bnet_mm.nothing'], allow_failed_imports=False)",
    'custom_imports = dict(imports=3)', "custom_imports = dict(imports=['bnet-mm'], allow_failed_imports=True)",
    "custom_imports = dict(imprts=['bnet_mm'])", "custom_imports = ['bnet_mm']", "custom_imports = 'bnet_mm'",
    'import nothing_of_this_name', '_base_ = 3', "_base_ = './nothing.py'", "_base_ = ['./base.py', './nothing.py']",
    "_base_ = 'bnet_mm::nothing.py'", '_base_ = None', "_base_ = 'bnet_mm::resnet50_bnet3_imagenett.py'",
    "_base_ = 'nothing::a/b.py'", "_base_ = 'mmdet::nothing/nothing.py'", "_base_ = './config.py'", "_base_ = ''",
    "_base_ = '.'", "_base_ = ['./base.py', './base.py']", "_base_ = './base.py'\n_base_.model.backbne.k = 3",
    "_base_ = './base.py'\nx = _base_.nothing", 'raise ValueError("a")', '1 / 0', 'x = {{_base_.model}}',
    "_base_ = './base.py'\nx = {{_base_.nothing}}", "model = dict(type='A'",
]  # fmt: skip
ARGUMENTS = [
    ('--resume',), ('--resume', 'nowhere.pth'), ('--amp',), ('--launcher', 'nothing'), ('--nothing',),
    ('--work-dir',), ('--cfg-options', 'model'), ('--cfg-options', '=3'),
    ('--cfg-options', 'model.backbone.bnet.k=[3'), ('--cfg-options', 'model.backbone.bnet.k='), ('--cfg-options',),
    ('--cfg-options', 'a=(1'), ('--cfg-options', '..=3'), ('--cfg-options', 'model.=3'),
    ('--cfg-options', '.model=3'), ('--cfg-options', 'model..k=3'), ('--local-rank', 'a'),
    ('--cfg-options', 'model.backbone.bnet.k.k=3'), ('--cfg-options', 'model.backbone.bnet[k]=3'),
    ('--cfg-options', 'train_dataloader.0.batch_size=3'), ('--cfg-options', 'model:3'),
    ('--cfg-options', 'model.type==3'), ('--work-dir', '/proc/nowhere'), ('--work-dir', '@/base.py'),
    ('--resume', '@/base.py'), ('--resume', '@'),
]  # fmt: skip
CONVERT = [
    ('--k', '2'), ('--k', '0'), ('--k', '-1'), ('--k', 'a'), ('--k', '1.5'), ('--where', ''), ('--where', 'D'),
    ('--where', '('), ('--where', 'nothing'), ('--dilation', '0'), ('--dilation', '-1'), ('--dilation', 'a'),
    ('--from-checkpoint', 'nowhere.pth'), ('--from-checkpoint', '@/base.py'), ('--from-checkpoint', '@'),
    ('-o', '@/base.py'), ('-o', '@/new.txt'), ('-o', '@'), ('-o', '@/nowhere/new.py'), ('-o', ''), ('--kk', '3'),
    ('--where',), ('--where', 'c'), ('--k', '3', '--nothing'), ('-o', '/proc/new.py'), ('--where', 'ABCD'),
    ('--dilation', '1.5'), ('--where', '*'), ('--k', '1000000001'),
]  # fmt: skip


def typos(word):
    """As fingers make them."""
    for i in range(len(word)):
        yield word[:i] + word[i + 1 :]
        yield word[: i + 1] + word[i:]
        yield word[:i] + word[i : i + 2][::-1] + word[i + 2 :]


def paths(node, prefix=()):
    """All places in a config and what stands there."""
    for name, value in node.items():
        yield (*prefix, name), value
        if isinstance(value, dict):
            yield from paths(value, (*prefix, name))


def nested(path, value):
    for name in reversed(path[1:]):
        value = {name: value}
    return f'{path[0]} = {value!r}\n'


def misspelt():
    """Every key of the config, in an option and in an inheriting config; a leaf keeps its value."""
    cfg = Config.fromstring(CONFIG, '.py').to_dict()
    known = {path for path, _ in paths(cfg)}
    for path, value in paths(cfg):
        if path[0] in FREE or isinstance(value, list):
            continue
        words = sorted({word for word in typos(path[-1]) if word and (*path[:-1], word) not in known})
        for word in random.Random(str(path)).sample(words, min(8, len(words))):
            wrong = (*path[:-1], word)
            inside, given = ((*wrong, 'type'), 'SGD') if isinstance(value, dict) else (wrong, value)
            if len(path) > 1 and not isinstance(value, dict):  # the key alone would be a variable; a dict, half of one
                yield Wrong(f'misspelt {".".join(wrong)}', 'train', BASE + nested(inside, given))
            yield Wrong(f'option {".".join(wrong)}', 'train', None, ('--cfg-options', f'{".".join(inside)}={given}'))


def cases():
    yield from misspelt()
    for name, values in INVALID.items():
        for value in values:
            yield Wrong(f'{name}={value}', 'train', None, ('--cfg-options', f'{name}={value}'))
    for norm in NORMS:
        for bnet in ('None', "dict(k=3, where='C')"):
            yield Wrong(
                f'{norm} {bnet}',
                'train',
                f'{BASE}model = dict(backbone=dict(bnet={bnet}, norm_cfg=dict(_delete_=True, **{norm})))',
            )
    for text in (*NESTED, *IMPORTS):
        yield Wrong(text, 'train', text if '_base_' in text else BASE + text)
    for i in range(120):
        cut = random.Random(i).randrange(1, CONFIG.index('optim_wrapper'))
        yield Wrong(f'cut at {cut}', 'train', CONFIG[:cut])
    for arguments in ARGUMENTS:
        yield Wrong(' '.join(arguments), 'train', None, arguments)
    for arguments in CONVERT:
        yield Wrong(
            f'convert {arguments}', 'convert_config', BASE + 'model = dict(backbone=dict(type="ResNet"))', arguments
        )
    for i, text in enumerate(itertools.chain(NESTED[:33], IMPORTS)):
        if i % 2:
            yield Wrong(f'convert {text}', 'convert_config', text if '_base_' in text else BASE + text)
