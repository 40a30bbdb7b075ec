"""Rules that every part of the targets must keep, each tested once for all that are registered.

A part is found by its registry, its settings come from the golden cases of its type (losses: test_losses.py), so a new page brings its tests with it.
The rules: one graph for the compiler; no tensor on the wrong device and no wait of the host; as many kernels for eight
images as for one; images without objects; half precision in, float32 out.
"""
import importlib, itertools
import pytest
import torch
from torch._subclasses import FakeTensorMode
from detlearn._modidx import d as INDEX
from detlearn.core.registry import (BBOX_ASSIGNERS, BBOX_CODERS, BBOX_SAMPLERS, MATCH_COST,
    PRIOR_GENERATORS)
from detlearn.core.structures import AssignResult, GroundTruth, Predictions, Priors
from counting import count
from test_assigners import SETTINGS
from test_golden import CASES, read

for module in INDEX['syms']:
    if module.split('.')[1] == 'targets': importlib.import_module(module)

# parts that go to the host once a batch (matching, NMS): named here, with the reason on their page
ON_HOST = {'ScoreHLRSampler'}
MAPS, C = [(8, 8), (4, 4)], 3
# settings that the zoo accepts and we warn about are still to work
pytestmark = pytest.mark.filterwarnings('ignore')


BY_HAND = {   # settings of samplers, whose golden cases are few
    'RandomSampler': [dict(num=32, pos_fraction=.5),
                      dict(num=32, pos_fraction=.25, neg_pos_ub=2, add_gt_as_proposals=False)],
    'InstanceBalancedPosSampler': [dict(num=32, pos_fraction=.25)],
    'IoUBalancedNegSampler': [dict(num=32, pos_fraction=.25),
                              dict(num=32, pos_fraction=.25, floor_thr=.1, floor_fraction=.5)],
    'CombinedSampler': [dict(num=32, pos_fraction=.25,
                             pos_sampler=dict(type='InstanceBalancedPosSampler'),
                             neg_sampler=dict(type='IoUBalancedNegSampler'))],
    'OHEMSampler': [dict(num=32, pos_fraction=.25)], 'ScoreHLRSampler': [dict(num=32, pos_fraction=.25)]}


def settings(name, most=2):
    "Some settings of a type: those of its golden cases, or none at all."
    if name in BY_HAND: return BY_HAND[name]
    if name in SETTINGS: return SETTINGS[name][:most]
    seen = {}
    for _, tensors, case in CASES:
        if case['type'] == name and 'raises' not in case:
            seen.setdefault(repr(case['kwargs']), read(case['kwargs'], tensors))
    return [BBOX_ASSIGNERS.build(kw) for kw in itertools.islice(seen.values(), most)] or [{}]


def parts(*registries):
    "Each registered part with each of its settings, as pytest parameters."
    found = [(reg.name, cls, kw) for reg in registries for cls in dict.fromkeys(reg.values())
             for kw in settings(cls.__name__)]
    return [pytest.param(role, cls, kw, id=f'{cls.__name__}-{i}')
            for i, (role, cls, kw) in enumerate(found)]


def scene(images, objects=4, seed=0):
    "Objects of a batch, the last slot of each image padding, a crowd in between, and priors around them."
    g = torch.Generator().manual_seed(seed)
    xy = torch.rand(images, objects, 2, generator=g)*48
    wh = torch.rand(images, objects, 2, generator=g)*24 + 4
    gt = GroundTruth(torch.cat([xy, xy+wh], -1), torch.randint(0, C, (images, objects), generator=g))
    if objects > 2:
        gt.valid[:, -1] = False
        gt.ignore[:, -2] = True
    xy, wh = torch.rand(60, 2, generator=g)*56, torch.rand(60, 2, generator=g)*28 + 4
    priors = Priors(torch.cat([xy, xy+wh], -1), [48, 12], [(8, 8), (16, 16)],
                    torch.rand(images, 60, generator=g) > .1)
    gt.sizes, gt.masks = torch.full((images, 2), 64), torch.rand(images, objects, 5, 5, generator=g) > .5
    boxes = priors.boxes + torch.rand(images, 60, 4, generator=g)*4
    preds = Predictions(torch.randn(images, 60, C, generator=g), torch.randn(images, 60, 4, generator=g)
                        *.2, dict(boxes=boxes, masks=torch.randn(images, 60, 5, 5, generator=g)))
    return priors, gt, preds


