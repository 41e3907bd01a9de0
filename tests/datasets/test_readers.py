"""The files of a data set, on folders made by hand; test_checker.py has whole toy data sets."""

import cv2
import numpy as np
import pytest
from PIL import Image

from bnet_mm.datasets.readers import (
    Sample,
    cityscapes_part,
    class_folders,
    imagenet_part,
    labelled_list,
    list_files,
    look_at_image,
    look_at_mask,
    look_at_video,
    pixels,
    voc_part,
)


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_list_files(tmp_path):
    touch(tmp_path, 'a/2.PNG', 'a/b/1.png', 'a/.hidden.png', 'a/c.txt', 'other/3.png')
    assert list_files(tmp_path, 'a', '.png') == ['a/2.PNG', 'a/b/1.png']
    with pytest.raises(FileNotFoundError) as error:
        list_files(tmp_path, 'no', '.png')
    assert error.value.filename == str(tmp_path / 'no')


def test_cityscapes(tmp_path):
    """An image and a mask belong together, and one without the other is listed all the same."""
    stems = [f'train/ulm/ulm_00000{i}_000019' for i in range(3)]
    touch(tmp_path, *(f'leftImg8bit/{stem}_leftImg8bit.png' for stem in stems[:2]))
    touch(tmp_path, *(f'gtFine/{stem}_gtFine_labelTrainIds.png' for stem in stems[1:]))
    found = cityscapes_part('train', tmp_path)
    assert [(sample.file, sample.mask) for sample in found] == [
        (f'leftImg8bit/{stem}_leftImg8bit.png', f'gtFine/{stem}_gtFine_labelTrainIds.png') for stem in stems
    ]


def test_voc(tmp_path):
    touch(tmp_path, 'VOC2012/ImageSets/Segmentation/val.txt')
    (tmp_path / 'VOC2012/ImageSets/Segmentation/val.txt').write_text('b\n\n a \n')
    assert voc_part('val', 'Masks', tmp_path) == [
        Sample(f'VOC2012/JPEGImages/{stem}.jpg', mask=f'VOC2012/Masks/{stem}.png') for stem in 'ba'
    ]


def test_lists_and_folders_of_classes(tmp_path):
    touch(tmp_path, 'val/n2/x.JPEG', 'val/n1/y z.JPEG', 'val/loose.JPEG')
    want = [Sample('val/n1/y z.JPEG', 0), Sample('val/n2/x.JPEG', 1)]
    assert class_folders('val', tmp_path) == imagenet_part('val', tmp_path) == want
    (tmp_path / 'meta').mkdir()
    (tmp_path / 'meta/val.txt').write_text('n1/y z.JPEG 5\n\nn2/x.JPEG 6\n')
    assert imagenet_part('val', tmp_path) == [Sample('val/n1/y z.JPEG', 5), Sample('val/n2/x.JPEG', 6)]
    for line in ('n1/x.JPEG', '3', 'n1/x.JPEG -1', 'n1/x.JPEG one'):
        (tmp_path / 'meta/val.txt').write_text(f'n1/y.JPEG 0\n{line}\n')
        with pytest.raises(ValueError, match='not a file and a label'):
            labelled_list('meta/val.txt', 'val', tmp_path)


def test_images_and_masks(tmp_path):
    image = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    Image.fromarray(image).save(tmp_path / 'image.png')
    assert np.array_equal(pixels(tmp_path / 'image.png'), image)
    palette = Image.fromarray(np.full((5, 7), 3, np.uint8), mode='P')
    palette.putpalette([i // 3 for i in range(768)])
    palette.save(tmp_path / 'mask.png')
    sample = Sample('image.png', mask='mask.png')
    look_at_image(tmp_path, sample, 4)
    look_at_mask(tmp_path, sample, 4)
    with pytest.raises(ValueError, match=r'has the labels \[3\], beyond 0 to 2'):
        look_at_mask(tmp_path, sample, 3)
    Image.fromarray(np.full((5, 8), 255, np.uint8)).save(tmp_path / 'mask.png')
    with pytest.raises(ValueError, match=r'has the shape \(5, 8\), not \(5, 7\)'):
        look_at_mask(tmp_path, sample, 3)
    (tmp_path / 'image.png').write_bytes((tmp_path / 'image.png').read_bytes()[:40])
    with pytest.raises(ValueError, match='image.png cannot be decoded'):
        look_at_image(tmp_path, sample, 4)


def test_videos(tmp_path):
    video = cv2.VideoWriter(str(tmp_path / 'v.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 5, (32, 32))
    for i in range(9):
        video.write(np.full((32, 32, 3), 20 * i, np.uint8))
    video.release()
    look_at_video(tmp_path, Sample('v.avi'), 1)
    (tmp_path / 'v.avi').write_bytes(b'no video')
    with pytest.raises(ValueError, match='v.avi cannot be decoded at frame 0 of 0'):
        look_at_video(tmp_path, Sample('v.avi'), 1)
