"""Every registered assigner: a batch gives what the images give one by one, and asks the host for nothing.

An assigner is found by its registry. Its settings are those of its golden cases, or those of `SETTINGS`; what it asks of predictions stands in
`predictions`. Images are drawn by hypothesis: no object up to five, crowds, padding at any place, priors that take no part.
"""
import functools, importlib, sys
import pytest
import torch
from hypothesis import given, settings as run, strategies as st
from torch._subclasses import FakeTensorMode
from detlearn._modidx import d as INDEX
from detlearn.core.registry import BBOX_ASSIGNERS
from detlearn.core.structures import AssignResult, GroundTruth, Predictions, Priors
from detlearn.targets.iou import columns
from detlearn.targets.priors import AnchorGenerator
from counting import count
from test_golden import CASES, read

for module in INDEX['syms']:
    if module.startswith('detlearn.targets.'): importlib.import_module(module)

pytestmark = pytest.mark.filterwarnings('ignore')   # settings that the zoo accepts and we warn about
SIDE, C = 64, 3
SETTINGS = {   # by type name: a list of settings, in place of those of the golden cases
    'AscendMaxIoUAssigner': [dict(pos_iou_thr=.5, neg_iou_thr=.4),
                             dict(pos_iou_thr=.7, neg_iou_thr=.3, min_pos_iou=.3)],
    'FCOSAssigner': [dict(regress_ranges=((-1, 20), (20, 1e8))),
                     dict(regress_ranges=((-1, 24), (12, 64)), center_sampling=True)]}
# waits of one batch, with the reason on their pages; all others: none
ON_HOST = {'HungarianAssigner': 1, 'MaskHungarianAssigner': 1}
# of two claims, that of the later object wins
BY_ORDER = {'MaxIoUAssigner', 'AscendMaxIoUAssigner', 'ApproxMaxIoUAssigner', 'GridAssigner',
            'RegionAssigner', 'UniformAssigner'}


def settings_of(name, most=3):
    if name in SETTINGS: return SETTINGS[name]
    seen = {}
    for _, tensors, case in CASES:
        if case['type'] == name and 'raises' not in case:
            seen.setdefault(repr(case['kwargs']), read(case['kwargs'], tensors))
    return [BBOX_ASSIGNERS.build(kw) for kw in list(seen.values())[:most]] or [{}]


ALL = [pytest.param(cls, kw, id=f'{name}-{i}') for name, cls in sorted(BBOX_ASSIGNERS.items())
       for i, kw in enumerate(settings_of(name))]
every_assigner = pytest.mark.parametrize('cls,kw', ALL)


@functools.cache
def some_priors():
    "Two levels of squares: 64 of side 32 and 16 of side 64, their centres in the middle of the cells."
    return AnchorGenerator([8, 16], [1.], [4.], center_offset=.5)([(8, 8), (4, 4)])


def boxes_of(n, g):
    "Boxes inside the image, in general position, so that nothing hangs on a tie."
    xy, wh = torch.rand(n, 2, generator=g)*(SIDE-12), torch.rand(n, 2, generator=g)*30 + 8
    return torch.cat([xy, (xy+wh).clamp(max=SIDE)], -1)


def predictions(images, g):
    "What the assigners ask of predictions, in general position: near the priors."
    boxes = some_priors().boxes
    near = boxes + torch.randn(images, *boxes.shape, generator=g)*4
    near = torch.cat([torch.minimum(near[..., :2], near[..., 2:] - 1), near[..., 2:]], -1)
    P = len(boxes)
    preds = Predictions(torch.randn(images, P, C, generator=g),
                        torch.randn(images, P, 4, generator=g)*.2,
                        dict(boxes=near, objectness=torch.randn(images, P, generator=g),
                             masks=torch.randn(images, P, 5, 5, generator=g)))
    # The sigmoid is taken once, for all: a CPU's differs in the last bit
    # between the middle of a buffer and its end, so a batch and an image would
    # get other numbers before any assigner sees them. SimOTA adds 1e5 to some
    # costs, where float32 has steps of 1/128: there a last bit decides ties.
    preds.extras['probabilities'] = preds.probabilities
    return preds


def one(s, i):
    "Image `i` of a structure with a batch axis, without it."
    pick = lambda v: {k: pick(x) for k, x in v.items()} if isinstance(v, dict) else v[i] if isinstance(
        v, torch.Tensor) else v
    return type(s)(**{k: pick(v) for k, v in vars(s).items()})


