"""Rules that every registered loss must keep, tested once for all.

Settings and inputs come from the golden cases of a type, so a new page brings its tests with it. The rules: one graph for the compiler; no
tensor on the wrong device and no wait of the host; no element, or none with a weight, gives zero; a NaN of weight 0 stays outside; half
precision in, float32 and finite out; slopes agree with finite differences; leading axes are only a way to write a list.
"""
import copy, importlib, itertools, socket
import pytest
import torch
from torch._subclasses import FakeTensorMode
from detlearn._modidx import d as INDEX
from detlearn.core.registry import LOSSES
from detlearn.losses.ae_loss import pad_matches
from detlearn.losses.reduce import average_factor
from counting import count
from test_golden import CASES, read

for module in INDEX['syms']:
    if module.split('.')[1] == 'losses': importlib.import_module(module)

# settings that the zoo accepts and we warn about are still to work
pytestmark = pytest.mark.filterwarnings('ignore')
WEIGHTS = ('weight', 'label_weight', 'label_weights')
NO_SLOPE = {'CIoULoss': 'the factor of the shape counts as a constant, its page compares with it '
                        'written out',
            'SeesawLoss': 'the compensation counts as a constant, its page checks q=0'}


def prepared(name, kw, args):
    "The zoo's arguments as ours: classes last, matches as a tensor."
    pred, target = list(args.values())[:2]
    if name == 'CrossEntropyLoss' and not kw.get('use_mask') and isinstance(
        target, torch.Tensor) and pred.dim() == target.dim() + 1 > 2:
        args = {**args, 'cls_score': pred.movedim(1, -1)}
    return {**args, 'match': pad_matches(args['match'])} if 'match' in args else args


def loss_cases(most=3):
    "For each registered loss, a golden case with each of its settings, weighted where there is one."
    for cls in dict.fromkeys(LOSSES.values()):
        seen = {}
        for _, tensors, case in CASES:
            if case['type'] != cls.__name__ or case['call'] != 'forward' or 'raises' in case: continue
            args = read(case['args'], tensors)
            first = next(iter(args.values()))
            if not (len(first) and 'reduction_override' not in args and args.get('match', [1]) != [[]]):
                continue
            if any((args[w] == 0).all() for w in WEIGHTS if w in args
                   and not case['kwargs'].get('use_mask')):
                continue
            key = repr(case['kwargs'])
            if key not in seen or len(args) > len(seen[key][1]):
                seen[key] = read(case['kwargs'], tensors), args
        for i, (kw, args) in enumerate(itertools.islice(seen.values(), most)):
            yield pytest.param(cls, kw, prepared(cls.__name__, kw, args), id=f'{cls.__name__}-{i}')
        if not seen: yield pytest.param(cls, {}, None, id=cls.__name__)


LOSS_CASES = list(loss_cases())
losses = pytest.mark.parametrize('cls,kw,args', LOSS_CASES)


def mapped(x, f):
    "All tensors of a nested structure through `f`."
    if isinstance(x, torch.Tensor): return f(x)
    if isinstance(x, dict): return {k: mapped(v, f) for k, v in x.items()}
    return type(x)(mapped(v, f) for v in x) if isinstance(x, (tuple, list)) else x


def total(out):
    "One number of whatever a loss gives."
    if isinstance(out, torch.Tensor): return out.sum()
    return sum(map(total, out.values() if isinstance(out, dict) else out))


def weight_name(kw, args):
    return next((w for w in WEIGHTS if w in args and not kw.get('use_mask')), None)
def first_of(args): return next(iter(args))


def value_and_slope(loss, args):
    "The sum of the loss and the gradient of its first argument; the loss itself is left as it was."
    name = first_of(args)
    pred = args[name].detach().clone().requires_grad_()
    value = total(copy.deepcopy(loss)(**{**args, name: pred}))
    value.backward()
    return value.detach(), pred.grad


def same(got, want, **tolerance):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, equal_nan=True, **tolerance)


def test_every_loss_is_here():
    wanted = '''AssociativeEmbeddingLoss BalancedL1Loss BoundedIoULoss CIoULoss CrossEntropyLoss DIoULoss DiceLoss DistributionFocalLoss FocalLoss GHMC GHMR
        GIoULoss GaussianFocalLoss IoULoss KnowledgeDistillationKLDivLoss L1Loss MSELoss QualityFocalLoss SeesawLoss SmoothL1Loss VarifocalLoss'''
    assert set(wanted.split()) <= set(LOSSES)
    assert all(p.values[2] for p in LOSS_CASES), 'no golden case shows how a loss is called'


@losses
def test_loss_is_one_graph(cls, kw, args):
    torch._dynamo.reset()
    loss = cls(**kw)
    compiled = torch.compile(copy.deepcopy(loss), fullgraph=True, backend='eager')
    same([total(compiled(**args))], [total(loss(**args))])


@losses
def test_loss_on_any_device_without_a_wait(cls, kw, args):
    loss = cls(**kw)
    assert count(lambda: value_and_slope(loss, args))['syncs'] == 0
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss, out = cls(**kw).to('cuda'), []
        pretend = mapped(args, lambda t: torch.empty_like(t, device='cuda'))
        # forward alone: autograd wants a real device
        counted = count(lambda: out.append(total(loss(**pretend))))
        assert out[0].device.type == 'cuda'
    assert counted['syncs'] == 0, counted['where']


