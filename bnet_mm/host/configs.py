"""Our configs by name, from anywhere: ``_base_ = 'bnet_mm::faster_rcnn_r50_bnet5_1x.py'``.

mmengine resolves ``package::folder/config`` for a fixed list of packages only, wants the folder, and has no registry to
add to; so its two look-ups are wrapped here, for our prefix alone.
"""

from __future__ import annotations

import difflib
import functools
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.fileio import load

PREFIX = 'bnet_mm::'
PACKAGE = Path(__file__).resolve().parents[1]


def zoo_root() -> Path:
    """The folder of model-index.yml and configs/: beside the package in a checkout, inside it in a wheel."""
    return PACKAGE / '.mim' if (PACKAGE / '.mim').is_dir() else PACKAGE.parent


def find_config(name: str) -> str:
    """The path of one of our configs, named with or without ``bnet_mm::`` and ``.py``.

    Raises:
        FileNotFoundError: If there is none of that name; the message names the nearest.
    """
    stem = name.removeprefix(PREFIX).removesuffix('.py')
    path = zoo_root() / 'configs' / f'{stem}.py'
    if not path.is_file():
        close = difflib.get_close_matches(stem, [other.stem for other in path.parent.glob('*.py')], n=1)
        raise FileNotFoundError(
            f'bnet_mm has no config {stem}.py' + (f'; did you mean {close[0]}.py?' if close else '')
        )
    return str(path)


def released_models() -> dict[str, dict[str, Any]]:
    """Name of each config of which weights were released -> its entry in the zoo, with ``Weights`` and ``Results``."""
    metafiles = load(zoo_root() / 'model-index.yml')['Import']
    models = (model for metafile in metafiles for model in load(zoo_root() / metafile)['Models'])
    return {Path(model['Config']).stem: model for model in models if 'Weights' in model}


def find_weights(name: str) -> str:
    """The address of the released weights of one of our configs.

    Raises:
        ValueError: If none were released.
    """
    config = Path(find_config(name))
    models = released_models()
    if config.stem not in models:
        raise ValueError(f'no weights were released for {config.name}')
    return models[config.stem]['Weights']


def install() -> None:
    """Make mmengine's Config and hub understand ``bnet_mm::``. They go on as they did with any other name."""
    import mmengine.hub

    get_cfg_path, get_config = Config._get_cfg_path, mmengine.hub.get_config

    def get_our_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        # Without a scope, for the types in our configs are those of the library that they inherit from.
        return (find_config(cfg_path), None) if cfg_path.startswith(PREFIX) else get_cfg_path(cfg_path, filename)

    @functools.wraps(get_config)
    def get_our_config(cfg_path: str, pretrained: bool = False) -> Config:
        if not cfg_path.startswith(PREFIX):
            return get_config(cfg_path, pretrained)
        cfg = Config.fromfile(find_config(cfg_path))
        if pretrained:
            cfg.model_path = find_weights(cfg_path)
        return cfg

    Config._get_cfg_path = staticmethod(get_our_cfg_path)
    mmengine.hub.get_config = mmengine.hub.hub.get_config = get_our_config
