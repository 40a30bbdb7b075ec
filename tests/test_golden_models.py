"""Whole models against fingerprints of the reference implementation: keys, shapes, outputs, losses, gradients, what is frozen.

Weights need no file: each comes from its name, by a random stream that never changes. The folder is `tests/golden_models`, or the one named by
DETLEARN_GOLDEN_MODELS: KIND.json with KIND.safetensors. A case is collected when the package has all types that its config names; the others are counted.
"""
import collections, copy, json, os, warnings, zlib
from pathlib import Path
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
import model_adapter as ours

FOLDER = Path(os.environ.get('DETLEARN_GOLDEN_MODELS') or Path(__file__).parent/'golden_models')
TOL = 1e-3   # of a tensor's largest value


def stream(name, shape, seed=0):
    "Standard normal numbers that belong to a name."
    z = np.random.RandomState(zlib.crc32(f'{seed}:{name}'.encode())).standard_normal(tuple(shape))
    return torch.from_numpy(np.asarray(z, dtype=np.float32)).reshape(tuple(shape))


@torch.no_grad()
def fill(model, seed=0):
    "Weights from names: of size `1/sqrt(fan in)`, norms near 1, statistics near 0 and 1."
    for name, p in model.named_parameters():
        z = stream(name, p.shape, seed)
        if name.endswith('init_proposal_bboxes.weight'): z = z.sigmoid()
        elif p.dim() >= 2: z = z/(p.numel()/p.shape[0])**.5
        elif name.rsplit('.', 1)[-1] in ('weight', 'scale', 'gamma'): z = 1 + .1*z
        else: z = z*.1
        p.copy_(z)
    for name, b in model.named_buffers():
        if name.endswith('running_mean'): b.copy_(.1*stream(name, b.shape, seed))
        elif name.endswith('running_var'): b.copy_(.5 + stream(name, b.shape, seed).abs())
        elif name.endswith('weight_gamma'):
            w = model.get_parameter(name[:-len('_gamma')])
            b.fill_((w.numel()/w.shape[0])**-.5)
    return model


def picture(spec):
    return torch.from_numpy(
        np.random.RandomState(spec['seed']).standard_normal(tuple(spec['shape'])).astype(np.float32))


def calm(model):
    "No dropout, so that training is the same each time."
    for m in model.modules():
        for name in ('p', 'drop_prob'):
            if 'Drop' in type(m).__name__ and hasattr(m, name): setattr(m, name, 0.)
        if isinstance(m, torch.nn.MultiheadAttention): m.dropout = 0.
    return model


def settings(x):
    "JSON to a config."
    if isinstance(x, dict):
        return (tuple(map(settings, x['$tuple'])) if '$tuple' in x
                else {k: settings(v) for k, v in x.items()})
    return list(map(settings, x)) if isinstance(x, list) else x


def leaves(x, path=''):
    "Every tensor of a nested result by its path."
    if isinstance(x, torch.Tensor): return {path: x.detach()}
    pairs = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else ()
    return {k: t for name, v in pairs
            for k, t in leaves(v, f'{path}.{name}' if path else str(name)).items()}


