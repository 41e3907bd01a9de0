"""The data sets of the configs, where they come from and what is missing: python tools/prepare_data.py NAME [ROOT]

Prints the sources, the commands that fetch, unpack and convert (the hosts' own, with their paths on this machine) and
the folders that the configs read. It changes and downloads nothing.

--check looks at the folder instead: the numbers of files against the published ones, every listed file, labels in
range, and some files of each part opened (images whole, masks and their values, objects of COCO, frames of videos). It
names what is missing and the command that makes it, and exits with 1. --any-size takes subsets and toy data as well.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from pycocotools.coco import COCO

IMAGES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')  # mmpretrain's
SHOWN = 10  # problems, and paths in a problem, before only their number is given


class Sample(NamedTuple):
    """An image or video and what is known of it; paths are relative to the root."""

    file: str
    label: int | None = None
    mask: str | None = None
    coco: COCO | None = None
    coco_id: int | None = None


@dataclass(frozen=True)
class DataSet:
    """One data set. In the commands {root} is filled in, and {mmseg} and {mmaction} with the .mim folders of these."""

    root: str  # where the configs look
    about: str
    commands: tuple[tuple[str, str], ...]  # the paths (patterns) that a command makes, and the command
    classes: int
    parts: dict[str, tuple[int, Callable[[Path], list[Sample]]]]  # published number of samples, and their reader
    look: Callable[[Path, Sample, int], None]  # opens one sample; raises ValueError with what is wrong


def list_files(root: Path, folder: str, suffix: str | tuple[str, ...]) -> list[str]:
    """Files below a folder with this end of their names, relative to the root; without hidden ones, as in mmengine."""
    if not (root / folder).is_dir():
        raise FileNotFoundError(None, 'no such folder', str(root / folder))
    return sorted(
        f'{os.path.relpath(where, root)}/{name}'
        for where, _, names in os.walk(root / folder, followlinks=True)
        for name in names
        if name.lower().endswith(suffix) and not name.startswith('.')
    )


def coco_file(folder: str, annotations: str, root: Path) -> list[Sample]:
    from pycocotools.coco import COCO

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(root / annotations))
        for objects in coco.imgToAnns.values():
            for one in objects:
                if one['category_id'] not in coco.cats or one['image_id'] not in coco.imgs:
                    raise ValueError(f'annotation {one["id"]} has an image_id or category_id that is not in the file')
        return [Sample(f'{folder}/{one["file_name"]}', coco=coco, coco_id=number) for number, one in coco.imgs.items()]
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f'{root / annotations} is no COCO annotation file: {type(error).__name__} {error}') from error


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().split('\n')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is no text: {error}') from error


def cityscapes_part(part: str, root: Path) -> list[Sample]:
    """Images and masks of the same stem; a stem that only one of them has is a sample too, to be found missing."""
    image, mask = f'leftImg8bit/{part}/{{}}_leftImg8bit.png', f'gtFine/{part}/{{}}_gtFine_labelTrainIds.png'
    stems = set()
    for path in (image, mask):
        folder, suffix = path.split('/{}')
        files = list_files(root, folder, suffix.lower())
        stems |= {file[len(folder) + 1 : -len(suffix)] for file in files}
    return [Sample(image.format(stem), mask=mask.format(stem)) for stem in sorted(stems)]


def voc_part(part: str, masks: str, root: Path) -> list[Sample]:
    stems = [line.strip() for line in read_lines(root / f'VOC2012/ImageSets/Segmentation/{part}.txt') if line.strip()]
    return [Sample(f'VOC2012/JPEGImages/{stem}.jpg', mask=f'VOC2012/{masks}/{stem}.png') for stem in stems]


def labelled_list(names: str, folder: str, root: Path) -> list[Sample]:
    """Lines of file and label."""
    samples = []
    for line in filter(None, map(str.strip, read_lines(root / names))):
        file, _, label = line.rpartition(' ')
        if not file or not label.isdecimal():
            raise ValueError(f'{root / names}: not a file and a label: {line!r}')
        samples.append(Sample(f'{folder}/{file}', int(label)))
    return samples


def class_folders(part: str, root: Path) -> list[Sample]:
    """A folder per class, numbered in the order of their names."""
    files = [file for file in list_files(root, part, IMAGES) if file.count('/') > 1]
    labels = {name: label for label, name in enumerate(sorted({file.split('/')[1] for file in files}))}
    return [Sample(file, labels[file.split('/')[1]]) for file in files]


def imagenet_part(part: str, root: Path) -> list[Sample]:
    """As mmpretrain's ImageNet reads it: the list in meta/ if there is one, the class folders otherwise."""
    if (root / f'meta/{part}.txt').exists():
        return labelled_list(f'meta/{part}.txt', part, root)
    return class_folders(part, root)


