"""The model zoo: its metafiles, the tables made from them, and what OpenMMLab's tools do with an installed wheel."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from itertools import chain

import mmengine.hub
import pytest
import yaml
from hosts import import_host_models
from mmengine.config import Config
from modelindex.load_model_index import load
from paths import REPO, SHARED_DATA

from bnet_mm.cli import UserError
from bnet_mm.host.configs import find_config, find_weights

sys.path.insert(0, str(REPO / 'tools' / 'dev'))  # the tool imports its neighbour
spec = importlib.util.spec_from_file_location('model_zoo', REPO / 'tools' / 'dev' / 'model_zoo.py')
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
sys.path.pop(0)

# Printed rows that are not a model here.
BATCH_SIZES = 'one row of nine batch sizes; (8,32), (8,4) and (8,1) of SN are models, with the figures of the model zoo'
OTHERS = "others' ResNet-50, for comparison"
WITHOUT_CONFIG = {
    **{('sn_readme.txt', f'README batch-size table, row {row}'): BATCH_SIZES for row in range(1, 4)},
    **{('sn_readme.txt', f'README batch-size table, row {row}'): 'differences of rows' for row in range(4, 7)},
    **{('sn_readme.txt', f'README model zoo, row {row}'): OTHERS for row in range(8, 12)},
}
COLLECTIONS = {'bnet_paper.txt': 'BNET', 'bnet_readme.txt': 'BNET', 'cbn_readme.txt': 'CBN', 'sn_readme.txt': 'SN'}
METRICS = {
    'box_ap': 'box AP', 'ap50': 'box AP50', 'ap75': 'box AP75', 'ap_s': 'box AP small', 'ap_m': 'box AP medium',
    'ap_l': 'box AP large', 'fps': 'FPS', 'mask_ap': 'mask AP', 'mask_ap50': 'mask AP50', 'mask_ap75': 'mask AP75',
    'mask_ap_s': 'mask AP small', 'mask_ap_m': 'mask AP medium', 'mask_ap_l': 'mask AP large',
    'error_cls': 'classification error', 'error_loc': 'localization error', 'error_bkg': 'background error',
    'error_miss': 'missed object error', 'error_fp': 'false positive error', 'error_fn': 'false negative error',
    'top1': 'Top 1 Accuracy', 'top5': 'Top 5 Accuracy', 'miou': 'mIoU',
}  # fmt: skip


@pytest.fixture(scope='module')
def models():
    return {model['Name']: model for model in chain(*tool.load_families().values())}


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['model_zoo.py', *arguments])
    tool.main()


def metrics_of(model):
    return {name: value for result in model.get('Results', []) for name, value in result['Metrics'].items()}


def test_nothing_is_stale(monkeypatch, capsys):
    run(monkeypatch, '--check')
    assert capsys.readouterr().out == '92 models in 5 metafiles\n'


def test_index_is_valid():
    index = load(str(REPO / 'model-index.yml'))
    assert index.check(silent=True) == []
    names = [model.name for model in index.models]
    assert len(names) == len(set(names)) == 92
    for collection in index.collections:
        assert collection.paper.startswith('https://arxiv.org/abs/') and collection.code.startswith(
            'https://github.com/'
        )
        assert collection.data['License'] == 'Apache-2.0'
    collections = {collection.name for collection in index.collections}
    assert {model.data['In Collection'] for model in index.models} == collections
    for model in index.models:
        assert (REPO / model.config).is_file() and model.config == f'configs/{model.name}.py'
        assert model.metadata.parameters > 1e6 and model.metadata.flops > 3e7 and model.metadata.training_data
        assert model.metadata.epochs or model.metadata.data['Iterations']
        assert bool(model.results) == ('Printed In' in model.metadata.data), model.name
        assert (model.weights or 'http').startswith('http')


def test_every_model_is_in_a_table(models):
    page = (REPO / 'configs' / 'README.md').read_text()
    assert [name for name in models if page.count(f'| `{name}.py` |') != 1] == []
    assert '| `faster_rcnn_r50_bnet5_1x.py` | Tables 5, 14; BNET README | BNET-5 | 40.1* | 41.87 | 209.9 |' in page
    assert '`R50_BNET-5.pth` from `resnet50_bnet5_imagenet`' in page


def test_needed_backbones_are_made_here(models):
    made = {model['Metadata'].get('Backbone File') for model in models.values()}
    needed = {model['Metadata'].get('Pretrained', '') for model in models.values()}
    local = {file for file in needed if 'BNET' in file or file.endswith('_imagenet.pth')}
    assert local and local <= made


@pytest.mark.parametrize(
    'name', ['mask_rcnn_r50_bn_1x', 'tsn_r50_bnet3_ucf101', 'deeplabv3_r101_bn_voc12aug', 'bireal18_bnet3_imagenet']
)
def test_costs(models, name):
    cfg = Config.fromfile(REPO / 'configs' / f'{name}.py')
    import_host_models(cfg.default_scope)
    metadata = models[name]['Metadata']
    assert tool.count(f'{name}.py', cfg) == (metadata['Parameters'], metadata['FLOPs'])
    if name == 'mask_rcnn_r50_bn_1x':  # 44.17 M, 260.14 GFLOPs by mmdetection 2.x
        assert (metadata['Parameters'], metadata['FLOPs']) == (44170992, 260137547700)


@pytest.mark.zoo
def test_all_costs(monkeypatch):
    for library in tool.TASKS:
        import_host_models(library)
    run(monkeypatch, '--check', '--costs')


@pytest.fixture
def small_zoo(tmp_path, monkeypatch):
    """The three models on UCF-101, alone."""
    (tmp_path / 'configs').mkdir()
    for path in (REPO / 'configs').glob('*ucf101*'):
        shutil.copy(path, tmp_path / 'configs')
    (tmp_path / 'model-index.yml').write_text('Import: [configs/metafile_ucf101.yml]')
    for page, models in (('README.md', 'bnet3'), ('configs/README.md', '.')):
        (tmp_path / page).write_text(f'before\n<!-- zoo: ucf101 {models} -->\nold\n<!-- /zoo -->\nafter\n')
    monkeypatch.setattr(tool, 'ROOT', tmp_path)
    monkeypatch.setattr(tool, 'CONFIGS', tmp_path / 'configs')
    run(monkeypatch)
    return tmp_path


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_tables_are_written(small_zoo):
    assert (small_zoo / 'README.md').read_text() == (
        'before\n<!-- zoo: ucf101 bnet3 -->\n\n'
        '| config | norm | top-1 | top-5 | parameters, M | GFLOPs |\n| --- | --- | --- | --- | --- | --- |\n'
        '| `configs/tsn_r50_bnet3_ucf101.py` | BNET-3 | 84.1* | 97.5* | 23.84 | 4.170 |\n\n<!-- /zoo -->\nafter\n'
    )


def test_what_is_stale_is_named_and_written(small_zoo, monkeypatch, capsys):
    metafile, page = small_zoo / 'configs' / 'metafile_ucf101.yml', small_zoo / 'README.md'
    before = metafile.read_text(), page.read_text()
    run(monkeypatch, '--check')
    change(page, '84.1', '94.1')
    change(metafile, 'Epochs: 75', 'Epochs: 76')
    change(metafile, '    Parameters: 23714981\n', '')
    with pytest.raises(
        UserError, match='^stale: configs/metafile_ucf101.yml, README.md; python tools/dev/model_zoo.py'
    ):
        run(monkeypatch, '--check')
    run(monkeypatch)
    assert (metafile.read_text(), page.read_text()) == before
    assert 'written: README.md\n' in capsys.readouterr().out


def test_a_measured_figure(small_zoo, monkeypatch):
    metafile = small_zoo / 'configs' / 'metafile_ucf101.yml'
    data = yaml.safe_load(metafile.read_text())
    measured = {'Task': 'Action Recognition', 'Dataset': 'UCF101', 'Metrics': {'Top 1 Accuracy': 80.2}}
    data['Models'][0]['Results'].append({**measured, 'Measured': 'when and on what'})
    metafile.write_text(yaml.safe_dump(data))
    run(monkeypatch)
    assert '| BN | 79.8*, 80.2 measured | 96.0* |' in (small_zoo / 'configs' / 'README.md').read_text()
    assert 'Measured: when and on what' in metafile.read_text()


def test_a_config_without_a_model(small_zoo, monkeypatch):
    (small_zoo / 'configs' / 'tsn_r50_bnet5_ucf101.py').rename(small_zoo / 'configs' / 'other.py')
    with pytest.raises(UserError, match='in no metafile: other; in a metafile, but no config: tsn_r50_bnet5_ucf101'):
        run(monkeypatch, '--check')


@pytest.mark.data
def test_every_printed_row(models):
    """A row is a model with its figures, or on the list above."""
    rows = json.loads((SHARED_DATA.parent / 'reference' / 'tables.json').read_text())
    without, claimed = set(), set()
    for row in rows:
        label, collection = f'{row["table"]}, row {row["row"] + 1}', COLLECTIONS[row['source']]
        found = [
            model
            for model in models.values()
            if model['In Collection'] == collection and label in model['Metadata'].get('Printed In', '').split('; ')
        ]
        if not found:
            without.add((row['source'], label))
        for model in found:
            claimed.add((model['Name'], label))
            fields, metrics = row['fields'], metrics_of(model)
            names = METRICS | {key: f'IoU {key[4:].replace("_", " ")}' for key in fields if key.startswith('iou_')}
            printed = {names[key]: value for key, value in fields.items() if key in names and value is not None}
            assert printed and {name: metrics.get(name) for name in printed} == printed, (model['Name'], label)
            link = fields.get('download_url') or fields.get('downloads', {}).get('Google Drive')
            assert link in (None, model.get('Weights')), (model['Name'], label)
    assert without == set(WITHOUT_CONFIG)
    own = {(model['Name'], label) for model in models.values() for label in printed_rows_of(model)}
    assert {(name, label) for name, label in own - claimed} == {
        (name, 'Section 3.3') for name in models if 'frelu' in name
    }


def printed_rows_of(model):
    return model['Metadata']['Printed In'].split('; ') if 'Printed In' in model['Metadata'] else []


def test_configs_by_name(tmp_path):
    """From the checkout, as in an editable installation."""
    (tmp_path / 'mine.py').write_text(
        "_base_ = 'bnet_mm::faster_rcnn_r50_bnet5_1x.py'\nmodel = dict(backbone=dict(depth=18))"
    )
    cfg = Config.fromfile(tmp_path / 'mine.py')
    assert (cfg.model.backbone.type, cfg.model.backbone.bnet.k, cfg.model.backbone.depth) == ('WithBNET', 5, 18)
    assert find_config('tsn_r50_bn_ucf101') == str(REPO / 'configs' / 'tsn_r50_bn_ucf101.py')
    with pytest.raises(
        FileNotFoundError, match=r'no config tsn_r50_bnet9_ucf101.py; did you mean tsn_r50_bnet\d_ucf101'
    ):
        find_config('bnet_mm::tsn_r50_bnet9_ucf101.py')


def test_hub():
    cfg = mmengine.hub.get_config('bnet_mm::retinanet_r101_bn_1x.py', pretrained=True)
    assert cfg.model_path.endswith('retinanet_r101_fpn_1x_coco_20200130-7a93545f.pth')
    with pytest.raises(ValueError, match='no weights were released for tsn_r50_bn_ucf101.py'):
        find_weights('tsn_r50_bn_ucf101')
    stock = mmengine.hub.get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    assert stock.model.backbone.type == 'ResNet'


USE_OF_A_WHEEL = """
import sys
from pathlib import Path
from mim.commands.download import download
from mim.commands.search import get_model_info
from mmengine.config import Config
import bnet_mm
from bnet_mm.host.configs import find_config

