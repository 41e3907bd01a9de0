"""tools/report.py: pages of runs that were written by hand, and in a browser where there is one."""

import json
import pickle
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from bnet_mm.cli import UserError, common_arguments, load_config
from bnet_mm.visualization.page import Section, Table, compared, norm_of, write_page
from helpers.tools import DEMO, SMALL, call_tool
from visualization.test_detections import RIGHT, annotations, results, with_error
from visualization.test_runs import step, write_run


class Page(HTMLParser):
    """The files that a page names, its headings and its cells."""

    def __init__(self, path):
        super().__init__()
        self.files, self.alts, self.cells, self.open = set(), [], [], ''
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        attributes, self.open = dict(attributes), tag
        if tag == 'img' and 'src' in attributes:
            self.alts.append(attributes['alt'])
        for name in ('src', 'href'):
            if name in attributes and attributes[name][0] != '#' and not attributes[name].startswith('data:'):
                self.files.add(unquote(attributes[name]))

    def handle_data(self, data):
        if self.open == 'td' and data.strip():
            self.cells.append(data.strip())


@pytest.fixture
def detectors(tmp_path):
    """Two seeds of one recipe and one of another; predictions with one error; odd names everywhere."""
    place = tmp_path / 'a "folder" & <more>'
    place.mkdir()
    (place / 'truth.json').write_text(json.dumps(annotations(images=2)))
    for image in (1, 2):
        cv2.imwrite(str(place / f'{image}.jpg'), np.full((150, 150, 3), 99, np.uint8))
    lines = [step(10, 3.0, 1), {'coco/bbox_mAP': 0.1, 'step': 1}, step(20, 2.0, 2), {'coco/bbox_mAP': 0.3, 'step': 2}]
    folders = []
    for name, seed, score in (('bn', 0, 0.30), ('bn', 1, 0.31), ('bnet', 0, 0.40), ('bnet', 1, 0.42)):
        folder = place / f'{name} {seed}'
        tested = {'coco/bbox_mAP': score, 'coco/bbox_mAP_l': -1.0, 'time': 0.5}
        write_run(folder, lines, name=f'{name} <i>', seed=seed, lr=len(name), tested=tested)
        for config in folder.rglob('*.py'):
            config.write_text(config.read_text() + f'test_evaluator = dict(ann_file={str(place / "truth.json")!r})\n')
        (folder / 'p.pkl').write_bytes(in_pkl(place, RIGHT if name == 'bnet' else []))
        folders.append(folder)
    return folders


def in_pkl(place, detections):
    samples = []
    for image, found in ((1, results(RIGHT)), (2, with_error('E_miss') if not detections else results(detections))):
        boxes = torch.tensor([one['bbox'] for one in found], dtype=torch.float)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([[3, 7].index(one['category_id']) for one in found])
        instances = dict(bboxes=boxes, labels=labels, scores=torch.tensor([one['score'] for one in found]))
        samples.append(dict(img_id=image, img_path=str(place / f'{image}.jpg'), pred_instances=instances))
    return pickle.dumps(samples)


def test_page_of_several_runs(detectors, tmp_path):
    pytest.importorskip('pycocotools')
    assert call_tool('report', *detectors, '--out', tmp_path / 'o') is None
    page = Page(tmp_path / 'o' / 'index.html')
    assert all((tmp_path / 'o' / file).is_file() for file in page.files)
    assert {'curves.png', 'curves.csv', 'precision_recall.png', 'side_by_side_1.png'} <= page.files
    assert '://' not in page.text and '<i>' not in page.text and 'bn &lt;i&gt;' in page.text
    assert all(page.alts)
    assert '0.305 ± 0.007071 (n = 2)' in page.cells and '0.41 ± 0.01414 (n = 2), +0.105 ▲' in page.cells
    assert '0, 1' in page.cells and '20, 20' in page.cells
    assert page.text.count('No maps of bn &lt;i&gt;') == 1 and 'No checkpoint with taps.' in page.text
    assert page.alts[-2].startswith('2.jpg')  # where the models differ


def test_page_of_a_trained_model(shapes, with_taps, tmp_path, monkeypatch):
    """With a checkpoint: maps, taps, parameters; the images are those of the config's test data."""
    monkeypatch.setenv('DATA_ROOT', str(shapes))
    folder = tmp_path / 'run'
    write_run(folder, [step(10, 3.0, 1)])
    cfg = load_config(common_arguments('').parse_args([DEMO, '--cfg-options', *SMALL]))
    for config in folder.rglob('*.py'):
        cfg.dump(config)
    shutil.copy(with_taps(DEMO, *SMALL), folder / 'epoch_1.pth')
    (folder / 'last_checkpoint').write_text('/elsewhere/epoch_1.pth')
    assert call_tool('report', folder, '--out', tmp_path / 'o') is None
    page = Page(tmp_path / 'o' / 'index.html')
    assert {'maps_1.png', 'maps_2.png', 'maps_3.png', 'taps_1.png', 'curves.png'} <= page.files
    assert 'BNET-5 at C' in page.cells and 'no run has predictions' in page.text
    assert 'Nothing was tested or validated yet.' in page.text


