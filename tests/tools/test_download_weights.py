"""tools/download_weights.py against a server that plays what can happen; the real links were never tried."""

import errno
import http.server
import io
import threading

import pytest
import torch
from mmengine.config import Config

from bnet_mm.cli import UserError
from bnet_mm.engine.runner import build_model
from bnet_mm.host.configs import find_config, released_models
from helpers import reference
from helpers.tools import call_tool, load_tool, run

gdown = pytest.importorskip('gdown', reason='gdown is not installed')
NAME = 'mobilenetv2_w025_bnet3_imagenet'


@pytest.fixture(scope='module')
def weights():
    pytest.importorskip('mmpretrain')
    torch.manual_seed(0)
    return reference.randomise(build_model(Config.fromfile(find_config(NAME)))).state_dict()


@pytest.fixture
def serve(monkeypatch):
    """Starts a server that answers with a function of the handler; the zoo's link becomes its address."""
    servers = []

    def start(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                answer(self)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return {'Weights': f'http://127.0.0.1:{server.server_port}/model.pth', 'Results': [{'Metrics': {'top-1': 7}}]}

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def content(state_dict):
    memory = io.BytesIO()
    torch.save(dict(state_dict=state_dict), memory)
    return memory.getvalue()


def send(handler, body, status=200, kind='application/octet-stream', announced=None, **headers):
    handler.send_response(status)
    headers = {'Content-Type': kind, 'Content-Length': str(announced or len(body)), **headers}
    for name, value in headers.items():
        handler.send_header(name.replace('_', '-'), value)
    handler.end_headers()
    handler.wfile.write(body)


def fetch(model, dest):
    tool = load_tool('download_weights')
    tool.RETRIES = 1
    return tool.fetch(NAME, model, dest)


def test_complete_file_is_kept(serve, weights, tmp_path, capsys):
    body = content(weights)
    model = serve(lambda handler: send(handler, body))
    path = fetch(model, tmp_path)
    assert path == tmp_path / f'{NAME}.pth' and path.read_bytes() == body and [*tmp_path.iterdir()] == [path]
    assert fetch(dict(model, Weights='http://nobody.invalid/'), tmp_path) == path  # not asked for again
    assert 'is there already' in capsys.readouterr().out


def test_broken_connection_goes_on_where_it_broke(serve, weights, tmp_path):
    body, asked = content(weights), []

    def answer(handler):
        asked.append(handler.headers.get('Range'))
        start = int((asked[-1] or 'bytes=0-').split('=')[1].rstrip('-'))
        if start:
            extent = f'bytes {start}-{len(body) - 1}/{len(body)}'
            send(handler, body[start:], 206, Content_Range=extent, ETag='"1"')
        else:
            send(handler, body[: len(body) // 2], announced=len(body), ETag='"1"', Accept_Ranges='bytes')
            handler.close_connection = True

    assert fetch(serve(answer), tmp_path).read_bytes() == body
    assert asked[0] is None and len(asked) == 2 and asked[1] and asked[1] != 'bytes=0-'


def half(handler, body):
    send(handler, body[: len(body) // 2], announced=len(body))
    handler.close_connection = True


PAGE = b'<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>'
WRONG = {
    'moved': (lambda handler, _: send(handler, b'', 404), '404'),
    'a page in its place': (lambda handler, _: send(handler, PAGE, kind='text/html'), 'gave a web page'),
    'half a file': (half, 'could not be downloaded'),
    'another file': (
        lambda handler, _: send(handler, b'\x80\x04 nonsense' * 99),
        'the file is not a readable checkpoint',
    ),
}


@pytest.mark.parametrize('case', WRONG)
def test_nothing_is_left_of_what_went_wrong(case, serve, weights, tmp_path):
    answer, sentence = WRONG[case]
    body = content(weights)
    with pytest.raises(UserError, match=sentence) as error:
        fetch(serve(lambda handler: answer(handler, body)), tmp_path)
    assert '\n' not in str(error.value).strip() and not [*tmp_path.iterdir()]


def test_incomplete_and_other_models(serve, weights, tmp_path):
    lacking = {name: value for name, value in weights.items() if 'bnconv' not in name}
    for state_dict in (lacking, {name: value.flatten() for name, value in weights.items()}):
        body = content(state_dict)
        with pytest.raises(UserError):
            fetch(serve(lambda handler, body=body: send(handler, body)), tmp_path)
        assert not [*tmp_path.iterdir()]


def test_full_disk(serve, tmp_path, monkeypatch):
    def full(url, output, **_):
        open(output, 'wb').write(b'PK')
        raise OSError(errno.ENOSPC, 'No space left on device', output)

    monkeypatch.setattr(gdown, 'download', full)
    with pytest.raises(UserError, match='No space left on device'):
        fetch(dict(Weights='http://x'), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_every_link_of_google_drive_has_an_id():
    links = [model['Weights'] for model in released_models().values()]
    drive = [link for link in links if 'drive.google.com' in link]
    assert len(drive) >= 19 and all(gdown.parse_url.parse_url(link)[0] for link in drive)
    assert all(link.endswith('.pth') for link in set(links) - set(drive))


def test_command_line(capsys, tmp_path):
    assert call_tool('download_weights', '--list') is None
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(released_models()) and 'faster_rcnn_r50_bnet5_1x: box AP 40.1' in '\n'.join(listed)
    assert call_tool('download_weights') == 2
    done = run('tools/download_weights.py', 'faster_rcnn_r50_bnet6_1x', '--dest', tmp_path / 'new')
    assert done.returncode == 2 and 'did you mean faster_rcnn_r50_bnet' in done.stderr
    assert 'Traceback' not in done.stderr and not (tmp_path / 'new').exists()
    done = run('tools/download_weights.py', 'tsn_r50_bn_ucf101')
    assert done.returncode == 2 and 'no weights were released for tsn_r50_bn_ucf101' in done.stderr
