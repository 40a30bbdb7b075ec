"""LVIS' rule against numbers of the package `lvis` 0.5.3, which was run once on the same random worlds (with `np.float` put back)."""
import numpy as np, pytest
from pycocotools import mask as codec
from detlearn.evaluation.lvis_eval import evaluate_lvis

NAMES = 'AP AP50 AP75 APs APm APl APr APc APf AR ARs ARm ARl'.split()
LVIS = {
    ('bbox', 300): [0.352916913, 0.594303298, 0.399165755, 0.434798486, 0.413032788, 0.48799505,
                    0.378175037, 0.440449213, 0.240126487, 0.683498677, 0.68, 0.690277778, 0.675],
    ('bbox', 10): [0.290072832, 0.506680285, 0.310784293, 0.327329562, 0.363250039, 0.2375, 0.315884351,
                   0.361394492, 0.192939651, 0.436772487, 0.378666667, 0.517261905, 0.3],
    ('segm', 300): [0.239643367, 0.524420153, 0.169115568, 0.287645238, 0.223303169, 0.5, 0.252791464,
                    0.323615854, 0.142522784, 0.573511905, 0.616898148, 0.515277778, 0.5],
    ('segm', 10): [0.18417606, 0.436890933, 0.104998297, 0.218519169, 0.177382524, 0.0, 0.194241376,
                   0.246575545, 0.11171126, 0.315244709, 0.317361111, 0.329166667, 0.0],
}


def outline(box): x, y, w, h = box; return [[x, y, x+w, y, x+w, y+h]]


def world(seed, segm, images=12, classes=6, dets=40):
    "Images with labelled, absent, half labelled and unvisited classes; detections near objects and anywhere."
    g = np.random.default_rng(seed)
    def box():
        w, h = np.exp(g.uniform(np.log(8), np.log(180), 2)); x, y = g.uniform(0, 400, 2)
        return [round(float(v), 2) for v in (x, y, w, h)]
    cats = [dict(id=c+3, name=f'c{c}', frequency='rcf'[c % 3]) for c in range(classes)]
    ims, anns, rows = [], [], []
    for i in range(images):
        pos = set(int(c)+3 for c in g.choice(classes, g.integers(1, 4), replace=False))
        rest = [c['id'] for c in cats if c['id'] not in pos]
        neg = [c for c in rest if g.random() < .4]; nel = [c for c in pos if g.random() < .4]
        ims.append(dict(id=i+1, width=640, height=640, neg_category_ids=neg,
                        not_exhaustive_category_ids=nel))
        for c in sorted(pos):
            for _ in range(g.integers(1, 4)):
                b = box()
                anns.append(dict(id=len(anns)+1, image_id=i+1, category_id=c, bbox=b,
                                 area=b[2]*b[3]/(2 if segm else 1), segmentation=outline(b)))
        mine = [a for a in anns if a['image_id'] == i+1]
        for _ in range(dets):
            if g.random() < .5:
                a = mine[g.integers(len(mine))]; b = np.array(a['bbox']); c = a['category_id']
                b = [float(v) for v in b + g.normal(0, .08, 4)*b[[2, 3, 2, 3]]]
                b[2:] = [max(v, 2) for v in b[2:]]
            else: b, c = box(), int(g.integers(classes))+3
            rows.append(dict(image_id=i+1, category_id=c, bbox=[round(v, 2) for v in b],
                             score=round(float(g.random()), 3)))
    if segm:
        rows = [dict(image_id=r['image_id'], category_id=r['category_id'], score=r['score'],
                     segmentation=codec.merge(codec.frPyObjects(outline(r['bbox']), 640, 640)))
                     for r in rows]
    return dict(images=ims, annotations=anns, categories=cats), rows


@pytest.mark.parametrize('iou_type,limit', LVIS)
def test_numbers_are_those_of_lvis(iou_type, limit):
    coco, rows = world(0, iou_type == 'segm')
    found = evaluate_lvis(coco, rows, iou_type=iou_type, max_dets=limit)
    ours = [found[k if k[:2] == 'AP' else f'{k}@{limit}'] for k in NAMES]
    assert np.abs(np.array(ours) - LVIS[iou_type, limit]).max() < 1e-8
