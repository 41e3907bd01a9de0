"""One image or video through a model by its config's own test pipeline, with the host's drawing of what comes out."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import VISUALIZERS, DefaultScope

from bnet_mm.layers.arguments import Duck
from bnet_mm.surgery.config import dicts_in

WHOLE = ('mmdet', 'mmseg')  # their predictions are in pixels of the file, not of what the pipeline made of it


class Seen(NamedTuple):
    """What one file gave.

    pictures: (N, H, W, 3), RGB: the file, for a classifier what the pipeline cropped from it, for a recogniser frames.
    share: Of height and width of the model's input, what is picture and not padding.
    sample: The host's data sample with the predictions.
    """

    pictures: np.ndarray
    share: tuple[float, float]
    sample: Any


def infer(model: Duck, cfg: Config, path: str) -> Seen:
    """Run the model, in evaluation mode, on an image or video file, as the test of its config would."""
    import mmcv

    pipeline = next(node['pipeline'] for _, node in dicts_in(cfg.test_dataloader.to_dict()) if 'pipeline' in node)
    video = dict(filename=path, label=-1, start_index=0, modality='RGB')
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.no_grad():
        steps = Compose([step for step in pipeline if not step['type'].endswith('LoadAnnotations')])
        data = steps(video if cfg.default_scope == 'mmaction' else dict(img_path=path, img_id=0))
        batch = model.data_preprocessor(pseudo_collate([data]), False)
        sample = model(**batch, mode='predict')[0]
    frames = data['inputs'].reshape(-1, *data['inputs'].shape[-3:]).permute(0, 2, 3, 1).numpy()
    high, wide = batch['inputs'].shape[-2:]
    share = frames.shape[1] / high, frames.shape[2] / wide
    if cfg.default_scope in WHOLE:
        return Seen(mmcv.imread(path, channel_order='rgb')[None], share, sample)
    bgr = cfg.default_scope != 'mmaction'
    return Seen(np.ascontiguousarray(frames[..., ::-1] if bgr else frames), share, sample)


def drawn(cfg: Config, seen: Seen, dataset_meta: dict, score: float = 0.3) -> np.ndarray:
    """The picture (H, W, 3) with boxes, masks or class as the host draws them.

    A recogniser's frames stay as they are, and what a segmentor without a palette saw.

    Args:
        dataset_meta: Classes and palette, as in a checkpoint's ``meta``.
        score: Boxes below it are left out.
    """
    picture = seen.pictures[0]
    if cfg.default_scope == 'mmaction' or (cfg.default_scope == 'mmseg' and not dataset_meta.get('palette')):
        return picture
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        visualizer = VISUALIZERS.build(dict(type=cfg.visualizer.type, name='drawn'))
    visualizer.dataset_meta = dataset_meta
    if cfg.default_scope == 'mmpretrain':
        return visualizer.visualize_cls(picture, seen.sample, classes=dataset_meta.get('classes'), draw_gt=False)
    options = dict(pred_score_thr=score) if cfg.default_scope == 'mmdet' else dict(with_labels=False)
    visualizer.add_datasample('', picture, seen.sample.cpu(), draw_gt=False, **options)
    return visualizer.get_image()
