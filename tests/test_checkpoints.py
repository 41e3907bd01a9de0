"""Every layout loads everywhere a checkpoint can be loaded, completely, and with the right function."""

import copy
import os
import pickle
import subprocess
import sys

import official_layouts as official
import pytest
import reference
import torch
from hosts import import_host_models
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from paths import REPO
from torch import nn

from bnet_mm import BNET
from bnet_mm.checkpoint.layouts import CheckpointError

pytest.importorskip('mmdet')
WIDTH = 8


@pytest.fixture(autouse=True)
def scope():
    import_host_models('mmdet')
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


def backbone_cfg(depth=50, k=5, bnet=True, **options):
    cfg = dict(type='ResNet', depth=depth, base_channels=WIDTH, stem_channels=WIDTH, **options)
    return dict(cfg, type='WithBNET', base='ResNet', bnet=dict(k=k)) if bnet else cfg


def detector_cfg(k=5, bnet=True, num_classes=80):
    """The Faster R-CNN of the configs, narrow."""
    cfg = Config.fromfile(f'{REPO}/configs/faster_rcnn_r50_bnet5_1x.py')
    model = cfg.model
    model.backbone = Config(dict(a=backbone_cfg(k=k, bnet=bnet, frozen_stages=1, norm_eval=True, init_cfg=None))).a
    channels = [WIDTH * 4 * 2**i for i in range(4)]
    model.neck.update(in_channels=channels, out_channels=16)
    model.rpn_head.update(in_channels=16, feat_channels=16)
    model.roi_head.bbox_roi_extractor.out_channels = 16
    model.roi_head.bbox_head.update(in_channels=16, fc_out_channels=32, num_classes=num_classes)
    model.test_cfg.rcnn.score_thr = 0.0
    return cfg


def save(checkpoint, path, legacy=False):
    if legacy:
        official.save_legacy(checkpoint, path)
    else:
        torch.save(checkpoint, path)
    return str(path)


# ------------------------------------------------------------------------------- ways to load a checkpoint


def by_load_state_dict(cfg, path):
    from bnet_mm.checkpoint.safe_load import load_checkpoint_file

    model = MODELS.build(cfg)
    model.load_state_dict(load_checkpoint_file(path)['state_dict'], strict=False)
    return model


def by_mmengine(cfg, path):
    """What Runner does for load_from, resume and test."""
    model = MODELS.build(cfg)
    load_checkpoint(model, path, map_location='cpu')
    return model


def by_pretrained(cfg, path):
    model = MODELS.build(dict(cfg, init_cfg=dict(type='Pretrained', checkpoint=path)))
    model.init_weights()
    return model


WAYS = [by_load_state_dict, by_mmengine, by_pretrained]


@pytest.fixture
def leftovers(monkeypatch):
    """What mmengine's loader reported since the test began; it prints, or logs to 'current', as its caller asks."""
    reports = []
    monkeypatch.setattr('mmengine.runner.checkpoint.print_log', lambda text, **_: reports.append(text))
    return lambda: [text for text in reports if 'do not match exactly' in text]


# ----------------------------------------------------------------------------------------------- BN checkpoints


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('depth, k', [(50, 5), (18, 3), (50, 1)])
def test_bn_checkpoint_keeps_the_function(tmp_path, way, depth, k):
    plain = reference.randomise(MODELS.build(backbone_cfg(depth, bnet=False)))
    path = save(dict(state_dict=plain.state_dict()), tmp_path / 'bn.pth')
    model = way(backbone_cfg(depth, k), path)
    x = torch.randn(1, 3, 64, 72)
    model.eval(), plain.eval()
    for got, want in zip(model(x), plain(x)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def predict(model, image):
    inputs = model.data_preprocessor(dict(inputs=[image], data_samples=[sample(image)]), False)
    with torch.no_grad():
        return model.predict(inputs['inputs'], inputs['data_samples'])[0].pred_instances


def sample(image):
    from mmdet.structures import DetDataSample

    height, width = image.shape[1:]
    meta = dict(
        img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0), batch_input_shape=(height, width)
    )
    return DetDataSample(metainfo=meta)


def assert_same_detections(got, want):
    assert len(want) > 10
    assert torch.equal(got.labels, want.labels)
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.bboxes, want.bboxes, rtol=1e-4, atol=1e-2)


