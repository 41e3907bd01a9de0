"""Models of libraries outside of OpenMMLab, by the code in tools/README.md. Each library is an extra."""

import ast
import copy
import importlib
import json
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import bnet_mm
import bnet_mm.host.compat  # noqa: F401  (before anything imports torchvision)
from bnet_mm import BNET
from bnet_mm.datasets.toy import LAYOUTS
from bnet_mm.surgery.report import Report
from helpers import reference
from helpers.paths import REPO

SECTION = (REPO / 'tools/README.md').read_text().partition('## Outside OpenMMLab')[2].partition('\n## ')[0]
ROWS = re.findall(r'^\| [\w-]+ \| `(.+?)` \| (\d+)', SECTION, re.MULTILINE)
LIBRARIES = dict(torchvision='torchvision', timm='timm', smp='segmentation_models_pytorch', YOLO='ultralytics')
BLOCKS = re.findall(r'```python\n(.*?)```', SECTION, re.DOTALL)


def library(name):
    """An extra, or a skip; in the namespace of the code in the README."""
    return pytest.importorskip(name, reason=f'{name} is no part of the installation')


@pytest.fixture
def names(monkeypatch, tmp_path):
    """names(expression): what its names mean."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('YOLO_OFFLINE', 'true')
    monkeypatch.setenv('YOLO_CONFIG_DIR', str(tmp_path))

    def meaning(code):
        found = dict(bnet_mm=bnet_mm, BNET=BNET, partial=partial)
        for name, module in LIBRARIES.items():
            if re.search(rf'\b{name}\b', code):
                found[name] = getattr(library(module), name) if name == 'YOLO' else library(module)
        return found

    return meaning


def tensors(output):
    """All floating-point tensors of an output, in their order."""
    if isinstance(output, torch.Tensor):
        return [output]
    children = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for child in children for tensor in tensors(child)]


def test_the_table_is_read():
    assert len(ROWS) == SECTION.count('\n| ') - 1 and len(BLOCKS) == 2


@pytest.mark.parametrize('code, count', ROWS, ids=[code for code, _ in ROWS])
def test_code_of_the_table(names, code, count):
    """So many layers are BNET; they read the plain model's weights and give its function; they train."""
    call, meaning = ast.parse(code, mode='eval').body, names(code)
    model = eval(code, meaning)
    if isinstance(model, Report):
        plain, model = eval(ast.unparse(call.args[0]), meaning), model.model
    else:
        call.keywords.clear()
        plain = eval(ast.unparse(call), meaning)
    layers = [layer for layer in model.modules() if isinstance(layer, BNET)]
    assert len(layers) == int(count) and {layer.bnconv.k for layer in layers} == {3}
    reference.randomise(plain)
    result = model.load_state_dict(plain.state_dict())
    assert result.missing_keys == result.unexpected_keys == []
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    plain, model = plain.double().eval(), model.double().eval()
    got, want = tensors(model(x)), tensors(plain(x))
    assert len(got) == len(want) > 0
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))
    sum(tensor.sum() for tensor in tensors(model.train()(x)) if tensor.requires_grad).backward()
    assert all(layer.bnconv.weight.grad.any() for layer in layers)


def test_lightning(tmp_path):
    lightning = library('lightning')
    names = dict(lightning=lightning, torch=torch, torchvision=library('torchvision'), F=F, bnet_mm=bnet_mm)
    exec(BLOCKS[0], names)
    module = names['Classifier']()
    before = copy.deepcopy(module.state_dict())
    data = torch.utils.data.TensorDataset(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))
    options = dict(accelerator='cpu', logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer = lightning.Trainer(max_epochs=1, **options)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    name = 'net.layer1.0.bn2.bnconv.weight'
    assert not torch.equal(module.state_dict()[name], before[name])
    again = names['Classifier'].load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    torch.testing.assert_close(again.state_dict(), module.state_dict(), rtol=0, atol=0)


@pytest.fixture
def yolo_data(tmp_path):
    """Toy data in YOLO's layout, without its crowds."""
    LAYOUTS['coco'](tmp_path / 'coco', dict(train=4, val=2), size=64, seed=0)
    for part in ('train', 'val'):
        images, labels = tmp_path / 'yolo' / 'images' / part, tmp_path / 'yolo' / 'labels' / part
        images.parent.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True)
        (tmp_path / 'coco' / f'{part}2017').rename(images)
        annotations = json.loads((tmp_path / 'coco/annotations' / f'instances_{part}2017.json').read_text())
        for image in annotations['images']:
            lines = []
            for one in (a for a in annotations['annotations'] if a['image_id'] == image['id']):
                x, y, w, h = (value / 64 for value in one['bbox'])
                lines.append(f'{one["category_id"] - 1} {x + w / 2} {y + h / 2} {w} {h}\n')
            (labels / image['file_name']).with_suffix('.txt').write_text(''.join(lines))
    path = tmp_path / 'yolo' / 'data.yaml'
    path.write_text(f'path: {path.parent}\ntrain: images/train\nval: images/val\nnames: [circle, square, triangle]\n')
    return path


def test_ultralytics(yolo_data, names, tmp_path, monkeypatch):
    """Trained, validated and read again as its command line does; boxes need torchvision's nms."""
    YOLO = names('YOLO')['YOLO']
    tasks = importlib.import_module('ultralytics.nn.tasks')
    monkeypatch.setattr(tasks.BaseModel, 'is_fused', tasks.BaseModel.is_fused)  # put back after the test
    monkeypatch.setattr(importlib.import_module('torchvision').ops, 'nms', mmcv_nms())
    namespace = dict(ultralytics=importlib.import_module('ultralytics'), bnet_mm=bnet_mm)
    importlib.import_module('ultralytics.models.yolo.detect')
    exec(BLOCKS[1], namespace)
    options = dict(
        epochs=1, imgsz=64, batch=2, workers=0, plots=False, device='cpu', verbose=False, project=str(tmp_path)
    )
    YOLO('yolo11n.yaml').train(trainer=namespace['BNETTrainer'], data=str(yolo_data), **options)
    (checkpoint,) = tmp_path.rglob('last.pt')
    again = YOLO(str(checkpoint))
    layers = [layer for layer in again.model.modules() if isinstance(layer, BNET)]
    assert len(layers) == 81 and not all(layer.is_affine() for layer in layers)
    image = next((yolo_data.parent / 'images' / 'val').iterdir())
    (result,) = again.predict(str(image), imgsz=64, conf=0.0001, verbose=False)
    assert len(result.boxes) > 0


def mmcv_nms():
    nms = library('mmcv.ops').nms
    return lambda boxes, scores, threshold: nms(boxes.float(), scores.float(), threshold)[1]
