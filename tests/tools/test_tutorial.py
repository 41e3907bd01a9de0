"""tools/tutorial.ipynb runs from the first cell to the last and shows what its text says."""

import json

import pytest

from helpers.paths import REPO

nbclient = pytest.importorskip('nbclient', reason='the tutorial needs nbclient and ipykernel')
nbformat = pytest.importorskip('nbformat')
pytest.importorskip('ipykernel')
NOTEBOOK = REPO / 'tools' / 'tutorial.ipynb'
CHECKS = """
assert formula < 1e-4 and unchanged < 1e-4 and loaded < 1e-4
assert len(losses) == 12 and losses[-3:].mean() < 0.8 * losses[:3].mean()
assert list(shares) == [f'backbone.layer{i}' for i in (1, 2, 3, 4)] and min(shares.values()) > 0.5
assert report.summary() == 'folded 20 of 20 norms of FasterRCNN' and target.stat().st_size > 1e6
"""


def test_nothing_is_left_of_a_run():
    code = [cell for cell in json.loads(NOTEBOOK.read_text())['cells'] if cell['cell_type'] == 'code']
    assert code and not any(cell['outputs'] or cell['execution_count'] or cell['metadata'] for cell in code)


def test_it_runs(tmp_path, monkeypatch):
    for name in ('TMPDIR', 'IPYTHONDIR', 'JUPYTER_RUNTIME_DIR'):
        monkeypatch.setenv(name, str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(CHECKS))
    resources = dict(metadata=dict(path=str(tmp_path)))
    nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3', resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
    assert sum('image/png' in output.get('data', {}) for output in outputs) == 3
    text = ''.join(output.get('text', '') for output in outputs)
    for words in (
        'enhanced 8 of 20 norms of ResNet',
        '<All keys matched successfully>',
        'without a counterpart',
    ):
        assert words in text