site = Path(sys.argv[1])
assert Path(bnet_mm.__file__).is_relative_to(site) and Path(find_config('tsn_r50_bn_ucf101')).is_relative_to(site)
Path('mine.py').write_text("_base_ = 'bnet_mm::mask_rcnn_r50_bnet3_1x.py'")
assert Config.fromfile('mine.py').model.backbone.bnet == dict(k=3, where='C')

info = get_model_info('bnet_mm', to_dict=True)
assert len(info) == 92
model = info['faster_rcnn_r50_bnet5_1x']
assert model['coco/box_ap'] == 40.1 and model['parameters'] == 41871776 and model['model'] == 'bnet'
assert model['weight'].startswith('https://drive.google.com/') and model['paper'] == 'https://arxiv.org/abs/2011.14150'
assert len(get_model_info('bnet_mm', models=['CBN'])) == 8
assert len(get_model_info('bnet_mm', training_datasets=['cityscapes'])) == 2

fetched = []
without_network = lambda url, path, **kwargs: fetched.append(url)
sys.modules['mim.commands.download'].download_from_file = without_network
(name,) = download('bnet_mm', ['faster_rcnn_r101_bn_1x'], 'dest')
assert fetched == [info['faster_rcnn_r101_bn_1x']['weight']] and fetched[0].endswith(name)
assert Config.fromfile('dest/faster_rcnn_r101_bn_1x.py').model.backbone.depth == 101
"""


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the checkout."""
    source = tmp_path_factory.mktemp('source')
    ignore = shutil.ignore_patterns('__pycache__', '*.so')
    for name in ('bnet_mm', 'configs', 'tools'):
        shutil.copytree(REPO / name, source / name, ignore=ignore)
    for name in (
        'setup.py',
        'pyproject.toml',
        'MANIFEST.in',
        'README.md',
        'LICENSE',
        'constraints.txt',
        'model-index.yml',
    ):
        shutil.copy(REPO / name, source)
    stale = source / 'build' / 'lib' / 'bnet_mm' / '.mim' / 'configs' / 'stale.py'  # of an earlier build
    stale.parent.mkdir(parents=True)
    stale.touch()
    build = [
        sys.executable,
        '-m',
        'pip',
        'wheel',
        '-q',
        '--no-index',
        '--no-deps',
        '--no-build-isolation',
        '-w',
        'dist',
    ]
    # Without a compiler, which is quick, and has to give a package of Python alone.
    subprocess.run([*build, '.'], cwd=source, check=True, env={**os.environ, 'CXX': 'false', 'CC': 'false'})
    (path,) = (source / 'dist').glob('*.whl')
    return path


def test_contents_of_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    mim = {name.removeprefix('bnet_mm/.mim/') for name in names if name.startswith('bnet_mm/.mim/')}
    configs = {f'configs/{path.name}' for path in (REPO / 'configs').iterdir() if path.is_file()}
    assert {name for name in mim if name.startswith('configs/')} == configs
    assert {'model-index.yml', 'tools/train.py', 'tools/test.py', 'tools/dist_train.sh'} <= mim
    assert 'bnet_mm/ops/bnet.py' in names and not any('_cpu' in name for name in names)
    assert not any('__pycache__' in name or name.startswith(('tests/', 'configs/', 'tools/')) for name in names)
    assert not any(name in mim for name in ('tools/dev/install.sh', 'tools/run_demo.sh', 'tools/dev/model_zoo.py'))


def test_use_of_the_wheel(wheel, tmp_path):
    site = tmp_path / 'site'
    zipfile.ZipFile(wheel).extractall(site)
    env = {**os.environ, 'PYTHONPATH': str(site), 'PYTHONWARNINGS': 'ignore'}
    done = subprocess.run(
        [sys.executable, '-c', USE_OF_A_WHEEL, site], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
