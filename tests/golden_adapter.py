"""From the zoo's calls to ours, for the golden cases.

A golden case names a type of the zoo and calls it the zoo's way: one image, `bboxes` first, lists of indices. Where our call differs, a
function below translates; where there is none, the call is the same. `there(type)` says whether the package has the type at all.
"""
import importlib
import torch
from detlearn._modidx import d as INDEX
from detlearn.core.structures import AssignResult, GroundTruth, Priors

PLACES = {sym.rsplit('.', 1)[1]: mod for mod, syms in INDEX['syms'].items() for sym in syms if sym.count('.') == mod.count('.') + 1}
SAME_AS = dict(anchor_inside_flags='valid_priors', py_sigmoid_focal_loss='sigmoid_focal_loss')  # another name here


def there(name):
    "Has the package this type or function, by this name or by ours?"
    return SAME_AS.get(name, name) in PLACES


def find(name):
    name = SAME_AS.get(name, name)
    return getattr(importlib.import_module(PLACES[name]), name)


def build(cfg):
    "The object of a dict with `type`."
    cfg = dict(cfg)
    return find(cfg.pop('type'))(**cfg)


def objects(boxes, labels=None, crowds=None):
    "The zoo's separate lists of objects and crowds as one `GroundTruth`."
    crowds = boxes[:0] if crowds is None else crowds
    if labels is not None: labels = torch.cat([labels, labels.new_full((len(crowds),), -1)])
    ignore = torch.arange(len(boxes) + len(crowds)) >= len(boxes)
    return GroundTruth(torch.cat([boxes, crowds.to(boxes.dtype)]), labels, ignore=ignore)


def assign(assigner, bboxes, gt_bboxes, gt_bboxes_ignore=None, gt_labels=None):
    res = assigner.assign(Priors(bboxes), objects(gt_bboxes, gt_labels, gt_bboxes_ignore))
    return dict(num_gts=int(res.num_gts), gt_inds=res.gt_inds, max_overlaps=res.max_overlaps, labels=res.labels)


def pseudo_sample(sampler, assign_result, bboxes, gt_bboxes):
    "Our masks as the zoo's index lists, and what it derives from them."
    res = sampler.sample(AssignResult(**vars(assign_result)), Priors(bboxes), GroundTruth(gt_bboxes))
    pos, neg = res.pos.nonzero()[:, 0], res.neg.nonzero()[:, 0]
    return dict(pos_inds=pos, neg_inds=neg, pos_bboxes=res.priors[pos], neg_bboxes=res.priors[neg], pos_is_gt=torch.zeros(len(pos), dtype=torch.uint8),
                num_gts=len(gt_bboxes), pos_assigned_gt_inds=res.gt_inds[pos] - 1, pos_gt_bboxes=res.boxes[pos], pos_gt_labels=res.labels[pos])


def encode(coder, bboxes, gt_bboxes, **more): return coder.encode(bboxes, gt_bboxes, **more)
def decode(coder, bboxes, pred_bboxes, **more): return coder.decode(bboxes, pred_bboxes, **more)


def anchor_inside_flags(valid_priors, flat_anchors, valid_flags, img_shape, allowed_border=0):
    "The zoo's second step alone: one level of one row, whose cells are all inside."
    everywhere = torch.tensor([[10**6, 10**6]])
    priors = Priors(flat_anchors, strides=[(1, 1)])
    return valid_flags & valid_priors(priors, [(1, len(flat_anchors))], everywhere, torch.tensor([img_shape[:2]]), allowed_border)[0]


def weighted_loss(weighted, pred, target, **more):
    return weighted(lambda pred, target: (pred - target)**2)(pred, target, **more)


def soft_nms(ours, boxes, scores, iou_threshold=.3, sigma=.5, min_score=1e-3, method='linear', offset=0):
    scores, inds = ours(boxes + torch.tensor([0, 0, offset, offset]), scores, iou_threshold, sigma, min_score, method)
    return torch.cat([boxes[inds], scores[:, None]], 1), inds


def cross_entropy_of_maps(loss, cls_score, label, **more):
    "Classes stand in the second axis of a map in the zoo, last here."
    if cls_score.dim() == label.dim() + 1 > 2 and not loss.use_mask: cls_score = cls_score.movedim(1, -1)
    return loss(cls_score, label, **more)


METHODS = dict(assign=assign, encode=encode, decode=decode, sample=pseudo_sample)
OF_TYPE = dict(CrossEntropyLoss=cross_entropy_of_maps)
FUNCTIONS = dict(anchor_inside_flags=anchor_inside_flags, weighted_loss=weighted_loss, soft_nms=soft_nms)


def run(type, call, kwargs, args, state):
    "One call of the zoo, made here."
    if call is None:
        translated = FUNCTIONS.get(type)
        return translated(find(type), **args) if translated else find(type)(**args)
    obj = build(dict(type=type, **kwargs))
    for name, value in state.items():
        getattr(obj, name).copy_(value) if isinstance(value, torch.Tensor) else setattr(obj, name, value)
    translated = OF_TYPE.get(type) or METHODS.get(call)
    if translated: return translated(obj, **args)
    return (obj if call == '__call__' else getattr(obj, call))(**args)
