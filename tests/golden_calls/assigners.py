"From the zoo's `assign(bboxes, gt_bboxes, ...)` of one image to ours."
import torch
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


TYPES = {'SimOTAAssigner': dict(assign=sim_ota), '*': dict(assign=assign)}   # '*': every type that is not named
