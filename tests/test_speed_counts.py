"""How often the host waits, and how many ops a batch takes: the zoo's RetinaNet with ResNet-50, from the shipped config, counted."""
import torch
from torch._subclasses import FakeTensorMode
from counting import count
from detlearn.core.config import Config
from detlearn.core.structures import GroundTruth
from detlearn.detectors.build import build_detector
from detlearn.detectors.single_stage import parse_losses

CONFIG, SIDE = 'retinanet/retinanet_r50_fpn_1x_coco', 128


def config():
    cfg = Config.fromfile(CONFIG).to_dict()
    # no download: numbers of ops do not depend on weights
    cfg['model']['backbone']['init_cfg'] = None
    return cfg['model']


def objects(B, G=10):
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(B, G, 2, generator=g)*SIDE/2
    boxes = torch.cat([corner, corner + 16 + torch.rand(B, G, 2, generator=g)*SIDE/2], -1)
    return GroundTruth(boxes, torch.randint(80, (B, G), generator=g))


def step(model, images, gt):
    "One training step: forward, loss, backward."
    total, _ = parse_losses(model(images, gt)); total.backward()


def step(model, images, gt):
    "One training step: forward, loss, backward."
    parse_losses(model(images, gt))[0].backward()


def test_training_step_never_waits():
    model = build_detector(config()).train()
    found = {B: count(lambda: step(model, torch.randn(B, 3, SIDE, SIDE), objects(B))) for B in (2, 8)}
    print({B: (f['ops'], f['syncs']) for B, f in found.items()})
    assert found[2]['syncs'] == found[8]['syncs'] == 0, found[8]['where']
    assert found[2]['ops'] == found[8]['ops']


def test_forward_and_loss_on_an_accelerator():
    "Pretended, so that a tensor left on the CPU, or a copy that the host waits for, is found. (Autograd wants a real device: the step above has it.)"
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device('cuda'):
        model = build_detector(config()).train()
        for B in (2, 8):
            images, gt = torch.empty(B, 3, SIDE, SIDE), pretended(B)
            out = {}
            found = count(lambda: out.update(model(images, gt)))
            assert found['syncs'] == 0, found['where']
            assert all(v.device.type == 'cuda' for v in out.values())


def pretended(B, G=10):
    "Objects on a pretended accelerator."
    zero = torch.zeros(B, G, dtype=torch.bool)
    return GroundTruth(torch.empty(B, G, 4), torch.empty(B, G, dtype=torch.long), ~zero, zero)


def test_loss_of_the_head():
    "Assign, sample, encode, compare: the whole batch at once."
    head = build_detector(config()).bbox_head
    def given(B):
        feats = [torch.randn(B, 256, SIDE//s, SIDE//s) for s in (8, 16, 32, 64, 128)]
        return head(feats), head.priors(feats), objects(B)
    found = {B: count(lambda args=given(B): head.loss(*args)) for B in (2, 8)}
    print({B: (f['ops'], f['kernels'], f['syncs']) for B, f in found.items()})
    assert found[2]['syncs'] == found[8]['syncs'] == 0, found[8]['where']
    # on a CPU the table of overlaps is walked in parts
    assert found[2]['ops'] == found[8]['ops'] and found[8]['kernels'] < 160


def test_inference_waits_twice_a_batch():
    "Real numbers: how many boxes are left decides what follows."
    torch.manual_seed(0)
    model, waits = build_detector(config()).eval(), {}
    with torch.no_grad():
        # scores above the threshold, so that NMS has work
        model.bbox_head.retina_cls.bias.fill_(-2.)
        for B in (2, 8):
            images = torch.randn(B, 3, SIDE, SIDE); found = count(lambda: model(images))
            waits[B] = found['syncs']
            assert found['syncs'] <= 2, found['where']
            assert model(images).valid.any()
    print(waits)
    assert waits[2] == waits[8]
