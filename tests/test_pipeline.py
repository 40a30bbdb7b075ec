"""Rules that every step of a pipeline keeps, whichever page it is from.

Objects: boxes, labels and masks agree in number, labels stay on their boxes, boxes lie inside, images without objects work.
Geometry: `matrix` leads every point there and back, and says where boxes and masks are. Randomness: numpy's seed alone.
"""
import copy, json, warnings
import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torch.utils._python_dispatch import TorchDispatchMode
from detlearn.core.registry import PIPELINES
from detlearn.core.shapes import ToyShapes, to_coco
from detlearn.data.affine import warp
from detlearn.data.loader import build_dataloader, build_dataset
from detlearn.data.strip import toy_sample
from detlearn.data.transforms import move_boxes, plain

TOYS = ToyShapes(12, size=(96, 80), seed=3, min_objects=3, max_objects=5, sizes=(12, 36), overlap=.05,
                 noise=3)
EMPTY = toy_sample(ToyShapes(1, size=(96, 80), empty=1.)[0])
NORM = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
COLOUR = [dict(type='PhotoMetricDistortion'), dict(type='YOLOXHSVRandomAug'),
          dict(type='CutOut', n_holes=(1, 4), cutout_ratio=(.2, .2)),
          dict(type='ColorTransform', level=9, prob=1.),
          dict(type='BrightnessTransform', level=8, prob=1.),
          dict(type='ContrastTransform', level=8, prob=1.), dict(type='EqualizeTransform', prob=1.),
          *(dict(type='Corrupt', corruption=c, severity=3)
            for c in ('shot_noise', 'glass_blur', 'snow', 'elastic_transform', 'jpeg_compression'))]
STRAIGHT = [  # boxes stay boxes: the matrix moves them exactly
    dict(type='Resize', img_scale=[(64, 60), (160, 120)]),
    dict(type='Resize', img_scale=(50, 90), keep_ratio=False),
    dict(type='Resize', img_scale=[(64, 60), (80, 80), (160, 120)], multiscale_mode='value'),
    dict(type='Resize', img_scale=(100, 90), ratio_range=(.5, 2.)),
    dict(type='RandomFlip', flip_ratio=1.),
    dict(type='RandomFlip', flip_ratio=[.3, .3, .4], direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='Pad', size_divisor=32), dict(type='Pad', size=(100, 120)),
    dict(type='Pad', pad_to_square=True),
    dict(type='RandomCrop', crop_size=(50, 60), allow_negative_crop=True),
    dict(type='RandomCrop', crop_size=(40, 70), crop_type='absolute_range', allow_negative_crop=True),
    dict(type='RandomCrop', crop_size=(.6, .7), crop_type='relative', allow_negative_crop=True),
    dict(type='RandomCrop', crop_size=(.3, .4), crop_type='relative_range', allow_negative_crop=True),
    dict(type='MinIoURandomCrop'), dict(type='Expand', ratio_range=(1, 3), prob=1.),
    dict(type='RandomCenterCropPad', crop_size=(60, 70), **NORM),
    dict(type='RandomCenterCropPad', crop_size=None, ratios=None, border=None, test_mode=True, **NORM),
    dict(type='RandomShift', shift_ratio=1.),
    dict(type='Translate', level=3, prob=1., max_translate_offset=60)]
SLANTED = [dict(type='RandomAffine', scaling_ratio_range=(.7, 1.4)),
           dict(type='RandomAffine', border=(-10, -8), skip_filter=False),
           dict(type='Rotate', level=6, prob=1.), dict(type='Shear', level=8, prob=1.),
           dict(type='Shear', level=8, prob=1., direction='vertical')]
MIXED = [dict(type='Mosaic', img_scale=(60, 70)), dict(type='MixUp', img_scale=(80, 96)),
         dict(type='CopyPaste')]
