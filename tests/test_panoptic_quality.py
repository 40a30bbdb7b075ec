"""Panoptic quality against numbers of `torchmetrics` 1.9.0, which was run once on the same random pictures (with void pixels)."""
import json
import numpy as np, torch
from torchvision.io import write_png
from detlearn.data.panoptic import CocoPanopticDataset, id_to_rgb
from detlearn.evaluation.panoptic_quality import pq_counts, quality

# PQ, SQ, RQ by class
TORCHMETRICS = [[0.297816, 0.694904, 0.428571], [0.536345, 0.715127, 0.75], [0.813698, 0.813698, 1.0],
                [0.17029, 0.51087, 0.333333]]


def world(seed, n=3, size=24):
    "Labels and instances of the truth and of a shifted answer, and void pixels: classes 0, 1 are things, 2, 3 stuff."
    g = np.random.default_rng(seed)
    for _ in range(n):
        label, instance = np.full((size, size), 2), np.zeros((size, size), int)
        for k in range(1, 6):
            x, y = g.integers(0, size-6, 2); w, h = g.integers(4, 12, 2)
            label[y:y+h, x:x+w] = g.integers(0, 2); instance[y:y+h, x:x+w] = k
        label[:, :3] = 3; instance[:, :3] = 0
        said, which = np.roll(label, g.integers(0, 2), 1), np.roll(instance, g.integers(0, 2), 1)
        said = np.where(which < 0, 0, said); void = g.random((size, size)) < .05
        yield label, instance, said, which, void


def test_numbers_are_those_of_torchmetrics():
    counts = np.zeros((4, 4))
    for label, instance, said, which, void in world(0):
        numbers = np.where(void, 0, 1 + label + 10*np.where(label >= 2, 0, instance))
        segments = [dict(id=int(i), label=int((i-1) % 10), crowd=False) for i in np.unique(numbers) if i]
        counts += pq_counts(said + 1000*np.where(said >= 2, 0, which), numbers, segments, 4)
    assert np.abs(quality(counts).T - TORCHMETRICS).max() < 1e-5


def test_segment_numbers_may_repeat_from_image_to_image(tmp_path):
    "In COCO's panoptic files a segment's id is its own in its picture alone."
    for i in (1, 2): write_png(id_to_rgb(torch.full((40, 50), 7)), str(tmp_path/f'{i}.png'))
    segment = dict(id=7, category_id=3, bbox=[0, 0, 50, 40], area=2000, iscrowd=0)
    coco = dict(images=[dict(id=i, file_name=f'{i}.jpg', width=50, height=40) for i in (1, 2)],
                categories=[dict(id=3, name='car', isthing=1)],
                annotations=[dict(image_id=i, file_name=f'{i}.png', segments_info=[segment])
                             for i in (1, 2)])
    (tmp_path/'p.json').write_text(json.dumps(coco))
    data = CocoPanopticDataset(tmp_path/'p.json', [], seg_prefix=str(tmp_path), test_mode=True)
    # label 0, instance 1; nothing said
    right, wrong = np.full((40, 50), 1000), np.full((40, 50), 1)
    assert data.evaluate([dict(pan_results=right)]*2)['PQ'] == 100
    assert abs(data.evaluate([dict(pan_results=right), dict(pan_results=wrong)])['PQ'] - 100/1.5) < 1e-9