def test_detector_loaded_from_a_bn_detector_gives_its_outputs(tmp_path):
    plain = reference.randomise(MODELS.build(detector_cfg(bnet=False).model)).eval()
    path = save(dict(state_dict=plain.state_dict(), meta={}), tmp_path / 'bn.pth')
    model = MODELS.build(detector_cfg(k=5).model).eval()
    load_checkpoint(model, path, map_location='cpu', strict=True)
    image = torch.randint(0, 255, (3, 96, 128)).float()
    assert_same_detections(predict(model, image), predict(plain, image))


# ------------------------------------------------------------------------------------ official checkpoints


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('depth, k', [(50, 5), (101, 3), (18, 3)])
def test_official_imagenet_checkpoint(tmp_path, leftovers, way, depth, k, legacy):
    checkpoint = official.imagenet_checkpoint(depth, k, seed=1, width=WIDTH)
    model = way(backbone_cfg(depth, k), save(checkpoint, tmp_path / 'a.pth', legacy))
    x = torch.randn(1, 3, 64, 72)
    model.eval()
    want = official.reference_backbone(checkpoint['state_dict'], x.double(), depth)
    for got, expected in zip(model(x), want):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    if way is not by_load_state_dict:  # one report, and the classifier is all that a backbone leaves over
        (report,) = leftovers()
        assert report.split('\n\n')[1:] == ['unexpected key in source state_dict: fc.weight, fc.bias\n']


