"From the zoo's index lists to our masks and weights, and back."
import torch
from detlearn.core.structures import AssignResult, GroundTruth, Priors


def lists(res, num_gts, labelled):
    "Our table as the zoo's index lists, and what it derives from them; without labels of priors the zoo gives None."
    index = torch.arange(len(res.gt_inds)) if res.index is None else res.index
    order = index.argsort()
    pos, neg = order[res.pos[order]], order[res.neg[order]]
    is_gt = torch.zeros(len(index), dtype=torch.bool) if res.is_gt is None else res.is_gt
    return dict(pos_inds=index[pos], neg_inds=index[neg], pos_bboxes=res.priors[pos], neg_bboxes=res.priors[neg], pos_is_gt=is_gt[pos].to(torch.uint8),
                num_gts=num_gts, pos_assigned_gt_inds=res.gt_inds[pos] - 1, pos_gt_bboxes=res.boxes[pos], pos_gt_labels=res.labels[pos] if labelled else None)


def sample(sampler, assign_result, bboxes, gt_bboxes, gt_labels=None):
    res = sampler.sample(AssignResult(**vars(assign_result)), Priors(bboxes), GroundTruth(gt_bboxes, gt_labels))
    return lists(res, len(gt_bboxes), assign_result.labels is not None)


def sample_masks(sampler, assign_result, masks, gt_masks):
    res = sampler.sample(AssignResult(**vars(assign_result)), masks, GroundTruth(torch.zeros(len(gt_masks), 4), masks=gt_masks))
    pos, neg = res.pos.nonzero()[:, 0], res.neg.nonzero()[:, 0]
    return dict(pos_inds=pos, neg_inds=neg, pos_masks=res.masks[pos], neg_masks=res.masks[neg], pos_is_gt=torch.zeros(len(pos), dtype=torch.uint8),
                num_gts=len(gt_masks), pos_assigned_gt_inds=res.gt_inds[pos] - 1, pos_gt_masks=res.gt_masks[pos],
                pos_gt_labels=None if assign_result.labels is None else res.labels[pos])


TYPES = {'*': dict(sample=sample), 'MaskPseudoSampler': dict(sample=sample_masks)}
