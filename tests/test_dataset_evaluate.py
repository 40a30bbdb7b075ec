"""`dataset.evaluate` against published numbers, and the way from a config through the hook to the right rule."""
import json
from pathlib import Path
import numpy as np, pytest, torch
from detlearn.apis.test import build_test_loader, dataset_of, measure
from detlearn.core.config import ConfigDict
from detlearn.core.shapes import ToyShapes, to_coco
from detlearn.core.structures import Detections
from detlearn.data.coco import CocoDataset
from detlearn.data.custom_dataset import CustomDataset
from detlearn.data.voc import VOCDataset, write_voc
from detlearn.engine.evaluation_hooks import EvalHook, evaluate_model

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent/'shared'/'data'
here = pytest.mark.skipif(not DATA.is_dir(), reason=f'SKIPPED LOUDLY: the real data sets are not here '
                                                    f'({DATA}); nothing is said about them')
QUIET = dict(logger='silent')


@here
def test_cocos_own_detections_have_the_published_numbers():
    folder = DATA/'coco_eval_reference'
    data = CocoDataset(folder/'padilla_sampled_gts_bbox_area.json', [], test_mode=True)
    rows = json.loads((folder/'instances_val2014_fakebbox100_results.json').read_text())
    found = data.evaluate(rows, proposal_nums=(1, 10, 100),
                          metric_items=['mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l', 'AR@1',
                                        'AR@10', 'AR@100', 'AR_s@100', 'AR_m@100', 'AR_l@100'])
    published = json.loads(
        (folder/'expected_bbox.json').read_text())['instances_val2014_fakebbox100_results']
    assert np.allclose(list(found.values()), published, atol=1e-6)


@here
def test_the_voc_toy_case_has_the_published_numbers(tmp_path):
    "Seven photos, 15 objects, 24 boxes at an overlap of 0.3: AP 24.57 % by all points, 26.84 % by eleven (Padilla et al., 2020)."
    folder, photos, results = DATA/'annotation_formats'/'voc_ap_toy_case', [], []
    corners = lambda words: [float(words[0]), float(words[1]), float(words[0])+float(words[2]),
                             float(words[1])+float(words[3])]
    for f in sorted((folder/'gts').glob('*.txt')):
        boxes = [corners(l.split()[1:]) for l in f.read_text().splitlines() if l.strip()]
        photos.append(dict(filename=f.stem+'.jpg', width=500, height=500,
                           ann=dict(bboxes=boxes, labels=[0]*len(boxes))))
        results.append(
            [np.array([corners(w[2:]) + [float(w[1])]
                       for l in (folder/'dets'/f.name).read_text().splitlines()
                       if (w := l.split())]).reshape(-1, 5)])
    (tmp_path/'toy.json').write_text(json.dumps(photos))
    data = CustomDataset(tmp_path/'toy.json', [], classes=('object',), test_mode=True)
    assert (sum(len(data.get_ann_info(i)['bboxes']) for i in range(7)),
            sum(len(r[0]) for r in results)) == (15, 24)
    class Legacy(CustomDataset): evaluator = 'VOCMetric'
    class Legacy2007(Legacy): year = 2007
    by_all, by_eleven = [d(tmp_path/'toy.json', [], classes=('object',), test_mode=True).evaluate(
        results, iou_thr=.3, **QUIET) for d in (Legacy, Legacy2007)]
    assert abs(by_all['mAP'] - .2457) < 1e-4 and abs(by_eleven['AP30'] - .2684) < 1e-4


