"""Laws of the targets that must hold for any input: found by hypothesis, or measured in a process of its own."""
import subprocess, sys
import pytest
import torch
from hypothesis import given, settings, strategies as st
from detlearn.core.boxes import box_iou
from detlearn.core.registry import BBOX_CODERS
from detlearn.targets.iou import best_overlaps, claimed_by, columns, taking_part

common = settings(max_examples=25, deadline=None, derandomize=True)
numbers = st.integers(0, 2**31-1)


def boxes_near(priors, g, reach=.4):
    "Boxes whose centre lies within `reach` sides of the prior's and whose sides are half to twice as long."
    size = priors[..., 2:] - priors[..., :2]
    centre = (priors[..., :2] + priors[..., 2:])/2 + (torch.rand(size.shape, generator=g)*2
                                                      - 1)*reach*size
    half = size*2**(torch.rand(size.shape, generator=g)*2 - 1)/2
    return torch.cat([centre-half, centre+half], -1)


def some_priors(g, lead, n):
    xy, wh = torch.rand(*lead, n, 2, generator=g)*400, torch.rand(*lead, n, 2, generator=g)*80 + 8
    return torch.cat([xy, xy+wh], -1)


CODERS = dict(DeltaXYWHBBoxCoder=dict(target_means=(.1, -.1, .2, 0.), target_stds=(.1, .1, .2, .2)),
              LegacyDeltaXYWHBBoxCoder=dict(target_stds=(.5,)*4),
              TBLRBBoxCoder=dict(normalizer=(4., 4, 2, 2)), DistancePointBBoxCoder={}, YOLOBBoxCoder={},
              PseudoBBoxCoder={},
              BucketingBBoxCoder=dict(num_buckets=14, scale_factor=3.))


@pytest.mark.parametrize('name', CODERS)
@common
@given(seed=numbers, lead=st.sampled_from([(), (1,), (3,), (2, 2)]), n=st.integers(0, 12))
def test_decode_undoes_encode(name, seed, lead, n):
    "For any boxes near their priors, with any leading axes."
    g = torch.Generator().manual_seed(seed)
    coder, priors = BBOX_CODERS.build(dict(type=name, **CODERS[name])), some_priors(g, lead, n)
    boxes, more = boxes_near(priors, g), ()
    if name == 'DistancePointBBoxCoder': priors = priors[..., :2]
    # a cell as large as the prior
    if name == 'YOLOBBoxCoder': more = ((priors[..., 2:] - priors[..., :2]).amax(-1),)
    said = coder.encode(priors, boxes, *more)
    if name == 'BucketingBBoxCoder': found = coder.decode(priors, (said[2]*99, said[0]))[0]
    else: found = coder.decode(priors, said, *more)
    # the zoo's old decoder does not shrink
    want = boxes + torch.tensor([-.5, -.5, .5, .5]) if name.startswith('Legacy') else boxes
    torch.testing.assert_close(found, want, rtol=1e-4, atol=5e-3)


def test_every_coder_is_tried():
    assert set(CODERS) == {c.__name__ for c in BBOX_CODERS.values()
                           if c.__module__.startswith('detlearn')}


@common
@given(seed=numbers, lead=st.sampled_from([(), (2,)]), G=st.integers(0, 6), P=st.integers(0, 30),
       pairs=st.integers(1, 200))
def test_blocks_give_the_table(seed, lead, G, P, pairs):
    "Whatever the size of a block, the reductions are those of the whole table, to the last bit, ties included."
    g = torch.Generator().manual_seed(seed)
    whole = lambda *s: torch.randint(0, 5, s, generator=g).float()            # whole numbers: many ties
    gt, priors = whole(*lead, G, 4), whole(P, 4)
    gt[..., 2:] += gt[..., :2] + 1
    priors[..., 2:] += priors[..., :2] + 1
    real, valid = torch.rand(*lead, G, generator=g) > .3, torch.rand(*lead, P, generator=g) > .2
    table = box_iou(gt, priors).masked_fill(~real[..., None], -1).masked_fill(~valid[..., None, :], -1)
    nobody = torch.cat([table.new_full((*lead, 1, P), -1), table], -2)
    best, owner = nobody.max(-2)
    top = torch.cat([table, table.new_full((*lead, G, 1), -1)], -1).amax(-1)
    code = torch.arange(G+1)[:, None]
    rows = torch.cat([top.new_full((*lead, 1), -1), top], -1)[..., None]
    claim = ((nobody == rows) & (rows >= 0)) * code
    fill = lambda p: taking_part(box_iou(gt, priors[p]), real, valid[..., p])
    for size in (pairs, None):
        parts = columns(priors, G, size)
        found = best_overlaps(fill, parts)
        for got, want in ((found.best, best), (found.owner, owner), (found.top, top)):
            assert torch.equal(got, want)
        assert torch.equal(claimed_by(fill, parts, found), claim.amax(-2))


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_memory_without_the_table():
    "Both passes over 200,000 priors and 500 objects stay under 200 MB above the inputs; the table alone would be 381 MB."
    program = '''
import torch
from detlearn.core.boxes import box_iou
from detlearn.targets.iou import best_overlaps, claimed_by, columns
from detlearn.core.shapes import random_boxes
peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])/1024
priors, objects = random_boxes(200_000, 2000, (16, 400), (1, 2)), random_boxes(500, 2000, (16, 400), seed=1)
fill, parts = lambda part: box_iou(objects, priors[part]), columns(priors, 500)
best_overlaps(fill, parts[:1]); before = peak()
claimed_by(fill, parts, best_overlaps(fill, parts))
print(peak() - before)
'''
    assert float(subprocess.check_output([sys.executable, '-c', program])) < 200
