"""Every policy of the rate against a closed form written down here, at every step, as the optimizer of a real run sees it."""
import math
import pytest, torch
from torch import nn
from detlearn.core.structures import Batch, GroundTruth
from detlearn.engine.hooks import Hook, LrUpdaterHook, OptimizerHook
from detlearn.engine.runner import EpochBasedRunner
from detlearn.engine.schedules import POLICIES

# iterations of an epoch, epochs, rate of the optimizer
N, E, BASE = 10, 12, .02
cos = lambda a, b, x: b + (a-b)*(1+math.cos(math.pi*x))/2   # from `a` to `b`


def cycle(t, T):
    "Two cycles of T/2 steps: up to ten times within 40 %, down to a ten-thousandth."
    c = T//2; up, k = int(.4*c), t % c
    return cos(BASE, 10*BASE, k/up) if k < up else cos(10*BASE, 1e-4*BASE, (k-up)/(c-up))


def one_cycle(t, T, top=.1):
    up = .3*T - 1
    return cos(top/25, top, t/up) if t <= up else cos(top, top/25/1e4, (t-up)/(T-1-up))


def yolox(t, T):
    "A parabola for two epochs, a cosine, three flat epochs."
    w, last = 2*N, T-3*N
    if t < w: return BASE*((t+1)/w)**2
    return .05*BASE if t+1 >= last else cos(BASE, .05*BASE, (t+1-w)/(last-w))


def restarts(t, T):
    for start, length, weight in ((0, 60, 1), (60, 40, .7), (100, 20, .4)):
        if t < start+length: return 1e-4 + weight*(BASE-1e-4)*(1+math.cos(math.pi*(t-start)/length))/2


