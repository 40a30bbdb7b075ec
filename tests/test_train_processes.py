"`train_detector` in two processes is `train_detector` in one with the same photos a step."
import warnings
from pathlib import Path
import torch
from detlearn.apis.test import with_objects
from detlearn.apis.train import set_random_seed, train_detector
from detlearn.core.config import Config
from detlearn.core.shapes import ToyShapes, to_coco
from detlearn.data.loader import build_dataset
from detlearn.detectors.build import build_detector
from detlearn.engine.distributed import launch
from detlearn.engine.checkpoints import read_file
from detlearn.engine.loggers import read_log

ROOT = Path(__file__).resolve().parents[1]
CODE = '''
import sys; sys.path.insert(0, sys.argv[3])
import torch, test_train_processes as t
from detlearn.engine.distributed import init_dist
rank, world = init_dist()
t.train(sys.argv[1], sys.argv[2], 4//world, True)
torch.distributed.destroy_process_group()
'''


def config(toys, work_dir, photos):
    "The demo's detector on eight photos, batch norms at rest, SGD, nothing random."
    cfg = Config.fromfile('toy/retinanet_demo')
    steps = with_objects(cfg.data.test.pipeline)      # nothing random
    for split in ('train', 'val', 'test'):
        cfg.data[split] = dict(type='CocoDataset', ann_file=f'{toys}/train.json',
                               img_prefix=f'{toys}/images', pipeline=steps)
    cfg.data.update(samples_per_gpu=photos, workers_per_gpu=0)
    cfg.model.backbone.update(norm_eval=True)
    cfg.update(work_dir=work_dir, seed=0, device='cpu', optimizer=dict(type='SGD', lr=.01, momentum=.9),
               optimizer_config=dict(grad_clip=None),
               lr_config=dict(policy='fixed'), runner=dict(type='EpochBasedRunner', max_epochs=2),
               custom_hooks=[],
               checkpoint_config=dict(interval=1),
               log_config=dict(interval=1, hooks=[dict(type='TextLoggerHook')]),
               evaluation=dict(interval=2))
    return cfg


def train(toys, work_dir, photos, distributed):
    cfg = config(toys, work_dir, int(photos))
    set_random_seed(0)
    return train_detector(build_detector(cfg.model), build_dataset(cfg.data.train), cfg,
                          distributed=distributed, validate=True, timestamp='now')


def test_two_processes_are_one(tmp_path):
    toys = tmp_path/'toys'
    to_coco(ToyShapes(8, seed=0), toys, 'train')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        train(str(toys), str(tmp_path/'one'), 4, False)
    launch(2, CODE, str(toys), str(tmp_path/'two'), str(ROOT/'tests'), timeout=300)
    one, two = [read_file(tmp_path/w/'epoch_2.pth')['state_dict'] for w in ('one', 'two')]
    worst = max((one[k]-two[k]).abs().max().item() for k in one if one[k].is_floating_point())
    assert one.keys() == two.keys() and worst < 1e-5, worst
    logs = [[r for r in read_log(tmp_path/w/'now.log.json') if r.get('mode') == 'val']
            for w in ('one', 'two')]
    assert len(logs[0]) == len(logs[1]) == 1
    assert (abs(logs[0][0]['bbox_mAP'] - logs[1][0]['bbox_mAP']) < 1e-4
            and abs(logs[0][0]['val_loss'] - logs[1][0]['val_loss']) < 1e-3)
