"""Whole models in the zoo's way: `build(kind, config)` for fingerprints of backbones, necks, plug-ins and detectors.

Backbones and necks are called as in the zoo. A detector differs in what goes in (lists of boxes, a dict an image) and out (maps of each level,
arrays of each class): `build` gives our detector with the zoo's calls around it, by a subclass of its own class. A head whose raw outputs
are not those of `RetinaHead` adds a line to `RAW`; one whose losses the zoo gives by level stands in `BY_LEVEL`.
"""
import importlib
import torch
from torch import nn
from detlearn._modidx import d as INDEX
from detlearn.core.registry import BACKBONES, NECKS, PLUGIN_LAYERS, Registry
from detlearn.core.structures import GroundTruth
from detlearn.detectors.build import build_detector
from detlearn.layers.pixel_decoder import padding_of

# heads whose losses the zoo gives as lists, one entry a level
BY_LEVEL = {'AnchorHead', 'DenseHead', 'RetinaHead'}
PARTS = {s.rsplit('.', 1)[1] for mod, syms in INDEX['syms'].items() for s in syms
         if s.count('.') == mod.count('.') + 1}


class BitmapMasks:
    "Masks of one image, `(G, H, W)` uint8."
    def __init__(self, masks, height, width): self.masks, self.height, self.width = masks, height, width


def missing(config):
    "Types that a config names and the package does not have."
    for mod in INDEX['syms']:
        if mod.split('.')[1] == 'layers': importlib.import_module(mod)
    known = PARTS.union(*Registry.everything)
    def types(x):
        values = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
        return {t for v in values for t in types(v)} | ({x['type']} if isinstance(x, dict)
                                                        and 'type' in x else set())
    return sorted(t for t in types(config) if t[0].isupper() and t not in known)


def build(kind, config):
    "A part or a detector of the package, with the zoo's calls."
    if kind == 'plugin': return spoken_to(PLUGIN_LAYERS.build(config), Plugin)
    if kind != 'detector': return dict(backbone=BACKBONES, neck=NECKS)[kind].build(config)
    model = spoken_to(build_detector(config), Detector)
    if hasattr(model, 'bbox_head'): spoken_to(model.bbox_head, Head)
    return model


def spoken_to(obj, calls):
    "The same object, answering the zoo's calls."
    obj.__class__ = type(type(obj).__name__, (calls, type(obj)), {})
    return obj


class Plugin:
    "Pixel decoders take a padding mask where the zoo takes `img_metas`."
    def forward(self, feats, img_metas=None):
        if img_metas is None: return super().forward(feats)
        sizes = torch.tensor([m['img_shape'][:2] for m in img_metas])
        return super().forward(feats, padding_of(sizes, img_metas[0]['batch_input_shape']))


def levels_of(head, feats, preds):
    "Flattened predictions as one map a level: scores, then deltas."
    sizes, A = [f.shape[-2:] for f in feats], head.num_base_priors
    def maps(x):
        return [p.reshape(len(p), h, w, -1).permute(0, 3, 1, 2)
                for p, (h, w) in zip(x.split([A*h*w for h, w in sizes], 1), sizes)]
    return maps(preds.scores), maps(preds.deltas)


# head: f(head, feats, preds) gives the zoo's outputs
RAW = dict(RetinaHead=levels_of, DenseHead=levels_of, AnchorHead=levels_of)


class Head:
    "Called from outside it gives the zoo's maps; from inside, our predictions."
    inside = False

    def __call__(self, feats, *args):
        preds = super().__call__(feats, *args)
        return preds if self.inside else RAW[type(self).__name__](self, feats, preds)


class LevelLoss:
    "A loss of each level, by cutting the axis of priors."
    def __call__(self, pred, target, weight=None, **kw):
        cut = lambda t: [None]*len(self.level_sizes) if t is None else t.split(self.level_sizes, 1)
        base = super().__call__
        return [base(p, t, w, **kw) for p, t, w in zip(cut(pred), cut(target), cut(weight))]


class Detector:
    "The zoo's `forward_train` and `simple_test`."
    def of_ours(self, feats):
        head = self.bbox_head
        head.inside = True
        if type(head).__name__ in BY_LEVEL:
            sizes = head.priors(feats).level_sizes
            for loss in (head.loss_cls, head.loss_bbox):
                if not isinstance(loss, LevelLoss): spoken_to(loss, LevelLoss)
                loss.level_sizes = sizes
        return head

    def forward_train(self, img, img_metas, gt_bboxes, gt_labels=None, gt_masks=None,
                      gt_bboxes_ignore=None, **kw):
        labels = gt_labels or [b.new_zeros(len(b), dtype=torch.long) for b in gt_bboxes]
        images = [dict(boxes=b, labels=l, size=m['img_shape'][:2], pad_size=m['pad_shape'][:2])
                  for b, l, m in zip(gt_bboxes, labels, img_metas)]
        for im, masks in zip(images, gt_masks or []): im['masks'] = torch.as_tensor(masks.masks)
        feats = self.extract_feat(img)
        return self.of_ours(feats).forward_train(feats, GroundTruth.pad(images))

    def simple_test(self, img, img_metas, rescale=False, **kw):
        feats = self.extract_feat(img)
        head = self.of_ours(feats)
        dets = head.simple_test(feats, torch.tensor([m['img_shape'][:2] for m in img_metas]))
        out = []
        for i in range(len(img)):
            d = dets[i].cut()
            rows = torch.cat([d.boxes, d.scores[:, None]], 1)
            out.append([rows[d.labels == c].numpy() for c in range(head.num_classes)])
        return out
