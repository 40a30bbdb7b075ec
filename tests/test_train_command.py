"""`detlearn train` in several processes, by the command alone: `torchrun` starts it, one process is killed, Ctrl-C is pressed, it is started wrongly."""
import json, os, re, shlex, signal, subprocess, sys
from pathlib import Path
import pytest, torch
from detlearn.core.shapes import ToyShapes, to_coco
from detlearn.engine.distributed import meeting_place
from detlearn.engine.loggers import read_log

ROOT = Path(__file__).resolve().parents[1]
ONE = [sys.executable, '-m', 'detlearn.apis.cli']
WAITING = str(ROOT/'tests'/'waiting_terminal.py')
# a port that the system gives; nobody can take it before torchrun does
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--rdzv-backend', 'c10d',
            '--rdzv-endpoint', '127.0.0.1:0', '--local-addr', '127.0.0.1']
COMMON = ['data.workers_per_gpu=0', 'log_config.interval=1', 'evaluation.interval=2',
          'model.backbone.base_channels=8', 'model.neck.in_channels=[16,32,64]',
          'model.backbone.norm_eval=True',
            # batch norms at rest: their statistics are of one process
            'runner.max_epochs=5', 'checkpoint_config.interval=1', 'model.test_cfg.score_thr=0.']
SETTINGS = [*COMMON, 'optimizer.type=SGD', 'optimizer.lr=.01', 'optimizer.momentum=.9']
RICH = [*COMMON, 'optimizer.type=AdamW', 'data.workers_per_gpu=1',
        'optimizer_config.type=GradientCumulativeFp16OptimizerHook',
        'optimizer_config.cumulative_iters=2', 'optimizer_config.loss_scale=dynamic',
        'custom_hooks.0.type=ExpMomentumEMAHook', 'custom_hooks.0.total_iter=10']


def many(n, *more):
    return [*TORCHRUN, '--nproc_per_node', str(n), '--monitor-interval', '0.1', *more, '-m',
            'detlearn.apis.cli']


def start(command, *words, **env):
    env = {k: v for k, v in dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1',
                                 PYTHONUNBUFFERED='1', **env).items()
                                 if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK') or k in env}
    return subprocess.Popen([*command, *map(str, words)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True)


def train(folder, toys, photos, command=ONE, at=None, then=None, settings=SETTINGS):
    "Run the command to its end; at the first line of its output that begins with `at` it waits, and `then` is called."
    if at: command = [*command[:-2], WAITING]
    p = start(command, 'train', 'toy/retinanet_demo', '--data', toys, '--work-dir', folder, '--device',
              'cpu', '--set', *settings, f'data.samples_per_gpu={photos}', **(dict(WAIT_AT=at) if at else {}))
    out = ''
    try:
        for line in p.stdout:
            out += line
            if at and line.startswith(at): then(p); at = None
        return p.wait(timeout=1800), out
    finally:
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)


def child(p, rank):
    "Process id of one of those that torchrun has started."
    for f in Path('/proc').glob('[0-9]*/stat'):
        try:
            if int(f.read_text().rsplit(')', 1)[1].split()[1]) == p.pid and f'RANK={rank}' in (
                f.parent/'environ').read_bytes().decode(errors='replace').split('\0'):
                return int(f.parent.name)
        except OSError: pass


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp('toys')
    for split, n, seed in (('train', 14, 0), ('val', 4, 1), ('test', 5, 2)):
        to_coco(ToyShapes(n, 64, sizes=(14, 28), seed=seed), folder, split)
    return folder


def outcome(folder):
    weights = torch.load(folder/'epoch_5.pth', weights_only=True)['state_dict']
    rows = [r for p in sorted(folder.glob('*.log.json')) for r in read_log(p)]
    train, val = [[r for r in rows if r.get('mode') == m] for m in ('train', 'val')]
    return (weights, train, val, json.loads((folder/'metrics.json').read_text()),
            json.loads((folder/'detections.json').read_text()))


@pytest.fixture(scope='module')
def one(tmp_path_factory, toys):
    "One process, eight photos a step: the photos of an epoch are 14, so each of two processes has seven, and its second batch is short."
    folder = tmp_path_factory.mktemp('one')
    status, out = train(folder, toys, 8); assert status == 0, out
    return outcome(folder)


def equal(a, b):
    if torch.is_tensor(a): return torch.equal(a, b)
    if isinstance(a, dict): return set(a) == set(b) and all(equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, (list, tuple)) else a == b


def apart(a, b): return max((a[k].float()-b[k].float()).abs().max().item() for k in a)


