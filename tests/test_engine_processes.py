"""The engine in many processes, and under deaths at random moments: real processes, real signals, real disks.

Where a test needs rights that this machine does not give (mounting a small disk, network namespaces), it is skipped and says why.
"""
import os, random, shutil, signal, subprocess, sys, time, warnings
from pathlib import Path
import pytest, torch
from torch import nn
from detlearn.engine.accumulation import GradientCumulativeOptimizerHook
from detlearn.engine.checkpoints import find_latest, read_file
from detlearn.engine.distributed import launch, run_child
from detlearn.engine.ema import EMAHook
from detlearn.engine.hooks import Hook
from detlearn.engine.loggers import read_log
from detlearn.engine.loop import ShapeLoader, ToyNet, fit, toy_loader
from detlearn.engine.runner import EpochBasedRunner

ROOT = Path(__file__).resolve().parents[1]
LR = dict(policy='step', step=[3], warmup='linear', warmup_iters=6, warmup_ratio=.1)
# torchrun's processes meet at a port that the system gives and nobody can take before
HERE = ['--rdzv-backend', 'c10d', '--rdzv-endpoint', '127.0.0.1:0', '--local-addr', '127.0.0.1']


class Heavy(ToyNet):
    "A toy whose checkpoint is large enough for a kill to hit the writing of it."
    def __init__(self, seed=0):
        super().__init__(seed); self.register_buffer('ballast', torch.zeros(500_000))


def make(folder, epochs=5, net=None, interval=1):
    net = net or Heavy()
    run = EpochBasedRunner(net, torch.optim.AdamW(net.parameters(), .02), folder,
                           dict(CLASSES=('cat', 'dog')), epochs, logger=lambda text: None)
    run.register_training_hooks(LR, GradientCumulativeOptimizerHook(2, grad_clip=dict(max_norm=1.)),
                                dict(interval=interval, by_epoch=False, max_keep_ckpts=3))
    run.register_hook(EMAHook(.2, warm_up=1))
    return run


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def sgd(folder, net=None):
    "SGD with momentum, nothing else that has a memory."
    net = net or ToyNet()
    run = EpochBasedRunner(net,
                           torch.optim.SGD(net.parameters(), .05, momentum=.9, nesterov=True,
                                           weight_decay=1e-3), folder, None, 5, logger=lambda text: None)
    run.register_training_hooks(LR, dict(grad_clip=dict(max_norm=1.)), dict(interval=1, by_epoch=False))
    return run


def equal(a, b):
    "Nests of dicts, lists, tensors and plain values, to the bit; the time of saving may differ."
    if torch.is_tensor(a): return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(equal(a[k], b[k]) for k in a if k not in ('time', 'saved'))
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, (list, tuple)) else a == b


# ---- resume is exact: SGD; AdamW, averaged weights, accumulation; with and without reading processes

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('recipe', ['sgd', 'adamw, average, accumulation'])
def test_all_that_a_checkpoint_holds_is_equal(tmp_path, recipe, workers):
    "Twenty steps, or k and 20-k by another run with other weights and seeds: every entry of the last file, weights, optimizer, hooks, random numbers, place."
    maker, other = (sgd, lambda: ToyNet(9)) if recipe == 'sgd' else (make, lambda: Heavy(9))
    whole = maker(tmp_path/'whole')
    whole.hooks[[type(h).__name__ for h in whole.hooks].index('CheckpointHook')].keep = -1
    torch.manual_seed(1); whole.run(toy_loader(num_workers=workers))
    last = read_file(tmp_path/'whole'/'iter_20.pth')
    assert {'meta', 'state_dict', 'optimizer', 'rng', 'place', 'hooks'} <= set(last)
    for k in (3, 8, 13):
        back = maker(tmp_path/f'back{k}', net=other()); torch.manual_seed(77)
        back.resume(tmp_path/'whole'/f'iter_{k}.pth'); back.run(toy_loader(num_workers=workers))
        theirs = read_file(tmp_path/f'back{k}'/'iter_20.pth')
        assert [n for n in last if not equal(last[n], theirs[n])] == []


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    run = make(tmp_path_factory.mktemp('straight')); torch.manual_seed(1); run.run(toy_loader())
    return run