ONE_PHOTO = COLOUR + STRAIGHT + SLANTED
name = lambda cfg: '-'.join(str(v) for v in cfg.values() if isinstance(v, (str, tuple, int)))[:60]
every = pytest.mark.parametrize('cfg', ONE_PHOTO, ids=name)
geometric = pytest.mark.parametrize('cfg', STRAIGHT + SLANTED, ids=name)


def resolved_config(name):
    from test_zoo import resolved
    return copy.deepcopy(resolved(name))


def numbered(i):
    "A toy photo whose labels are the numbers of its objects."
    s = toy_sample(TOYS[i], crowds=[[60, 50, 90, 75]])
    return dict(s, gt_labels=torch.arange(len(s['gt_labels'])))


def run(cfg, seed, results):
    "One step, built and called with a seed; it must not change what it was given."
    step = PIPELINES.build(copy.deepcopy(cfg))
    before = {k: v.clone() for k, v in results.items() if torch.is_tensor(v)}
    np.random.seed(seed); torch.manual_seed(99*seed + 1)
    out = step(results)
    for k, v in before.items():
        assert torch.equal(results[k], v), f'{cfg["type"]} has changed {k} of its input'
    return out


def check(out, who):
    n = {k: len(out[k]) for k in ('gt_bboxes', 'gt_labels', 'gt_masks') if k in out}
    assert len(set(n.values())) == 1, f'{who}: {n}'
    h, w = out['img'].shape[-2:]
    for key in ('gt_bboxes', 'gt_bboxes_ignore'):
        b = plain(out[key])
        assert (b.shape[1:] == (4,) and (b >= 0).all()
                and (b <= torch.tensor([w, h, w, h])).all()), f'{who}: {key} outside'
        assert (b[:, 2:] >= b[:, :2]).all()
    assert (out['gt_masks'].shape[-2:] == (h, w) and out['gt_masks'].dtype == torch.uint8
            and out['gt_labels'].dtype == torch.int64)


@every
def test_objects_stay_together(cfg):
    for i in range(6):
        out = run(cfg, i, numbered(i))
        if out is None: continue
        check(out, cfg['type'])
        if cfg['type'] != 'PhotoMetricDistortion': assert out['img'].dtype == torch.uint8
        if cfg['type'] not in ('Pad', 'RandomCenterCropPad') and 'img_shape' in out:
            assert tuple(out['img_shape'][:2]) == out['img'].shape[-2:]
        for label, mask, box in zip(out['gt_labels'].tolist(), plain(out['gt_masks']),
                                    plain(out['gt_bboxes'])):
            # pixels of a mask lie in the box with the same place
            y, x = torch.nonzero(mask, as_tuple=True)
            if len(x):
                assert (x.min() >= box[0] - 1.5 and x.max() + 1 <= box[2] + 1.5
                        and y.min() >= box[1] - 1.5 and y.max() + 1 <= box[3] + 1.5)


@every
def test_no_objects(cfg):
    out = run(cfg, 0, dict(EMPTY))
    if cfg['type'] != 'RandomCrop': assert out is not None
    if out is not None: check(out, cfg['type']); assert not len(out['gt_labels'])


@every
def test_a_seed_repeats(cfg):
    a, b = run(cfg, 5, numbered(2)), run(cfg, 5, numbered(2))
    for k in ('img', 'gt_bboxes', 'gt_labels', 'gt_masks', 'matrix'): assert torch.equal(a[k], b[k]), k


