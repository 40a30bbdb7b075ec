"""The engine under faults that a notebook can't hold: processes that are killed, signals, files that are half written."""
import json, os, signal, subprocess, sys, textwrap, time
from pathlib import Path
import pytest, torch
from torch import nn
from torch.optim import lr_scheduler as L
from detlearn.engine import hooks
from detlearn.engine.checkpoints import find_latest, read_file, save_checkpoint
from detlearn.engine.ema import EMAHook
from detlearn.engine.evaluation_hooks import EvalHook
from detlearn.engine.guards import CheckInvalidLossHook
from detlearn.engine.loggers import ProgressHook, read_log
from detlearn.engine.loop import ToyNet, ToyPhotos, fit, stack_toys, toy_loader
from detlearn.engine.runner import EpochBasedRunner, IterBasedRunner
from detlearn.engine.schedules import lr_at

LR = dict(policy='step', step=[3], warmup='linear', warmup_iters=6, warmup_ratio=.1)
ROOT = Path(__file__).resolve().parents[1]


def loader(workers=0): return toy_loader(num_workers=workers)


def make(folder, epochs=5, until=0, seed=0, by_epoch=True, interval=1):
    net = ToyNet(seed)
    runner = EpochBasedRunner(net, torch.optim.AdamW(net.parameters(), .02), folder,
                              dict(CLASSES=ToyPhotos.CLASSES), epochs)
    runner.register_training_hooks(LR, dict(grad_clip=dict(max_norm=1.)),
                                   dict(interval=interval, by_epoch=by_epoch),
                                   dict(interval=2, hooks=[dict(type='TextLoggerHook')]))
    runner.register_hook(EMAHook(.2, warm_up=1))
    if until: runner.register_hook(Wait(until))
    return runner


class Wait(hooks.Hook):
    "In one iteration, say so and wait until a signal has come: however slow the machine, it comes there."
    priority = 'LOWEST'
    def __init__(self, until): self.until = until
    def after_train_iter(self, runner):
        if runner.iter+1 != self.until: return
        print('here', flush=True)
        while not runner.stop.asked: time.sleep(.01)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    runner = make(tmp_path_factory.mktemp('straight'), by_epoch=False); torch.manual_seed(1)
    runner.run(loader())
    return runner


