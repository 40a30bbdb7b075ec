"""Rules that every backbone, neck and pixel decoder must keep, each tested once for all that are registered.

One graph for the compiler and for export; nothing on the wrong device; any size of image; an image gives the same alone and in a batch; the
layout of memory does not matter; half precision stays finite. Settings are small ones from below, or those of the first golden model of the type.
"""
import importlib
import pytest
import torch
import torchvision
from torch._subclasses import FakeTensorMode
from detlearn._modidx import d as INDEX
from detlearn.core.registry import BACKBONES, NECKS, PLUGIN_LAYERS
from detlearn.backbones.resnet import ResNet
from detlearn.layers.fuse import fuse_conv_bn
from counting import count
from test_golden_models import CASES, calm, live, picture, settings

for module in INDEX['syms']:
    if module.split('.')[1] in ('layers', 'backbones', 'necks'): importlib.import_module(module)

two = dict(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1), base_channels=8)
stage = lambda n: dict(num_modules=1, num_branches=n, block='BASIC' if n > 1 else 'BOTTLENECK',
                       num_blocks=(1,)*n, num_channels=tuple(8*2**i for i in range(n)))
SMALL = dict(
    ResNet=[dict(depth=18, base_channels=8),
            dict(depth=50, **two, dcn=dict(type='DCNv2'), stage_with_dcn=(False, True),
            plugins=[dict(cfg=dict(type='ContextBlock', ratio=.5), stages=(False, True),
                          position='after_conv3'), dict(cfg=dict(type='NonLocal2d'),
                                                        stages=(False, True), position='after_conv1'),
                     dict(cfg=dict(type='GeneralizedAttention', num_heads=2), stages=(False, True),
                          position='after_conv2')])],
    ResNetV1d=[dict(depth=18, base_channels=8)],
    ResNeXt=[dict(depth=50, groups=2, **two)], Res2Net=[dict(depth=50, **two)],
    ResNeSt=[dict(depth=50, stem_channels=8, **two)],
    RegNet=[dict(arch=dict(w0=8, wa=8, wm=2., group_w=4, depth=4, bot_mul=1.), out_indices=(0, 1))],
    HRNet=[dict(extra={f'stage{n}': stage(n) for n in (1, 2, 3, 4)})],
    HourglassNet=[dict(downsample_times=2, num_stacks=2, stage_channels=(8, 8, 12),
                       stage_blocks=(1, 1, 1), feat_channel=8)],
    Darknet=[dict(out_indices=(1, 2, 3))],
    CSPDarknet=[dict(deepen_factor=.1, widen_factor=.125),
                dict(arch='P6', deepen_factor=.1, widen_factor=.125, use_depthwise=True)],
    SSDVGG=[dict(depth=11, out_feature_indices=(10, 24))], MobileNetV2=[dict(widen_factor=.25)],
    EfficientNet=[dict(out_indices=(2, 3, 4)), dict(arch='es', out_indices=(2, 3))],
    EfficientNetLite=[dict(out_indices=(2, 3))],
    SwinTransformer=[dict(embed_dims=8, depths=(2, 2), strides=(4, 2), num_heads=(1, 2), window_size=4,
                          out_indices=(0, 1), use_abs_pos_embed=True)],
    PyramidVisionTransformer=[dict(embed_dims=8, num_layers=[1]*4, num_heads=[1]*4,
                                   pretrain_img_size=64)],
    PyramidVisionTransformerV2=[dict(embed_dims=8, num_layers=[1]*4, num_heads=[1]*4)],
    TridentResNet=[dict(depth=50, num_branch=3, test_branch_idx=-1, trident_dilations=(1, 2, 3),
                        num_stages=3, strides=(1, 2, 2), dilations=(1,)*3, out_indices=(2,),
                        base_channels=8)],
    DetectoRS_ResNet=[dict(depth=50, conv_cfg=dict(type='ConvAWS'),
                           sac=dict(type='SAC', use_deform=True), stage_with_sac=(False, True), **two)],
    DetectoRS_ResNeXt=[dict(depth=50, groups=2, **two)],
    TorchvisionBackbone=[dict(name='mobilenet_v3_small')])
