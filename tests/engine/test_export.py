"""Enhanced models leave PyTorch: tools/export_onnx.py as a user runs it, torch.export and torch.compile.

Detectors as a whole are in test_detection.py, INT8 in test_quantisation.py.
"""

import copy
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import digit_version
from torch import nn
from torch.nn import functional as F

import bnet_mm
from bnet_mm import BNET, cli
from helpers import reference
from helpers.hosts import import_host_models
from helpers.paths import REPO
from helpers.tools import load_tool

TOOL = REPO / 'tools' / 'export_onnx.py'
HEAD = "custom_imports = dict(imports=['bnet_mm'], allow_failed_imports=False)\nnorm = dict(type='BN')\n"
SMALL = 'base_channels=8, stem_channels=8'
SEGMENTOR = (
    'model = dict(pretrained=None, auxiliary_head=None, decode_head=dict(in_channels=64, channels=8, num_classes=4, '
    f"norm_cfg=norm), backbone=dict(type='WithBNET', base='ResNetV1c', bnet=dict(k=3), norm_cfg=norm, {SMALL}))"
)
# scope, base config, what is changed in it, whether height and width of the file are free
MODELS_EXPORTED = {
    'faster_rcnn': (
        'mmdet', 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
        f"model = dict(backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=5, where='AC'), depth=18, {SMALL}), "
        'neck=dict(in_channels=[8, 16, 32, 64], out_channels=8), rpn_head=dict(in_channels=8, feat_channels=8), '
        'roi_head=dict(bbox_roi_extractor=dict(out_channels=8), bbox_head=dict(in_channels=8, fc_out_channels=8)))',
        True,
    ),
    'deeplabv3': ('mmseg', 'mmseg::deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py', SEGMENTOR, True),
    'pspnet': ('mmseg', 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py', SEGMENTOR, False),
    'fcn_aligned': (  # mmseg's resize() turns sizes into constants where it aligns corners
        'mmseg', 'mmseg::fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py',
        SEGMENTOR.replace('num_classes=4', 'num_classes=4, align_corners=True, concat_input=False, in_index=[2, 3]')
        .replace('in_channels=64', "in_channels=[32, 64], input_transform='resize_concat'"),
        False,
    ),
    'tsn': (
        'mmaction',
        'mmaction::recognition/tsn/tsn_imagenet-pretrained-r50_8xb32-1x1x3-100e_kinetics400-rgb.py',
        "model = dict(backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=3), depth=18, pretrained=None), "
        'cls_head=dict(in_channels=512, num_classes=5))',
        True,
    ),
    'classifier': (
        'mmpretrain', 'mmpretrain::resnet/resnet18_8xb32_in1k.py',
        f"model = dict(backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=3), {SMALL}), "
        'head=dict(in_channels=64, num_classes=5))',
        True,
    ),
}  # fmt: skip


def onnx_packages():
    if digit_version(torch.__version__) < digit_version('2.6'):
        pytest.skip('the ONNX exporter needs torch 2.6')
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(name)


def make(name, folder):
    """A config file, its model with random weights and statistics, and the model's checkpoint."""
    scope, base, text, _ = MODELS_EXPORTED[name]
    import_host_models(scope)
    config = folder / f'{name}.py'
    config.write_text(f"_base_ = '{base}'\n{HEAD}{text}\n")
    cfg = Config.fromfile(config)
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with DefaultScope.overwrite_default_scope(scope):
        model = reference.randomise(MODELS.build(cfg.model))
    model.eval()
    torch.save(dict(meta={}, state_dict=model.state_dict()), folder / f'{name}.pth')
    return config, folder / f'{name}.pth', model


def export(monkeypatch, capsys, *arguments):
    """The tool, in this process; returns exit code, stdout and the last line of stderr."""
    tool = load_tool('export_onnx')
    monkeypatch.setattr(sys, 'argv', ['export_onnx.py', *map(str, arguments)])
    try:
        cli.run_tool(tool.main)
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    return code, out, ([''] + err.strip().splitlines())[-1]


def run(*arguments, block=None):
    """The tool in a process of its own, in which the package ``block`` cannot be imported."""
    start = f'import runpy, sys; sys.modules[{block!r}] = None; sys.argv = sys.argv[1:]; '
    start += f"sys.path.insert(0, {str(REPO / 'tools')!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [TOOL, *arguments] if block is None else ['-c', start, TOOL, *arguments]
    return subprocess.run([sys.executable, *map(str, command)], cwd=REPO, capture_output=True, text=True, timeout=300)


def nodes(path):
    import onnx

    graph = onnx.load(path).graph
    channels = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    depthwise = 0
    for node in graph.node:
        groups = {attribute.name: attribute.i for attribute in node.attribute}.get('group', 1)
        depthwise += node.op_type == 'Conv' and 1 < groups == channels[node.input[1]]
    return depthwise, {node.op_type for node in graph.node}


def host_outputs(name, model, image):
    """What the host itself computes, by its own functions rather than the tool's."""
    if name == 'faster_rcnn':
        return model.neck(model.backbone(image))
    if name in ('deeplabv3', 'fcn_aligned', 'pspnet'):
        return [model.encode_decode(image, [dict(img_shape=image.shape[2:])])]
    if name == 'tsn':
        feats, options = model.extract_feat(image)
        return [model.cls_head(feats, **options)]
    return [model.head(model.neck(model.backbone(image)))]


@torch.no_grad()
def assert_same_function(path, name, model, size):
    import onnxruntime

    image = torch.randn(3, *((5,) if name == 'tsn' else ()), 3, *size)
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    got = session.run(None, {'image': image.numpy()})
    want = host_outputs(name, model, image)
    assert [output.name for output in session.get_outputs()] == (
        [f'feat{i}' for i in range(5)] if name == 'faster_rcnn' else ['logits']
    )
    assert len(got) == len(want)
    for one, two in zip(got, want):
        assert two.abs().max() > 1e-3 and two.std() > 0
        torch.testing.assert_close(torch.from_numpy(one), two, rtol=0, atol=1e-4 * two.abs().max().item())


@pytest.mark.parametrize('name', MODELS_EXPORTED)
def test_onnx_file_computes_what_the_model_does(name, tmp_path, monkeypatch, capsys):
    """Of any size, as far as the file says so; against the model that has not been folded."""
    onnx_packages()
    config, checkpoint, model = make(name, tmp_path)
    untouched, free = copy.deepcopy(model), MODELS_EXPORTED[name][-1]
    out = tmp_path / 'out.onnx'
    features = ['--features'] if name == 'faster_rcnn' else []
    code, text, error = export(monkeypatch, capsys, config, checkpoint, out, '--shape', 64, 96, *features)
    assert code == 0, error
    assert ('backbone and neck only: --features' in text) == (features != [])
    assert ('height and width are fixed to 64 x 96' in text.lower()) is not free
    assert 'mean 123.675' in text and text.count('onnxruntime and torch at') == 2
    depthwise, kinds = nodes(out)
    assert depthwise == sum(isinstance(module, BNET) for module in model.modules()) >= 8
    assert 'BatchNormalization' not in kinds
    assert_same_function(out, name, untouched, (160, 128) if free else (64, 96))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([config.name, checkpoint.name, out.name])


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    onnx_packages()
    pytest.importorskip('mmdet')
    torch.manual_seed(0)
    return make('faster_rcnn', tmp_path_factory.mktemp('detector'))


def test_command_line(detector, tmp_path):
    """In its own process, with an option that changes the model and a tensor too many."""
    config, checkpoint, model = detector
    state_dict = dict(model.state_dict(), left_over=torch.zeros(1))
    for name, layer in model.named_modules():
        if isinstance(layer, BNET):  # k = 3 into k = 5
            taps = f'{name}.bnconv.weight'
            state_dict[taps] = state_dict[taps][..., 1:-1, 1:-1]
    torch.save(state_dict, tmp_path / 'small.pth')
    options = ['--features', '--cfg-options', 'model.backbone.bnet.k=3']
    done = run(config, tmp_path / 'small.pth', tmp_path / 'o.onnx', *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        'left out: left_over' in done.stdout and '(x - mean) / std' in done.stdout and 'folded 20 of 20' in done.stdout
    )
    assert nodes(tmp_path / 'o.onnx')[0] == 16


def test_fixed_size(tmp_path, monkeypatch, capsys):
    """Batch free, height and width not; and an option that is for detectors."""
    onnx_packages()
    import onnx

    config, checkpoint, model = make('classifier', tmp_path)
    untouched, out = copy.deepcopy(model), tmp_path / 'out.onnx'
    arguments = (config, checkpoint, out, '--shape', 64, 96)
    code, text, error = export(monkeypatch, capsys, *arguments, '--fixed-size')
    assert code == 0, error
    assert 'HEIGHT AND WIDTH ARE FIXED to 64 x 96' in text
    shape = onnx.load(out).graph.input[0].type.tensor_type.shape.dim
    assert [axis.dim_param or axis.dim_value for axis in shape] == ['batch', 3, 64, 96]
    assert_same_function(out, 'classifier', untouched, (64, 96))
    out.unlink()
    code, _, error = export(monkeypatch, capsys, *arguments, '--features')
    assert code == 2 and error == 'error: --features is for detectors, this is a ImageClassifier'


def lacking(detector, tmp_path):
    state_dict = dict(detector[2].state_dict())
    del state_dict['neck.fpn_convs.1.conv.bias'], state_dict['rpn_head.rpn_cls.weight']
    torch.save(state_dict, tmp_path / 'less.pth')
    return tmp_path / 'less.pth'


def other_width(detector, tmp_path):
    state_dict = dict(detector[2].state_dict())
    state_dict['backbone.layer1.0.conv1.weight'] = torch.zeros(4, 8, 3, 3)
    torch.save(state_dict, tmp_path / 'other.pth')
    return tmp_path / 'other.pth'


def text(detector, tmp_path):
    (tmp_path / 'text.pth').write_text('not a checkpoint')
    return tmp_path / 'text.pth'


@pytest.mark.parametrize('checkpoint, message', [
    (lacking, 'less.pth lacks 2 tensors of this model: neck.fpn_convs.1.conv.bias, rpn_head.rpn_cls.weight'),
    (other_width, 'other.pth is not a checkpoint of this model: size mismatch for backbone.layer1.0.conv1.weight'),
    (text, 'text.pth is not a readable checkpoint'),
    (lambda detector, tmp_path: tmp_path / 'none.pth', 'none.pth does not exist'),
])  # fmt: skip
def test_bad_checkpoint(detector, tmp_path, monkeypatch, capsys, checkpoint, message):
    arguments = (detector[0], checkpoint(detector, tmp_path), tmp_path / 'o.onnx')
    code, _, error = export(monkeypatch, capsys, *arguments)
    assert code == 2 and error.startswith('error: ') and message in error
    assert not list(tmp_path.glob('o.onnx*'))


@pytest.mark.parametrize('out, options, message', [
    ('there.onnx', [], 'there.onnx exists already'),
    ('no/folder.onnx', [], 'the folder of'),
    ('o.onnx', ['--shape', 0, 64], '--shape takes a positive height and width, got 0 64'),
    ('o.onnx', ['--images', 'none.jpg'], '--images: none.jpg is not a readable image'),
    ('o.onnx', ['--images', __file__], 'test_export.py is not a readable image'),
    ('o.onnx', ['--int8', '--images', 'one.jpg'], '--int8 needs pictures'),
    ('o.onnx', ['--cfg-options', 'model.type=RPNHead'], 'the model RPNHead cannot be built'),
    ('o.onnx', ['--cfg-options', 'modl.backbone.depth=18'], 'did you mean model?'),
])  # fmt: skip
def test_bad_command(detector, tmp_path, monkeypatch, capsys, out, options, message):
    (tmp_path / 'there.onnx').write_text('mine')
    code, _, error = export(monkeypatch, capsys, *detector[:2], tmp_path / out, *options)
    assert code == 2 and error.startswith('error: ') and message in error
    assert (tmp_path / 'there.onnx').read_text() == 'mine' and len(list(tmp_path.iterdir())) == 1


def test_unknown_task(tmp_path, monkeypatch, capsys):
    onnx_packages()
    (tmp_path / 'c.py').write_text(
        "model = dict(type='SN', num_features=2)\ncustom_imports = dict(imports=['bnet_mm'])\n"
    )
    torch.save(bnet_mm.SN2d(2).state_dict(), tmp_path / 'c.pth')
    code, _, error = export(monkeypatch, capsys, tmp_path / 'c.py', tmp_path / 'c.pth', tmp_path / 'o.onnx')
    assert code == 2 and 'a SN2d cannot be exported, only detectors, segmentors' in error


def test_wrong_file_is_not_written(detector, tmp_path, monkeypatch, capsys):
    """A host whose code is another one when it is traced."""
    monkeypatch.setattr(F, 'relu', lambda x, inplace=False: x.abs() if torch.compiler.is_compiling() else x.relu())
    monkeypatch.setattr(nn.ReLU, 'forward', lambda self, x: F.relu(x))
    code, _, error = export(monkeypatch, capsys, *detector[:2], tmp_path / 'o.onnx', '--shape', 64, 64, '--features')
    assert code == 2 and 'onnxruntime and torch differ at 1 x 3 x 64 x 64' in error
    assert not list(tmp_path.iterdir())


def test_missing_package(tmp_path, monkeypatch, capsys):
    if digit_version(torch.__version__) < digit_version('2.6'):
        pytest.skip('says that torch is too old')
    done = run('c.py', 'c.pth', tmp_path / 'o.onnx', block='onnx')
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('error: onnx') and 'run: pip install onnx onnxruntime onnxscript' in last
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    code, _, error = export(monkeypatch, capsys, 'c.py', 'c.pth', tmp_path / 'o.onnx')
    assert code == 2 and 'onnxruntime' in error and 'cannot be imported' in error


# --------------------------------------------------------------------------------------- torch.export, torch.compile


def backbone(scope):
    """A randomised ResNet-18 with BNET at all norms, and an input for it."""
    pytest.importorskip(scope)
    import_host_models(scope)
    if scope == 'mmdet':
        config = dict(type='ResNet', depth=18, base_channels=8, stem_channels=8, norm_eval=False)
    else:
        head = dict(type='FCNHead', in_channels=64, in_index=3, channels=8, num_classes=4)
        body = dict(type='ResNetV1c', depth=18, base_channels=8, stem_channels=8)
        config = dict(type='EncoderDecoder', backbone=body, decode_head=head, test_cfg=dict(mode='whole'))
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(config)
    bnet_mm.enhance(model, k=3, where='all')
    model = reference.randomise(model if scope == 'mmdet' else model.backbone)
    assert sum(isinstance(module, BNET) for module in model.modules()) >= 20
    return model, torch.randn(2, 3, 64, 96)


def assert_equal(got, want, tolerance):
    assert len(got) == len(want)
    for one, two in zip(got, want):
        assert two.abs().max() > 0
        torch.testing.assert_close(one, two, rtol=0, atol=tolerance * two.abs().max().item())


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_torch_export(scope):
    """With free batch, height and width."""
    dims = getattr(torch.export, 'Dim', None)
    if not hasattr(dims, 'DYNAMIC'):
        pytest.skip('needs torch.export.Dim.DYNAMIC')
    model, x = backbone(scope)
    model.eval()
    free = {axis: dims.DYNAMIC for axis in (0, 2, 3)}
    program = torch.export.export(model, (x,), dynamic_shapes=(free,), strict=False)
    other = torch.randn(3, 3, 128, 64)
    with torch.no_grad():
        assert_equal(program.module()(other), model(other), 1e-6)


def trained_step(model, x):
    """Outputs, gradients and statistics after one step in training mode."""
    outputs = model(x)
    sum(y.square().mean() for y in outputs).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    kept = model.state_dict()
    return [y.detach() for y in outputs], gradients, [b.float() for name, b in model.named_buffers() if name in kept]


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_torch_compile(scope):
    """In training mode, in one graph; in float64, in which nothing but a mistake can be seen."""
    eager, x = backbone(scope)
    eager, x = eager.double(), x.double()
    model = copy.deepcopy(eager)
    eager.train(), model.train()
    torch._dynamo.reset()
    compiled = trained_step(torch.compile(model, backend='aot_eager', fullgraph=True), x)
    for got, want in zip(compiled, trained_step(eager, x)):
        assert_equal(got, want, 1e-9)