def test_page_of_a_classifier(tmp_path):
    """Its confusion matrix: one of three images of class 0 is taken for class 2."""
    pytest.importorskip('mmpretrain')
    write_run(tmp_path / 'run', [step(10, 3.0, 1)], tested={'accuracy/top1': 75.0})
    for config in (tmp_path / 'run').rglob('*.py'):
        config.write_text(config.read_text().replace('mmdet', 'mmpretrain'))
    pairs = [(0, 0), (0, 0), (0, 2), (1, 1)]
    samples = [dict(gt_label=torch.tensor([true]), pred_score=torch.eye(3)[guess]) for true, guess in pairs]
    (tmp_path / 'run' / 'p.pkl').write_bytes(pickle.dumps(samples))
    assert call_tool('report', tmp_path / 'run', '--out', tmp_path / 'o') is None
    page = Page(tmp_path / 'o' / 'index.html')
    assert 'confusion_1.png' in page.files and {'accuracy/top1', '75'} <= set(page.cells)
    (tmp_path / 'run' / 'p.pkl').write_bytes(pickle.dumps([dict(other=1)]))
    with pytest.raises(UserError, match='p.pkl cannot be read'):
        call_tool('report', tmp_path / 'run', '--out', tmp_path / 'o')


def test_a_run_in_progress(tmp_path):
    write_run(tmp_path / 'run', [])
    assert call_tool('report', tmp_path / 'run', '--out', tmp_path / 'o') is None
    assert 'No loss was logged yet.' in (tmp_path / 'o' / 'index.html').read_text()


def test_different_kinds_are_refused(tmp_path):
    write_run(tmp_path / 'a', [], name='a')
    write_run(tmp_path / 'b', [], name='b')
    for config in (tmp_path / 'b').rglob('*.py'):
        config.write_text(config.read_text().replace('mmdet', 'mmpretrain'))
    with pytest.raises(UserError, match=r'different kinds, and no page compares them: a \(mmdet\), b \(mmpretrain\)'):
        call_tool('report', tmp_path / 'a', tmp_path / 'b', '--out', tmp_path / 'o')
    assert not (tmp_path / 'o').exists()


def test_compared():
    base = [1.0, 2.0, 3.0]  # standard error 1 / sqrt(3); of the difference, with the same spread, sqrt(2 / 3) = 0.816
    assert compared(base, base) == '2 ± 1 (n = 3)'
    assert compared([2.6, 3.6, 4.6], base) == '3.6 ± 1 (n = 3), +1.6'
    assert compared([2.7, 3.7, 4.7], base) == '3.7 ± 1 (n = 3), +1.7 ▲'
    assert compared([-0.7, 0.3, 1.3], base) == '0.3 ± 1 (n = 3), -1.7 ▼'
    assert compared([9.0], base) == '9, +7'


@pytest.mark.parametrize('model, norm', [
    (dict(backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=7, where='AC'))), 'BNET-7 at AC'),
    (dict(backbone=dict(type='ResNet', norm_cfg=dict(type='BNET', k=5))), 'BNET-5 by norm_cfg'),
    (dict(backbone=dict(type='ResNet', norm_cfg=dict(type='GN', num_groups=32))), 'GN'),
    (dict(backbone=dict(type='ResNet')), 'BN'),
])  # fmt: skip
def test_norm_of(model, norm):
    assert norm_of(Config(dict(model=model))) == norm


@pytest.fixture
def browser():
    sync_api = pytest.importorskip('playwright.sync_api')
    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    if chromium is None:
        pytest.skip('needs a Chromium')
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield opened
        opened.close()


@pytest.mark.parametrize('width, scheme', [(1280, 'light'), (390, 'dark')])
def test_in_a_browser(browser, tmp_path, width, scheme):
    """No errors, nothing wider than the window, tables sort by numbers, the lightbox goes by keyboard."""
    from matplotlib.figure import Figure

    rows = [['b', '10.5, +1'], ['a', '9'], ['c', '']]
    section = Section('One', ['<b>note</b>'], [Table('Numbers', ['name', 'a number whose name is long'], rows)])
    for i in range(2):
        section.add(Figure(figsize=(9, 3)), tmp_path, f'a picture & {i}.png', f'Picture {i}')
    sections = [section, Section('A second section with a long name'), Section('Another one')]
    target = write_page('A_very_long_title_' * 5, sections, 'foot', tmp_path)
    page, complaints = browser.new_page(viewport=dict(width=width, height=800), color_scheme=scheme), []
    page.on('console', lambda message: complaints.append(message.text))
    page.on('pageerror', lambda error: complaints.append(str(error)))
    page.on('requestfailed', lambda request: complaints.append(request.url))
    page.goto(target.as_uri())
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    assert page.evaluate('[...document.querySelectorAll("main img")].every(image => image.naturalWidth === 900)')
    light = page.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(255, 255, 255)'
    assert light == (scheme == 'light')

    def column():
        return page.locator('tbody tr td:first-child').all_inner_texts()

    page.get_by_role('button', name='a number').press('Enter')
    assert column() == ['a', 'b', 'c']
    page.get_by_role('button', name='a number').click()
    assert column() == ['c', 'b', 'a']
    page.get_by_role('button', name='name', exact=True).click()
    assert column() == ['a', 'b', 'c']

    page.locator('a.enlarge').first.press('Enter')
    shown = page.locator('dialog img')
    assert shown.is_visible() and shown.get_attribute('alt') == 'Picture 0'
    page.keyboard.press('ArrowRight')
    assert shown.get_attribute('alt') == 'Picture 1'
    page.keyboard.press('ArrowRight')
    assert shown.get_attribute('alt') == 'Picture 0'
    page.keyboard.press('Escape')
    assert not shown.is_visible() and page.evaluate('document.activeElement.className') == 'enlarge'
    assert complaints == []