def test_runner_is_the_loop(tmp_path):
    "Same seed: bitwise equal weights after 20 steps."
    net = ToyNet(); opt = torch.optim.AdamW(net.parameters(), .02); torch.manual_seed(1)
    fit(net, loader(), opt, 5, lambda step, steps: lr_at(LR, .02, step//4, step), 1.)
    runner = make(tmp_path); runner.hooks = [h for h in runner.hooks if not isinstance(h, EMAHook)]
    torch.manual_seed(1); runner.run(loader())
    assert runner.iter == 20 and same(net, runner.model)


# ---- real processes

CHILD = '''
    import sys; sys.path[:0] = [{tests!r}, {root!r}]
    import torch, test_engine as t
    runner = t.make({folder!r}, until={until}, by_epoch=False, interval={interval}); torch.manual_seed(1)
    try: runner.run(t.loader())
    except KeyboardInterrupt: sys.exit(130)
'''


def child(folder, until, sign, interval=1):
    "Train in another process; send it a signal in the iteration `until`."
    code = textwrap.dedent(CHILD.format(tests=str(Path(__file__).parent), root=str(ROOT),
                                        folder=str(folder), until=until, interval=interval))
    p = subprocess.Popen([sys.executable, '-u', '-c', code], stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    out = ''
    for line in p.stdout:
        out += line
        if line.strip() == 'here': p.send_signal(sign)
    return p.wait(), out


def go_on(folder, path, seed=9):
    runner = make(folder, seed=seed, by_epoch=False); torch.manual_seed(55)
    runner.resume(path); runner.run(loader())
    return runner


def test_sigint_saves_and_says_how_to_resume(tmp_path, straight):
    rc, out = child(tmp_path, 6, signal.SIGINT)
    assert rc == 130, out
    assert ('Interrupted at iteration 6 (epoch 2, after 2 of 4 batches)' in out and 'resume with:' in out
            and 'interrupted.pth' in out)
    assert same(go_on(tmp_path, tmp_path/'interrupted.pth').model, straight.model)


def test_sigterm_saves_and_ends_well(tmp_path, straight):
    rc, out = child(tmp_path, 9, signal.SIGTERM)
    assert rc == 0, out
    assert ('SIGTERM: finishing this iteration' in out and 'Interrupted at iteration 9' in out
            and 'resume with:' in out)
    assert same(go_on(tmp_path, tmp_path/'interrupted.pth').model, straight.model)


def test_sigkill_in_mid_epoch(tmp_path, straight):
    rc, out = child(tmp_path, 7, signal.SIGKILL, interval=3)
    assert rc == -signal.SIGKILL and 'Interrupted' not in out
    last = find_latest(tmp_path)
    assert last.name == 'iter_6.pth'                                   # mid-epoch: 6 of 4 + 4
    assert same(go_on(tmp_path, last).model, straight.model)
    logs = sorted(tmp_path.glob('*.log.json'), key=lambda p: p.stat().st_mtime)
    assert all(json.loads(l) for l in logs[0].read_text().splitlines())  # the killed run's log is whole


KILLED = '''
    import sys, os, signal; sys.path[:0] = [{root!r}]
    import torch
    from detlearn.engine import checkpoints as c
    net = torch.nn.Linear(200, 200)
    c.save_checkpoint({path!r}, net, meta=dict(iter=1))
    def kill(*args): os.kill(os.getpid(), signal.SIGKILL)
    {fault}
    c.save_checkpoint({path!r}, net, meta=dict(iter=2))
'''
FAULTS = {'between writing and renaming': 'c.os.replace = kill',
          'before the bytes are pushed': 'c.os.fsync = kill',
          'in the middle of writing': 'old = torch.save\n    def half(obj, f): old(obj, f); '
                                      'os.truncate(f, 5000); kill()\n    torch.save = half'}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_kill_while_saving_leaves_the_old_file(tmp_path, fault):
    path = tmp_path/'epoch_1.pth'
    code = textwrap.dedent(KILLED).format(root=str(ROOT), path=str(path),
                                          fault=textwrap.dedent(FAULTS[fault].replace('\n    ', '\n')))
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert p.returncode == -signal.SIGKILL, p.stderr
    assert read_file(path)['meta']['iter'] == 1
    # the hidden remains are no candidate
    assert find_latest(tmp_path) == path
    save_checkpoint(path, nn.Linear(2, 2), meta=dict(iter=3))          # and in nobody's way
    assert sorted(f.name for f in tmp_path.iterdir()) == ['epoch_1.pth']


# ---- places, loaders, runners

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('done', [2, 4, 7])
def test_resumed_is_uninterrupted(tmp_path, done, workers, straight):
    whole = straight
    if workers:
        whole = make(tmp_path/'whole', by_epoch=False); torch.manual_seed(1); whole.run(loader(workers))
    first = make(tmp_path/'a', by_epoch=False, epochs=2); torch.manual_seed(1)
    first.run(loader(workers))
    second = make(tmp_path/'b', seed=4, by_epoch=False); torch.manual_seed(2)
    second.resume(tmp_path/'a'/f'iter_{done}.pth'); second.run(loader(workers))
    assert second.iter == 20 and same(second.model, whole.model)


@pytest.mark.parametrize('done', [3, 8, 11])
def test_the_books_own_loader_resumes(tmp_path, done):
    "Batches of `build_dataloader` depend on seed, epoch and place alone; no replay is needed."
    from detlearn.data.loader import build_dataloader
    data = lambda seed: build_dataloader(ToyPhotos(), 4, 0, seed=seed, collate_fn=stack_toys,
                                         pin_memory=False)
    whole = make(tmp_path/'a', by_epoch=False); torch.manual_seed(1); whole.run(data(3))
    back = make(tmp_path/'b', seed=4, by_epoch=False); torch.manual_seed(2)
    back.resume(tmp_path/'a'/f'iter_{done}.pth'); back.run(data(3))
    assert back.iter == 20 and same(back.model, whole.model)


def test_iterations_resume(tmp_path):
    def runner(folder, n):
        net = ToyNet()
        out = IterBasedRunner(net, torch.optim.AdamW(net.parameters(), .02), tmp_path/folder,
                              max_iters=n)
        out.register_training_hooks(dict(policy='poly', by_epoch=False), dict(grad_clip=None),
                                    dict(interval=5))
        return out
    whole = runner('a', 15); torch.manual_seed(1); whole.run(loader())
    back = runner('b', 15); torch.manual_seed(2); back.resume(tmp_path/'a'/'iter_10.pth')
    assert (back.epoch, back.inner_iter) == (2, 2)
    back.run(loader()); assert back.iter == 15 and same(back.model, whole.model)


@pytest.mark.parametrize('done', [5, 9])
@pytest.mark.parametrize('how', ['groups', 'classes', 'endless'])
def test_every_order_of_the_loader_resumes(tmp_path, how, done):
    "Batches of one shape, classes in turn, batches without an end: in the middle of a pass, to the bit."
    from detlearn.data.loader import build_dataloader
    class Photos(ToyPhotos):
        flag = [i % 3 == 0 for i in range(16)]
        def get_cat_ids(self, i): return [1] + [2]*(i < 3)
    settings = dict(groups={}, classes=dict(class_aware_sampler=dict(num_sample_class=1)),
                    endless=dict(runner_type='IterBasedRunner'))[how]
    def train(folder, seed, resume=None):
        net = ToyNet(seed); opt = torch.optim.AdamW(net.parameters(), .02)
        out = (IterBasedRunner(net, opt, tmp_path/folder, max_iters=13) if how == 'endless'
               else EpochBasedRunner(net, opt, tmp_path/folder, max_epochs=3))
        out.register_training_hooks(dict(policy='fixed'), dict(grad_clip=None),
                                    dict(interval=1, by_epoch=False))
        if resume: out.resume(tmp_path/resume/f'iter_{done}.pth')
        out.run(build_dataloader(Photos(), 4, 0, seed=3, collate_fn=stack_toys, pin_memory=False,
                                 **settings))
        return out
    whole = train('a', 0); back = train('b', 4, 'a')
    assert back.iter == whole.iter >= 12 and same(back.model, whole.model)


def test_looking_does_not_change_the_training(tmp_path, straight):
    runner = make(tmp_path, by_epoch=False)
    runner.register_hook(EvalHook(loader(), interval=3, by_epoch=False, save_best='val_loss'))
    torch.manual_seed(1); runner.run([loader(), loader()], [('train', 1), ('val', 1)])
    assert same(runner.model, straight.model) and len(list(tmp_path.glob('best_val_loss_*'))) == 1


def test_log_has_the_zoos_keys(tmp_path):
    runner = make(tmp_path)
    runner.register_hook(EvalHook(loader(),
                                  evaluate_fn=lambda model, data: dict(bbox_mAP=.5, val_loss=1.)))
    torch.manual_seed(1); runner.run(loader())
    head, *lines = read_log(next(tmp_path.glob('*.log.json')))
    assert head['CLASSES'] == ['cat', 'dog']
    train, val = [[r for r in lines if r['mode'] == m] for m in ('train', 'val')]
    assert list(train[0]) == ['mode', 'epoch', 'iter', 'lr', 'memory', 'data_time', 'loss_cls',
                              'loss_bbox', 'loss', 'grad_norm', 'time']
    assert list(val[0]) == ['mode', 'epoch', 'iter', 'lr', 'bbox_mAP', 'val_loss'] and len(val) == 5
    assert [(r['epoch'], r['iter']) for r in train[:3]] == [(1, 2), (1, 4), (2, 2)]
    assert abs(train[0]['lr'] - lr_at(LR, .02, 0, 1)) < 1e-9


def test_no_host_synchronisation_between_logs(tmp_path):
    "Forward, backward, clipping, step, averaging, checking: nothing is read until the log is due."
    from torch.utils._python_dispatch import TorchDispatchMode
    class Reads(TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += any(w in str(func) for w in ('local_scalar', 'nonzero', 'aten.equal', 'is_nonzero',
                                                   'masked_select'))
            return func(*args, **(kwargs or {}))
    net = ToyNet()
    runner = EpochBasedRunner(net, torch.optim.SGD(net.parameters(), .02, momentum=.9), None,
                              max_epochs=2, logger=lambda text: None)
    runner.register_training_hooks(LR, dict(grad_clip=dict(max_norm=1.)), None,
                                   dict(interval=50,
                                        hooks=[dict(type='TextLoggerHook', ignore_last=True)]))
    for h in (EMAHook(.2, warm_up=1), CheckInvalidLossHook(100), ProgressHook(disable=True)):
        runner.register_hook(h)
    counts, batches = [], [stack_toys([ToyPhotos()[i] for i in range(4)])]*4
    class Count(hooks.Hook):
        priority = 'HIGHEST'
        def before_train_iter(self, r): counts.append(reads.n)
    runner.register_hook(Count())
    with Reads() as reads: runner.run([batches])
    assert len(counts) == 8 and counts[:8] == [counts[0]]*8


def test_no_device_is_named():
    "A pretended accelerator: a stray CPU tensor raises."
    from torch._subclasses import FakeTensorMode
    buffer = hooks.LogBuffer()
    with FakeTensorMode(), torch.device('cuda'):
        for _ in range(3): buffer.update(dict(loss=torch.rand(()), time=.1), 2)
        row = buffer.values['loss']; assert hooks.mean_of(row).device.type == 'cuda'
        check = CheckInvalidLossHook(10)
        at = type('R', (), dict(outputs=dict(loss=torch.rand(())), iter=0, max_iters=9, batch=None))
        check.after_train_iter(at); assert check.first.device.type == 'cuda'


# ---- schedules

def by_torch(make, n=60, base=.02):
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], base); sched, out = make(opt), []
    for _ in range(n): out.append(opt.param_groups[0]['lr']); opt.step(); sched.step()
    return out


ORACLES = {'StepLR': (dict(policy='step', step=7, gamma=.5), lambda o: L.StepLR(o, 7, .5)),
           'MultiStepLR': (dict(policy='step', step=[20, 40]), lambda o: L.MultiStepLR(o, [20, 40])),
           'ExponentialLR': (dict(policy='exp', gamma=.95), lambda o: L.ExponentialLR(o, .95)),
           'PolynomialLR': (dict(policy='poly', power=.9), lambda o: L.PolynomialLR(o, 60, .9)),
           'CosineAnnealingLR': (dict(policy='CosineAnnealing', min_lr_ratio=.01),
                                 lambda o: L.CosineAnnealingLR(o, 60, .0002)),
           'LinearLR': (dict(policy='fixed', warmup='linear', warmup_iters=50, warmup_ratio=.001),
                        lambda o: L.LinearLR(o, .001, 1, 50)),
           'ConstantLR': (dict(policy='fixed', warmup='constant', warmup_iters=50, warmup_ratio=.1),
                          lambda o: L.ConstantLR(o, .1, 50))}


@pytest.mark.parametrize('name', ORACLES)
def test_schedules_are_torchs(name):
    cfg, oracle = ORACLES[name]
    assert [lr_at(dict(cfg, by_epoch=False), .02, 0, i, max_iters=60)
            for i in range(60)] == pytest.approx(by_torch(oracle), rel=1e-9)


def test_the_zoos_schedule():
    "`schedule_1x` on COCO: 7,330 iterations an epoch."
    cfg = dict(policy='step', warmup='linear', warmup_iters=500, warmup_ratio=.001, step=[8, 11])
    at = lambda it: lr_at(cfg, .02, it//7330, it, 12, 12*7330)
    assert [at(i) for i in (0, 49, 499, 500, 8*7330-1, 8*7330, 11*7330)] == pytest.approx(
        [2e-5, .02*(.001+.999*49/500), .02*(.001+.999*499/500), .02, .02, .002, .0002])


def test_load_from_lets_class_rows_follow_their_names(tmp_path):
    "`load_from` of a run knows the classes of the data and those of the file."
    def head(n, value):
        net = nn.ModuleDict(dict(fc_cls=nn.Linear(4, n+1)))
        nn.init.constant_(net['fc_cls'].weight, value); return net
    old = head(3, 1.); old['fc_cls'].weight.data[1] = 7.
    save_checkpoint(tmp_path/'old.pth', old, meta=dict(CLASSES=('cat', 'dog', 'bird'), iter=0))
    run = EpochBasedRunner(head(2, 0.), None, tmp_path/'w', dict(CLASSES=('fox', 'dog')), 1,
                           logger=(said := []).append)
    report = run.load_checkpoint(tmp_path/'old.pth')
    # fox is new, dog is taken over, background is the last row
    assert run.model['fc_cls'].weight[:, 0].tolist() == [0., 7., 1.]
    assert (report.rows == {'fc_cls.weight': ['dog'], 'fc_cls.bias': ['dog']}
            and any('rows of 1 of 2 classes are taken over by name: dog' in s for s in said))
