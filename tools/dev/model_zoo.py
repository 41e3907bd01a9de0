"""The model zoo as data: python tools/dev/model_zoo.py [--check] [--costs]

configs/metafile_*.yml, which model-index.yml lists, are the one source. By hand: which printed row a config is, what is
printed there, what is measured, the released weights. This tool fills in what the configs say (data, schedule, batch,
pretrained file) and what is counted (parameters, FLOPs), and writes the tables in README.md and configs/README.md that
stand between <!-- zoo: FAMILY REGEX --> and <!-- /zoo -->: the models of metafile_FAMILY.yml whose names match.

Parameters are the trainable ones. FLOPs are counted by tools/dev/cost_table.py, with the rule of the printed row
where the config has one and with mmcv's elsewhere: detectors at 1280 x 800 with 1000 proposals, 100 for the mask head,
segmentors at their crop size without auxiliary head, one frame of a video, one image of 224 x 224.

--check writes nothing and fails if anything is stale. --costs counts every model again (over a minute) instead of only
those without figures.
"""

from __future__ import annotations

from checkout import ROOT  # first: is this the right Python?

# isort: split

import argparse
import re
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from bnet_mm.cli import UserError, run_tool
from cost_table import LIBRARIES, count_config, count_flops, printed_rows

CONFIGS = ROOT / 'configs'
PAGES = ('README.md', 'configs/README.md')
NOT_A_RESULT = {'faster_rcnn_r18_bn_demo', 'faster_rcnn_r18_bnet5_demo'}
BY_HAND = ('Norm', 'Printed In', 'Backbone File')
TASKS = {library: task for task, library in LIBRARIES.items()}
SIZES = {'mmdet': (800, 1280), 'mmpretrain': (224, 224), 'mmaction': (224, 224)}
DATA = {
    'CocoDataset': 'COCO', 'CityscapesDataset': 'Cityscapes', 'PascalVOCDataset': 'Pascal VOC 2012 + Aug',
    'VideoDataset': 'UCF101', 'ImageNet': 'ImageNet-1k', 'CustomDataset': 'Imagenette',
}  # fmt: skip
HEADLINES = {
    'box AP': 'box AP', 'mask AP': 'mask AP', 'mIoU': 'mIoU', 'Top 1 Accuracy': 'top-1', 'Top 5 Accuracy': 'top-5',
}  # fmt: skip
SHORT = ('config', 'norm', *HEADLINES.values(), 'parameters, M', 'GFLOPs', 'weights')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing, fail if a file is stale')
    parser.add_argument('--costs', action='store_true', help='count the parameters and FLOPs of every model again')
    args = parser.parse_args()
    families = load_families()
    check_names(families)
    makers = {}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for model in chain(*families.values()):
            model['Metadata'] = complete(model, args.costs)
            makers.setdefault(model['Metadata'].get('Backbone File'), model['Name'])
    texts = {metafile(family): metafile_text(family, models) for family, models in families.items()}
    texts |= {ROOT / page: page_text(page, families, makers) for page in PAGES}
    stale = [path for path, text in texts.items() if path.read_text() != text]
    if args.check and stale:
        names = ', '.join(str(path.relative_to(ROOT)) for path in stale)
        raise UserError(f'stale: {names}; python tools/dev/model_zoo.py writes them')
    for path in stale:
        path.write_text(texts[path])
        print(f'written: {path.relative_to(ROOT)}')
    print(f'{sum(map(len, families.values()))} models in {len(families)} metafiles')


def metafile(family: str) -> Path:
    return CONFIGS / f'metafile_{family}.yml'


def load_families() -> dict[str, list[dict]]:
    """The models of each metafile, in the order of model-index.yml."""
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    names = [re.fullmatch(r'configs/metafile_(\w+)\.yml', path)[1] for path in index['Import']]
    return {name: yaml.safe_load(metafile(name).read_text())['Models'] for name in names}


def check_names(families: dict[str, list[dict]]) -> None:
    """Every config is one model, and its name is that of the file.

    Raises:
        UserError: If not.
    """
    names = [model['Name'] for model in chain(*families.values())]
    configs = {path.stem for path in CONFIGS.glob('*.py')} - NOT_A_RESULT
    problems = {
        'twice in the metafiles': sorted({name for name in names if names.count(name) > 1}),
        'in no metafile': sorted(configs - set(names)),
        'in a metafile, but no config': sorted(set(names) - configs),
    }
    if found := [f'{what}: {", ".join(which)}' for what, which in problems.items() if which]:
        raise UserError('; '.join(found))