def pixels(path: Path) -> np.ndarray:
    """All pixels of an image, palette images as their indices."""
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except Exception as error:  # decoders raise whatever they like
        raise ValueError(f'{path} cannot be decoded: {error}') from error


def look_at_image(root: Path, sample: Sample, classes: int) -> None:
    pixels(root / sample.file)


def look_at_mask(root: Path, sample: Sample, classes: int) -> None:
    image, mask = pixels(root / sample.file), pixels(root / sample.mask)
    if mask.shape != image.shape[:2]:
        raise ValueError(f'{root / sample.mask} has the shape {mask.shape}, not {image.shape[:2]} as its image')
    if wrong := sorted(set(np.unique(mask).tolist()) - {*range(classes), 255}):
        raise ValueError(f'{root / sample.mask} has the labels {wrong}, beyond 0 to {classes - 1} and 255 (ignored)')


def look_at_objects(root: Path, sample: Sample, classes: int) -> None:
    """Size of the image, and every object's mask."""
    height, width = pixels(root / sample.file).shape[:2]
    listed = sample.coco.imgs[sample.coco_id]
    if (height, width) != (listed['height'], listed['width']):
        raise ValueError(
            f'{root / sample.file} is {width} x {height}, in the annotations {listed["width"]} x {listed["height"]}'
        )
    for one in sample.coco.imgToAnns[sample.coco_id]:
        try:
            sample.coco.annToMask(one)
        except Exception as error:  # pycocotools raises bare Exceptions
            raise ValueError(f'the segmentation of annotation {one["id"]}, {sample.file}: {error}') from error