def coded(part, boxes, deltas, border):
    "A coder there and back, called by what it is told: most of it a box and four numbers."
    name = type(part).__name__
    if name == 'DistancePointBBoxCoder': boxes = boxes[..., :2]
    if name == 'BucketingBBoxCoder':
        bins = deltas.repeat_interleave(part.side_num, -1)
        found, sure = part.decode(boxes, (bins, bins.flip(-1)), border)
        return [found, sure, *part.encode(boxes, found + found.new_full((4,), 1.).cumsum(0))]
    more = (8, border) if name == 'YOLOBBoxCoder' else (border,)
    found = part.decode(boxes, deltas, *more)
    return [found, part.encode(boxes, found + found.new_full((4,), 1.).cumsum(0), *more[:-1])]


def costs(part, priors, gt, preds):
    "The table of a match cost: classes, boxes, or masks of one row."
    name = type(part).__name__
    if name == 'IoUCost': return part(priors.boxes + preds.deltas, gt.boxes)
    if name == 'BBoxL1Cost': return part(preds.deltas, gt.boxes/64)
    if name == 'ClassificationCost' or name == 'FocalLossCost' and not part.binary_input:
        return part(preds.scores, gt.labels)
    masks = gt.labels[..., None, None] == torch.arange(C, device=gt.labels.device)
    logits = preds.scores[..., None, :]
    return part(logits if name != 'DiceCost' or part.pred_act else logits.sigmoid(), masks)


def sampled(part):
    "`f(priors, gt, preds)`: one draw, with dice that are the same for every image and every call."
    part.throw = lambda codes: (torch.arange(codes.shape[-1], device=codes.device)*.618 % 1).expand(
        codes.shape)
    def use(priors, gt, preds):
        codes = (torch.arange(priors.boxes.shape[-2], device=gt.boxes.device) % 3 - 1) * gt.real.any(
            -1, keepdim=True)
        assigned = AssignResult(gt.real.sum(-1), codes, preds.deltas.float()[..., 0].sigmoid(),
                                codes*0 - 1)
        candidates = codes.shape[-1] + gt.valid.shape[-1]*getattr(part, 'add_gt_as_proposals', False)
        grow = lambda x: x.float().repeat_interleave(2, -2)[..., -candidates:, :]
        if type(part).__name__ == 'MaskPseudoSampler':
            res = part.sample(assigned, preds.extras['masks'], gt)
            return [res.gt_masks.float(), res.labels, res.weight]
        more = {}
        if type(part).__name__ == 'OHEMSampler': more = dict(losses=grow(preds.scores)[..., 0].abs())
        if type(part).__name__ == 'ScoreHLRSampler':
            more = dict(preds=(grow(preds.scores), grow(preds.extras['boxes'])))
        res = part.sample(assigned, priors, gt, **more)
        return [res.boxes, res.labels, res.weight]
    return use


def call_of(role, cls, kw):
    "`f(priors, gt, preds)`: one use of a part, tensors in, a list of tensors out."
    part = cls(**kw)
    if role == 'bbox_assigner':
        def use(priors, gt, preds):
            res = part.assign(priors, gt, preds)
            return [t for t in (res.num_gts, res.gt_inds, res.max_overlaps, res.labels) if t is not None]
    elif role == 'bbox_sampler': return sampled(part)
    elif role == 'bbox_coder':
        def use(priors, gt, preds):
            border = gt.valid.new_full((gt.valid.shape[0], 2), 64, dtype=torch.long)
            return coded(part, priors.boxes, preds.deltas, border)
    elif role == 'match_cost':
        # over objects: there may be none
        def use(priors, gt, preds): return [costs(part, priors, gt, preds).sum(-1)]
    elif role == 'prior_generator':
        def use(priors, gt, preds):
            # one level a call
            if not hasattr(part, 'strides'): return [part.grid_points(MAPS[0], 8, gt.boxes.device)]
            made = part(MAPS[:1]*len(part.strides), gt.boxes.device)
            return [made.boxes]
    else: raise AssertionError(f'no recipe for the role {role!r}: add one to tests/test_parts.py')
    return use


def on_cuda(x):
    "The same structure with tensors of a pretended GPU; only inside a `FakeTensorMode`."
    if isinstance(x, dict): return {k: on_cuda(v) for k, v in x.items()}
    return torch.empty_like(x, device='cuda') if isinstance(x, torch.Tensor) else x


def pretended(structure):
    return type(structure)(**{k: on_cuda(v) for k, v in vars(structure).items()})


def same(got, want):
    assert len(got) == len(want)
    for g, w in zip(got, want): torch.testing.assert_close(g, w, equal_nan=True)


