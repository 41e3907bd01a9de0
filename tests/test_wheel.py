"""What OpenMMLab's tools do with an installed wheel."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from bnet_mm.datasets.toy import LAYOUTS
from helpers.paths import REPO
from helpers.tools import SMALL

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
    for name in ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE', 'model-index.yml'):
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
    files = [path for path in (REPO / 'configs').rglob('*') if path.is_file() and path.suffix != '.pyc']
    configs = {path.relative_to(REPO).as_posix() for path in files}
    assert {name for name in mim if name.startswith('configs/')} == configs
    assert {'model-index.yml', 'tools/train.py', 'tools/test.py', 'tools/dist_train.sh'} <= mim
    assert {'bnet_mm/ops/bnet.py', 'bnet_mm/visualization/page.html'} <= names
    assert not any('_cpu' in name for name in names)
    assert not any('__pycache__' in name or name.startswith(('tests/', 'configs/', 'tools/')) for name in names)
    assert not any(name in mim for name in ('tools/install.sh', 'tools/run_demo.sh', 'tools/dev/model_zoo.py'))


@pytest.mark.hardening
def test_mim_trains_and_tests(wheel, tmp_path):
    """A config of the wheel by its name, with the wheel's tools."""
    pytest.importorskip('mim')
    zipfile.ZipFile(wheel).extractall(tmp_path / 'site')
    LAYOUTS['coco'](tmp_path / 'shapes', dict(train=4, val=2), size=96, seed=0)
    env = dict(PYTHONPATH=str(tmp_path / 'site'), PYTHONWARNINGS='ignore', DATA_ROOT=str(tmp_path / 'shapes'))
    common = ('bnet_mm', 'faster_rcnn_r18_bnet5_demo.py', '--gpus', '0', '--work-dir', str(tmp_path / 'w'))
    for command in (['train', *common], ['test', *common, '--checkpoint', str(tmp_path / 'w' / 'epoch_1.pth')]):
        command = [sys.executable, '-m', 'mim', *command, '--cfg-options', *SMALL]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True)
        assert done.returncode == 0 and 'bbox_mAP_50' in done.stdout, done.stderr[-3000:] + done.stdout[-1000:]


def test_use_of_the_wheel(wheel, tmp_path):
    site = tmp_path / 'site'
    zipfile.ZipFile(wheel).extractall(site)
    env = {**os.environ, 'PYTHONPATH': str(site), 'PYTHONWARNINGS': 'ignore'}
    done = subprocess.run(
        [sys.executable, '-c', USE_OF_A_WHEEL, site], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
