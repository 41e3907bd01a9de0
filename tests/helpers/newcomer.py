"""For tools/dev/newcomer.sh: the README's commands after the first two, and what a user has of their own for them.

python tests/helpers/newcomer.py DATA PAGE, in the root of a checkout: DATA is the demo's, in COCO's layout, PAGE the
page that it left. Writes my_config.py, my_bn.pth, photos/ and clip.mp4, removes what an earlier call of the commands
has written, and prints them with the README's stand-ins (FOLDER, CONFIG, CHECKPOINT) filled in; 'not typed: ...' is one
that is left out, and why.
"""

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import cv2
import torch
from mmengine.config import Config

import bnet_mm  # noqa: F401
from bnet_mm.engine.runner import build_model
from test_documents import COMMANDS, TEXTS, commands_of, entry_of, split_shell

CONFIG = 'configs/faster_rcnn_r18_bnet5_demo.py'
OWN_CONFIG = "_base_ = 'configs/faster_rcnn_r18_bn_demo.py'\nmodel = dict(neck=dict(norm_cfg=dict(type='BN')))\n"
NETWORK = r'python tools/download_weights\.py '  # of those that have a test, with a server that plays the network
NOT_RUN = 'not run: '


def left_out() -> dict[str, str]:
    """Why each command of the README is left out, '' if it is typed; without those of the section of two commands."""
    section = re.search(r'^## Two commands\n(.*?)^## ', TEXTS['README.md'], re.S | re.M)[1]
    first = [one for block in re.findall(r'```bash\n(.*?)```', section, re.S) for one in split_shell(block)]
    result = {}
    for command in commands_of('README.md'):
        where = COMMANDS[entry_of(command)]
        reason = where.removeprefix(NOT_RUN) if where.startswith(NOT_RUN) else ''
        result[command] = 'needs the network' if re.match(NETWORK, command) else reason
    return {command: reason for command, reason in result.items() if command not in first}


def commands(data: str, checkpoint: str) -> Iterator[str]:
    """The lines for the script."""
    values = dict(FOLDER=data, CONFIG=CONFIG, CHECKPOINT=checkpoint)
    for command, reason in left_out().items():
        if reason:
            yield f'not typed: {command} ({reason})'
        else:
            yield re.sub(r'\b(FOLDER|CONFIG|CHECKPOINT)\b', lambda match: shlex.quote(values[match[1]]), command)


def prepare(data: Path) -> None:
    """A config and a checkpoint with BN, some pictures, and a video of them."""
    Path('my_config.py').write_text(OWN_CONFIG)
    with redirect_stdout(sys.stderr):  # where mmengine logs
        torch.save(dict(state_dict=build_model(Config.fromfile('my_config.py')).state_dict()), 'my_bn.pth')
    pictures = sorted((data / 'val2017').iterdir())[:3]
    Path('photos').mkdir(exist_ok=True)
    for path in pictures:
        (Path('photos') / path.name).write_bytes(path.read_bytes())
    frames = [cv2.imread(str(path)) for path in pictures]
    height, width = frames[0].shape[:2]
    video = cv2.VideoWriter('clip.mp4', cv2.VideoWriter.fourcc(*'mp4v'), 5, (width, height))
    for frame in frames:
        video.write(cv2.resize(frame, (width, height)))
    video.release()


def remove_written(lines: list[str]) -> None:
    """What the tools would not overwrite."""
    for name in re.findall(r' -o (\S+)\.py', '\n'.join(lines)):
        for suffix in ('.py', '.pth'):
            Path(f'{name}{suffix}').unlink(missing_ok=True)
        shutil.rmtree(f'{name}_data', ignore_errors=True)


def main() -> None:
    data, page = sys.argv[1:]
    prepare(Path(data))
    (note,) = Path(page).parents[1].glob('bnet5/train/last_checkpoint')
    lines = list(commands(data, note.read_text().strip()))
    remove_written(lines)
    print(*lines, sep='\n')


if __name__ == '__main__':
    main()
