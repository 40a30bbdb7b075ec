"From the zoo's index lists to our masks and weights, and back."
import torch
from detlearn.core.structures import AssignResult, GroundTruth, Priors


def pseudo_sample(sampler, assign_result, bboxes, gt_bboxes):
    "Our masks as the zoo's index lists, and what it derives from them."
    res = sampler.sample(AssignResult(**vars(assign_result)), Priors(bboxes), GroundTruth(gt_bboxes))
    pos, neg = res.pos.nonzero()[:, 0], res.neg.nonzero()[:, 0]
    return dict(pos_inds=pos, neg_inds=neg, pos_bboxes=res.priors[pos], neg_bboxes=res.priors[neg], pos_is_gt=torch.zeros(len(pos), dtype=torch.uint8),
                num_gts=len(gt_bboxes), pos_assigned_gt_inds=res.gt_inds[pos] - 1, pos_gt_bboxes=res.boxes[pos], pos_gt_labels=res.labels[pos])


TYPES = dict(PseudoSampler=dict(sample=pseudo_sample))
