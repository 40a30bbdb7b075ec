"The zoo's two steps of validity."
import torch
from detlearn.core.structures import Priors
from detlearn.targets.priors import valid_priors


def anchor_inside_flags(flat_anchors, valid_flags, img_shape, allowed_border=0):
    "The second step alone: one level of one row, whose cells are all inside."
    everywhere = torch.tensor([[10**6, 10**6]])
    priors = Priors(flat_anchors, strides=[(1, 1)])
    return valid_flags & valid_priors(priors, [(1, len(flat_anchors))], everywhere, torch.tensor([img_shape[:2]]), allowed_border)[0]


FUNCTIONS = dict(anchor_inside_flags=anchor_inside_flags)