PLUGINS = dict(ContextBlock=dict(in_channels=16, ratio=.25), NonLocal2d=dict(in_channels=16),
               GeneralizedAttention=dict(in_channels=16, num_heads=2),
               DropBlock=dict(drop_prob=.1, block_size=3),
    SELayer=dict(channels=16, ratio=4), CBAM=dict(in_channels=16), DyReLU=dict(channels=16),
    ASPP=dict(in_channels=16, out_channels=8), RFB=dict(in_channels=16),
    SPPBottleneck=dict(in_channels=16, out_channels=16),
    ConvModule=dict(in_channels=16, out_channels=8, kernel_size=3, norm_cfg=dict(type='BN')),
    CrissCrossAttention=dict(in_channels=16))
SIZE, ODD = (64, 96), (65, 91)
BY_IMAGE_ALONE = {'RFP'}                           # its input holds the image and the maps of a backbone


def nets():
    "Each registered backbone and neck with its settings and inputs."
    for cls in dict.fromkeys(BACKBONES.values()):
        for i, kw in enumerate(SMALL.get(cls.__name__, [])):
            yield pytest.param(lambda c=cls, k=kw: c(**k), [(2, 3, *SIZE)], True,
                               id=f'{cls.__name__}-{i}')
        if cls.__name__ not in SMALL: yield pytest.param(None, [], True, id=cls.__name__)
    first = {}
    for case in (p.values[0] for p in CASES):
        first.setdefault(case['config']['type'], case) if case['kind'] in ('neck', 'plugin') else None
    for registry, cls in [(r, c) for r in (NECKS, PLUGIN_LAYERS) for c in dict.fromkeys(r.values())]:
        case = first.get(cls.__name__)
        if registry is PLUGIN_LAYERS and cls.__name__ in PLUGINS:
            yield pytest.param(lambda c=cls: c(**PLUGINS[c.__name__]), [(2, 16, 16, 24)], True,
                               id=cls.__name__)
        elif case is None: yield pytest.param(None, [], False, id=cls.__name__)
        else:
            yield pytest.param(lambda c=case, r=registry: r.build(settings(c['config'])),
                               [tuple(i['shape']) for i in case['inputs']], False, id=cls.__name__)


each = pytest.mark.parametrize('make,shapes,image', list(nets()))
pytestmark = pytest.mark.filterwarnings('ignore')


def build(make):
    assert make, 'a part without small settings: add them to SMALL or PLUGINS'
    torch.manual_seed(0)
    return calm(make()).eval()


def inputs(shapes, image, change=lambda s: s, seed=0):
    torch.manual_seed(seed)
    maps = [torch.randn(change(s)) for s in shapes]
    return maps[0] if image else tuple(maps)


def same(got, want, tol=2e-4):
    got, want = live(got), live(want)
    assert [g.shape for g in got] == [w.shape for w in want]
    for g, w in zip(got, want): assert (g - w).abs().max() <= tol*max(1., float(w.abs().max()))


@each
@torch.no_grad()
def test_net_is_one_graph(make, shapes, image):
    torch._dynamo.reset()
    net, x = build(make), inputs(shapes, image)
    want = net(x)
    same(torch.compile(net, fullgraph=True, backend='eager')(x), want)


@each
@torch.no_grad()
def test_net_can_be_exported(make, shapes, image):
    net, x = build(make), inputs(shapes, image)
    same(torch.export.export(net, (x,), strict=False).module()(x), net(x))


@each
@torch.no_grad()
def test_net_on_any_device_without_a_wait(make, shapes, image):
    net, x = build(make), inputs(shapes, image)
    assert count(lambda: net(x))['syncs'] == 0
    # the same net with weights and inputs of a pretended GPU
    with FakeTensorMode():
        pretend = lambda t: torch.empty(t.shape, dtype=t.dtype, device='cuda')
        state = {k: pretend(v)
                 for k, v in {**dict(net.named_parameters()), **dict(net.named_buffers())}.items()}
        outs = live(torch.func.functional_call(net, state,
                                               (pretend(x) if image else tuple(map(pretend, x)),)))
    assert outs and all(o.device.type == 'cuda' for o in outs)


