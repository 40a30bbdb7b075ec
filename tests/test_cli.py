"The command line, whole: on tiny toy photos, in processes of its own, with Ctrl-C in the middle, and with everything wrong that a user can get wrong."
import json, os, re, shlex, signal, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from detlearn.apis.cli import main
from detlearn.core.shapes import ToyShapes, to_coco
from detlearn.data.voc import write_voc
from detlearn.data.yolo import write_yolo

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, '-c', 'import sys; from detlearn.apis.cli import main; sys.exit(main())']
TINY = ['data.samples_per_gpu=4', 'log_config.interval=1', 'evaluation.interval=1',
        'model.backbone.base_channels=8', 'model.neck.in_channels=[16,32,64]']


def start(*words, wait_at=''):
    "With `wait_at`: at the first line that begins so it waits until it is asked to stop."
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1',
               WAIT_AT=wait_at)
    command = [sys.executable, str(ROOT/'tests/waiting_terminal.py')] if wait_at else COMMAND
    return subprocess.Popen([*command, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=env)


def run(*words):
    with start(*words) as p:
        try: out, err = p.communicate(timeout=1800)
        except BaseException: p.kill(); raise
    return p.returncode, out, err


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp('toys')
    for split, n, seed in (('train', 8, 0), ('val', 4, 1), ('test', 4, 2)):
        to_coco(ToyShapes(n, 64, sizes=(14, 28), seed=seed), folder, split)
    return folder


@pytest.fixture(scope='module')
def trained(toys, tmp_path_factory):
    "A run of the command line in a process of its own."
    work = tmp_path_factory.mktemp('work')/'run'
    status, out, err = run('train', 'toy/retinanet_demo', '--data', toys, '--work-dir', work, '--device',
                           'cpu', '--set', 'runner.max_epochs=2', *TINY)
    assert status == 0, err
    return work, out


def fails(capsys, words, *texts, status=2):
    "The command ends with this status and one sentence that holds these texts; no traceback."
    assert main([str(w) for w in words]) == status
    err = capsys.readouterr().err
    for t in texts: assert t in err, f'{t!r} is not in: {err}'
    assert 'Traceback' not in err and 'File "' not in err
    return err


# ---- the way through
def test_train_leaves_everything(trained, toys):
    work, out = trained
    assert {'config.py', 'provenance.txt', 'latest.pth', 'metrics.json', 'detections.json',
            'index.html'} <= {p.name for p in work.iterdir()}
    metrics = json.loads((work/'metrics.json').read_text())
    assert {'AP', 'AP50', 'AP75', 'per_class', 'seconds', 'cpu_seconds', 'peak_memory'} <= set(metrics)
    assert (set(metrics['per_class']) == {'circle', 'square', 'triangle'} and metrics['cpu_seconds'] > 0
            and metrics['images'] == 4)
    page = (work/'index.html').read_text(encoding='utf-8')
    assert 'http' not in page and page.count('data:image') == 3 and 'adamw_cosine.py' in page
    log = [json.loads(l) for l in next(work.glob('*.log.json')).read_text().splitlines()]
    train, val = [[r for r in log if r.get('mode') == m] for m in ('train', 'val')]
    assert {'epoch', 'iter', 'lr', 'memory', 'data_time', 'loss_cls', 'loss_bbox', 'loss',
            'time'} <= set(train[0])
    assert len(val) == 2 and {'bbox_mAP', 'bbox_mAP_50', 'val_loss'} <= set(val[0])
    for split, n in (('train', 8), ('val', 4), ('test', 4)):
        assert f'{split}' in out and f'{n} images' in out
    assert re.search('AP50 [0-9.]+ on 4 test photos', out)


def test_test_gives_the_same_numbers(trained, capsys):
    work, _ = trained
    assert main(['test', str(work), '--device', 'cpu']) == 0
    a, b = [json.loads((f/'metrics.json').read_text()) for f in (work, work/'test')]
    assert abs(a['AP50'] - b['AP50']) < 1e-6 and 'AP50' in capsys.readouterr().out


@pytest.mark.parametrize('kind', ['yolo', 'voc'])
def test_other_formats(kind, trained, toys, tmp_path, capsys):
    "The same photos in YOLO's and VOC's folders: the training gives the same detector, and `test` the same numbers."
    write, photos = dict(yolo=(write_yolo, 'images/{}'), voc=(write_voc, 'JPEGImages'))[kind]
    for split in ('train', 'val', 'test'):
        coco = json.loads((toys/f'{split}.json').read_text())
        folder = tmp_path/kind/photos.format(split); folder.mkdir(parents=True, exist_ok=True)
        write(coco, tmp_path/kind, split)
        for im in coco['images']: (folder/im['file_name']).symlink_to(toys/'images'/im['file_name'])
    words = ['--device', 'cpu', '--set', 'runner.max_epochs=2', *TINY]
    numbers = lambda folder: json.loads((folder/'metrics.json').read_text())
    assert main(['train', 'toy/retinanet_demo', '--data', str(tmp_path/kind), '--work-dir',
                 str(tmp_path/'run'), *words]) == 0
    found, wanted = numbers(tmp_path/'run'), numbers(trained[0])
    assert (found['val_loss'] == pytest.approx(wanted['val_loss'], rel=1e-3)
            and list(found['per_class']) == list(wanted['per_class']))
    assert main(['test', str(trained[0]), '--data', str(tmp_path/kind), '--out', str(tmp_path/'out'),
                 '--device', 'cpu']) == 0
    assert numbers(tmp_path/'out')['val_loss'] == pytest.approx(wanted['val_loss'], rel=1e-4)
    assert (tmp_path/'out/index.html').is_file()


def test_predict_draws_and_writes(trained, toys, tmp_path, capsys):
    "Grey, with alpha, 16 bits, turned by EXIF: all are photos."
    work, _ = trained
    photos = tmp_path/'photos'; photos.mkdir()
    rgb = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(rgb).save(photos/'rgb.png'); Image.fromarray(rgb[..., 0]).save(photos/'grey.png')
    Image.fromarray(np.dstack([rgb, rgb[..., :1]])).save(photos/'rgba.png')
    Image.fromarray(rgb[..., 0].astype(np.uint16)*257).save(photos/'deep.png')
    turned = Image.Exif(); turned[274] = 6; Image.fromarray(rgb).save(photos/'turned.jpg', exif=turned)
    assert main(['predict', str(work), str(photos), '--out', str(tmp_path/'out'), '--score-thr', '0.01',
                 '--device', 'cpu']) == 0
    coco = json.loads((tmp_path/'out/predictions.json').read_text())
    sizes = {im['file_name']: (im['width'], im['height']) for im in coco['images']}
    assert sizes == {'rgb.png': (60, 40), 'grey.png': (60, 40), 'rgba.png': (60, 40),
                     'deep.png': (60, 40), 'turned.jpg': (40, 60)}
    assert {p.name for p in (tmp_path/'out').glob('*.jpg')} == {'rgb.jpg', 'grey.jpg', 'rgba.jpg',
                                                                'deep.jpg', 'turned.jpg'}
    for a in coco['annotations']:
        assert 0 <= a['bbox'][0] and a['bbox'][2] <= 60.01 and 0 < a['score'] <= 1


def test_predict_from_a_checkpoint_alone(trained, toys, tmp_path, capsys):
    work, _ = trained
    (tmp_path/'x.pth').write_bytes((work/'latest.pth').read_bytes())
    assert main(['predict', str(tmp_path/'x.pth'), str(next((toys/'images').glob('test*'))), '--out',
                 str(tmp_path/'out'), '--device', 'cpu']) == 0
    assert capsys.readouterr().out.startswith('1 photos')


def test_ctrl_c_saves_and_resume_goes_on(toys, tmp_path):
    "The command that it prints is the command that works."
    work = tmp_path/'a run'
    settings = [*TINY[:-2], *TINY[-2:], 'data.samples_per_gpu=2', 'runner.max_epochs=3']
    words = ['train', 'toy/retinanet_demo', '--data', toys, '--work-dir', work, '--device', 'cpu',
             '--set', *settings]
    p, text = start(*words, wait_at='Epoch [2][1/4]'), ''
    for line in p.stdout:
        text += line
        if line.startswith('Epoch [2][1/4]'): p.send_signal(signal.SIGINT)
    err = p.stderr.read(); assert p.wait(timeout=1800) == 130, (text, err)
    assert ('Traceback' not in err and (work/'interrupted.pth').exists()
            and not (work/'metrics.json').exists())
    command = re.search('resume with: detlearn (.*)', text)[1]
    assert '--resume' in command
    at = torch.load(work/'interrupted.pth', weights_only=True)['meta']
    assert (at['epoch'], at['inner_iter']) == (1, 1)
    status, out, err = run(*shlex.split(command)); assert status == 0, err
    assert 'resumed from' in out and 'Epoch [3][4/4]' in out and 'Epoch [1]' not in out
    assert (work/'metrics.json').exists()


def test_help_names_every_option(capsys):
    assert main([]) == 0 and main(['--help']) == 0
    text = capsys.readouterr().out
    for name in ('demo', 'train', 'test', 'predict', 'browse-config', 'lint', 'download', 'doctor'):
        assert name in text and main([name, '--help']) == 0
        assert len(capsys.readouterr().out) > 60
    assert main(['doctor']) == 0 and 'torch' in capsys.readouterr().out


def test_browse_config(capsys):
    assert main(['browse-config', 'retinanet/retinanet_r50_fpn_1x_coco', '--set', 'optimizer.lr=0.02',
                 '--find', 'optimizer.lr']) == 0
    assert re.match(r'optimizer.lr = 0.02 +# --set', capsys.readouterr().out)
    assert main(['browse-config']) == 0 and 'blood_cells/retinanet_lite0_fpn' in capsys.readouterr().out


# ---- what can be wrong: the command and the config
def test_a_process_ends_with_status_2():
    status, out, err = run('train', 'no/such/config')
    assert status == 2 and 'no packaged config' in err and 'Traceback' not in err


def test_unknown_command(capsys): fails(capsys, ['trian'], "did you mean 'train'")
def test_missing_argument(capsys): fails(capsys, ['train'], 'required: config')
def test_set_without_value(capsys, toys):
    fails(capsys, ['train', 'toy/retinanet_demo', '--data', toys, '--set', 'model'], 'KEY=VALUE')


def write(folder, text): (folder/'c.py').write_text(text); return folder/'c.py'

def test_config_with_an_import(capsys, tmp_path):
    fails(capsys, ['browse-config', write(tmp_path, 'import os\nx = 1\n')], 'c.py:1', 'import')
def test_config_with_a_call(capsys, tmp_path):
    fails(capsys, ['browse-config', write(tmp_path, "x = 1\ny = open('/etc/passwd')\n")], 'c.py:2')
def test_base_outside_the_root(capsys, tmp_path):
    fails(capsys, ['browse-config', write(tmp_path, "_base_ = '../../../../../etc/c.py'\n")], 'outside')

def test_unknown_type(capsys, toys, tmp_path):
    fails(capsys, ['train', 'toy/retinanet_demo', '--data', toys, '--work-dir', tmp_path/'w', '--set',
                   'model.bbox_head.type=RetinaHed'], "did you mean 'RetinaHead'", 'model.bbox_head')

def test_unknown_key(capsys, toys, tmp_path):
    fails(capsys, ['train', 'toy/retinanet_demo', '--data', toys, '--work-dir', tmp_path/'w', '--set',
                   'model.bbox_head.num_clases=3'], "'num_clases'", 'num_classes', 'model.bbox_head')


# ---- the data
def test_no_such_folder(capsys, toys):
    fails(capsys, ['train', 'toy/retinanet_demo', '--data', toys.parent/'tyos'], 'no such folder')

def test_no_annotations(capsys, tmp_path):
    fails(capsys, ['train', 'toy/retinanet_demo', '--data', tmp_path], 'neither COCO', 'nor YOLO',
          'nor VOC')

def test_annotation_file_missing(capsys, tmp_path):
    fails(capsys, ['train', 'toy/retinanet_demo', '--work-dir', tmp_path/'w', '--set',
                   f'data.train.ann_file={tmp_path}/train.json'], 'train.json: there is no such file')

def test_annotation_file_cut_short(capsys, toys, tmp_path):
    (tmp_path/'cut.json').write_bytes((toys/'train.json').read_bytes()[:500])
    fails(capsys, ['train', 'toy/retinanet_demo', '--data', toys, '--work-dir', tmp_path/'w', '--set',
                   f'data.train.ann_file={tmp_path}/cut.json'],
                   'cut.json: the file is cut short: it ends at byte 500')

def test_num_classes_disagrees(capsys, toys, tmp_path):
    fails(capsys, ['train', 'toy/retinanet_demo', '--data', toys, '--work-dir', tmp_path/'w', '--set',
                   'model.bbox_head.num_classes=80'],
          'num_classes=80, but CocoDataset has 3 classes: circle, square, triangle. Set '
          'model.bbox_head.num_classes=3')
    assert not (tmp_path/'w'/'latest.pth').exists()

def test_torn_photo_in_training(capsys, toys, tmp_path):
    to_coco(ToyShapes(4, 64, sizes=(14, 28)), tmp_path, 'train')
    (tmp_path/'images/train_00002.png').write_bytes(b'\x89PNG torn')
    fails(capsys, ['train', 'toy/retinanet_demo', '--data', tmp_path, '--work-dir', tmp_path/'w',
                   '--device', 'cpu', '--set', *TINY], 'train_00002.png: the image cannot be decoded')

def test_photos_of_the_annotations_are_gone(capsys, toys, tmp_path):
    (tmp_path/'train.json').write_bytes((toys/'train.json').read_bytes())
    fails(capsys, ['train', 'toy/retinanet_demo', '--data', tmp_path], 'which is in no folder below',
          '--set data.train.img_prefix')


# ---- the weights
def test_no_model(capsys, tmp_path):
    fails(capsys, ['predict', tmp_path/'x.pth', tmp_path], 'x.pth: there is no such file')
    fails(capsys, ['test', tmp_path], 'no checkpoint')

def test_weights_that_carry_code(capsys, trained, toys, tmp_path):
    class Code:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/ran',)
    torch.save(dict(state_dict=Code(), meta={}), tmp_path/'evil.pth')
    fails(capsys, ['predict', tmp_path/'evil.pth', toys/'images'], 'is refused', '.safetensors')
    fails(capsys, ['train', 'toy/retinanet_demo', '--data', toys, '--work-dir', tmp_path/'w', '--device',
                   'cpu', '--load-from', tmp_path/'evil.pth', '--set', *TINY], 'is refused')
    assert not (tmp_path/'ran').exists()

def test_weights_cut_short(capsys, trained, toys, tmp_path):
    (tmp_path/'cut.pth').write_bytes((trained[0]/'latest.pth').read_bytes()[:5000])
    fails(capsys, ['predict', tmp_path/'cut.pth', toys/'images'], 'cut.pth is not readable as weights',
          '5000 bytes')

def test_weights_of_other_shapes(capsys, trained, toys, tmp_path):
    "Loaded, re-initialised, missing, unexpected: each group is told."
    state = torch.load(trained[0]/'latest.pth', weights_only=True); weights = state['state_dict']
    weights['bbox_head.retina_cls.weight'] = torch.zeros(80, 32, 3, 3)
    del weights['neck.fpn_convs.0.conv.bias']; weights['roi_head.fc.weight'] = torch.zeros(2, 2)
    torch.save(state, tmp_path/'other.pth')
    assert main(['predict', str(tmp_path/'other.pth'), str(toys/'images'), '--out', str(tmp_path/'out'),
                 '--device', 'cpu']) == 0
    err = capsys.readouterr().err
    for words in ('tensors loaded',
                  '1 re-initialised, other shape: bbox_head.retina_cls.weight (80, 32, 3, 3)',
                  '1 missing in the file: neck.fpn_convs.0.conv.bias',
                  '1 unexpected in the file: roi_head.fc.weight'):
        assert words in err, err

def test_resume_with_another_model(capsys, trained, toys, tmp_path):
    fails(capsys, ['train', 'toy/retinanet_demo', '--data', toys, '--work-dir', tmp_path/'w', '--device',
                   'cpu', '--set', *TINY, f'resume_from={trained[0]}/latest.pth',
                   'model.neck.out_channels=16', 'model.bbox_head.in_channels=16'],
          'is not a checkpoint of this model', 're-initialised')


# ---- the photos
@pytest.mark.parametrize('name, data, text', [('torn.png', b'\x89PNG', 'cannot be decoded'),
                                              ('zero.jpg', b'', 'is empty (0 bytes)')])
def test_bad_photo(capsys, trained, tmp_path, name, data, text):
    (tmp_path/name).write_bytes(data)
    fails(capsys, ['predict', trained[0], tmp_path/name, '--out', tmp_path/'out'], name, text,
          'none of 1 photos')

def test_bad_photo_among_good_ones(capsys, trained, toys, tmp_path):
    for p in sorted((toys/'images').glob('test*')): (tmp_path/p.name).write_bytes(p.read_bytes())
    (tmp_path/'a_torn.png').write_bytes(b'\x89PNG')
    assert main(['predict', str(trained[0]), str(tmp_path), '--out', str(tmp_path/'out'), '--device',
                 'cpu']) == 1
    out, err = capsys.readouterr(); assert out.startswith('4 photos') and 'a_torn.png' in err

def test_no_photos(capsys, trained, tmp_path):
    fails(capsys, ['predict', trained[0], tmp_path], 'no photo in this folder')
    fails(capsys, ['predict', trained[0], tmp_path/'x.png'], 'x.png: there is no such file')
