"From the zoo's `assign(bboxes, gt_bboxes, ...)` of one image to ours."
import torch
from detlearn.core.boxes import cxcywh_to_xyxy
from detlearn.core.structures import GroundTruth, Predictions, Priors


def objects(boxes, labels=None, crowds=None):
    "The zoo's separate lists of objects and crowds as one `GroundTruth`; crowds last, so that codes are the zoo's."
    crowds = boxes[:0] if crowds is None else crowds
    if labels is not None: labels = torch.cat([labels, labels.new_full((len(crowds),), -1)])
    ignore = torch.arange(len(boxes) + len(crowds)) >= len(boxes)
    return GroundTruth(torch.cat([boxes, crowds.to(boxes.dtype)]), labels, ignore=ignore)


def result(res):
    "Our result in the zoo's words."
    return dict(num_gts=int(res.num_gts), gt_inds=res.gt_inds, max_overlaps=res.max_overlaps, labels=res.labels)


def assign(assigner, bboxes, gt_bboxes, gt_bboxes_ignore=None, gt_labels=None):
    return result(assigner.assign(Priors(bboxes), objects(gt_bboxes, gt_labels, gt_bboxes_ignore)))


def seen(boxes, scores, **more):
    "Decoded boxes and probabilities, which the zoo gives as arguments."
    return Predictions(scores, extras=dict(boxes=boxes, **more))


def sim_ota(assigner, pred_scores, priors, decoded_bboxes, gt_bboxes, gt_labels, gt_bboxes_ignore=None, eps=1e-7):
    return result(assigner.assign(Priors(priors), objects(gt_bboxes, gt_labels, gt_bboxes_ignore), seen(decoded_bboxes, pred_scores, probabilities=pred_scores)))


def task_aligned(assigner, pred_scores, decode_bboxes, anchors, gt_bboxes, gt_bboxes_ignore=None, gt_labels=None, alpha=1, beta=6):
    assigner.alpha, assigner.beta = alpha, beta
    res = assigner.assign(Priors(anchors), objects(gt_bboxes, gt_labels, gt_bboxes_ignore), seen(decode_bboxes, pred_scores, probabilities=pred_scores))
    return dict(result(res), assign_metrics=res.extras['assign_metrics'])


def uniform(assigner, bbox_pred, anchor, gt_bboxes, gt_bboxes_ignore=None, gt_labels=None):
    "Its `max_overlaps` has one number an object, and is None without any."
    res = assigner.assign(Priors(anchor), objects(gt_bboxes, gt_labels, gt_bboxes_ignore), seen(bbox_pred, bbox_pred[:, :1]))
    pairs = {k: res.extras[k] for k in ('pos_idx', 'pos_predicted_boxes', 'target_boxes')}
    return dict(result(res), max_overlaps=res.extras['object_overlaps'] if len(gt_bboxes) else None, **pairs)


def hungarian(assigner, bbox_pred, cls_pred, gt_bboxes, gt_labels, img_meta, gt_bboxes_ignore=None, eps=1e-7):
    "Its boxes are normalised: centre and size; ours are pixels."
    gt = objects(gt_bboxes, gt_labels, gt_bboxes_ignore)
    gt.sizes = torch.tensor(img_meta['img_shape'][:2])
    return result(assigner.assign(None, gt, seen(cxcywh_to_xyxy(bbox_pred) * gt.sizes.flip(0).repeat(2), cls_pred)))


def mask_hungarian(assigner, cls_pred, mask_pred, gt_labels, gt_mask, img_meta, gt_bboxes_ignore=None, eps=1e-7):
    gt = GroundTruth(torch.zeros(len(gt_labels), 4), gt_labels, masks=gt_mask[..., None])   # masks at sampled points
    return result(assigner.assign(None, gt, Predictions(cls_pred, extras=dict(masks=mask_pred[..., None]))))


