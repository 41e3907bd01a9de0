"""The model zoo: its metafiles and the tables made from them."""

import json
import shutil
import sys
from itertools import chain

import pytest
import yaml
from mmengine.config import Config
from modelindex.load_model_index import load

import model_zoo as tool
from bnet_mm.cli import UserError
from helpers.hosts import import_host_models
from helpers.paths import REPO, SHARED_DATA

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
