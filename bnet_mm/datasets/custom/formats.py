"""Which labels a user's folder has, and which of them a config can train on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from bnet_mm.cli import UserError
from bnet_mm.datasets.custom.folder import Folder, Found
from bnet_mm.datasets.custom.labels import annotation_files, read_coco, read_voc, read_yolo, yolo_labels
from bnet_mm.datasets.custom.masks import mask_pairs, read_masks
from bnet_mm.messages import first_of


class Format(NamedTuple):
    """A form of labels.

    is_there: Whether a folder has any.
    of: What they are: objects or masks.
    """

    is_there: Callable[[Folder], bool]
    read: Callable[[Folder], Found]
    of: str = 'objects'


FORMATS = {
    'coco': Format(lambda folder: bool(annotation_files(folder)), read_coco),
    'voc': Format(lambda folder: bool(folder.ending('.xml')), read_voc),
    'yolo': Format(
        lambda folder: bool({file for image in folder.images for file in yolo_labels(image)} & set(folder.files)),
        read_yolo,
    ),
    'masks': Format(lambda folder: any(mask_pairs(folder).values()), read_masks, 'masks'),
}


def read(folder: Folder, name: str, needed: str) -> Found:
    """The labels of a folder, in the format of this name or, for 'auto', the one that it has.

    Args:
        needed: What the config trains on: 'boxes', 'objects' (boxes with masks) or 'masks'.

    Raises:
        UserError: If the folder has no such labels, or several, or the config trains on others.
    """
    if not folder.images:
        raise UserError(f'{folder.root} has no images')
    kind = 'masks' if needed == 'masks' else 'objects'
    there = [one for one, form in FORMATS.items() if form.is_there(folder)] if name == 'auto' else [name]
    fit = [one for one in there if FORMATS[one].of == kind]
    if not there:
        raise UserError(f'{folder.root} has {len(folder.images)} images and no labels of {", ".join(FORMATS)}')
    if not fit:
        raise UserError(f'the labels are {first_of(there)}, and the config trains on {needed}')
    if len(fit) > 1:
        raise UserError(f'{folder.root} has labels of {" and ".join(fit)}: name one of them with --format')
    found = FORMATS[fit[0]].read(folder)
    known = {sample.file for sample in found.samples}
    if kind == 'objects' and (others := [image for image in folder.images if image not in known]):
        found.notes['no labels, so left out'] += others
    if needed == 'objects':
        boxes = [s.labels for s in found.samples if any(not one.get('segmentation') for one in s.objects)]
        if boxes:
            found.problems.append(
                f'the config trains on boxes with masks, and these have boxes only: {first_of(boxes)}'
            )
    return found