def look_at_video(root: Path, sample: Sample, classes: int) -> None:
    """Three frames, with the decoder of the configs; not the last one, which OpenCV may miss in a sound file."""
    video = cv2.VideoCapture(str(root / sample.file))
    frames = max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT)))
    for position in (0, frames // 3, frames * 2 // 3):
        video.set(cv2.CAP_PROP_POS_FRAMES, position)
        if not video.read()[0]:
            raise ValueError(f'{root / sample.file} cannot be decoded at frame {position} of {frames}')


def fetch(url: str, unpack: str) -> str:
    """The command that fetches an archive into the root and unpacks it."""
    return f'wget -cP {{root}} {url} && ' + unpack.replace('ARCHIVE', f'{{root}}/{url.rpartition("/")[2]}')


UNZIP = 'unzip -qnd {root} ARCHIVE'
TORCHVISION = (
    'python -c "import sys, bnet_mm.compat; from torchvision.datasets import ImageNet; ImageNet(*sys.argv[1:])" {root}'
)

# The numbers: COCO's annotation files; the Cityscapes paper (arXiv 1604.01685); the segmentation table of VOC2012's
# development kit, and for aug mmseg's converter, which insists on 1464 + 9118 = 10582; trainlist01.txt and
# testlist01.txt of UCF-101; mmpretrain's ImageNet class; for Imagenette the catalogue of TensorFlow Datasets.
DATA_SETS = dict(
    coco=DataSet(
        root='data/coco',
        about="""\
COCO 2017, from cocodataset.org, "Download": train images (18 GB), val images (1 GB), train/val annotations.

train2017/*.jpg                              118287
val2017/*.jpg                                5000
annotations/instances_{train,val}2017.json""",
        commands=(
            ('train2017*', fetch('http://images.cocodataset.org/zips/train2017.zip', UNZIP)),
            ('val2017*', fetch('http://images.cocodataset.org/zips/val2017.zip', UNZIP)),
            ('annotations*', fetch('http://images.cocodataset.org/annotations/annotations_trainval2017.zip', UNZIP)),
        ),
        classes=80,
        parts=dict(
            train=(118287, partial(coco_file, 'train2017', 'annotations/instances_train2017.json')),
            val=(5000, partial(coco_file, 'val2017', 'annotations/instances_val2017.json')),
        ),
        look=look_at_objects,
    ),
    cityscapes=DataSet(
        root='data/cityscapes',
        about="""\
Cityscapes, from www.cityscapes-dataset.com after registration: leftImg8bit_trainvaltest.zip (11 GB) and
gtFine_trainvaltest.zip. csDownload asks for the login.

leftImg8bit/train/<city>/*_leftImg8bit.png   2975
leftImg8bit/val/<city>/*_leftImg8bit.png     500
gtFine/{train,val}/<city>/*_labelTrainIds.png, with classes 0 to 18 and 255 (ignored)""",
        commands=(
            ('', 'pip install cityscapesscripts'),
            (
                'leftImg8bit* gtFine*',
                'csDownload -d {root} leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip && '
                "unzip -qnd {root} {root}/'*_trainvaltest.zip'",
            ),
            ('gtFine*_labelTrainIds.png', 'python {mmseg}/tools/dataset_converters/cityscapes.py {root} --nproc 8'),
        ),
        classes=19,
        parts=dict(train=(2975, partial(cityscapes_part, 'train')), val=(500, partial(cityscapes_part, 'val'))),
        look=look_at_mask,
    ),
    voc=DataSet(
        root='data/VOCdevkit',
        about="""\
PASCAL VOC 2012, from host.robots.ox.ac.uk/pascal/VOC/voc2012: VOCtrainval_11-May-2012.tar (2 GB), augmented by SBD
(Semantic Boundaries Dataset), from Berkeley: benchmark.tgz (1.4 GB). mmseg's converter needs scipy.

VOC2012/JPEGImages/*.jpg
VOC2012/SegmentationClass/*.png, with classes 0 to 20 and 255 (ignored)
VOC2012/SegmentationClassAug/*.png
VOC2012/ImageSets/Segmentation/train.txt     1464
VOC2012/ImageSets/Segmentation/aug.txt       9118 more to train on, with SegmentationClassAug; 10582 in all
VOC2012/ImageSets/Segmentation/val.txt       1449""",
        commands=(
            (
                'VOC2012*',
                fetch(
                    'http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar',
                    'tar xf ARCHIVE -C {root} --strip-components 1',
                ),
            ),
            (
                '',
                fetch(
                    'https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz',
                    'tar xf ARCHIVE -C {root}',
                ),
            ),
            (
                'VOC2012/SegmentationClassAug* VOC2012/ImageSets/Segmentation/aug.txt',
                'python {mmseg}/tools/dataset_converters/voc_aug.py {root} {root}/benchmark_RELEASE --nproc 8',
            ),
        ),
        classes=21,
        parts=dict(
            train=(1464, partial(voc_part, 'train', 'SegmentationClass')),
            aug=(9118, partial(voc_part, 'aug', 'SegmentationClassAug')),
            val=(1449, partial(voc_part, 'val', 'SegmentationClass')),
        ),
        look=look_at_mask,
    ),
    ucf101=DataSet(
        root='data/ucf101',
        about="""\
UCF-101, split 1, from www.crcv.ucf.edu: UCF101.rar (7 GB) and UCF101TrainTestSplits-RecognitionTask.zip. If wget
does not trust the site's certificate: mmaction2's own script fetches them with --no-check-certificate.

videos/<Class>/v_<Class>_gXX_cYY.avi         13320
ucf101_train_split_1_videos.txt              9537 lines of file and class, 0 to 100
ucf101_val_split_1_videos.txt                3783""",
        commands=(
            (
                'videos*',
                fetch(
                    'https://www.crcv.ucf.edu/datasets/human-actions/ucf101/UCF101.rar',
                    'unrar x ARCHIVE {root}/ && mv {root}/UCF-101 {root}/videos',
                ),
            ),
            (
                '',
                fetch(
                    'https://www.crcv.ucf.edu/wp-content/uploads/2019/03/UCF101TrainTestSplits-RecognitionTask.zip',
                    'unzip -jd {root}/annotations ARCHIVE',
                ),
            ),
            (
                'ucf101_*.txt',
                'PYTHONPATH={mmaction} python {mmaction}/tools/data/build_file_list.py ucf101 data/ucf101/videos '
                '--level 2 --format videos',
            ),
        ),
        classes=101,
        parts=dict(
            train=(9537, partial(labelled_list, 'ucf101_train_split_1_videos.txt', 'videos')),
            val=(3783, partial(labelled_list, 'ucf101_val_split_1_videos.txt', 'videos')),
        ),
        look=look_at_video,
    ),
    imagenet=DataSet(
        root='data/imagenet',
        about="""\
ImageNet (ILSVRC 2012), from image-net.org after registration: ILSVRC2012_img_train.tar (138 GB),
ILSVRC2012_img_val.tar (6 GB) and ILSVRC2012_devkit_t12.tar.gz; put all three into the folder. torchvision (with
scipy) compares their checksums and unpacks them, unless train/ or val/ is there already.

train/<wnid>/*.JPEG                          1281167 in 1000 folders
val/<wnid>/*.JPEG                            50000 in 1000 folders
meta/{train,val}.txt: not needed; where they are, these lists of file and class (0 to 999) are read, not the folders""",
        commands=(('train*', f'{TORCHVISION} train'), ('val*', f'{TORCHVISION} val')),
        classes=1000,
        parts=dict(train=(1281167, partial(imagenet_part, 'train')), val=(50000, partial(imagenet_part, 'val'))),
        look=look_at_image,
    ),
    imagenette=DataSet(
        root='data/imagenette2',
        about="""\
Imagenette, version 2, full size, from github.com/fastai/imagenette: imagenette2.tgz (1.5 GB).

train/<wnid>/*.JPEG                          9469 in 10 folders
val/<wnid>/*.JPEG                            3925 in 10 folders""",
        commands=(
            (
                '*',
                fetch(
                    'https://s3.amazonaws.com/fast-ai-imageclas/imagenette2.tgz',
                    'tar xf ARCHIVE -C {root} --strip-components 1',
                ),
            ),
        ),
        classes=10,
        parts=dict(train=(9469, partial(class_folders, 'train')), val=(3925, partial(class_folders, 'val'))),
        look=look_at_image,
    ),
)


def mim_folder(library: str) -> str:
    spec = find_spec(library)
    return (
        shlex.quote(str(Path(spec.origin).parent / '.mim')) if spec and spec.origin else f'<folder of {library}>/.mim'
    )


def fill_in(command: str, root: Path) -> str:
    """The command for this root and the libraries installed here."""
    return command.format(root=shlex.quote(str(root)), mmseg=mim_folder('mmseg'), mmaction=mim_folder('mmaction'))


def describe(name: str, root: Path) -> str:
    data = DATA_SETS[name]
    commands = [f'mkdir -p {shlex.quote(str(root))}', *(fill_in(command, root) for _, command in data.commands)]
    if root.resolve() != Path(data.root).resolve():
        commands.insert(1, f'mkdir -p data && ln -sn {shlex.quote(str(root.resolve()))} {data.root}')
    check = f'python {sys.argv[0]} {name} {shlex.quote(str(root))} --check'
    return f'{data.about}\n\nThe configs look in {data.root}. From where training is started:\n\n' + '\n'.join(
        [*commands, check]
    )


def check(data: DataSet, root: Path, any_size: bool, opened: int) -> list[str]:
    """What is wrong, a sentence each, what is missing first; prints what was looked at."""
    parts: dict[str, list[Sample]] = {}
    missing: set[str] = set()
    problems = []
    for part, (_, read) in data.parts.items():
        try:
            parts[part] = read(root)
        except FileNotFoundError as error:
            missing.add(outermost_missing(root, os.path.relpath(error.filename, root)))
        except (OSError, ValueError) as error:
            problems.append(str(error))
    for part, samples in parts.items():
        if not any_size or not samples:
            problems += check_numbers(part, samples, data.parts[part][0], data.classes)
        files = (file for sample in samples for file in (sample.file, sample.mask) if file)
        absent = {file for file in files if not os.path.isfile(f'{root}/{file}')}
        missing |= {outermost_missing(root, file) for file in absent}
        whole = [sample for sample in samples if not absent & {sample.file, sample.mask}]
        chosen = np.unique(np.linspace(0, len(whole) - 1, max(0, min(opened, len(whole)))).astype(int))
        for number in chosen:
            try:
                data.look(root, whole[number], data.classes)
            except ValueError as error:
                problems.append(str(error))
        print(f'{part}: {len(samples)} samples, {len(absent)} files missing, {len(chosen)} samples opened')
    return [*name_missing(data, root, missing), *problems, *check_lists(parts, data.classes)]


def outermost_missing(root: Path, file: str) -> str:
    """The first folder that is missing on the way to the file, or the file."""
    path = root / file
    while path.parent != root and not path.parent.exists():
        path = path.parent
    return path.relative_to(root).as_posix()


def check_numbers(part: str, samples: list[Sample], count: int, classes: int) -> Iterator[str]:
    found = [(len(samples), count, 'samples')]
    labels = samples[0].coco.cats if samples and samples[0].coco else {sample.label for sample in samples} - {None}
    if labels:
        found.append((len(labels), classes, 'classes'))
    for number, published, what in found:
        if number != published:
            yield f'{part} has {number} {what}, the published data set {published} (--any-size takes fewer)'


def check_lists(parts: dict[str, list[Sample]], classes: int) -> Iterator[str]:
    """Nothing twice, labels in range, and the same label for a class folder everywhere."""
    part_of: dict[str, str] = {}
    label_of: dict[str, int] = {}
    for part, samples in parts.items():
        for sample in samples:
            if sample.file in part_of:
                yield f'{sample.file}, listed in {part}, is in {part_of[sample.file]} already'
            part_of[sample.file] = part
            if sample.label is None:
                continue
            if sample.label >= classes:
                yield f'{sample.file} has the label {sample.label} in {part}, beyond 0 to {classes - 1}'
            _, *folder, _ = sample.file.split('/')
            if folder and sample.label != label_of.setdefault(folder[0], sample.label):
                yield f'{sample.file} has the label {sample.label} in {part}, its class {label_of[folder[0]]} before'


def name_missing(data: DataSet, root: Path, missing: set[str]) -> Iterator[str]:
    """One sentence for what the same command makes; the last command that fits is the one."""
    by_command: dict[str, list[str]] = {}
    for path in sorted(missing):
        fits = [command for makes, command in data.commands if any(fnmatch(path, one) for one in makes.split())]
        by_command.setdefault(fits[-1] if fits else '', []).append(str(root / path))
    for command, paths in by_command.items():
        more = f' and {len(paths) - SHOWN} more' if len(paths) > SHOWN else ''
        made_by = f'; made by: {fill_in(command, root)}' if command else ''
        yield f'missing: {", ".join(paths[:SHOWN])}{more}{made_by}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=DATA_SETS)
    parser.add_argument('root', nargs='?', type=Path, help='its folder; default: where the configs look')
    parser.add_argument('--check', action='store_true', help='look at the folder instead of printing how to make it')
    parser.add_argument('--any-size', action='store_true', help='do not compare numbers with the published ones')
    parser.add_argument('--open', type=int, default=20, metavar='N', help='open N files of each part (20)')
    args = parser.parse_args()
    data = DATA_SETS[args.name]
    root = args.root or Path(data.root)
    if not args.check:
        if args.any_size:
            parser.error('--any-size goes with --check')
        return print(describe(args.name, root))
    if not root.is_dir():
        sys.exit(f'error: {root} is not a folder; how to make it: python {sys.argv[0]} {args.name} {root}')
    try:
        problems = check(data, root, args.any_size, args.open)
    except ModuleNotFoundError as error:
        sys.exit(f'error: {args.name} cannot be checked without {error.name}: pip install {error.name}')
    for problem in problems[:SHOWN]:
        print(f'error: {problem}', file=sys.stderr)
    if problems:
        sys.exit(f'error: {root} is not complete: {len(problems)} problems')
    print(f'{root} is complete' + ('' if args.any_size else ', with the published numbers'))


if __name__ == '__main__':
    main()