@each
@torch.no_grad()
def test_image_alone_in_a_batch_and_in_another_layout(make, shapes, image):
    net, x = build(make), inputs(shapes, image)
    both = live(net(x))
    alone = live(net(x[:1] if image else tuple(t[:1] for t in x)))
    # branches in the batch: every image's first
    rows = [b[:len(a)] if len(b) != 3*len(x) else b[::2] for a, b in zip(alone, both)]
    same(alone, rows)
    last = lambda t: t.to(memory_format=torch.channels_last)
    same(net.to(memory_format=torch.channels_last)(last(x) if image else tuple(map(last, x))), both)


@each
def test_any_size_and_half_precision(make, shapes, image, request):
    name, net = request.node.callspec.id.split('-')[0], build(make)
    if image: odd = inputs(shapes, image, lambda s: (1, s[1], *(ODD if s[1] == 3 else (13, 19))))
    elif name in BY_IMAGE_ALONE: odd = inputs(shapes, image, lambda s: (1, *s[1:]))
    else:
        odd = tuple(torch.randn(1, s[1], -(-33*s[2]//shapes[0][2]), -(-45*s[2]//shapes[0][2]))
                    for s in shapes)
    with torch.no_grad(): assert all(o.isfinite().all() for o in live(net(odd)))
    leaf = odd.requires_grad_() if image else tuple(t.requires_grad_() for t in odd)
    with torch.autocast('cpu', torch.bfloat16): outs = live(net(leaf))
    assert all(o.isfinite().all() for o in outs)
    sum(o.float().pow(2).mean() for o in outs).backward()
    assert all(t.grad is None or t.grad.isfinite().all() for t in ([odd] if image else odd))


@each
@torch.no_grad()
def test_norms_fold_away(make, shapes, image):
    net, x = build(make), inputs(shapes, image)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, .1); m.running_var.uniform_(.7, 1.5)
    fused = fuse_conv_bn(net, x)
    left = lambda n: sum(isinstance(m, torch.nn.BatchNorm2d) for m in n.modules())
    # its stored weights are not what it uses
    standardised = any(type(m).__name__ == 'ConvAWS' for m in net.modules())
    assert left(fused) < left(net) or left(net) == 0 or standardised
    same(fused(x), net(x), 1e-3)


class Pair(torch.nn.Module):
    "A backbone with a neck, as a detector has them."
    def __init__(self, backbone, *necks):
        super().__init__()
        self.backbone, self.necks = backbone, torch.nn.Sequential(*necks)

    def forward(self, image): return self.necks(self.backbone(image))


def pairs():
    resnet = lambda: ResNet(18, base_channels=8)
    light = BACKBONES['EfficientNetLite']
    swin = BACKBONES['SwinTransformer']
    yield 'ResNet-FPN', lambda: Pair(resnet(), NECKS['FPN']([8, 16, 32, 64], 16, 5))
    yield 'ResNet-FPN-BFP-DyHead', lambda: Pair(resnet(), NECKS['FPN']([8, 16, 32, 64], 16, 5),
                                                NECKS['BFP'](16, 5), NECKS['DyHead'](16, 16, 1))
    yield 'Lite-PAFPN', lambda: Pair(light(out_indices=(3, 4, 5)),
                                     NECKS['PAFPN']([40, 112, 320], 16, 4, add_extra_convs='on_output'))
    yield 'Swin-ChannelMapper', lambda: Pair(swin(**SMALL['SwinTransformer'][0]),
                                             NECKS['ChannelMapper']([8, 16], 16, num_outs=3))
    yield 'CSPDarknet-YOLOXPAFPN', lambda: Pair(BACKBONES['CSPDarknet'](
        deepen_factor=.1, widen_factor=.125), NECKS['YOLOXPAFPN']([32, 64, 128], 16, 1))


@pytest.mark.parametrize('make', [p for _, p in pairs()], ids=[n for n, _ in pairs()])
@torch.no_grad()
def test_backbone_with_neck(make):
    net, image = build(make), torch.randn(2, 3, *SIZE)
    want = net(image)
    torch._dynamo.reset()
    same(torch.compile(net, fullgraph=True, backend='eager')(image), want)
    same(torch.export.export(net, (image,), strict=False).module()(image), want)
    same(fuse_conv_bn(net, image)(image), want, 1e-3)


FAMILY = ('ResNet', 'ResNetV1d', 'ResNeXt', 'Res2Net', 'ResNeSt', 'RegNet', 'DetectoRS_ResNet',
          'DetectoRS_ResNeXt', 'TridentResNet')


@pytest.mark.parametrize('name', FAMILY)
def test_plugins_in_every_place_deformed_and_saved(name):
    "Each place has its plug-in, each stage its offsets; saving memory changes nothing."
    kw = {**SMALL[name][0], **({} if name == 'RegNet' else dict(depth=50)), 'norm_eval': False}
    if name == 'ResNetV1d': kw.update(two)
    n = len(BACKBONES[name](**kw).res_layers)
    kw.update(out_indices=(n-1,),
              plugins=[dict(cfg=dict(type='CBAM', ratio=4, postfix=str(i)), position=f'after_conv{i}')
                       for i in (1, 2, 3)],
              dcn=dict(type='DCNv2'), stage_with_dcn=tuple(i == 1 for i in range(n)))
    for k in ('sac', 'stage_with_sac'): kw.pop(k, None)
    found = []
    for saved in (False, True):
        torch.manual_seed(0)
        net = BACKBONES[name](**kw, with_cp=saved).train()
        image = torch.randn(2, 3, *SIZE, requires_grad=True)
        outs = live(net(image))
        sum(o.pow(2).mean() for o in outs).backward()
        assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
        found.append([*outs, image.grad, *(b.float() for b in net.buffers())])
    blocks = [m for m in net.modules() if hasattr(m, 'behind')]
    assert (all(sorted(b.behind) == [1, 2, 3] for b in blocks)
            and any(hasattr(m, 'conv_offset') for m in net.modules()))
    same(*found)


@pytest.mark.parametrize('cls', list(dict.fromkeys(BACKBONES.values())), ids=lambda c: c.__name__)
def test_init_cfg_of_a_backbone(cls):
    kw = SMALL[cls.__name__][0]
    net = cls(**kw, init_cfg=dict(type='Constant', layer='Conv2d', val=.125))
    # start as they must, whatever a rule says
    own = {c for m in net.modules() if type(m).__name__ == 'SAC' for c in m.children()}
    convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m not in own]
    assert convs and all((m.weight == .125).all() for m in convs)
    # have no pretrained, as in the zoo
    if cls.__name__ in ('CSPDarknet', 'EfficientNet', 'EfficientNetLite'): return
    assert cls(**kw, pretrained='a.pth').init_cfg == dict(type='Pretrained', checkpoint='a.pth')
    with pytest.raises(ValueError, match='keep init_cfg'):
        cls(**kw, pretrained='a.pth', init_cfg=dict(type='Constant', layer='Conv2d'))


@pytest.mark.parametrize('depth', [18, 34, 50, 101])
@torch.no_grad()
def test_resnet_with_torchvisions_weights(depth):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(f'resnet{depth}', weights=None).eval()
    ours = ResNet(depth).eval()
    for m in theirs.modules():                       # statistics of a net that has been trained
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, .1); m.running_var.uniform_(.8, 1.5)
    report = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not report.missing_keys and report.unexpected_keys == ['fc.weight', 'fc.bias']
    x = torch.randn(1, 3, 75, 101)
    y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    for i, mine in enumerate(ours(x), 1):
        y = getattr(theirs, f'layer{i}')(y)
        torch.testing.assert_close(mine, y, rtol=1e-5, atol=1e-5*float(y.abs().max()))
