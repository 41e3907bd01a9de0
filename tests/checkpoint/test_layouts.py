"""Every layout loads everywhere a checkpoint can be loaded, completely, and with the right function."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from torch import nn

from bnet_mm import BNET
from bnet_mm.checkpoint.layouts import CheckpointError, parse_key
from helpers import official_layouts as official
from helpers import reference
from helpers.checkpoints import WAYS, WIDTH, backbone_cfg, by_load_state_dict, detector_cfg, save
from helpers.paths import REPO

pytestmark = pytest.mark.usefixtures('mmdet_scope')


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


@pytest.mark.parametrize('name', ['bnconv.weight', 'weight', 'norm.running_mean', 'running_var'])
@pytest.mark.parametrize('value', [None, 'text', [1.0, 2.0]])
def test_what_is_no_tensor_is_named(name, value):
    state_dict = {f'0.{key}': tensor for key, tensor in BNET(2).state_dict().items()}
    state_dict.update({f'0.{name}': value})
    with pytest.raises(CheckpointError, match=f'0.{name} is a {type(value).__name__} in the checkpoint, not a tensor'):
        torch.nn.Sequential(BNET(2)).load_state_dict(state_dict)


@pytest.mark.parametrize('key, parsed', [
    ('layer1.0.bn3.bnconv.weight', ('layer1.0.bn3', 'bnconv.weight', False)),
    ('layer1.0.bn3.norm.running_mean', ('layer1.0.bn3', 'norm.running_mean', False)),
    ('bnconv.weight', ('', 'bnconv.weight', False)),
    ('layer1.0.bn3.running_mean', ('layer1.0.bn3', 'norm.running_mean', False)),
    ('layer1.0.bn3.weight', ('layer1.0.bn3', 'weight', False)),
    ('layer1.0.mybnconv.weight', ('layer1.0.mybnconv', 'weight', False)),
])  # fmt: skip
def test_parts_of_a_key(key, parsed):
    assert parse_key(key) == parsed
