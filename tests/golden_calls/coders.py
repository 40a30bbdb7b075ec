"The zoo names the arguments of a coder otherwise."
def encode(coder, bboxes, gt_bboxes, **more): return coder.encode(bboxes, gt_bboxes, **more)
def decode(coder, bboxes, pred_bboxes, **more): return coder.decode(bboxes, pred_bboxes, **more)
def encode_points(coder, points, gt_bboxes, **more): return coder.encode(points, gt_bboxes, **more)
def decode_points(coder, points, pred_bboxes, **more): return coder.decode(points, pred_bboxes, **more)


TYPES = {'*': dict(encode=encode, decode=decode), 'DistancePointBBoxCoder': dict(encode=encode_points, decode=decode_points)}