def test_two_processes_are_one(tmp_path, toys, one):
    status, out = train(tmp_path/'two', toys, 4, many(2)); assert status == 0, out
    weights, rows, val, metrics, found = outcome(tmp_path/'two')
    assert len(rows) == len(one[1]) == 10 and len(val) == len(one[2]) == 2
    for k in ('loss', 'loss_cls', 'loss_bbox'):
        worst = max(abs(a[k]-b[k])/max(abs(a[k]), 1) for a, b in zip(one[1], rows)); print(k, worst)
        assert worst < 1e-6
    assert apart(weights, one[0]) < 1e-5; print('weights', apart(weights, one[0]))
    for a, b in zip(one[2], val):
        assert (a.keys() == b.keys()
                and all(abs(a[k]-b[k]) < 2e-5 for k in a if k.startswith(('val_', 'bbox_'))))
    # the report of the test photos, of which one process had three and the other two
    assert (metrics['images'] == 5 and {k: v for k, v in metrics.items() if k.startswith('AP')}
            == pytest.approx({k: v for k, v in one[3].items() if k.startswith('AP')}))
    assert (len(found) == len(one[4]) > 20
            and [r['image_id'] for r in found] == [r['image_id'] for r in one[4]])
    assert max(abs(a['score']-b['score']) for a, b in zip(found, one[4])) < 1e-4
    # the first process alone speaks and writes
    assert len(list((tmp_path/'two').glob('*.log.json'))) == 1 and (tmp_path/'two/index.html').exists()
    lines = [l for l in out.splitlines() if l.startswith(('Epoch', 'AP', 'train', 'model', 'warning'))]
    assert len(lines) == len(set(lines)) and sum(l.startswith('Epoch [') for l in lines) == 10


@pytest.mark.parametrize('at', ['Epoch [1][1/2]', 'Epoch [3][1/2]'])
def test_a_killed_process_is_no_end(tmp_path, toys, one, at):
    "Killed before anything was saved, or later; the folder holds a longer run of earlier days, which nobody asked for."
    folder = tmp_path/'run'; folder.mkdir()
    torch.save(dict(meta=dict(iter=10**6, epoch=99), state_dict={}), folder/'epoch_99.pth')
    os.utime(folder/'epoch_99.pth', (1, 1))
    killed = []
    def kill(p): killed.append(child(p, 1)); os.kill(killed[0], signal.SIGKILL)
    status, out = train(folder, toys, 4, many(2, '--max-restarts', '1'), at, kill)
    assert status == 0 and killed, out
    assert 'epoch_99.pth is from an earlier run: this one begins anew' in out
    if at.startswith('Epoch [3]'): assert re.search(r'resumed from \S+epoch_[234].pth', out), out
    else: assert out.count('Epoch [1][1/2]') == 2 and 'resumed' not in out, out
    assert apart(outcome(folder)[0], one[0]) < 1e-5