@pytest.mark.parametrize('k', [1, 6, 11, 19])
def test_n_steps_are_k_and_n_minus_k(tmp_path, k, straight):
    first = make(tmp_path); torch.manual_seed(1)
    class Stop(Hook):
        priority = 'LOWEST'
        def before_train_iter(self, runner):
            if runner.iter+1 == k: os.kill(os.getpid(), signal.SIGINT)
    first.register_hook(Stop())
    with pytest.raises(KeyboardInterrupt): first.run(toy_loader())
    second = make(tmp_path, net=Heavy(9)); torch.manual_seed(77)
    second.resume(tmp_path/'interrupted.pth'); second.run(toy_loader())
    assert second.iter == 20 and same(second.model, straight.model)


LIFE = '''
import os, sys; sys.path.insert(0, sys.argv[2])
import torch, time, test_engine_processes as t
from detlearn.engine.hooks import Hook
class Begun(Hook):
    priority = 'HIGHEST'
    def before_train_iter(self, runner): open(sys.argv[1] + '/begun', 'a').write('x')
pushed,push = [],os.fsync                  # twice a checkpoint: its bytes, its name
def hang(file):
    pushed.append(file)
    if len(pushed) == 3: open(sys.argv[1] + '/hangs', 'w').close(); time.sleep(900)
    push(file)
if sys.argv[3] == 'hang': os.fsync = hang  # a disk that takes for ever over the second checkpoint
run = t.make(sys.argv[1]); run.register_hook(Begun()); torch.manual_seed(1); run.resume('auto')
run.run(t.toy_loader())
'''


def test_twenty_kills_at_random_moments(tmp_path, straight):
    "Each life is killed after a random time, in a step or while a checkpoint is written; the next goes on from the newest whole file."
    import multiprocessing as mp
    ctx = mp.get_context('forkserver')
    ctx.set_forkserver_preload(['detlearn.engine.distributed', 'detlearn.engine.accumulation',
                                'detlearn.engine.ema', 'detlearn.engine.loggers', 'pytest',
                                'torch._dynamo'])
    torn, kills, rng = 0, 0, random.Random(0)
    while kills < 20:
        (tmp_path/'begun').unlink(missing_ok=True)
        last = kills == 19  # the last dies while it writes, whatever chance did before
        words = [str(tmp_path), str(Path(__file__).parent), 'hang' if last else '']
        p = ctx.Process(target=run_child, args=(LIFE, words, {}, str(tmp_path/'out')), daemon=True)
        p.start()
        # iterations begun, so that lives get somewhere on a busy machine
        wanted = rng.randint(1, 3)
        begun = lambda: (tmp_path/'begun').exists() and (tmp_path/'begun').stat().st_size >= wanted
        while p.is_alive() and not ((tmp_path/'hangs').exists() if last else begun()): time.sleep(.001)
        if not last: time.sleep(rng.uniform(0, .02))
        if p.is_alive(): p.kill(); kills += 1
        p.join()
        assert p.exitcode in (-9, 0), (tmp_path/'out').read_text()
        torn += any(f.name.endswith('.tmp') for f in tmp_path.iterdir())
        with warnings.catch_warnings():
            # no file is damaged: cut ones never get a name
            warnings.simplefilter('error'); newest = find_latest(tmp_path)
        if p.exitcode == 0 or (newest and read_file(newest)['meta']['iter'] == 20):
            # finished too early: begin anew, the deaths go on
            if kills < 20: [f.unlink() for f in tmp_path.glob('*.pth')]
    assert find_latest(tmp_path), 'no life has saved anything: the kills came too early'
    run = make(tmp_path, net=Heavy(3)); torch.manual_seed(1); run.resume('auto'); run.run(toy_loader())
    assert run.iter == 20 and same(run.model, straight.model)
    assert torn, 'no kill hit the writing of a checkpoint'
    print(f'{torn} of {kills} kills came while a checkpoint was written')