def draw_batch(counts, crowds, seed):
    "A padded batch, its slots in any order, and each image alone: `(gt, [(gt_i, slots_i), ...])`."
    g = torch.Generator().manual_seed(seed)
    G = max(counts) + seed % 2
    slots = [torch.randperm(G, generator=g)[:n] for n in counts]             # where each object sits
    gt = GroundTruth(torch.rand(len(counts), G, 4, generator=g)*SIDE, torch.full((len(counts), G), -1),
                     torch.zeros(len(counts), G, dtype=torch.bool),
                     # rubbish in the padding
                     masks=torch.rand(len(counts), G, 5, 5, generator=g) > .5,
                     sizes=torch.full((len(counts), 2), SIDE))
    alone = []
    for i, (n, at) in enumerate(zip(counts, slots)):
        image = GroundTruth(boxes_of(n, g), torch.randint(0, C, (n,), generator=g),
                            ignore=torch.rand(n, generator=g) < crowds,
                            masks=torch.rand(n, 5, 5, generator=g) > .5, sizes=torch.full((2,), SIDE))
        for name in ('boxes', 'labels', 'ignore', 'masks'):
            getattr(gt, name)[i, at] = getattr(image, name)
        gt.valid[i, at] = True
        alone.append((image, at))
    return gt, alone


def at_slots(codes, slots):
    "Codes of an image alone, as they stand in the batch."
    return torch.where(codes > 0,
                       torch.cat(
        [slots, slots.new_zeros(1)])[(codes-1).clamp(min=0).clamp(max=len(slots))] + 1, codes)


@every_assigner
@run(max_examples=25, deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=3), crowds=st.sampled_from([0., .3, 1.]),
       seed=st.integers(0, 10**6), part=st.sampled_from([None, 'of each image', 'shared']))
def test_batch_is_the_loop_over_images(cls, kw, counts, crowds, seed, part):
    gt, alone = draw_batch(counts, crowds, seed)
    g = torch.Generator().manual_seed(seed)
    # the order is kept, the gaps stay
    if cls.__name__ in BY_ORDER:
        alone = [(GroundTruth(im.boxes[o], im.labels[o], ignore=im.ignore[o], masks=im.masks[o],
                              sizes=im.sizes), at[o]) for im, at in alone for o in [at.argsort()]]
    preds, assigner, base = predictions(len(counts), g), cls(**kw), some_priors()
    valid = torch.rand(len(counts), len(base.boxes), generator=g) < .9 if part else None
    if part == 'shared': valid = valid[:1].expand(len(counts), -1)
    res = assigner.assign(Priors(base.boxes, base.level_sizes, base.strides, valid[0] if part == 'shared'
                                 else valid), gt, preds)
    for i, (image, at) in enumerate(alone):
        got = one(AssignResult(res.num_gts, res.gt_inds, res.max_overlaps, res.labels), i)
        want = assigner.assign(Priors(base.boxes, base.level_sizes, base.strides,
                                      None if valid is None else valid[i]), image, one(preds, i))
        assert torch.equal(got.gt_inds, at_slots(want.gt_inds, at)), f'image {i}'
        assert int(got.num_gts) == int(want.num_gts) == int(image.real.sum())
        assert torch.equal(got.labels, want.labels)
        if got.max_overlaps is not None and got.max_overlaps.shape == want.max_overlaps.shape:
            torch.testing.assert_close(got.max_overlaps, want.max_overlaps)
        owners = got.gt_inds[got.gt_inds > 0] - 1
        assert gt.real[i][owners].all(), 'a crowd or padding owns a prior'
        if valid is not None:
            assert (got.gt_inds[~valid[i]] <= 0).all(), 'a prior that takes no part has an owner'


@every_assigner
@pytest.mark.parametrize('most', [1, 400, 1200])
def test_a_large_table_in_parts(cls, kw, most, monkeypatch):
    "Whatever the size of the parts, the answer is that of the whole table. Priors in general position: ties have no order."
    gt, _ = draw_batch([9, 0, 14], .2, 5)
    base, g = some_priors(), torch.Generator().manual_seed(3)
    preds, boxes = predictions(3, g), base.boxes + torch.rand(base.boxes.shape, generator=g)
    for valid in (None, torch.rand(len(boxes), generator=g) < .8):
        use = lambda: cls(**kw).assign(Priors(boxes, base.level_sizes, base.strides, valid), gt, preds)
        want = use()
        with monkeypatch.context() as m:
            for name, module in list(sys.modules.items()):
                if name.startswith('detlearn.targets.') and hasattr(module, 'columns'):
                    m.setattr(module, 'columns', lambda boxes, G, _=None: columns(boxes, G, most))
            got = use()
        assert torch.equal(got.gt_inds, want.gt_inds) and torch.equal(got.labels, want.labels)
        if want.max_overlaps is not None: torch.testing.assert_close(got.max_overlaps, want.max_overlaps)


@every_assigner
def test_no_priors(cls, kw):
    gt, _ = draw_batch([3, 0], 0., 1)
    none = lambda t: t[:, :0]
    preds = predictions(2, torch.Generator())
    res = cls(**kw).assign(Priors(some_priors().boxes[:0], [0, 0], some_priors().strides), gt,
                           Predictions(none(preds.scores), none(preds.deltas),
                                       {k: none(v) for k, v in preds.extras.items()}))
    assert res.gt_inds.shape == res.labels.shape == (2, 0) and res.num_gts.tolist() == [3, 0]