def test_voc_2007_has_eleven_recalls(tmp_path):
    toys = ToyShapes(3, 64, classes=('circle', 'square'), seed=3, sizes=(16, 24))
    coco = json.loads(to_coco(toys, tmp_path).read_text())
    for c, n in zip(coco['categories'], ('cat', 'dog')): c['name'] = n
    for year in ('VOC2007', 'VOC2012'): write_voc(coco, tmp_path/year)
    first, second = [VOCDataset(None, [], img_prefix=str(tmp_path/y), test_mode=True)
                     for y in ('VOC2007', 'VOC2012')]
    results = [[np.zeros((0, 5)) for _ in first.CLASSES] for _ in range(3)]
    for i in range(3):
        a = first.get_ann_info(i)
        # one of each class
        for c in set(a['labels']):
            results[i][c] = np.c_[a['bboxes'][a['labels'] == c], np.full((a['labels'] == c).sum(),
                                                                         .9)][:1]
    a, b = [d.evaluate(results, **QUIET)['mAP'] for d in (first, second)]
    assert (first.year, second.year) == (2007, 2012) and a != b
    assert list(first.evaluate(results, metric=['bbox', 'recall'], **QUIET))[-1] == 'recall@1000@0.5'


class Oracle(torch.nn.Module):
    "Answers the truth, which the batch tells."
    def __init__(self): super().__init__(); self.p = torch.nn.Parameter(torch.zeros(()))
    def train_and_test(self, images, gt):
        return (dict(loss_cls=self.p + gt.valid.float().mean()),
                Detections(gt.boxes, torch.where(gt.valid, .9, 0.), gt.labels, gt.valid))


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp('toys')
    for k, name in enumerate(('a', 'b')):
        coco = json.loads(to_coco(ToyShapes(4, (96, 72), seed=k, sizes=(14, 30)), folder,
                                  name).read_text())
        for im in coco['images']: im.update(neg_category_ids=[2], not_exhaustive_category_ids=[])
        for c, f in zip(coco['categories'], 'rcf'): c['frequency'] = f
        # every third object has no label
        coco['annotations'] = [a for a in coco['annotations'] if a['id'] % 3]
        (folder/f'{name}_part.json').write_text(json.dumps(coco))
    return folder


def loader(folder, kind, files, **kw):
    steps = [dict(type='LoadImageFromFile'),
             dict(type='MultiScaleFlipAug', img_scale=(120, 90), flip=False, transforms=[
        dict(type='Resize', keep_ratio=True), dict(type='RandomFlip'),
        dict(type='Normalize', mean=[0, 0, 0], std=[255, 255, 255]),
        dict(type='Pad', size_divisor=16), dict(type='ImageToTensor', keys=['img']),
        dict(type='Collect', keys=['img'])])]
    each = [dict(type=kind, ann_file=f'{folder}/{f}.json', img_prefix=f'{folder}/images', pipeline=steps)
            for f in files]
    test = each[0] if len(each) == 1 else dict(type='ConcatDataset', datasets=each, **kw)
    return build_test_loader(ConfigDict(dict(samples_per_gpu=2, workers_per_gpu=0, test=test)), 'test')


def test_lvis_is_judged_by_its_rule(toys):
    found = loader(toys, 'LVISV05Dataset', ['a_part'])
    hook = EvalHook(found, metric='bbox', save_best='bbox_AP')
    numbers = evaluate_model(Oracle(), found, **hook.eval_kwargs)
    assert (list(numbers)[:2] == ['bbox_AP', 'bbox_AP50'] and {'bbox_APr', 'val_loss'} <= set(numbers)
            and numbers['bbox_AP'] > .99)
    metrics, rows, _ = measure(Oracle(), found)
    assert metrics['AP'] > .99 and {'APr', 'AR@300', 'per_class'} <= set(metrics)
    with pytest.raises(TypeError, match="no setting 'metrc'; did you mean 'metric'"):
        EvalHook(found, metrc='bbox')


def test_joined_sets_are_judged_apart_or_together(toys):
    apart, together = [evaluate_model(Oracle(), loader(toys, 'CocoDataset', ['a', 'b'], separate_eval=s))
                       for s in (True, False)]
    assert ({'0_bbox_mAP', '1_bbox_mAP'} <= set(apart)
            and min(apart['0_bbox_mAP'], apart['1_bbox_mAP'], together['bbox_mAP']) > .99)
    found = loader(toys, 'CocoDataset', ['a', 'b'])
    metrics, rows, _ = measure(Oracle(), found)
    assert (metrics['AP'] > .99 and {r['image_id'][:2] for r in rows} == {'0/', '1/'}
            and len(dataset_of(found)) == 8)