@pytest.mark.parametrize('old_form', [False, True])
@pytest.mark.parametrize('legacy', [False, True])
def test_official_detection_checkpoint_matches_every_key(tmp_path, leftovers, old_form, legacy):
    """Strictly: nothing missing, nothing unexpected; and the same function, borders included."""
    checkpoint = official.detection_checkpoint(
        50, 5, seed=2, old_form=old_form, width=WIDTH, neck_channels=16, fc_channels=32
    )
    path = save(checkpoint, tmp_path / 'a.pth', legacy)
    model = MODELS.build(detector_cfg(k=5).model).eval()
    load_checkpoint(model, path, map_location='cpu', strict=True)
    assert leftovers() == []
    by_torch = MODELS.build(detector_cfg(k=5).model).eval()
    assert str(by_torch.load_state_dict(checkpoint['state_dict'], strict=True)) == '<All keys matched successfully>'
    x = torch.randn(1, 3, 64, 72)
    want = official.reference_backbone(checkpoint['state_dict'], x.double(), 50, prefix='backbone.', old_form=old_form)
    for one in (model, by_torch):
        for got, expected in zip(one.backbone(x), want):
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_official_names_load_into_plain_norm_cfg_models():
    """BNET everywhere through norm_cfg, without WithBNET."""
    checkpoint = official.imagenet_checkpoint(50, 5, seed=1, width=WIDTH)
    model = MODELS.build(dict(backbone_cfg(bnet=False), norm_cfg=dict(type='BNET', k=5)))
    left = model.load_state_dict(checkpoint['state_dict'], strict=False)
    assert left.missing_keys == [] and left.unexpected_keys == ['fc.weight', 'fc.bias']
    x = torch.randn(1, 3, 64, 72)
    model.eval()
    want = official.reference_backbone(checkpoint['state_dict'], x.double(), 50)
    for got, expected in zip(model(x), want):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize('twin', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_load_official_checkpoints_too(twin):
    checkpoint = official.imagenet_checkpoint(50, 5, seed=1, width=WIDTH)
    model = twin(MODELS.build(backbone_cfg(k=5)))
    left = model.load_state_dict(checkpoint['state_dict'], strict=False)
    assert left.missing_keys == [] and left.unexpected_keys == ['fc.weight', 'fc.bias']


@pytest.mark.parametrize('norm, k', [('bnet3', 3), ('bnet5', 5), ('bnet7', 7)])
def test_official_detection_keys_at_full_size(norm, k):
    """The configs as they are: every key and shape of the released detectors."""
    checkpoint = official.detection_checkpoint(50, k, seed=0)
    cfg = Config.fromfile(f'{REPO}/configs/faster_rcnn_r50_{norm}_1x.py')
    model = MODELS.build(cfg.model)
    assert str(model.load_state_dict(checkpoint['state_dict'], strict=True)) == '<All keys matched successfully>'


@pytest.mark.parametrize('old_form', [False, True])
def test_inference_api_loads_official_detectors(tmp_path, old_form):
    from mmdet.apis import inference_detector, init_detector

    checkpoint = official.detection_checkpoint(
        50, 5, seed=3, old_form=old_form, width=WIDTH, neck_channels=16, fc_channels=32
    )
    path = save(checkpoint, tmp_path / 'a.pth')
    model = init_detector(detector_cfg(k=5), path, device='cpu')
    assert model.dataset_meta['classes'][0] == 'person'
    layer = model.backbone.layer3[1].bn3
    name = 'bnconv3' if old_form else 'bnet3.bnconv'
    assert torch.equal(layer.bnconv.weight, checkpoint['state_dict'][f'backbone.layer3.1.{name}.weight'])
    found = inference_detector(model, torch.randint(0, 255, (90, 120, 3), dtype=torch.uint8).numpy())
    assert len(found.pred_instances) > 0 and torch.isfinite(found.pred_instances.bboxes).all()


# ------------------------------------------------------------------------------------------- kernels of other size


@pytest.mark.parametrize('small, large', [(1, 3), (3, 5), (3, 7), (5, 7)])
def test_smaller_kernel_is_centred(small, large):
    source, target = reference.randomise(BNET(4, k=small)).eval(), BNET(4, k=large).eval()
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 4, 6, 9)
    torch.testing.assert_close(target(x), source(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('source, target', [(BNET(4, k=5), BNET(4, k=3)), (BNET(4, k=3), BNET(6, k=3))])
def test_kernel_that_does_not_fit_is_an_error_in_every_loader(tmp_path, source, target):
    source, target = nn.Sequential(nn.Conv2d(3, 4, 1), source), nn.Sequential(nn.Conv2d(3, 4, 1), target)
    path = save(dict(state_dict=source.state_dict()), tmp_path / 'a.pth')
    for load in (
        lambda: load_checkpoint(target, path),
        lambda: target.load_state_dict(source.state_dict(), strict=False),
    ):
        with pytest.raises(CheckpointError, match=r'1\.bnconv\.weight has shape .* in the checkpoint; the layer takes'):
            load()


# ---------------------------------------------------------------------------------------------- nothing in silence


@pytest.mark.parametrize('lost', ['weight', 'bias', 'running_mean', 'running_var', None])
@pytest.mark.parametrize('way', WAYS)
def test_missing_norm_stops_loading(tmp_path, way, lost):
    """The convolution before it is there and the BNET layer, or a part of it, is not."""
    state_dict = MODELS.build(backbone_cfg(bnet=False)).state_dict()
    gone = [key for key in state_dict if key.startswith('layer2.1.bn3.') and (lost is None or key.endswith(lost))]
    for key in gone:
        del state_dict[key]
    path = save(dict(state_dict=state_dict), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError) as error:
        way(backbone_cfg(), path)
    for name in ('layer2.1.conv3.weight', 'layer2.1.bn3.weight', 'layer2.1.bn3.running_mean', 'layer2.1.bnet3.*'):
        assert name in str(error.value)


@pytest.mark.parametrize('way', WAYS)
def test_checkpoint_of_other_norms_stops_loading(tmp_path, way):
    """Every convolution fits and no norm does: what mmengine would only log."""
    other = MODELS.build(backbone_cfg(bnet=False, norm_cfg=dict(type='GN', num_groups=4)))
    path = save(dict(state_dict=other.state_dict()), tmp_path / 'gn.pth')
    with pytest.raises(CheckpointError, match='layer1.0.conv3.weight but not the BNET layer after it, layer1.0.bn3'):
        way(backbone_cfg(), path)


def test_stem_norm_is_checked_even_if_more_is_missing(tmp_path):
    model = MODELS.build(dict(backbone_cfg(bnet=False), norm_cfg=dict(type='BNET', k=3)))
    state_dict = {
        name: value for name, value in model.state_dict().items() if 'layer' not in name and 'bn1' not in name
    }
    assert list(state_dict) == ['conv1.weight']
    with pytest.raises(CheckpointError, match='conv1.weight but not the BNET layer after it, bn1'):
        load_checkpoint(model, save(dict(state_dict=state_dict), tmp_path / 'a.pth'))


def test_norm_before_its_convolution_is_left_to_the_report():
    """Pre-activation order: nothing says that the checkpoint should have had this norm."""
    model = nn.Sequential(BNET(3), nn.Conv2d(3, 4, 1))
    left = model.load_state_dict({}, strict=False)
    assert '0.bnconv.weight' in left.missing_keys and '1.weight' in left.missing_keys


def test_partial_checkpoint_without_the_block_is_only_reported(tmp_path, leftovers):
    """Loading a part of a model (a backbone without its last stage, say) stays possible, as in the host."""
    state_dict = MODELS.build(backbone_cfg(bnet=False)).state_dict()
    path = save(
        dict(state_dict={key: value for key, value in state_dict.items() if not key.startswith('layer4')}),
        tmp_path / 'a.pth',
    )
    model = by_mmengine(backbone_cfg(), path)
    assert torch.equal(model.layer3[0].conv1.weight, state_dict['layer3.0.conv1.weight'])
    assert len(leftovers()) == 1 and 'layer4.2.bn3.bnconv.weight' in leftovers()[0]


def test_same_tensor_in_two_layouts_is_an_error():
    checkpoint = official.imagenet_checkpoint(50, 5, seed=1, width=WIDTH)
    model = MODELS.build(backbone_cfg(k=5))
    state_dict = dict(checkpoint['state_dict'])
    state_dict['layer1.0.bn3.bnconv.weight'] = state_dict['layer1.0.bnet3.bnconv.weight']
    with pytest.raises(CheckpointError, match='layer1.0.bn3.bnconv.weight twice'):
        model.load_state_dict(state_dict, strict=False)


def test_loading_leaves_the_callers_state_dict_alone():
    checkpoint = official.imagenet_checkpoint(50, 5, seed=1, width=WIDTH)
    before = copy.copy(checkpoint['state_dict'])
    MODELS.build(backbone_cfg(k=5)).load_state_dict(checkpoint['state_dict'], strict=False)
    assert list(checkpoint['state_dict']) == list(before)


# ------------------------------------------------------------------------------------------ pretrained weights


def test_pretrained_file_of_which_nothing_fits_is_refused(tmp_path):
    """Plain BN models too; the model is as it was; the message has file, keys looked for, keys found, and a cure."""
    classifier = {f'backbone.{name}': v for name, v in MODELS.build(backbone_cfg(bnet=False)).state_dict().items()}
    wide = MODELS.build(dict(backbone_cfg(bnet=False), base_channels=12, stem_channels=12)).state_dict()
    norms = {name: v for name, v in MODELS.build(backbone_cfg(bnet=False)).state_dict().items() if v.dim() < 2}
    files = [
        (classifier, 'the file has backbone.conv1.weight (8, 3, 7, 7), ', "say prefix='backbone' in init_cfg"),
        (wide, 'the file has conv1.weight (12, 3, 7, 7), ', 'more'),
        (norms, 'the file has bn1.weight (8,), bn1.bias (8,), bn1.running_mean (8,) and ', 'more'),
        ({}, 'the file has no tensor', 'no tensor'),
    ]
    for bnet in (True, False):
        for state_dict, found, end in files:
            path = save(dict(state_dict=state_dict), tmp_path / 'other.pth')
            model = MODELS.build(backbone_cfg(bnet=bnet, init_cfg=dict(type='Pretrained', checkpoint=path)))
            before = copy.deepcopy(model.state_dict())
            with pytest.raises(CheckpointError) as error:
                model.init_weights()
            text = str(error.value)
            assert text.startswith(f'pretrained weights {path}: nothing in this file fits ResNet, which looked for ')
            assert found in text and text.endswith(end) and 'looked for conv1.weight (8, 3, 7, 7), layer1' in text
            assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_pretrained_prefix(tmp_path):
    """What the message proposes works; a prefix that no key has is refused with the name of the file."""
    plain = reference.randomise(MODELS.build(backbone_cfg(bnet=False)))
    path = save({f'backbone.{name}': value for name, value in plain.state_dict().items()}, tmp_path / 'a.pth')
    model = MODELS.build(dict(backbone_cfg(), init_cfg=dict(type='Pretrained', checkpoint=path, prefix='backbone')))
    model.init_weights()
    assert torch.equal(model.layer1[0].bn3.weight, plain.layer1[0].bn3.weight)
    model = MODELS.build(dict(backbone_cfg(), init_cfg=dict(type='Pretrained', checkpoint=path, prefix='neck')))
    with pytest.raises(CheckpointError, match=f'pretrained weights {path}: neck. is not in the pretrained model'):
        model.init_weights()


def test_pretrained_file_of_a_part_is_accepted(tmp_path, leftovers):
    weight = torch.randn(WIDTH, 3, 7, 7)
    path = save({'conv1.weight': weight, 'fc.weight': torch.zeros(2, 2)}, tmp_path / 'a.pth')
    model = by_pretrained(backbone_cfg(bnet=False), path)
    assert torch.equal(model.conv1.weight, weight) and len(leftovers()) == 1


def test_pretrained_file_that_mmaction_cannot_use_is_one_sentence(tmp_path):
    """It reads torchvision's layout by itself; our runner says what was being done."""
    from bnet_mm.cli import UserError
    from bnet_mm.engine.runner import CheckedRunner

    import_host_models('mmaction')
    path = save({'backbone.conv1.weight': torch.zeros(64, 3, 7, 7)}, tmp_path / 'a.pth')
    runner = object.__new__(CheckedRunner)
    with DefaultScope.overwrite_default_scope('mmaction'):
        runner.model = MODELS.build(dict(type='ResNet', depth=18, pretrained=path, norm_eval=False))
    with pytest.raises(UserError, match='the weights of the model cannot be initialised: KeyError: conv1.weight'):
        runner._init_model_weights()


# ------------------------------------------------------------------------------------------------ conversion tool


def convert(*arguments):
    command = [sys.executable, str(REPO / 'tools' / 'convert_checkpoint.py'), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize('kind', ['imagenet', 'detection', 'old detection'])
def test_conversion_tool(tmp_path, kind):
    if kind == 'imagenet':
        checkpoint = official.imagenet_checkpoint(50, 3, seed=4, width=WIDTH)
    else:
        checkpoint = official.detection_checkpoint(50, 3, seed=4, old_form=kind.startswith('old'), width=WIDTH)
    source = save(checkpoint, tmp_path / 'in.pth')
    done = convert(source, tmp_path / 'out.pth')
    assert done.returncode == 0, done.stderr
    assert 'unmatched (0)' in done.stdout and 'optimizer' in done.stdout.splitlines()[-2]
    assert f'renamed ({16 * 5}):' in done.stdout
    converted = torch.load(tmp_path / 'out.pth', weights_only=True)
    model = MODELS.build(backbone_cfg(k=3))
    prefix = '' if kind == 'imagenet' else 'backbone.'
    own = {key[len(prefix) :]: value for key, value in converted['state_dict'].items() if key.startswith(prefix)}
    assert set(model.state_dict()) == set(own) - {'fc.weight', 'fc.bias'}
    twin = MODELS.build(backbone_cfg(k=3))
    model.load_state_dict(own, strict=False)
    original = {k[len(prefix) :]: v for k, v in checkpoint['state_dict'].items() if k.startswith(prefix)}
    twin.load_state_dict(original, strict=False)
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name

    again = convert(source, tmp_path / 'out.pth')
    assert again.returncode != 0 and 'exists already' in again.stderr


@pytest.mark.parametrize('change, message', [
    (lambda sd: sd.pop('layer1.0.bnet3.running_var'), 'layer1.0.bn3.norm.running_var is missing'),
    (lambda sd: sd.update({'layer1.0.bnet3.gamma': torch.ones(3)}), 'layer1.0.bnet3.gamma is no part of a BNET layer'),
])  # fmt: skip
def test_conversion_writes_nothing_on_leftovers(tmp_path, change, message):
    checkpoint = official.imagenet_checkpoint(50, 3, seed=4, width=WIDTH)
    change(checkpoint['state_dict'])
    done = convert(save(checkpoint, tmp_path / 'in.pth'), tmp_path / 'out.pth')
    assert done.returncode != 0 and message in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ['in.pth']


@pytest.mark.parametrize('state_dict, message', [
    ({'fc.weight': torch.zeros(2, 2), 'fc.bias': torch.zeros(2)},
     "has no tensor below 'backbone.', as a classifier has; its first are fc.weight, fc.bias"),
    ({}, 'holds no state_dict of tensors'),
    (None, 'in.pth does not exist'),
])  # fmt: skip
def test_backbone_of_something_else(tmp_path, state_dict, message):
    """That it works is tested with the command of configs/README.md, in test_models.py."""
    if state_dict is not None:
        save(dict(state_dict=state_dict), tmp_path / 'in.pth')
    done = convert(tmp_path / 'in.pth', tmp_path / 'out.pth', '--backbone')
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not [name for name in os.listdir(tmp_path) if name != 'in.pth']
    save(dict(state_dict={'backbone.conv1.weight': torch.zeros(1)}), tmp_path / 'in.pth')
    (tmp_path / 'out.pth').write_text('mine')
    done = convert(tmp_path / 'in.pth', tmp_path / 'out.pth', '--backbone')
    assert done.returncode == 1 and 'exists already' in done.stderr and (tmp_path / 'out.pth').read_text() == 'mine'


def test_conversion_of_something_else(tmp_path):
    bn = save(dict(state_dict=MODELS.build(backbone_cfg(bnet=False)).state_dict()), tmp_path / 'bn.pth')
    for source, message in ((bn, 'nothing to convert'), (tmp_path / 'no.pth', 'does not exist')):
        done = convert(source, tmp_path / 'out.pth')
        assert done.returncode != 0 and message in done.stderr and 'Traceback' not in done.stderr
    assert not (tmp_path / 'out.pth').exists()