@geometric
def test_there_and_back(cfg):
    "Points come back to where they were; boxes and masks are where the matrix says."
    for i in range(6):
        before = numbered(i); out = run(cfg, i, before)
        if out is None: continue
        matrix, back = out['matrix'], torch.linalg.inv(out['matrix'])
        points = torch.cat([torch.rand(20, 2)*80, torch.ones(20, 1)], 1)
        torch.testing.assert_close(points @ matrix.T @ back.T, points, atol=1e-3, rtol=0)
        h, w = out['img'].shape[-2:]
        boxes = plain(before['gt_bboxes'])[out['gt_labels']]
        inside = move_boxes(boxes, matrix).clamp(min=0).minimum(torch.tensor([w, h, w, h]))
        torch.testing.assert_close(plain(out['gt_bboxes']), inside, atol=1e-2, rtol=0)
        if cfg in STRAIGHT:
            uncut = ((inside > 0) & (inside < torch.tensor([w, h, w, h]))).all(-1)
            torch.testing.assert_close(move_boxes(plain(out['gt_bboxes']), back)[uncut], boxes[uncut],
                                       atol=2e-2, rtol=0)
        ys, xs = torch.meshgrid(torch.arange(h) + .5, torch.arange(w) + .5, indexing='ij')
        # where each pixel comes from
        origin = torch.stack([xs, ys, torch.ones_like(xs)], -1) @ back.T
        x, y = [origin[..., k].floor().long() for k in (0, 1)]
        # not on the edge of two old pixels
        clear = ((origin[..., :2] - origin[..., :2].round()).abs() > 1e-3).all(-1)
        known = (x >= 0) & (x < 96) & (y >= 0) & (y < 80)
        masks = plain(before['gt_masks'])[out['gt_labels']][:, y.clamp(0, 79), x.clamp(0, 95)]*known
        wrong = ((masks != plain(out['gt_masks'])) & clear).sum()
        assert not wrong, f'{cfg["type"]}: {wrong} pixels of masks are not where the matrix says'


KEEPS_PIXELS = [c for c in STRAIGHT if c['type'] in ('RandomFlip', 'Pad', 'RandomCrop',
                                                     'MinIoURandomCrop', 'Expand', 'RandomCenterCropPad',
                                                     'RandomShift', 'Translate')]


@pytest.mark.parametrize('cfg',
                         KEEPS_PIXELS + [dict(type='Resize', img_scale=(192, 160)),
                                         dict(type='Resize', img_scale=(288, 160), keep_ratio=False)],
                                         ids=name)
def test_masks_come_back(cfg):
    "Through the inverse matrix a mask is what it was, wherever the photo can still be seen."
    for i in range(6):
        before = numbered(i); out = run(cfg, i, before)
        if out is None: continue
        back = torch.linalg.inv(out['matrix'])
        seen = plain(warp(tv_tensors.Mask(torch.ones(1, *out['img'].shape[-2:], dtype=torch.uint8)),
                          back, (80, 96)))[0]
        again = plain(warp(out['gt_masks'], back, (80, 96)))
        assert torch.equal(again, plain(before['gt_masks'])[out['gt_labels']]*seen), cfg['type']


def test_proposals_reach_the_batch(tmp_path):
    "The zoo's pipeline of Fast R-CNN, from a proposal file to a batch."
    files = to_coco(TOYS, tmp_path)
    np.savez(tmp_path/'p.npz', *[t['boxes'].numpy() for t in TOYS])
    cfg = resolved_config('fast_rcnn/fast_rcnn_r50_fpn_1x_coco.py')
    train = dict(cfg['data']['train'], ann_file=str(files), img_prefix=str(tmp_path/'images'),
                 proposal_file=str(tmp_path/'p.npz'), classes=None)
    train.pop('data_root', None)
    loader = build_dataloader(build_dataset(train), 3, 0, seed=0)
    batch = next(iter(loader))
    proposals = batch.extras['proposals']
    assert proposals.shape[::2] == (3, 4)
    # they were the objects, and have gone the same way
    for b, (boxes, real) in enumerate(zip(batch.gt.boxes, batch.gt.real)):
        torch.testing.assert_close(proposals[b, :int(real.sum())], boxes[real], atol=1e-2, rtol=0)


