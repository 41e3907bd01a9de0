"""The data sets of the configs: where they come from, their layout, their published numbers."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from bnet_mm.datasets.readers import (
    Sample,
    cityscapes_part,
    class_folders,
    coco_file,
    imagenet_part,
    labelled_list,
    look_at_image,
    look_at_mask,
    look_at_objects,
    look_at_video,
    voc_part,
)


@dataclass(frozen=True)
class DataSet:
    """One data set. In the commands {root} is filled in, and {mmseg} and {mmaction} with the .mim folders of these."""

    root: str  # where the configs look
    about: str
    commands: tuple[tuple[str, str], ...]  # the paths (patterns) that a command makes, and the command
    classes: int
    parts: dict[str, tuple[int, Callable[[Path], list[Sample]]]]  # published number of samples, and their reader
    look: Callable[[Path, Sample, int], None]  # opens one sample; raises ValueError with what is wrong


def fetch(url: str, unpack: str) -> str:
    """The command that fetches an archive into the root and unpacks it."""
    return f'wget -cP {{root}} {url} && ' + unpack.replace('ARCHIVE', f'{{root}}/{url.rpartition("/")[2]}')


UNZIP = 'unzip -qnd {root} ARCHIVE'
TORCHVISION = (
    'python -c "import sys, bnet_mm.host.compat; from torchvision.datasets import ImageNet; '
    'ImageNet(*sys.argv[1:])" {root}'
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