def sampled(t):
    "All numbers of a small tensor, 256 of a large one."
    t = t.reshape(-1)
    return (t if t.numel() <= 2048 else t[torch.arange(256)*t.numel()//256]).double()


def same_tensors(got, want, store):
    found = leaves(got)
    for path, w in want.items():
        assert path in found, f'{path} is missing'
        assert (list(found[path].shape)
                == w['shape']), f'{path} has shape {list(found[path].shape)} for {w["shape"]}'
        a, b = sampled(found[path]), store[w['t']].double()
        if not b.numel(): continue
        off = float((a - b).abs().nan_to_num(0.).max()/max(1e-3, float(b.abs().max())))
        assert (off <= TOL
                and torch.equal(a.isnan(),
                                b.isnan())), f'{path} is off by {off:.2g} of its largest value'


def same_numbers(got, want, tol=TOL):
    for k, w in want.items():
        assert k in got, f'{k} is missing; there is {sorted(got)}'
        assert ((got[k] is None) == (w is None)
                and (w is None or np.shape(got[k]) == np.shape(w)
                     and np.allclose(got[k], w, rtol=tol, atol=tol,
                                     equal_nan=True))), f'{k}: {got[k]} for {w}'


def given(model, kind, xs):
    "What a part is called with: an image, or maps; the pixel decoders of MaskFormer take what is known of the images too."
    if kind == 'backbone': return xs[0],
    about = kind == 'plugin' and not type(model).__name__.startswith('MSDeform')
    return tuple(xs), *([metas(tuple(4*n for n in xs[0].shape[2:]), len(xs[0]))] if about else [])


def train_net(model, kind, xs):
    "Mean squares of the outputs in training mode; their gradients go back."
    model.train()
    leaf = [x.clone().requires_grad_() for x in xs]
    loss = sum((t**2).mean() for t in live(model(*given(model, kind, leaf))))
    loss.backward()
    norms = [None if x.grad is None else float(x.grad.norm()) for x in leaf]
    return dict(loss=float(loss.detach()),
                input_grad_norm=norms), [n for n, p in model.named_parameters() if not p.requires_grad]


def live(x): return [x] if isinstance(x, torch.Tensor) else [t for v in x for t in live(v)]


def check_part(model, case, store, xs):
    calm(model).eval()
    with torch.no_grad(): same_tensors(model(*given(model, case['kind'], xs)), case['out'], store)
    want = case.get('train_mode')
    if not want: return
    numbers, frozen = train_net(model, case['kind'], xs)
    same_numbers(dict(loss=numbers['loss']), dict(loss=want['loss']))
    for i, (g, w) in enumerate(zip(numbers['input_grad_norm'], want['input_grad_norm'])):
        same_numbers({f'gradient of input {i}': g}, {f'gradient of input {i}': w}, 1e-2)
    assert frozen == want['frozen'], 'frozen parameters differ'


def objects(size):
    "Boxes and labels of two images, as shares of the size."
    shares = [[[.1, .1, .5, .6], [.45, .3, .95, .9], [.2, .55, .45, .85]],
              [[.05, .2, .6, .75], [.55, .1, .8, .35]]]
    return [torch.tensor(s)*torch.tensor([*size[::-1], *size[::-1]])
            for s in shares], [torch.tensor([1, 3, 0]), torch.tensor([2, 1])]


def metas(size, n):
    return [dict(img_shape=(*size, 3), ori_shape=(*size, 3), pad_shape=(*size, 3),
                 batch_input_shape=size, scale_factor=np.ones(4, np.float32), flip=False)]*n


def train_detector(model, image, size):
    model = calm(copy.deepcopy(model))
    model.train()
    torch.manual_seed(0); np.random.seed(0)
    boxes, labels = objects(size)
    given = (dict(gt_bboxes=boxes) if type(model).__name__ == 'RPN'
             else dict(gt_bboxes=boxes, gt_labels=labels))
    losses = model.forward_train(image.clone(), metas(size, 2), **given)
    mean = lambda v: sum(x.mean() for x in v) if isinstance(v, (list, tuple)) else v.mean()
    sum(mean(v) for k, v in losses.items() if 'loss' in k).backward()
    number = lambda x: float(x.detach().sum())
    norm = lambda ps: float(sum((p.grad.double()**2).sum() for p in ps)**.5) if ps else None
    return ({k: [number(x) for x in v] if isinstance(v, (list, tuple)) else number(v)
             for k, v in losses.items()},
            {n: norm([p for p in c.parameters() if p.grad is not None])
             for n, c in model.named_children()})


def same_detections(got, want, store, size):
    "As sets: a near tie of scores may change the order, or one suppression."
    def table(dets, labels):
        return torch.cat([dets[:, :4].double()/max(size), dets[:, 4:].double(),
                          10.*labels[:, None].double()], 1)
    ref = table(*(store[want[k]['t']].reshape(want[k]['shape']) for k in ('0.dets', '0.labels')))
    mine = table(torch.cat([torch.from_numpy(b) for b in got]),
                 torch.tensor([i for i, b in enumerate(got) for _ in b]))
    assert abs(len(ref) - len(mine)) <= .03*len(ref) + 1, f'{len(mine)} detections for {len(ref)}'
    if len(ref) and len(mine):
        lost = int((torch.cdist(ref, mine, p=float('inf')).min(1).values > 5*TOL).sum())
        assert lost <= .03*len(ref), f'{lost} of {len(ref)} detections without a near one'


def check_detector(model, case, store, xs):
    model.eval()
    size, image = tuple(xs[0].shape[2:]), xs[0]
    with torch.no_grad():
        feats = model.extract_feat(image)
        raw = dict(feats=feats)
        for name in ('rpn_head', 'bbox_head', 'mask_head'):
            if any(k.startswith(f'{name}.') for k in case['out']):
                raw[name] = getattr(model, name)(feats)
        same_tensors(raw, case['out'], store)
    if 'train' in case:
        losses, norms = train_detector(model, image, size)
        sure = {k: v for k, v in case['train']['losses'].items() if case['train']['det'][k]}
        same_numbers(losses, sure)
        if len(sure) == len(case['train']['det']):
            same_numbers(norms, {k: v for k, v in case['train']['grad_norm'].items()
                                 if case['train']['grad_det'][k]}, 10*TOL)
    if '0.dets' in case.get('test', {}):
        with torch.no_grad():
            same_detections(model.simple_test(image[:1], metas(size, 1), rescale=True)[0], case['test'],
                            store, size)


def load(folder):
    "Every case of a folder with its tensors: those that can be built, and what the others lack."
    cases, lacking = [], collections.Counter()
    for path in sorted(folder.glob('*.json')):
        store = load_file(path.with_suffix('.safetensors'))
        for case in json.loads(path.read_text())['cases']:
            lack = ours.missing(settings(case['config']))
            if lack: lacking[(case['kind'], *lack)] += 1
            else: cases.append(pytest.param(case, store, id=f"{case['kind']}-{case['id']}"))
    return cases, lacking


CASES, LACKING = load(FOLDER)


def test_models_that_are_left():
    for (kind, *types), n in sorted(LACKING.items()): print(f'{n} {kind} cases need {", ".join(types)}')
    print(f'{len(CASES)} of {len(CASES) + sum(LACKING.values())} models are built')
    assert CASES, f'no case in {FOLDER}'


@pytest.mark.parametrize('case,store', CASES)
def test_model(case, store):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = ours.build(case['kind'], settings(case['config']))
    have, want = ({(k, tuple(s)) for k, s in pairs}
                  for pairs in ([(k, v.shape) for k, v in model.state_dict().items()], case['state']))
    assert have == want, f'{len(want - have)} missing {sorted(want - have)[:3]}, {len(have - want)} extra {sorted(have - want)[:3]}'
    fill(model, case['seed'])
    (check_detector if case['kind'] == 'detector' else check_part)(model, case, store,
                                                                   [picture(i) for i in case['inputs']])