@losses
def test_loss_of_nothing(cls, kw, args):
    "No element, or none with a weight: zero, finite, and the graph is kept."
    n = len(args[first_of(args)])
    nothing = mapped({k: v for k, v in args.items() if k != 'avg_factor'},
                     lambda t: t[:0] if t.dim() and len(t) == n else t)
    value, slope = value_and_slope(cls(**kw), nothing)
    assert value == 0 and slope.numel() == 0
    name = weight_name(kw, args)
    if name is None: return
    value, slope = value_and_slope(cls(**kw), {**args, name: torch.zeros_like(args[name])})
    assert value == 0 and slope.abs().sum() == 0


@losses
def test_what_has_no_weight_may_hold_anything(cls, kw, args):
    name, first = weight_name(kw, args), first_of(args)
    if name is None: pytest.skip('called without weights')
    weight, spoiled = args[name].clone(), args[first].clone()
    weight[0], spoiled[0] = 0, float('nan')
    value, slope = value_and_slope(cls(**kw), {**args, name: weight, first: spoiled})
    assert value.isfinite() and slope.isfinite().all() and (slope[0] == 0).all()
    same([value], [value_and_slope(cls(**kw), {**args, name: weight})[0]])


@losses
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_loss_in_half_precision(cls, kw, args, dtype):
    "Computed in float32; finite, with finite slopes, also for the largest numbers that half precision holds."
    first = first_of(args)
    probabilities = (cls.__name__ == 'GaussianFocalLoss' or kw.get('activated')
                     or kw.get('activate') is False)
    half = args[first].to(dtype)
    # the slope of a square is twice the error: it must fit, too
    most = 1e4 if cls.__name__ == 'MSELoss' else 6e4
    worst = ((half > half.float().mean()).to(dtype) if probabilities
             else (half.float()*1e5).clamp(-most, most).to(dtype))
    for pred in (half, worst):
        with torch.autocast('cpu', dtype):
            value, slope = value_and_slope(cls(**kw), {**args, first: pred})
        assert (value.dtype == torch.float32 and value.isfinite() and slope.dtype == dtype
                and slope.isfinite().all())
    if not probabilities:
        same([value_and_slope(cls(**kw), {**args, first: half})[0]],
             [value_and_slope(cls(**kw), {**args, first: half.float()})[0]])


def few(t, n): return t[:3] if t.dim() and len(t) == n else t


@losses
def test_slopes_by_finite_differences(cls, kw, args):
    if cls.__name__ in NO_SLOPE: pytest.skip(NO_SLOPE[cls.__name__])
    first, n = first_of(args), len(args[first_of(args)])
    args = mapped(args, lambda t: few(t, n))
    if cls.__name__ == 'GaussianFocalLoss': args = mapped(args, lambda t: t[:1, :1, :4, :4])
    args = mapped(args, lambda t: t.double() if t.is_floating_point() else t)
    pred = args.pop(first)[..., :6].clone() if 'match' in args else args.pop(first).clone()
    if 'match' in args: args = dict(target=args['target'][..., :6], match=args['match'].clamp(max=5))
    if cls.__name__ == 'DiceLoss':
        pred, args['target'] = pred.flatten(1)[:, :8], args['target'].flatten(1)[:, :8]
    loss = cls(**{k: v for k, v in kw.items() if k != 'momentum'})
    assert torch.autograd.gradcheck(lambda x: total(loss(**{first: x}, **args)), pred.requires_grad_())


@losses
def test_leading_axes(cls, kw, args):
    "(14, ...) as (2, 7, ...): the same sum."
    n = len(args[first_of(args)])
    if cls.__name__ in ('AssociativeEmbeddingLoss', 'DiceLoss',
                        'GaussianFocalLoss') or kw.get('use_mask') or n % 2:
        pytest.skip('its leading axes have a meaning of their own, tested on its page')
    folded = mapped(args, lambda t: t.view(2, n//2, *t.shape[1:]) if t.dim() and len(t) == n else t)
    same([total(cls(**kw)(**folded))], [total(cls(**kw)(**args))])


@losses
def test_reductions_agree(cls, kw, args):
    if cls.__name__ == 'AssociativeEmbeddingLoss' or kw.get('use_mask'): pytest.skip('has no reduction')
    args = {k: v for k, v in args.items() if k != 'avg_factor'}
    run = lambda r, **more: total(cls(**kw)(**args, **more, reduction_override=r))
    each = run('none')
    # always divided by the number of valid elements, 'sum' is refused
    if cls.__name__ in ('GHMC', 'GHMR'): return
    same([run('sum'), run('mean', avg_factor=1.)], [each, each])
    with pytest.raises(ValueError, match='reduction'): run('median')
    with pytest.raises(ValueError, match='avg_factor'): run('sum', avg_factor=3.)


def average_in_a_process(rank, port, queue):
    torch.distributed.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank,
                                         world_size=2)
    positives = torch.arange(6).view(2, 3) < (2, 6)[rank]
    queue.put((rank, average_factor(positives).item(), average_factor(positives & False).item()))
    torch.distributed.destroy_process_group()


def test_one_average_factor_for_two_processes():
    "2 positives here, 6 there: both divide by 4; without any, by 1."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.get_context('spawn')
    queue = context.SimpleQueue()
    workers = [context.Process(target=average_in_a_process, args=(rank, port, queue))
               for rank in range(2)]
    for w in workers: w.start()
    for w in workers: w.join(60)
    assert sorted(queue.get() for _ in workers) == [(0, 4., 1.), (1, 4., 1.)]