# name: the config, and `f(t, T)`; t and T count epochs where the config says by_epoch, else iterations
BY_ITER = {
    'fixed': (dict(policy='fixed'), lambda t, T: BASE),
    'step list': (dict(policy='step', step=[80, 110]), lambda t, T: BASE*.1**((t >= 80)+(t >= 110))),
    'step int, floor': (dict(policy='step', step=30, gamma=.2, min_lr=1e-3),
                        lambda t, T: max(BASE*.2**(t//30), 1e-3)),
    'exp': (dict(policy='exp', gamma=.97), lambda t, T: BASE*.97**t),
    'poly': (dict(policy='poly', power=.9, min_lr=1e-4), lambda t, T: (BASE-1e-4)*(1-t/T)**.9 + 1e-4),
    'inv': (dict(policy='inv', gamma=.1, power=.75), lambda t, T: BASE/(1+.1*t)**.75),
    'CosineAnnealing': (dict(policy='CosineAnnealing', min_lr_ratio=.01),
                        lambda t, T: cos(BASE, .01*BASE, t/T)),
    'FlatCosineAnnealing': (dict(policy='FlatCosineAnnealing', start_percent=.6, min_lr=1e-4),
                            lambda t, T: BASE if t < round(.6*T)
                            else cos(BASE, 1e-4, (t-round(.6*T))/(T-round(.6*T)))),
    'LinearAnnealing': (dict(policy='LinearAnnealing', min_lr=1e-4),
                        lambda t, T: BASE + (1e-4-BASE)*t/T),
    'CosineRestart': (dict(policy='CosineRestart', periods=[60, 40, 20], restart_weights=[1, .7, .4],
                           min_lr=1e-4), restarts),
    'cyclic': (dict(policy='cyclic', cyclic_times=2), cycle),
    'OneCycle': (dict(policy='OneCycle', max_lr=.1), one_cycle),
    'YOLOX': (dict(policy='YOLOX', warmup='exp', warmup_by_epoch=True, warmup_iters=2, warmup_ratio=1,
                   num_last_epochs=3, min_lr_ratio=.05), yolox)}
BY_EPOCH = {
    'step': (dict(policy='step', step=[8, 11]), lambda t, T: BASE*.1**((t >= 8)+(t >= 11))),
    'exp': (dict(policy='exp', gamma=.8), lambda t, T: BASE*.8**t),
    'poly': (dict(policy='poly', power=2.), lambda t, T: BASE*(1-t/T)**2),
    'inv': (dict(policy='inv', gamma=1.), lambda t, T: BASE/(1+t)),
    'CosineAnnealing': (dict(policy='CosineAnnealing', min_lr=0.), lambda t, T: cos(BASE, 0, t/T)),
    'LinearAnnealing': (dict(policy='LinearAnnealing', min_lr_ratio=.1), lambda t, T: BASE*(1-.9*t/T)),
    'FlatCosineAnnealing': (dict(policy='FlatCosineAnnealing', min_lr=0.),
                            lambda t, T: BASE if t < 9 else cos(BASE, 0, (t-9)/3)),
    'CosineRestart': (dict(policy='CosineRestart', periods=[8, 4], restart_weights=[1, .5], min_lr=0.),
                      lambda t, T: cos(BASE, 0, t/8) if t < 8 else .5*cos(BASE, 0, (t-8)/4))}
WARMUPS = {'none': ({}, lambda i: 1.),
           'constant': (dict(warmup='constant', warmup_iters=25, warmup_ratio=.1),
                        lambda i: .1 if i < 25 else 1.),
           'linear': (dict(warmup='linear', warmup_iters=25, warmup_ratio=.01),
                      lambda i: .01 + .99*i/25 if i < 25 else 1.),
           'exp': (dict(warmup='exp', warmup_iters=25, warmup_ratio=.01),
                   lambda i: .01**(1-i/25) if i < 25 else 1.),
           'linear, in epochs': (dict(warmup='linear', warmup_by_epoch=True, warmup_iters=3,
                                      warmup_ratio=.1), lambda i: .1 + .9*i/30 if i < 30 else 1.)}


class Toy(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(1))
    def forward(self, images, gt): return dict(loss=self.w.sum())


class Note(Hook):
    priority = 'LOWEST'
    def __init__(self): self.seen = []
    def after_train_iter(self, runner):
        self.seen.append([g['lr'] for g in runner.optimizer.param_groups])


def rates(cfg, epochs=E):
    "What two groups of an optimizer, one with a tenth of the rate, get in a real run."
    net = Toy(); net.v = nn.Parameter(torch.zeros(1))
    opt = torch.optim.SGD([dict(params=[net.w], lr=BASE), dict(params=[net.v], lr=BASE/10)], BASE)
    run = EpochBasedRunner(net, opt, None, None, epochs, logger=lambda text: None)
    for h in (LrUpdaterHook(**cfg), OptimizerHook(), note := Note()): run.register_hook(h)
    run.run([[Batch(torch.zeros(1, 3, 2, 2), GroundTruth(torch.zeros(1, 0, 4)))]*N])
    return note.seen


def check(cfg, expected):
    seen = rates(cfg); assert len(seen) == N*E
    assert [a for a, _ in seen] == pytest.approx(expected, rel=1e-9, abs=1e-15)
    # no absolute rate in it: groups keep their proportion
    if cfg['policy'] not in ('OneCycle', 'step', 'CosineRestart', 'FlatCosineAnnealing',
                             'LinearAnnealing', 'poly', 'CosineAnnealing'):
        assert [b for _, b in seen] == pytest.approx([a/10 for a in expected], rel=1e-9, abs=1e-15)


# YOLOX has a warm-up of its own
@pytest.mark.parametrize('name, warmup',
                         [(n, w) for n in BY_ITER for w in WARMUPS if n != 'YOLOX' or w == 'none'])
def test_by_iteration(name, warmup):
    cfg, form = BY_ITER[name]
    more, factor = WARMUPS[warmup]; by = {} if name in ('cyclic', 'OneCycle') else dict(by_epoch=False)
    check(dict(cfg, **by, **more), [form(i, N*E)*factor(i) for i in range(N*E)])


@pytest.mark.parametrize('warmup', WARMUPS)
@pytest.mark.parametrize('name', BY_EPOCH)
def test_by_epoch(name, warmup):
    cfg, form = BY_EPOCH[name]; more, factor = WARMUPS[warmup]
    check(dict(cfg, **more), [form(i//N, E)*factor(i) for i in range(N*E)])


def test_no_policy_is_left_out(): assert {c['policy'] for c, _ in BY_ITER.values()} == set(POLICIES)
