"The zoo names the arguments of a coder otherwise."
def encode(coder, bboxes, gt_bboxes, **more): return coder.encode(bboxes, gt_bboxes, **more)
def decode(coder, bboxes, pred_bboxes, **more): return coder.decode(bboxes, pred_bboxes, **more)


TYPES = {'*': dict(encode=encode, decode=decode)}