def complete(model: dict, recount: bool) -> dict:
    """The model's metadata with what its config says, and with its costs."""
    config = f'{model["Name"]}.py'
    cfg = Config.fromfile(CONFIGS / config)
    metadata = {key: model['Metadata'][key] for key in BY_HAND if key in model['Metadata']}
    backbone = cfg.model.backbone
    if pretrained := backbone.get('pretrained') or (backbone.get('init_cfg') or {}).get('checkpoint'):
        local = '://' not in pretrained or pretrained.startswith('http')
        metadata['Pretrained'] = pretrained.rpartition('/')[2] if local else pretrained
    loader, dataset, times = cfg.train_dataloader, cfg.train_dataloader.dataset, 1
    if dataset.type == 'RepeatDataset':
        dataset, times = dataset.dataset, dataset.times
    dataset = dataset.datasets[0] if dataset.type == 'ConcatDataset' else dataset
    metadata['Training Data'] = DATA[dataset.type]
    if 'max_iters' in cfg.train_cfg:
        metadata['Iterations'] = cfg.train_cfg.max_iters
    else:
        metadata['Epochs'] = cfg.train_cfg.max_epochs * times
    metadata['Batch Size'] = cfg.get('auto_scale_lr', {}).get('base_batch_size', loader.batch_size)
    metadata['Training Resources'] = f'{metadata["Batch Size"] // loader.batch_size} GPUs'
    costs = {key: model['Metadata'].get(key) for key in ('Parameters', 'FLOPs')}
    if recount or None in costs.values():
        costs = dict(zip(costs, count(config, cfg)))
    return metadata | costs


def count(config: str, cfg: Config) -> tuple[int, int]:
    """Trainable parameters and FLOPs."""
    rule = next((row['rule'] for row in printed_rows() if row['config'] == config), 'mmcv')
    size = SIZES.get(cfg.default_scope) or tuple(cfg.model.data_preprocessor.size)
    parameters, flops = count_config(config, TASKS[cfg.default_scope], size, rule)
    if head := cfg.model.get('roi_head', {}).get('mask_head'):
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            flops += count_flops(HundredRegions(MODELS.build(head)), 'classification', (14, 14), rule)
    return parameters, round(flops)


class HundredRegions(nn.Module):
    """What a mask head sees of one image, as mmdetection 2.x counted it."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, image: Tensor) -> Tensor:
        return self.head(image.new_empty(100, self.head.in_channels, *image.shape[2:]))


def metafile_text(family: str, models: list[dict]) -> str:
    """The metafile with its comment at the top, in the one format that this tool writes."""
    comment = re.match(r'(#.*\n)*', metafile(family).read_text())[0]
    return comment + yaml.safe_dump({'Models': models}, sort_keys=False, width=200)


def page_text(page: str, families: dict[str, list[dict]], makers: dict[str, str]) -> str:
    """The page with its tables written anew."""

    def replace(match: re.Match) -> str:
        models = [model for model in families[match[2]] if re.search(match[3], model['Name'])]
        lines = table([table_row(model, page, makers) for model in models], page == 'README.md')
        return '\n'.join([match[1], '', *lines, '', match[4]])

    return re.sub(r'(<!-- zoo: (\w+) (\S+) -->).*?(<!-- /zoo -->)', replace, (ROOT / page).read_text(), flags=re.S)


def table(rows: list[dict], short: bool) -> Iterator[str]:
    """A table in Markdown, without the columns that are empty everywhere."""
    columns = [name for name in rows[0] if any(row[name] for row in rows) and (name in SHORT or not short)]
    for cells in (columns, ['---'] * len(columns), *([row[name] for name in columns] for row in rows)):
        yield f'| {" | ".join(cells)} |'


def table_row(model: dict, page: str, makers: dict[str, str]) -> dict[str, str]:
    metadata = model['Metadata']
    pretrained = metadata.get('Pretrained', '')
    maker = makers.get(pretrained) if pretrained else None
    gpus = int(metadata['Training Resources'].split()[0])
    folder = 'configs/' if page == 'README.md' else ''
    return {
        'config': f'`{folder}{model["Name"]}.py`',
        'printed in': printed_in(metadata.get('Printed In', ''), model['In Collection']),
        'norm': metadata['Norm'],
        **{title: metric(model, name) for name, title in HEADLINES.items()},
        'parameters, M': f'{metadata["Parameters"] / 1e6:.2f}',
        'GFLOPs': f'{metadata["FLOPs"] / 1e9:#.4g}',
        'schedule': f'{metadata["Epochs"]} epochs' if 'Epochs' in metadata else f'{metadata["Iterations"]} iterations',
        'GPUs x images': f'{gpus} x {metadata["Batch Size"] // gpus}',
        'pretrained file': pretrained and f'`{pretrained}`' + (f' from `{maker}`' if maker else ''),
        'makes file': f'`{metadata["Backbone File"]}`' if 'Backbone File' in metadata else '',
        'weights': f'[released]({model["Weights"]})' if 'Weights' in model else '',
    }


def metric(model: dict, name: str) -> str:
    """A figure with a star if it is quoted; a result that has been measured here says when and how in ``Measured``."""
    return ', '.join(
        f'{result["Metrics"][name]}' + (' measured' if 'Measured' in result else '*')
        for result in model.get('Results', [])
        if name in result['Metrics']
    )


def printed_in(rows: str, collection: str) -> str:
    """'Table 1, row 3; Table 5, row 1; README model zoo 1, row 1' of BNET as 'Tables 1, 5; BNET README'."""
    numbers = re.findall(r'Table (\d+)', rows)
    tables = f'Table{"s" * (len(numbers) > 1)} {", ".join(numbers)}' if numbers else ''
    readme = f'{collection} README' if 'README' in rows else ''
    section = ''.join(re.findall(r'Section [\d.]+', rows))
    return '; '.join(filter(None, (tables, readme, section)))


if __name__ == '__main__':
    run_tool(main)