@pytest.mark.parametrize('sign', [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_taken_up_by_the_command_that_it_prints(tmp_path, toys, one, sign):
    "Ctrl-C reaches all processes from the terminal, and once more from torchrun; SIGTERM reaches torchrun alone, which hands it on."
    folder = tmp_path/'run'
    stop = ((lambda p: os.killpg(p.pid, sign)) if sign == signal.SIGINT
            else (lambda p: p.send_signal(sign)))
    status, out = train(folder, toys, 4, many(2), 'Epoch [2][1/2]', stop)
    assert (folder/'interrupted.pth').exists() and not (folder/'metrics.json').exists(), out
    command = re.search('resume with: torchrun (.*)', out)[1]
    assert command.startswith('--nproc_per_node 2 -m detlearn.apis.cli train')
    p = start(TORCHRUN, *shlex.split(command))
    out, _ = p.communicate(timeout=1800)
    assert p.returncode == 0 and re.search(r'resumed from \S+interrupted.pth', out), out
    assert apart(outcome(folder)[0], one[0]) < 1e-5


# ---- one process, with everything that has a memory: AdamW,
# a scaler, averaged weights, accumulation, a reading process

@pytest.fixture(scope='module')
def rich(tmp_path_factory, toys):
    folder = tmp_path_factory.mktemp('rich'); status, out = train(folder, toys, 2, settings=RICH)
    assert status == 0, out
    return torch.load(folder/'epoch_5.pth', weights_only=True)


def test_a_checkpoint_holds_everything(rich):
    "Model, average, optimizer, schedule (the iteration, and the base rate in the optimizer), scaler, random numbers, place of the sampler, config, classes, versions."
    meta, hooks = rich['meta'], {k.split()[1]: v
                                 for k, v in {**rich['hooks'], **rich['own_hooks']}.items()}
    assert ({'python', 'numpy', 'torch'} <= set(rich['rng'])
            and {'seed', 'epoch', 'start'} <= set(rich['sampler']) and rich['place'] is not None)
    assert ((meta['epoch'], meta['iter']) == (5, 35) and tuple(meta['CLASSES'])
            == ('circle', 'square', 'triangle') and 'RetinaHead' in meta['config'])
    assert {'detlearn_version', 'torch_version', 'python_version', 'seed'} <= set(meta)
    assert (len(hooks['ExpMomentumEMAHook']['raw']) > 50
            and hooks['GradientCumulativeFp16OptimizerHook']['inner']['scale'] >= 1)
    assert (all('initial_lr' in g for g in rich['optimizer']['param_groups'])
            and any('exp_avg_sq' in v for v in rich['optimizer']['state'].values()))


@pytest.mark.parametrize('sign, status',
                         [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_a_stopped_command_goes_on_exactly(tmp_path, toys, rich, sign, status):
    "The command that is printed (after a kill: the same with --resume) ends with the very same file, to the bit."
    folder = tmp_path/'run'
    got, out = train(folder, toys, 2, at='Epoch [3][4/7]', then=lambda p: p.send_signal(sign),
                     settings=RICH)
    assert got == status, out
    if sign == signal.SIGKILL:
        words = ['train', 'toy/retinanet_demo', '--data', str(toys), '--work-dir', str(folder),
                 '--device', 'cpu', '--resume', '--set', *RICH, 'data.samples_per_gpu=2']
    else:
        assert (folder/'interrupted.pth').exists()
        words = shlex.split(re.search('resume with: detlearn (.*)', out)[1])
    p = start(ONE, *words); out, _ = p.communicate(timeout=1800)
    assert p.returncode == 0 and 'resumed from' in out, out
    back = torch.load(folder/'epoch_5.pth', weights_only=True)
    # the work directory stands in the config
    drop = lambda s: {**s, 'meta': {k: v for k, v in s['meta'].items()
                                    if k not in ('time', 'saved', 'config')}}
    assert [k for k in rich if not equal(drop(rich)[k], drop(back)[k])] == []


# ---- started wrongly: a sentence from each process that notices, and no traceback

def wrong(*starts, **kw):
    runs = [start(ONE, *words, **env) for env, *words in starts]
    said = [p.communicate(timeout=1800)[0] for p in runs]
    assert [p.returncode for p in runs] == [2]*len(runs), said
    assert not any('Traceback' in s for s in said), said
    return said


def test_half_an_environment():
    assert ('launcher=pytorch, but not set: WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Start torchrun '
            '--nproc_per_node N' in wrong((dict(RANK='0'), 'train', 'toy/retinanet_demo'))[0])


def test_launcher_without_processes():
    assert 'launcher=pytorch, but not set: RANK' in wrong((dict(), 'train', 'toy/retinanet_demo',
                                                           '--launcher', 'pytorch'))[0]


def test_a_command_for_one():
    assert 'detlearn demo works in one process' in wrong((dict(RANK='0', WORLD_SIZE='2'), 'demo'))[0]


def test_two_configs(tmp_path, toys):
    store, where = meeting_place()  # kept to the end of the test
    common = dict(where, WORLD_SIZE='2')
    words = ['train', 'toy/retinanet_demo', '--data', toys, '--work-dir', tmp_path/'w', '--device',
             'cpu', '--set', *SETTINGS]
    said = wrong((dict(common, RANK='0'), *words),
                 (dict(common, RANK='1', LOCAL_RANK='1'), *words, 'runner.max_epochs=7'))
    for s in said:
        assert ('the processes do not run the same: runner is' in s and "'max_epochs': 5" in s
                and "'max_epochs': 7" in s), s
    assert 'detlearn train (process 1): the processes' in said[1]


def test_a_wrong_config_is_told(tmp_path, toys):
    p = start(many(2), 'train', 'toy/retinanet_demo', '--data', toys, '--work-dir', tmp_path/'w',
              '--set', 'model.bbox_head.num_clases=3')
    out, _ = p.communicate(timeout=1800)
    # the tracebacks are torchrun's own
    assert (p.returncode == 1 and "detlearn train: " in out and "did you mean 'num_classes'" in out
            and str(ROOT/'detlearn') not in out), out