TARGETS = parts(BBOX_ASSIGNERS, BBOX_SAMPLERS, BBOX_CODERS, MATCH_COST, PRIOR_GENERATORS)
targets = pytest.mark.parametrize('role,cls,kw', TARGETS)
on_device = pytest.mark.parametrize('role,cls,kw',
                                    [p for p in TARGETS if p.values[1].__name__ not in ON_HOST])


def test_the_parts_are_there():
    names = {p.values[1].__name__ for p in TARGETS}
    assert {'AnchorGenerator', 'DeltaXYWHBBoxCoder', 'MaxIoUAssigner', 'PseudoSampler'} <= names


@on_device
def test_target_is_one_graph(role, cls, kw):
    torch._dynamo.reset()
    use, given = call_of(role, cls, kw), scene(2)
    same(torch.compile(use, fullgraph=True, backend='eager')(*given), use(*given))


@targets
def test_target_waits_for_nothing_or_once(role, cls, kw):
    given = scene(2)
    assert count(lambda: call_of(role, cls, kw)(*given))['syncs'] == (cls.__name__ in ON_HOST)


@on_device
def test_target_on_any_device_without_a_wait(role, cls, kw):
    given = scene(2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        use, pretend = call_of(role, cls, kw), [pretended(g) for g in given]
        out = []
        counted = count(lambda: out.extend(use(*pretend)))
        assert all(t.device.type == 'cuda' for t in out)
    assert counted['syncs'] == 0, counted['where']


@targets
def test_target_of_eight_images_costs_one(role, cls, kw):
    use = call_of(role, cls, kw)
    one, eight = (count(lambda: use(*scene(n)))['ops'] - count(lambda: scene(n))['ops'] for n in (1, 8))
    assert one == eight


@targets
def test_target_without_objects(role, cls, kw):
    use = call_of(role, cls, kw)
    full, empty = use(*scene(2)), use(*scene(2, objects=0))
    assert [t.shape for t in full] == [t.shape for t in empty]
    assert all(t.isfinite().all() for t in empty)
    if role == 'bbox_assigner': assert (empty[1] <= 0).all() and (empty[0] == 0).all()


@targets
def test_target_in_half_precision(role, cls, kw):
    use, (priors, gt, preds) = call_of(role, cls, kw), scene(2)
    half = Predictions(preds.scores.bfloat16(), preds.deltas.bfloat16(), preds.extras)
    with torch.autocast('cpu', torch.bfloat16): out = use(priors, gt, half)
    assert all(t.dtype != torch.bfloat16 and not t.is_floating_point() or t.dtype == torch.float32
               for t in out)
    same(out, use(priors, gt, Predictions(half.scores.float(), half.deltas.float(), preds.extras)))


# those are the same for all images
@pytest.mark.parametrize('role,cls,kw', [p for p in TARGETS if p.values[0] != 'prior_generator'])
def test_image_alone_or_in_a_batch(role, cls, kw):
    use, (priors, gt, preds) = call_of(role, cls, kw), scene(3)
    pick = lambda v, i: {k: pick(x, i) for k, x in v.items()} if isinstance(
        v, dict) else v[i:i+1] if isinstance(v, torch.Tensor) and len(v) == 3 else v
    alone = lambda s, i: type(s)(**pick(vars(s), i))
    for i in range(3):
        same(use(*(alone(s, i) for s in (priors, gt, preds))),
             [t[i:i+1] for t in use(priors, gt, preds)])


def test_the_counter_sees_each_kind_of_wait():
    x = torch.arange(4.)
    waiting = dict(item=lambda: x.sum().item(), mask=lambda: x[x > 1], nonzero=lambda: x.nonzero(),
                   put=lambda: x.clone().index_put_((x > 1,), x[0]))
    for name, wait in waiting.items(): assert count(wait)['syncs'] == 1, name
    assert count(lambda: x[torch.tensor([0, 2])])['syncs'] == 0
    assert count(lambda: x.t().view(2, 2).sum())['kernels'] == 1
    with FakeTensorMode():
        x = torch.empty(4, device='cuda')
        for copies, n in ((lambda: x.new_tensor([1., 2]), 1), (lambda: x.cpu(), 1),
                          (lambda: torch.ones(2).to('cuda', non_blocking=True), 0),
                          (lambda: x.double(), 0), (lambda: x.copy_(torch.ones(4)), 1),
                          (lambda: x.copy_(torch.ones(4), non_blocking=True), 0)):
            assert count(copies)['syncs'] == n
