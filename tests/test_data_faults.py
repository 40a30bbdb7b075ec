"Bad input to the data stage: each fault gives a sentence that names the place, and is one test. All faulty files are made here."
import copy, json, warnings
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from detlearn.data.coco import CocoDataset
from detlearn.data.loader import LoaderError, build_dataloader, build_dataset
from detlearn.data.transforms import (Collect, DefaultFormatBundle, LoadAnnotations, LoadImageFromFile,
    Resize)

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT.parent/'shared'/'data'
GOOD = dict(images=[dict(id=1, file_name='a.png', width=64, height=48),
                    dict(id=2, file_name='b.png', width=64, height=48)],
            annotations=[dict(id=1, image_id=1, category_id=3, bbox=[5, 6, 20, 10], area=200, iscrowd=0),
                         dict(id=2, image_id=2, category_id=7, bbox=[0, 0, 30, 30], area=900,
                              iscrowd=0)],
            categories=[dict(id=3, name='person'), dict(id=7, name='dog')])
STEPS = [LoadImageFromFile(), LoadAnnotations(), Resize((64, 48)), DefaultFormatBundle(),
         Collect(['img', 'gt_bboxes', 'gt_labels', 'gt_bboxes_ignore'])]

@pytest.fixture
def coco(): return copy.deepcopy(GOOD)

@pytest.fixture
def folder(tmp_path):
    "Two good photos; `photo` is what they show."
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    for name in 'ab': Image.fromarray(pixels).save(tmp_path/f'{name}.png')
    return tmp_path

def make(folder, coco, **kw):
    (folder/'ann.json').write_text(coco if isinstance(coco, str) else json.dumps(coco))
    return CocoDataset('ann.json', STEPS, data_root=folder, **kw)

def fails(call, *words, error=ValueError):
    "The error is of this kind, and its one sentence holds these words."
    with pytest.raises(error) as e: call()
    text = str(e.value)
    for w in words: assert w in text, f'{w!r} is not in: {text}'
    return text

def test_good(folder, coco):
    data = make(folder, coco)
    assert data.CLASSES == ('person', 'dog') and not data.skipped
    assert data[0]['gt_bboxes'].tolist() == [[5, 6, 25, 16]] and data[1]['gt_labels'].tolist() == [1]

# ---- the annotation file
def test_annotation_file_missing(folder, coco):
    make(folder, coco)
    fails(lambda: CocoDataset('an.json', STEPS, data_root=folder), 'an.json: there is no such file',
          'holds ann.json', 'Check ann_file', error=FileNotFoundError)
    fails(lambda: CocoDataset('no/where/ann.json', STEPS, data_root=folder), 'Of its folder only',
          error=FileNotFoundError)

