"Operators: torchvision's where it has them, with the zoo's arguments."
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align
from detlearn.losses.focal_loss import sigmoid_focal_loss


def largest(input, roi, size, scale, samples, aligned):
    "The largest sample of each bin, for one RoI `(1, 5)`: as many samples a bin as the RoI has pixels, unless a number is given."
    extent = (roi[0, 3:] - roi[0, 1:3])*scale
    if not aligned: extent = extent.clamp(min=1.)
    h, w = (samples or max(int((e/n).ceil()), 1) for e, n in zip(extent.flip(0), size))
    return F.max_pool2d(roi_align(input, roi, (size[0]*h, size[1]*w), scale, 1, aligned), (h, w))


def pooled(input, rois, output_size, spatial_scale=1., sampling_ratio=0, pool_mode='avg', aligned=True):
    if isinstance(output_size, int): output_size = output_size, output_size
    if pool_mode == 'avg': return roi_align(input, rois, output_size, spatial_scale, sampling_ratio, aligned)
    return torch.cat([largest(input, r[None], output_size, spatial_scale, sampling_ratio, aligned) for r in rois])


def focal(input, target, gamma=2., alpha=.25, weight=None, reduction='mean'): return sigmoid_focal_loss(input, target, weight, gamma, alpha, reduction)


FUNCTIONS = dict(RoIAlign=pooled, sigmoid_focal_loss_op=focal)