def test_a_cut_checkpoint_is_named_and_passed_over(tmp_path):
    run = make(tmp_path, 1); torch.manual_seed(1); run.run(toy_loader())
    data = (tmp_path/'iter_4.pth').read_bytes(); (tmp_path/'iter_4.pth').write_bytes(data[:len(data)//2])
    with pytest.warns(UserWarning, match='iter_4.pth is passed over'):
        assert find_latest(tmp_path).name == 'iter_3.pth'
    with pytest.warns(UserWarning, match='iter_4.pth is passed over'): run.resume('auto')
    assert run.iter == 3


def test_a_full_disk(tmp_path, straight):
    "A disk of two megabytes: the message says so, the last file is whole, and the run goes on elsewhere."
    disk = tmp_path/'disk'; disk.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=10m', 'tmpfs', str(disk)],
                          capture_output=True, text=True)
    if done.returncode: pytest.skip(f'no right to mount a small disk: {done.stderr.strip()}')
    try:
        run = make(disk); torch.manual_seed(1)
        run.hooks[[type(h).__name__ for h in run.hooks].index('CheckpointHook')].keep = -1
        with pytest.raises(OSError, match='the disk is full') as e: run.run(toy_loader())
        assert 'The last whole checkpoint is' in str(e.value) and 'go on elsewhere' in str(e.value)
        with warnings.catch_warnings(): warnings.simplefilter('error'); last = find_latest(disk)
        assert last is not None and not [f for f in disk.iterdir() if f.name.endswith('.tmp')]
        on = make(tmp_path/'elsewhere', net=Heavy(4)); torch.manual_seed(5); on.resume(last)
        on.run(toy_loader())
        assert same(on.model, straight.model)
    finally: subprocess.run(['umount', '-l', str(disk)])


# ---- many processes

TRAIN = '''
import gc, os, signal, sys, torch
from pathlib import Path
from detlearn.core.structures import Batch, GroundTruth
from detlearn.engine.distributed import init_dist, build_ddp
from detlearn.engine.hooks import Hook
from detlearn.engine.loop import ToyNet, ToyPhotos
from detlearn.engine.runner import EpochBasedRunner
from detlearn.losses.reduce import reduce_mean
folder,total,die = sys.argv[1],int(sys.argv[2]),sys.argv[3]
torch.set_num_threads(1)
rank,world = init_dist('pytorch' if 'RANK' in os.environ else 'none')
class Counted(ToyNet):
    "Losses over objects, divided by their number in all processes; an image may have none."
    def forward(self, images, gt):
        miss = (self.b(self.a(images.mean((-2, -1))).tanh())[:, None] - gt.boxes[..., :2]).square()*gt.valid[..., None]
        n = reduce_mean(gt.valid.sum().float()).clamp(min=1)
        return dict(loss_cls=miss[..., 0].sum()/n, loss_bbox=miss[..., 1].sum()/n)
photos,n = ToyPhotos(15, noise=0),15
objects = [torch.arange(3) < (i*7 % 4) for i in range(n)]                       # none, three, two, one, none, ...
items = [(photos.x[i], photos.y[i].expand(3, 4) + torch.arange(3)[:, None]/9, objects[i]) for i in range(n)]
for i in (1, 3): items[i] = (items[i][0], items[i][1], torch.zeros(3).bool())    # with two processes, one begins with nothing but empty images
mine,size = items[rank::world],total//world
batches = [Batch(torch.stack([a for a,_,_ in c]), GroundTruth(torch.stack([b for _,b,_ in c]), valid=torch.stack([v for _,_,v in c]))) for c in (mine[i:i+size] for i in range(0, len(mine), size))]
class Die(Hook):
    priority = 'HIGHEST'
    def before_train_iter(self, runner):
        mark = Path(folder)/'died'
        if die == 'die' and rank == 1 and runner.iter == 10 and not mark.exists(): mark.write_text(''); os.kill(os.getpid(), signal.SIGKILL)
def train():
    torch.manual_seed(0); net = build_ddp(Counted(dropout=0))
    run = EpochBasedRunner(net, torch.optim.SGD(net.parameters(), .1, momentum=.9), folder, dict(seed=0), 7, logger=lambda text: None)
    run.register_training_hooks(dict(policy='step', step=[5], warmup='linear', warmup_iters=5), dict(grad_clip=dict(max_norm=1.)), dict(interval=1, by_epoch=False, max_keep_ckpts=2), dict(interval=1, hooks=[dict(type='TextLoggerHook')]))
    run.register_hook(Die()); run.resume('auto'); run.run(batches)
train(); gc.collect()                                         # a wrapped model keeps the group: it goes first
if world > 1: torch.distributed.destroy_process_group()      # its threads end before the process does
'''


def outcome(folder):
    logs = [read_log(p)
            for p in sorted(Path(folder).glob('*.log.json'), key=lambda p: p.stat().st_mtime)]
    losses = [r['loss'] for log in logs for r in log if r.get('mode') == 'train']
    return losses, torch.load(Path(folder)/'iter_21.pth', weights_only=True)['state_dict']


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp('one')
    subprocess.run([sys.executable, '-c', TRAIN, str(folder), '6', 'live'], check=True,
                   env={k: v for k, v in os.environ.items() if k != 'RANK'})
    return outcome(folder)


def close(a, b):
    # 7 epochs of batches of 6, 6, 3
    assert len(a[0]) == len(b[0]) == 21
    assert max(abs(x-y)/max(abs(x), 1) for x, y in zip(a[0], b[0])) < 1e-6
    assert max((x-y).abs().max().item() for x, y in zip(a[1].values(), b[1].values())) < 1e-5


@pytest.mark.parametrize('n', [2, 3])
def test_processes_are_one(tmp_path, n, one):
    launch(n, TRAIN, tmp_path, 6, 'live', timeout=1800)
    close(outcome(tmp_path), one)


PIECES = '''
import sys, torch
from pathlib import Path
from detlearn.core.structures import Batch, GroundTruth
from detlearn.engine.accumulation import GradientCumulativeOptimizerHook
from detlearn.engine.distributed import init_dist, build_ddp
from detlearn.engine.hooks import CheckpointHook
from detlearn.engine.loop import ToyNet, ToyPhotos
from detlearn.engine.runner import EpochBasedRunner, gather_objects
from detlearn.losses.reduce import reduce_mean
folder,norm,whole,world,resume = Path(sys.argv[1]),sys.argv[2] == 'normaliser',sys.argv[3] == 'whole',int(sys.argv[4]),sys.argv[5]
torch.set_num_threads(1)
rank,world = init_dist() if world > 1 else (0, 1)
class Net(ToyNet):
    def forward(self, images, gt):
        out = super().forward(images, gt); n = float(len(images))
        return {k: v*n/reduce_mean(torch.tensor(n)) for k,v in out.items()} if norm else out
photos = ToyPhotos(20, noise=0); mine = [photos[i] for i in range(20)][rank::world]; size = 4//world
batches = [Batch(torch.stack([a for a,_,_ in c]), GroundTruth(torch.stack([b for _,b,_ in c]))) for c in (mine[i:i+size] for i in range(0, len(mine), size))]
net = build_ddp(Net(seed=3 if resume != '-' else 0, dropout=0))
run = EpochBasedRunner(net, torch.optim.SGD(net.parameters(), .1, momentum=.9), folder, {}, 2, logger=lambda t: None)
for h in (GradientCumulativeOptimizerHook(3, whole_batch=whole), CheckpointHook(1, by_epoch=False)): run.register_hook(h)
if resume != '-': run.resume(resume)
run.run(batches)
flat = gather_objects(torch.cat([p.detach().flatten() for p in net.parameters()]))
assert all(torch.equal(f, flat[0]) for f in flat), 'the processes have different weights'
if rank == 0: torch.save(flat[0], folder/'end.pt')
if world > 1: torch.distributed.destroy_process_group()
'''


@pytest.mark.parametrize('whole', ['whole', 'zoo'])
@pytest.mark.parametrize('kind', ['normaliser', 'plain'])
def test_processes_accumulate_as_one(tmp_path, kind, whole):
    "Ten iterations, three a step, so the last batch is of one piece; and the same taken up in the middle of a batch, where each process has gradients of its own."
    run = lambda world, name, resume='-': (launch(world, PIECES, tmp_path/name, kind, whole, world,
                                                  resume, timeout=1800), torch.load(tmp_path/name/'end.pt'))[1]
    one, two = run(1, 'one'), run(2, 'two')
    assert (one-two).abs().max() < 1e-6
    for at in (4, 5, 6): assert torch.equal(run(2, f'back{at}', tmp_path/'two'/f'iter_{at}.pth'), two)


SICK = '''
import sys, torch
from detlearn.core.structures import Batch, GroundTruth
from detlearn.engine.diagnosis import NaNTracerHook
from detlearn.engine.distributed import init_dist, build_ddp
from detlearn.engine.hooks import OptimizerHook
from detlearn.engine.loop import ToyNet, toy_loader
from detlearn.engine.runner import EpochBasedRunner
from detlearn.losses.reduce import reduce_mean
rank,world = init_dist()
class Net(ToyNet):
    def forward(self, images, gt): n = reduce_mean(torch.tensor(float(len(images)))); return {k: v/n for k,v in super().forward(images, gt).items()}
batches = list(toy_loader(16, noise=0, shuffle=False))
if rank == 1: batches[2].images[1, 0, 0, 0] = float('nan')
net = build_ddp(Net(dropout=0)); run = EpochBasedRunner(net, torch.optim.SGD(net.parameters(), .1), sys.argv[1], {}, 1, logger=lambda t: None)
for h in (OptimizerHook(), NaNTracerHook()): run.register_hook(h)
try: run.run(batches); print('no error')
except FloatingPointError as e: print(e)
torch.distributed.destroy_process_group()
'''


def test_a_nan_in_one_of_two_processes(tmp_path):
    "Losses share a normaliser, so a process that traced alone would wait for ever for the other."
    healthy, sick = launch(2, SICK, tmp_path, timeout=1800)
    assert 'not finite in another process' in healthy
    assert ('the loss of iteration 3 is not finite. first not finite: input of a (Linear)' in sick
            and 'Images 8.jpg' in sick and 'nan_iter_3_process_1.pth' in sick)
    assert [f.name for f in tmp_path.glob('nan_*')] == ['nan_iter_3_process_1.pth']


def test_torchrun_restarts_a_killed_process(tmp_path, one):
    script = tmp_path/'train.py'; script.write_text(TRAIN); folder = tmp_path/'run'; folder.mkdir()
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--max-restarts',
               '2', '--monitor-interval', '0.1', *HERE, str(script), str(folder), '6', 'die']
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800,
                          env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder/'died').exists()
    assert max((x-y).abs().max().item()
               for x, y in zip(outcome(folder)[1].values(), one[1].values())) < 1e-5


