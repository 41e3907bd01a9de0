"""Download released models: python tools/download_weights.py [NAME ...] [--all] [--list] [--dest checkpoints]

NAME is that of a config, such as faster_rcnn_r50_bnet5_1x; the links are those of the model zoo. A file is kept, as
DEST/NAME.pth, when it can be read safely and has every tensor of the config's model; else nothing is. A connection
that breaks is tried again from where it broke.
"""

from __future__ import annotations

import environment  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse
from pathlib import Path

from mmengine.config import Config

from bnet_mm.cli import UserError, clear_errors, run_tool
from bnet_mm.engine.runner import build_model, load_complete
from bnet_mm.files import make_folder, written
from bnet_mm.host.configs import find_config, released_models

RETRIES = 5


def download(url: str, path: Path) -> None:
    """The file at ``url``, of Google Drive or of any server.

    Raises:
        UserError: If there is none, or a web page in its place.
    """
    with clear_errors('gdown downloads them (pip install "bnet_mm[download]", Python 3.10 or later)'):
        import gdown
    with clear_errors(f'{url} could not be downloaded'):
        gdown.download(url, str(path), resume=True, retries=RETRIES, timeout=30)
    with path.open('rb') as file:
        begins = file.read(256).lstrip().lower()
    if begins.startswith((b'<!doctype', b'<html', b'<?xml')):
        raise UserError(f'{url} gave a web page, not a file: it has moved, or too many have downloaded it today')


def fetch(name: str, model: dict, dest: Path) -> Path:
    """Download one model of the zoo and check it against its config.

    Raises:
        UserError: If anything is wrong; nothing is left of it.
    """
    path = dest / f'{name}.pth'
    if path.exists():
        print(f'{path} is there already')
        return path
    with written(path) as partial:
        try:
            download(model['Weights'], partial)
            load_complete(build_model(Config.fromfile(find_config(name))), str(partial))
        except UserError as error:
            raise UserError(f'{name}: {str(error).replace(str(partial), "the file")}') from error
        finally:
            for rest in dest.glob(f'{partial.name}?*'):  # what gdown would go on with
                rest.unlink()
    return path


def printed(model: dict) -> str:
    """What the paper prints of a model, in a line."""
    return ', '.join(
        f'{metric} {value}' for result in model['Results'][:1] for metric, value in result['Metrics'].items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', metavar='NAME', help='name of a config, such as faster_rcnn_r50_bnet5_1x')
    parser.add_argument('--all', action='store_true', help='every model that was released')
    parser.add_argument('--list', action='store_true', help='only say which were released')
    parser.add_argument('--dest', type=Path, default=Path('checkpoints'), help='folder for them (checkpoints)')
    args = parser.parse_args()
    models = released_models()
    if args.list:
        print(*(f'{name}: {printed(model)}; {model["Weights"]}' for name, model in models.items()), sep='\n')
        return
    names = list(models) if args.all else [Path(name).name.removesuffix('.py') for name in args.names]
    if not names:
        parser.error('which? Give names, --all or --list')
    for name in names:
        if name not in models:
            with clear_errors(name):
                find_config(name)
            raise UserError(f'no weights were released for {name}; --list says for which')
    make_folder(args.dest)
    for name in names:
        path = fetch(name, models[name], args.dest)
        print(f'{name}, printed: {printed(models[name])}\n  python tools/test.py bnet_mm::{name} {path}')


if __name__ == '__main__':
    run_tool(main)