@every_assigner
def test_labels_may_be_missing(cls, kw):
    gt, _ = draw_batch([3, 0], 0., 1)
    gt.labels = None
    try: res = cls(**kw).assign(some_priors(), gt, predictions(2, torch.Generator()))
    # it needs them, and says so
    except ValueError as e: assert 'labels' in str(e)
    else: assert res.labels is None


@every_assigner
def test_waits_of_a_batch(cls, kw):
    gt, _ = draw_batch([3, 5, 0, 2], .2, 0)
    preds = predictions(4, torch.Generator())
    counted = count(lambda: cls(**kw).assign(some_priors(), gt, preds))
    assert counted['syncs'] <= ON_HOST.get(cls.__name__, 0), counted['where']


@every_assigner
def test_one_graph(cls, kw):
    torch._dynamo.reset()
    gt, _ = draw_batch([3, 5, 0, 2], .2, 0)
    preds, priors, assigner = predictions(4, torch.Generator()), some_priors(), cls(**kw)
    use = lambda: assigner.assign(priors, gt, preds)
    assert torch.equal(torch.compile(use, fullgraph=True, backend='eager')().gt_inds, use().gt_inds)


@every_assigner
def test_stays_on_its_device(cls, kw):
    if cls.__name__ in ON_HOST: return
    base, preds = some_priors(), predictions(2, torch.Generator())
    there = lambda t: torch.empty(t.shape, dtype=t.dtype, device='cuda')
    with FakeTensorMode(allow_non_fake_inputs=True):
        gt = GroundTruth(*(there(t) for t in (torch.rand(2, 5, 4), torch.zeros(2, 5, dtype=torch.long),
                                              torch.zeros(2, 5, dtype=torch.bool))))
        fake = Predictions(there(preds.scores), there(preds.deltas),
                           {k: there(v) for k, v in preds.extras.items()})
        res = []
        counted = count(lambda: res.append(
            cls(**kw).assign(Priors(there(base.boxes), base.level_sizes, base.strides), gt, fake)))
        assert all(t.device.type == 'cuda' for t in (res[0].gt_inds, res[0].labels, res[0].num_gts))
    assert counted['syncs'] == 0, counted['where']


def test_all_are_here():
    assert 'MaxIoUAssigner' in BBOX_ASSIGNERS and ALL


MEMORY = '''
import resource, sys, torch
from detlearn.core.structures import GroundTruth, Predictions, Priors
from detlearn.core.shapes import random_boxes
from detlearn.targets.max_iou_assigner import MaxIoUAssigner
from detlearn.targets.atss_assigner import ATSSAssigner
from detlearn.targets.task_aligned_assigner import TaskAlignedAssigner
torch.set_num_threads(1)
scores = torch.rand(200_000, 3)
use = lambda priors, gt: ASSIGNER.assign(Priors(priors), GroundTruth(gt, torch.zeros(len(gt)).long()),
                                         Predictions(scores[:len(priors)], None, dict(boxes=priors)))
priors, objects = random_boxes(200_000, 1000, seed=1), random_boxes(500, 1000, seed=2)
use(priors[:1000], objects)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
codes = use(priors, objects).gt_inds
print((peak() - before)//1024, (codes > 0).sum().item())
'''


@pytest.mark.parametrize('assigner',
                         ['MaxIoUAssigner(.5, .4, .1)', 'ATSSAssigner(9)', 'TaskAlignedAssigner(13)'])
def test_a_hundred_million_pairs_in_little_memory(assigner):
    "200,000 priors and 500 objects: the table alone would take 400 MB."
    import subprocess
    out = subprocess.run([sys.executable, '-c', MEMORY.replace('ASSIGNER', assigner)],
                         capture_output=True, text=True, check=True, timeout=300).stdout.split()
    assert int(out[0]) < 200, f'{out[0]} MB'
    assert int(out[1]) > 500


AGAIN = '''
import importlib, inspect, torch
from detlearn.targets import hungarian_assigner as page
from detlearn.targets.hungarian_assigner import cheapest_pairs
assert inspect.isfunction(cheapest_pairs)  # a handle of an operator dies with its registration
cost = torch.rand(2, 5, 3); before = cheapest_pairs(cost)
for _ in range(3): importlib.reload(page)
for f in (cheapest_pairs, page.cheapest_pairs): assert (f(cost) == before).all()
torch.library.custom_op('detlearn::cheapest_pairs', lambda cost: 7*torch.ones(2), mutates_args=(),
                        schema='(Tensor cost) -> Tensor')
print(cheapest_pairs(cost).tolist())       # the newest is asked
'''


def test_an_operator_that_is_registered_anew_leaves_older_callers_alive():
    "A page and the module made of it register the same operator in one process."
    import subprocess
    done = subprocess.run([sys.executable, '-c', AGAIN], capture_output=True, text=True, timeout=600)
    assert done.stdout == '[7.0, 7.0]\n', (done.returncode, done.stderr)
