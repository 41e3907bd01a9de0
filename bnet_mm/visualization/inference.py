"""One image or video through a model by its config's own test pipeline, with the host's drawing of what comes out."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, VISUALIZERS, DefaultScope
from mmengine.visualization import Visualizer

from bnet_mm.engine.runner import build_model, load_complete
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


def trained(cfg: Config, checkpoint: str) -> tuple[Duck, dict]:
    """The model of a config with a checkpoint that has every tensor of it, in evaluation mode, and classes and palette.

    Raises:
        UserError: If the checkpoint cannot be read or lacks a tensor.
    """
    model = build_model(cfg)
    meta = load_complete(model, checkpoint).get('meta', {})
    model.eval()
    return model, dataset_meta(cfg, meta)


def dataset_meta(cfg: Config, meta: dict) -> dict:
    """Classes and palette: what the checkpoint says, also in the form of mmdetection 2, else the config's data set."""
    given = meta.get('dataset_meta') or meta
    given = {key.lower(): value for key, value in given.items() if key.lower() in ('classes', 'palette') and value}
    if 'classes' in given:
        return given
    dataset = _dataset(cfg)
    with DATASETS.switch_scope_and_registry(cfg.default_scope) as registry:
        known = getattr(registry.get(dataset['type']), 'METAINFO', {})
    return {**known, **dataset.get('metainfo', {})}


def _dataset(cfg: Config) -> dict:
    return next(node for _, node in dicts_in(cfg.test_dataloader.to_dict()) if 'pipeline' in node)


def infer(model: Duck, cfg: Config, source: str | np.ndarray) -> Seen:
    """Run the model, in evaluation mode, on one input, as the test of its config would.

    Args:
        source: An image or video file; or an image (H, W, 3), BGR, as a frame of a video is.
    """
    import mmcv

    size = () if isinstance(source, str) else source.shape[:2]
    load = 'LoadAnnotations' if isinstance(source, str) else ('LoadAnnotations', 'LoadImageFromFile')
    start: dict[str, Any]
    if cfg.default_scope == 'mmaction':
        start = dict(filename=source, label=-1, start_index=0, modality='RGB')
    elif isinstance(source, str):
        start = dict(img_path=source, img_id=0)
    else:
        start = dict(img=source, img_path='', img_id=0, img_shape=size, ori_shape=size)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.no_grad():
        steps = Compose([step for step in _dataset(cfg)['pipeline'] if not step['type'].endswith(load)])
        data = steps(start)
        batch = model.data_preprocessor(pseudo_collate([data]), False)
        sample = model(**batch, mode='predict')[0].cpu()
    frames = data['inputs'].reshape(-1, *data['inputs'].shape[-3:]).permute(0, 2, 3, 1).numpy()
    high, wide = batch['inputs'].shape[-2:]
    share = frames.shape[1] / high, frames.shape[2] / wide
    if cfg.default_scope in WHOLE:
        whole = mmcv.imread(source, channel_order='rgb') if isinstance(source, str) else source[..., ::-1]
        return Seen(np.ascontiguousarray(whole)[None], share, sample)
    bgr = cfg.default_scope != 'mmaction'
    return Seen(np.ascontiguousarray(frames[..., ::-1] if bgr else frames), share, sample)


def drawn(cfg: Config, seen: Seen, dataset_meta: dict, score: float = 0.3) -> np.ndarray:
    """The picture (H, W, 3) with boxes, masks or class as the host draws them; of a recogniser, the first frame.

    What a segmentor without a palette saw stays as it is.

    Args:
        dataset_meta: Classes and palette, as in a checkpoint's ``meta``.
        score: Boxes below it are left out.
    """
    picture = seen.pictures[0]
    if cfg.default_scope == 'mmseg' and not dataset_meta.get('palette'):
        return picture
    if cfg.default_scope == 'mmaction':
        label = int(seen.sample.pred_label)
        text = f'{class_name(dataset_meta, label)}: {seen.sample.pred_score[label]:.2f}'
        plain = Visualizer(image=picture)
        plain.draw_texts(text, np.array([5, 5]), colors='white', bboxes=dict(facecolor='black', alpha=0.8))
        return plain.get_image()
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        visualizer = VISUALIZERS.build(dict(type=cfg.visualizer.type, name='drawn'))
    visualizer.dataset_meta = dataset_meta
    if cfg.default_scope == 'mmpretrain':
        return visualizer.visualize_cls(picture, seen.sample, classes=dataset_meta.get('classes'), draw_gt=False)
    options = dict(pred_score_thr=score) if cfg.default_scope == 'mmdet' else dict(with_labels=False)
    visualizer.add_datasample('', picture, seen.sample, draw_gt=False, **options)
    return visualizer.get_image()


def class_name(dataset_meta: dict, label: int) -> str:
    """The name of a class, or its number where no names are known."""
    classes = dataset_meta.get('classes') or ()
    return str(classes[label]) if label < len(classes) else str(label)