def test_annotation_file_cut_short(folder, coco):
    text = json.dumps(coco)
    for n in (1, 50, len(text)//2, len(text)-1):
        fails(lambda: make(folder, text[:n]), f'ann.json: the file is cut short: it ends at byte {n}')

def test_annotation_file_empty(folder): fails(lambda: make(folder, ''), 'the file is empty (0 bytes)')

def test_annotation_file_not_json(folder):
    fails(lambda: make(folder, 'image,x,y\na.png,1,2\n'), 'no JSON at byte 0', 'line 1')

@pytest.mark.parametrize('key', ['images', 'annotations', 'categories'])
def test_annotation_file_not_coco(folder, coco, key):
    del coco[key]
    fails(lambda: make(folder, coco), f'not COCO: /{key} is missing')

def test_annotation_file_is_a_result_file(folder):
    fails(lambda: make(folder, [dict(image_id=1, category_id=3, bbox=[0, 0, 1, 1], score=.5)]),
          'not COCO', 'detector writes as its results')

# ---- ids and names
@pytest.mark.parametrize('key, what', [('category_id', 'categories'), ('image_id', 'images')])
def test_unknown_id(folder, coco, key, what):
    coco['annotations'][1][key] = 99
    fails(lambda: make(folder, coco), f'/annotations/1/{key} is 99', f'/{what} has no such id')

def test_doubled_image_id(folder, coco):
    coco['images'][1]['id'] = 1
    fails(lambda: make(folder, coco), '/images/1/id is 1, and so is that of /images/0')

@pytest.mark.parametrize('name',
                         ['../a.png', 'x/../../a.png', '/etc/passwd', 'C:\\a.png', '..\\..\\a.png'])
def test_file_name_leaves_the_folder(folder, coco, name):
    coco['images'][1]['file_name'] = name
    fails(lambda: make(folder, coco), '/images/1/file_name', 'refused')

def test_classes_as_a_string(folder, coco):
    # the comma
    for classes in ('person', ('person')):
        fails(lambda: make(folder, coco, classes=classes), "classes=('person',)")

def test_unknown_class(folder, coco):
    fails(lambda: make(folder, coco, classes=('Persons',)), "'Persons'", "Did you mean 'person'?")

# ---- boxes
def test_box_of_zero_area(folder, coco, capsys):
    coco['annotations'] += [dict(id=3, image_id=1, category_id=3, bbox=[9, 9, 0, 10], area=0),
                            dict(id=4, image_id=1, category_id=3, bbox=[9, 9, 10, .5], area=5)]
    data = make(folder, coco)
    assert data.skipped == {'boxes without area': 2} and len(data.get_ann_info(0)['bboxes']) == 1
    assert 'ann.json: left out 2 boxes without area.' in capsys.readouterr().out

def test_box_outside_the_image(folder, coco, capsys):
    coco['annotations'].append(dict(id=3, image_id=1, category_id=3, bbox=[64, 9, 10, 10], area=100))
    data = make(folder, coco)
    assert data.skipped == {'boxes outside the image': 1} and len(data.get_ann_info(0)['bboxes']) == 1
    assert 'left out 1 box outside the image.' in capsys.readouterr().out
    assert len(data.coco['annotations']) == 3  # evaluation sees the file as it is

@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_box_nan(folder, coco, value):
    coco['annotations'][1]['bbox'][2] = value
    fails(lambda: make(folder, coco), 'ann.json: /annotations/1/bbox', 'NaN or infinity')

@pytest.mark.parametrize('box', [[1, 2, 3], [1, 2, 3, 4, 5], None, [1, 2, 3, 'x'], 7])
def test_box_not_four_numbers(folder, coco, box):
    coco['annotations'][1]['bbox'] = box
    fails(lambda: make(folder, coco), '/annotations/1/bbox is', 'expected four numbers')

def test_images_without_objects(folder, coco, capsys):
    del coco['annotations'][1]
    assert (len(make(folder, coco)) == 1
            and 'left out 1 image without objects.' in capsys.readouterr().out)
    kept = make(folder, coco, filter_empty_gt=False)
    assert len(kept) == 2 and kept[1]['gt_bboxes'].shape == (0, 4)
    assert len(make(folder, coco, test_mode=True)) == 2

def test_no_annotation_at_all(folder, coco):
    coco['annotations'] = []
    data = make(folder, coco, filter_empty_gt=False)
    assert data[0]['gt_bboxes'].shape == (0, 4) and data[0]['gt_labels'].dtype == torch.int64
    fails(lambda: build_dataloader(make(folder, coco), 2, 0), 'holds no image',
          '2 images without objects')

# ---- images
def test_image_missing(folder, coco):
    (folder/'b.png').rename(folder/'bb.png')
    fails(lambda: make(folder, coco)[1], 'b.png: there is no such file', 'bb.png', 'img_prefix',
          error=FileNotFoundError)

def test_image_truncated(folder, coco):
    data = (folder/'b.png').read_bytes(); (folder/'b.png').write_bytes(data[:len(data)//2])
    fails(lambda: make(folder, coco)[1], 'b.png: the image cannot be decoded',
          f'{len(data)//2} bytes are cut short')

def test_jpeg_truncated(folder, coco):
    coco['images'][1]['file_name'] = 'b.jpg'
    Image.open(folder/'b.png').save(folder/'b.jpg')
    data = (folder/'b.jpg').read_bytes(); (folder/'b.jpg').write_bytes(data[:len(data)//2])
    fails(lambda: make(folder, coco)[1], 'b.jpg: the image cannot be decoded')

def test_image_of_zero_bytes(folder, coco):
    (folder/'b.png').write_bytes(b'')
    fails(lambda: make(folder, coco)[1], 'b.png: the image file is empty (0 bytes)')

def test_image_is_a_web_page(folder, coco):
    (folder/'b.png').write_text('<html>404</html>')
    fails(lambda: make(folder, coco)[1], 'b.png: the image cannot be decoded', 'no image')

def test_image_grayscale(folder, coco):
    grey = Image.open(folder/'b.png').convert('L'); grey.save(folder/'b.png')
    image = make(folder, coco)[1]['img']
    assert image.shape == (3, 48, 64) and (image == torch.from_numpy(np.array(grey))).all()

def test_image_rgba(folder, coco):
    pixels = np.array(Image.open(folder/'b.png'))
    Image.fromarray(np.dstack([pixels, np.full((48, 64), 9, np.uint8)])).save(folder/'b.png')
    # alpha is dropped
    assert (make(folder, coco)[1]['img'] == torch.from_numpy(pixels).permute(2, 0, 1)).all()

def test_image_16_bit(folder, coco):
    pixels = np.array(Image.open(folder/'b.png').convert('L'))
    Image.fromarray(pixels.astype(np.uint16)*256 + 200).save(folder/'b.png')
    # the upper byte is kept
    assert (make(folder, coco)[1]['img'] == torch.from_numpy(pixels)).all()

def test_image_turned_by_exif(folder, coco):
    note = Image.Exif(); note[0x112] = 6
    photo = Image.open(folder/'b.png'); photo.save(folder/'b.png', exif=note)
    with pytest.warns(UserWarning, match='says 64 x 48 pixels .* the photo has 48 x 64.*EXIF'):
        out = make(folder, coco)[1]
    assert out['img_metas']['ori_shape'] == (64, 48, 3)
    coco['images'][1].update(width=48, height=64)          # annotated as seen: no warning, and upright
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*annotation file says')
        raw = LoadImageFromFile()(
            dict(img_info=dict(filename=str(folder/'b.png'), width=48, height=64)))['img']
    assert (raw == torch.from_numpy(np.array(photo.transpose(Image.Transpose.ROTATE_270))).permute(
        2, 0, 1)).all()

def test_mask_missing(folder, coco):
    data = make(folder, coco); data.pipeline[1:2] = [LoadAnnotations(with_mask=True)]
    fails(lambda: data[0], 'a.png: object 0 has no segmentation', 'with_mask=False')

# ---- in a worker
@pytest.mark.parametrize('workers', [0, 2])
def test_failure_in_a_worker_is_a_sentence(folder, coco, workers):
    (folder/'b.png').write_bytes(b'')
    text = fails(lambda: list(build_dataloader(make(folder, coco), 2, workers)),
                 'b.png: the image file is empty', error=LoaderError)
    assert '\n' not in text and 'Traceback' not in text

def test_samples_without_annotations_make_a_batch(folder, coco):
    data = make(folder, coco, test_mode=True)
    data.pipeline = [LoadImageFromFile(), DefaultFormatBundle(), Collect(['img'])]
    batch = next(iter(build_dataloader(data, 2, 0, shuffle=False)))
    assert (batch.images.shape == (2, 3, 48, 64) and batch.gt.boxes.shape == (2, 0, 4)
            and not batch.gt.real.any())

# ---- real photos
@pytest.mark.parametrize('name, images, boxes',
                         [('bccd/train.json', 205, 2804), ('bccd/test.json', 72, None)])
def test_real_photos(name, images, boxes):
    if not PHOTOS.is_dir():
        pytest.skip(f'SKIPPED LOUDLY: the real photos are not here ({PHOTOS}); nothing is said '
                    'about them')
    cfg = dict(type='CocoDataset', ann_file=str(PHOTOS/name), img_prefix=str(PHOTOS/'bccd/images'),
               pipeline=STEPS)
    data = build_dataset(cfg, dict(test_mode=True))
    assert len(data) == images and data.CLASSES == ('RBC', 'WBC', 'Platelets')
    if boxes: assert len(data.coco['annotations']) == boxes
    used = sum(len(data.get_ann_info(i)['bboxes']) + len(data.get_ann_info(i)['bboxes_ignore'])
               for i in range(len(data)))
    assert used + sum(data.skipped.values()) == len(data.coco['annotations'])
    assert data[0]['img'].shape[0] == 3 and data[0]['img_metas']['ori_shape'] == (480, 640, 3)