@pytest.mark.parametrize('cfg', MIXED, ids=name)
def test_photos_that_mix(cfg):
    n = 3 if cfg['type'] == 'Mosaic' else 1
    for i in range(6):
        given = dict(numbered(i), mix_results=[numbered(j) for j in range(i+1, i+1+n)])
        out = run(cfg, i, given); check(out, cfg['type'])
        assert out['img'].dtype == torch.uint8
        again = run(cfg, i, given)
        for k in ('img', 'gt_bboxes', 'gt_labels', 'gt_masks'): assert torch.equal(out[k], again[k])
    out = run(cfg, 0, dict(EMPTY, mix_results=[dict(EMPTY)]*n)); check(out, cfg['type'])
    assert not len(out['gt_labels'])
    with pytest.raises(ValueError, match='further photos'): run(cfg, 0, numbered(0))


def steps_of_the_zoo():
    "Every distinct step of every config of the zoo, with the config that it is first in."
    from test_zoo import resolved, root
    found = {}
    def steps(some, where):
        for s in some:
            if isinstance(s, (list, tuple)): steps(s, where)
            elif isinstance(s, dict) and 'type' in s:
                found.setdefault(repr(s), (s, where))
                # its names are not ours
                for inner in ('transforms', 'policies'):
                    steps(s.get(inner, ()) if s['type'] != 'Albu' else (), where)
    def walk(value, where):
        if isinstance(value, dict):
            for k, v in value.items():
                (steps(v, where) if 'pipeline' in str(k) and isinstance(v, (list, tuple))
                 else walk(v, where))
        elif isinstance(value, (list, tuple)):
            for v in value: walk(v, where)
    configs = sorted(p.relative_to(root()).as_posix() for p in root().rglob('*.py')
                     if '_base_' not in p.parts)
    for config in configs: walk(resolved(config), config)
    return found.values()


try: ZOO_STEPS = list(steps_of_the_zoo())
# the wheel with the configs is missing: the next test says so
except pytest.fail.Exception: ZOO_STEPS = []
SIGNATURES = {}
for cfg, where in ZOO_STEPS:
    SIGNATURES.setdefault((cfg['type'], *sorted(k for k in cfg if k != 'type')), []).append((cfg, where))


def test_the_zoo_has_its_steps():
    from test_zoo import root
    assert (root().is_dir() and len(ZOO_STEPS) >= 150 and len(SIGNATURES) >= 60
            and len({s[0] for s in SIGNATURES}) >= 30)


@pytest.mark.parametrize('signature', SIGNATURES, ids='-'.join)
def test_step_of_the_zoo_builds(signature):
    "Each step with the settings of every config of the zoo that names these settings; none is missing."
    for cfg, where in SIGNATURES[signature]:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            if cfg['type'] == 'Albu':  # a package of its own, which may not be there: then a sentence
                try: PIPELINES.build(copy.deepcopy(cfg))
                except ImportError as e: assert 'pip install albumentations' in str(e)
            else: assert PIPELINES.build(copy.deepcopy(cfg)) is not None, where


class LargeResults(TorchDispatchMode):
    "Operations that make a new tensor of at least so many numbers."
    def __init__(self, least): super().__init__(); self.least, self.seen = least, []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {a.untyped_storage().data_ptr() for a in args if torch.is_tensor(a)}
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(
            out) and out.numel() >= self.least and out.untyped_storage().data_ptr() not in given:
            self.seen.append(out.dtype)
        return out


def test_pixels_are_written_four_times():
    "Scaled and mirrored as bytes, then made float once, then given room once: what a photo costs is counted, not timed."
    sample = toy_sample(ToyShapes(1, size=(320, 240), seed=1, min_objects=2)[0], masks=False)
    steps = [dict(type='Resize', img_scale=(400, 300)), dict(type='RandomFlip', flip_ratio=1.),
             dict(type='Normalize', **NORM),
             dict(type='Pad', size_divisor=32), dict(type='DefaultFormatBundle'),
             dict(type='Collect', keys=['img', 'gt_bboxes', 'gt_labels'])]
    steps = [PIPELINES.build(c) for c in steps]
    with LargeResults(3*300*400) as count:
        for step in steps: sample = step(sample)
    assert sample['img'].shape == (3, 320, 416)
    assert count.seen == [torch.uint8, torch.uint8, torch.float32, torch.float32], count.seen
