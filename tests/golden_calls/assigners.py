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
    "Its `max_overlaps` is None, but zeros without objects."
    priors, gt, scale = region_call(**args)
    res = result(assigner.assign(priors, gt, anchor_scale=scale))
    return res if len(gt.boxes) else dict(res, max_overlaps=torch.zeros(len(priors.boxes)))


def region_meant(assigner, priors, gt, scale):
    "What the reference means to do, in loops: object by object, level by level."
    first = scale*priors.strides[0][0]
    codes, hidden = torch.zeros(len(priors.boxes), dtype=torch.long), torch.zeros(len(priors.boxes), dtype=torch.bool)
    def middle(box, ratio, level):
        (s, _), r = priors.strides[level], (1-ratio)/2
        a, b = box[:2]/s, box[2:]/s
        low, high = ((1-r)*a + r*b).round().clamp(min=0), (r*a + (1-r)*b).round().clamp(min=0)
        at = (priors.boxes[:, :2] + priors.boxes[:, 2:])/2/s
        return ((at >= low) & (at <= high)).all(1) & (priors.levels == level)
    for k, box in enumerate(gt.boxes, 1):
        n = len(priors.level_sizes)
        own = int((((box[2]-box[0])*(box[3]-box[1])).sqrt().log2() - torch.tensor(float(first)).log2() + .5).floor().clamp(0, n-1))
        codes[middle(box, assigner.ignore_ratio, own)] = -1
        codes[middle(box, assigner.center_ratio, own)] = k
        for l in (own-1, own+1):
            if 0 <= l < n: hidden |= middle(box, assigner.ignore_ratio, l)
    return codes, hidden


def region_differs(assigner, args, want):
    "Both numbers: ours is what is meant; with 0 and 1 used as an index, it is the reference's."
    priors, gt, scale = region_call(**args)
    got = assigner.assign(priors, gt, anchor_scale=scale)
    codes, hidden = region_meant(assigner, priors, gt, scale)
    meant = codes.masked_fill(hidden | ~priors.valid, -1)
    assert torch.equal(got.gt_inds, meant)
    if want is None:                                             # the reference ended in an IndexError for its labels
        assert torch.equal(got.labels, torch.where(meant > 0, gt.labels[(meant-1).clamp(min=0)], -1))
        return
    for part, flags in zip(codes.split(priors.level_sizes), hidden.split(priors.level_sizes)): part[flags.long()] = -1
    assert torch.equal(codes.masked_fill(~priors.valid, -1), want['gt_inds'] if isinstance(want, dict) else want.gt_inds)




TYPES = {'ATSSAssigner': dict(assign=atss), 'ApproxMaxIoUAssigner': dict(assign=approx), 'PointAssigner': dict(assign=point),
         'CenterRegionAssigner': dict(assign=center_region), 'GridAssigner': dict(assign=grid), 'RegionAssigner': dict(assign=region),
         'HungarianAssigner': dict(assign=hungarian), 'MaskHungarianAssigner': dict(assign=mask_hungarian),
         'TaskAlignedAssigner': dict(assign=task_aligned), 'UniformAssigner': dict(assign=uniform),
         'SimOTAAssigner': dict(assign=sim_ota), '*': dict(assign=assign)}   # '*': every type that is not named

# Where the reference is plainly broken: type, reason, a test of both numbers. Cases without objects are not concerned.
DIFFERS = {'RegionAssigner': ('uses the ignore flags 0 and 1 of the levels beside as an index, and with labels and several levels ends in an IndexError', region_differs)}
