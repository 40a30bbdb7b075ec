"The zoo's calls of losses, where ours differ."
from types import SimpleNamespace
import torch
from detlearn.losses.pisa_loss import isr_p as ours
from detlearn.losses.reduce import weighted_loss as weighted


def cross_entropy_of_maps(loss, cls_score, label, **more):
    "Classes stand in the second axis of a map in the zoo, last here."
    if cls_score.dim() == label.dim() + 1 > 2 and not loss.use_mask: cls_score = cls_score.movedim(1, -1)
    return loss(cls_score, label, **more)


def weighted_loss(pred, target, **more): return weighted(lambda pred, target: (pred - target)**2)(pred, target, **more)


def seesaw_of_positives(loss, cls_score, labels, **more):
    "Elements of background have no place in the zoo's list of class losses; here they are 0."
    out = loss(cls_score, labels, **more)
    own = labels < loss.num_classes
    if isinstance(out, dict) and out['loss_cls_classes'].dim(): out['loss_cls_classes'] = out['loss_cls_classes'][own] if own.any() else out['loss_cls_classes'].sum()
    return out


def of_boxes(loss, pred, target, weight=None, avg_factor=None, reduction_override=None, **more):
    "Where no weight is positive, the zoo gives one 0, whatever the reduction; its IoULoss not for `'none'`."
    reduction = reduction_override or loss.reduction
    if weight is not None and not (weight > 0).any() and (reduction != 'none' or type(loss).__name__ != 'IoULoss'):
        avg_factor, reduction = None, 'sum'
    return loss(pred, target, weight, avg_factor=avg_factor, reduction_override=reduction, **more)


def embedding(loss, pred, target, match):
    "Without any object the zoo's graph ends at the first map."
    return loss(pred, target if any(match) else target.detach(), match)


def isr_p(bbox_targets, sampling_results, num_class=80, **more):
    "Lists of the positives' objects, image by image, as codes of all rows: the zoo's codes, which start anew at the third image."
    positive = (bbox_targets[0] >= 0) & (bbox_targets[0] < num_class)
    objects, offset = [], 1
    for image in sampling_results:
        objects.append(image.pos_assigned_gt_inds + offset)
        if len(objects[-1]): offset = int(image.pos_assigned_gt_inds.max()) + 2
    codes = torch.zeros_like(bbox_targets[0]).masked_scatter(positive, torch.cat(objects))
    more = {k: getattr(v, 'part', v) for k, v in more.items()}   # parts themselves, not behind the zoo's methods
    return ours(bbox_targets=bbox_targets, sampling_results=SimpleNamespace(gt_inds=codes), num_class=num_class, **more)


TYPES = dict(CrossEntropyLoss=dict(forward=cross_entropy_of_maps), SeesawLoss=dict(forward=seesaw_of_positives),
             AssociativeEmbeddingLoss=dict(forward=embedding),
             **{f'{kind}IoULoss': dict(forward=of_boxes) for kind in ('', 'G', 'D', 'C', 'Bounded')})
FUNCTIONS = dict(weighted_loss=weighted_loss, isr_p=isr_p)
NAMES = dict(py_sigmoid_focal_loss='sigmoid_focal_loss')