def atss(assigner, bboxes, num_level_bboxes, gt_bboxes, gt_bboxes_ignore=None, gt_labels=None, cls_scores=None, bbox_preds=None):
    preds = None if cls_scores is None else seen(bbox_preds, cls_scores)
    return result(assigner.assign(Priors(bboxes, num_level_bboxes), objects(gt_bboxes, gt_labels, gt_bboxes_ignore), preds))


def approx(assigner, approxs, squares, approxs_per_octave, gt_bboxes, gt_bboxes_ignore=None, gt_labels=None):
    return result(assigner.assign(Priors(squares), objects(gt_bboxes, gt_labels, gt_bboxes_ignore), approxs=approxs.view(-1, approxs_per_octave, 4)))


def point(assigner, points, gt_bboxes, gt_bboxes_ignore=None, gt_labels=None):
    "The stride stands beside each point; ours are given by level."
    strides, sizes = points[:, 2].unique_consecutive(return_counts=True)
    priors = Priors(points[:, :2], sizes.tolist(), [(s, s) for s in strides.tolist()])
    return result(assigner.assign(priors, objects(gt_bboxes, gt_labels, gt_bboxes_ignore)))


def center_region(assigner, bboxes, gt_bboxes, gt_bboxes_ignore=None, gt_labels=None):
    "Its list of pairs (prior, class): shadows first, then those who lost the prior; ours are two tables of a fixed size."
    res = assigner.assign(Priors(bboxes), objects(gt_bboxes, gt_labels, gt_bboxes_ignore))
    if gt_labels is None: return dict(result(res), shadowed_labels=None)
    pairs = torch.cat([res.extras[k][:len(gt_bboxes)].mT.nonzero() for k in ('shadow', 'outranked')])
    return dict(result(res), shadowed_labels=torch.stack([pairs[:, 0], gt_labels[pairs[:, 1]]], 1))


def grid(assigner, bboxes, box_responsible_flags, gt_bboxes, gt_labels=None):
    return result(assigner.assign(Priors(bboxes), objects(gt_bboxes, gt_labels), responsible=box_responsible_flags.bool()))


def region_call(mlvl_anchors, mlvl_valid_flags, gt_bboxes, img_meta, featmap_sizes, anchor_scale, anchor_strides, gt_bboxes_ignore=None, gt_labels=None, allowed_border=0):
    "The zoo's lists of levels as `Priors`; without objects it looks at no border."
    boxes, (h, w) = torch.cat(mlvl_anchors), img_meta['img_shape'][:2]
    x1, y1, x2, y2 = boxes.unbind(-1)
    inside = torch.cat(mlvl_valid_flags)
    if allowed_border >= 0: inside = inside & (x1 >= -allowed_border) & (y1 >= -allowed_border) & (x2 < w+allowed_border) & (y2 < h+allowed_border)
    priors = Priors(boxes, [len(a) for a in mlvl_anchors], [(s, s) for s in anchor_strides], inside if len(gt_bboxes) else None)
    return priors, objects(gt_bboxes, gt_labels), anchor_scale


def region(assigner, **args):
    priors, gt, scale = region_call(**args)
    return result(assigner.assign(priors, gt, anchor_scale=scale))


TYPES = {'ATSSAssigner': dict(assign=atss), 'ApproxMaxIoUAssigner': dict(assign=approx), 'PointAssigner': dict(assign=point),
         'CenterRegionAssigner': dict(assign=center_region), 'GridAssigner': dict(assign=grid), 'RegionAssigner': dict(assign=region),
         'HungarianAssigner': dict(assign=hungarian), 'MaskHungarianAssigner': dict(assign=mask_hungarian),
         'TaskAlignedAssigner': dict(assign=task_aligned), 'UniformAssigner': dict(assign=uniform),
         'SimOTAAssigner': dict(assign=sim_ota), '*': dict(assign=assign)}   # '*': every type that is not named