def test_two_hosts_in_namespaces(tmp_path, one):
    "Two network namespaces of this test's own, joined by a cable: two machines as far as gloo can tell."
    tag = f'dl{os.getpid()}'; a, b = f'{tag}a', f'{tag}b'
    ip = lambda *args: subprocess.run(['ip', *args], capture_output=True, text=True)
    if shutil.which('ip') is None: pytest.skip('no ip command: two hosts can not be made')
    made = ip('netns', 'add', a)
    if made.returncode: pytest.skip(f'no right to make network namespaces: {made.stderr.strip()}')
    try:
        ip('netns', 'add', b)
        cable = ip('link', 'add', f'{tag}x', 'type', 'veth', 'peer', 'name', f'{tag}y')
        if cable.returncode: pytest.skip(f'no right to join network namespaces: {cable.stderr.strip()}')
        for end, host, address in ((f'{tag}x', a, '10.213.7.1/24'), (f'{tag}y', b, '10.213.7.2/24')):
            ip('link', 'set', end, 'netns', host); ip('-n', host, 'addr', 'add', address, 'dev', end)
            ip('-n', host, 'link', 'set', end, 'up'); ip('-n', host, 'link', 'set', 'lo', 'up')
        common = dict(os.environ, MASTER_ADDR='10.213.7.1', MASTER_PORT='29513', WORLD_SIZE='2',
                      LOCAL_RANK='0', OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
        hosts = [subprocess.Popen(['ip', 'netns', 'exec', h, sys.executable, '-c', TRAIN, str(tmp_path),
                                   '6', 'live'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True,
                                  env=dict(common, RANK=str(r), GLOO_SOCKET_IFNAME=e))
                                  for r, (h, e) in enumerate(((a, f'{tag}x'), (b, f'{tag}y')))]
        try: said = [p.communicate(timeout=1800)[0] for p in hosts]
        finally: [p.kill() for p in hosts]
        assert [p.returncode for p in hosts] == [0, 0], said
        close(outcome(tmp_path), one)
    finally:
        for h in (a, b): ip('netns', 'del', h)


# ---- what the engine costs

def test_the_engine_costs_few_operations():
    "The loop by hand and the whole engine, a step within an epoch: tensor operations and Python calls, which are the same on every machine."
    from counting import Counter
    from detlearn.core.shapes import ToyShapes
    from detlearn.detectors.build import build_detector
    cfg = dict(type='RetinaNet',
               backbone=dict(type='ResNet', depth=18, base_channels=16, norm_eval=False, num_stages=4,
                             out_indices=(1, 2, 3)),
               neck=dict(type='FPN', in_channels=[32, 64, 128], out_channels=32, num_outs=3),
               bbox_head=dict(type='RetinaHead', num_classes=3, in_channels=32, feat_channels=32,
                              stacked_convs=1,
                              anchor_generator=dict(type='AnchorGenerator', strides=[8, 16, 32],
                                                    ratios=[1.], octave_base_scale=2,
                                                    scales_per_octave=2),
                              loss_cls=dict(type='FocalLoss'), loss_bbox=dict(type='L1Loss')))
    batches = list(ShapeLoader(ToyShapes(16, 96, sizes=(16, 40)), 4))
    class Mark(Hook):
        priority = 'HIGHEST'
        def __init__(self, mark): self.mark = mark
        def before_train_iter(self, runner): self.mark()
    def by_hand(mark):
        net = build_detector(cfg)
        fit(net, batches, torch.optim.SGD(net.parameters(), .01), 1, lambda s, k: .01, 35.,
            lambda *a: mark())
    def engine(mark):
        net = build_detector(cfg)
        run = EpochBasedRunner(net, torch.optim.SGD(net.parameters(), .01), None,
                               dict(CLASSES=('a', 'b', 'c')), 1, logger=lambda text: None)
        run.register_training_hooks(LR, dict(grad_clip=dict(max_norm=35.)),
                                    dict(interval=-1, save_last=False),
                                    dict(interval=50, hooks=[dict(type='TextLoggerHook')]),
                                    custom_hooks_config=[dict(type='CheckInvalidLossHook'), Mark(mark)])
        run.run([batches])
    def per_step(train, now):
        "From one mark to the next, the second step: nothing happens for the first time."
        seen = []; train(lambda: seen.append(now())); return seen[2] - seen[1]
    def ops(train):
        with Counter() as c: return per_step(train, c.ops.total)
    def calls(train):
        n, old = [0], sys.getprofile()
        def note(frame, event, arg): n[0] += event in ('call', 'c_call')
        sys.setprofile(note)
        try: return per_step(train, lambda: n[0])
        finally: sys.setprofile(old)
    for what, most in ((ops, 1.03), (calls, 1.15), (lambda t: per_step(t, time.process_time), None)):
        hand, full = what(by_hand), what(engine)
        print(what.__name__.replace('<lambda>', 'CPU seconds'), hand, full, f'{full/hand:.3f}')
        if most: assert hand < full < most*hand
