"The zoo's calls of losses, where ours differ."
from detlearn.losses.reduce import weighted_loss as weighted


def cross_entropy_of_maps(loss, cls_score, label, **more):
    "Classes stand in the second axis of a map in the zoo, last here."
    if cls_score.dim() == label.dim() + 1 > 2 and not loss.use_mask: cls_score = cls_score.movedim(1, -1)
    return loss(cls_score, label, **more)


def weighted_loss(pred, target, **more): return weighted(lambda pred, target: (pred - target)**2)(pred, target, **more)


TYPES = dict(CrossEntropyLoss=dict(forward=cross_entropy_of_maps))
FUNCTIONS = dict(weighted_loss=weighted_loss)
NAMES = dict(py_sigmoid_focal_loss='sigmoid_focal_loss')
