"The zoo's operators of post-processing, where ours differ."
import torch
from detlearn.postprocess.nms import soft_nms as ours


def soft_nms(boxes, scores, iou_threshold=.3, sigma=.5, min_score=1e-3, method='linear', offset=0):
    scores, inds = ours(boxes + torch.tensor([0, 0, offset, offset]), scores, iou_threshold, sigma, min_score, method)
    return torch.cat([boxes[inds], scores[:, None]], 1), inds


FUNCTIONS = dict(soft_nms=soft_nms)
