"DropBlock: the chance of a square has another name."


def chance(block, feat_size): return block.gamma(feat_size)


TYPES = dict(DropBlock={'_compute_gamma': chance})
