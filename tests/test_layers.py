"""Rules that every registered layer must keep: convolutions, norms, activations, drop layers, attentions, encodings, transformers.

A layer is found by its registry, so one without small settings below fails at once. The rules are those of tests/test_nets.py: one graph for the
compiler and for export; nothing on the wrong device, no wait; any size; an image gives the same alone and in a batch, in either layout of
memory; half precision stays finite; checkpoints go out and come in; in training gradients reach every weight. (Plug-ins: tests/test_nets.py.)
"""
import importlib
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from detlearn._modidx import d as INDEX
from detlearn.core.registry import Registry
from detlearn.backbones.pretrained import load_pretrained, load_state
from detlearn.backbones.resnet import ResNet
from detlearn.engine.checkpoints import load_checkpoint, resume_checkpoint, save_checkpoint
from detlearn.layers.conv_module import ConvModule, build_activation_layer, build_norm_layer
from detlearn.layers.deform_conv import deform_conv2d
from detlearn.layers.upsample import build_upsample_layer
from counting import count

MODULES = [m for m in INDEX['syms'] if m.split('.')[1] == 'layers']
for module in INDEX['syms']:
    if module.split('.')[1] in ('layers', 'backbones', 'necks'): importlib.import_module(module)

N = 16                                                  # channels
IMAGE, ROWS = ((2, N, 8, 12),), ((10, 2, N), (6, 2, N))  # a map; tokens that ask, tokens that are asked
attn = dict(type='MultiheadAttention', embed_dims=N, num_heads=2)
points = dict(type='MultiScaleDeformableAttention', embed_dims=N, num_heads=2, num_levels=2,
              num_points=2, dropout=0.)
ffn = dict(embed_dims=N, feedforward_channels=24)
encoder = dict(attn_cfgs=attn, ffn_cfgs=ffn, operation_order=('self_attn', 'norm', 'ffn', 'norm'))
decoder = dict(type='DetrTransformerDecoderLayer', attn_cfgs=attn, ffn_cfgs=ffn, feedforward_channels=24,
               operation_order=('self_attn', 'norm', 'cross_attn', 'norm', 'ffn', 'norm'))
pointed = {**decoder, 'attn_cfgs': [attn, points]}
stack = lambda kind, layer, n=2, **kw: dict(type=kind, transformerlayers=layer, num_layers=n, **kw)
LEVELS = [(3, 4), (2, 2)]


def call(f, *shapes, **kw): return dict(call=f, shapes=shapes, **kw)


def look(net, q, v, ref): return net(q, value=v, reference_points=ref.sigmoid(), spatial_shapes=LEVELS)


def whole(net, x, ask): return net(x, x[:, 0] > 9, ask, x)


def deformable(net, a, b, ask): return net([a, b], [a[:, 0] > 9, b[:, 0] > 9], ask, [a, b])[0]


def walk(net, q, v, ref):
    return net(q, None, v, reference_points=ref.sigmoid(), valid_ratios=torch.ones_like(ref[:, :2, :2]),
               spatial_shapes=LEVELS)[0]


# registry: type: settings, and how it is called where one
# map does not do; 1-d and 3-d layers have maps of their own
line, cube = call(lambda net, x: net(x), (2, N, 9)), call(lambda net, x: net(x), (2, N, 4, 5, 6))
conv = lambda **kw: dict(in_channels=N, out_channels=8, kernel_size=3, padding=1, **kw)
LAYERS = {
    'conv layer': {'*': (conv(), {}), 'Conv1d': (conv(), line), 'Conv3d': (conv(), cube),
                   'deconv3d': (conv(), cube), 'ConvTranspose3d': (conv(), cube),
                   'SAC': (conv(use_deform=True, bias=False), {}), 'DCN': (conv(deform_groups=2), {})},
    'norm layer': {'*': ({}, {}), 'GN': (dict(num_groups=4), {}), 'BN1d': ({}, line), 'IN1d': ({}, line),
                   'BN3d': ({}, cube), 'IN3d': ({}, cube),
                   'LN': ({}, call(lambda net, x: net(x), (10, 2, N)))},
    'activation layer': {'*': ({}, {})}, 'padding layer': {'*': (dict(padding=2), {})},
    'linear layer': {'*': (dict(in_features=N, out_features=8), call(lambda net, x: net(x), (10, N)))},
    'upsample layer': {'nearest': (dict(scale_factor=2), {}),
                       'bilinear': (dict(scale_factor=2, align_corners=False), {}),
                       'deconv': (dict(in_channels=N, out_channels=8, kernel_size=4, stride=2,
                                       padding=1), {}),
                       'deconv3d': (dict(in_channels=N, out_channels=8, kernel_size=4, stride=2,
                                         padding=1), cube),
                       'pixel_shuffle': (dict(in_channels=N, out_channels=8, scale_factor=2,
                                              upsample_kernel=3), {}),
                       'carafe': (dict(channels=N, scale_factor=2), {})},
    'dropout layer': {'*': (dict(drop_prob=.3), {})},
    'attention': {'MultiheadAttention': (dict(embed_dims=N, num_heads=2),
                                         call(lambda net, q, k: net(q, k, query_pos=q), *ROWS, batch=1)),
                  'MultiScaleDeformableAttention': ({k: v for k, v in points.items() if k != 'type'},
                                                    call(look, (10, 2, N), (16, 2, N), (2, 10, 2, 2),
                                                         batch=(1, 1, 0)))},
    'feedforward network': {'FFN': (ffn, call(lambda net, x: net(x), (10, 2, N), batch=1))},
    'positional encoding': {'*': (dict(num_feats=8),
                                  call(lambda net, x: net(x[:, 0] > 1), (2, 3, 5, 7)))},
    'transformer layer': {'BaseTransformerLayer': (encoder,
                                                   call(lambda net, q: net(q), (10, 2, N), batch=1)),
                          'DetrTransformerDecoderLayer': (
    {k: v for k, v in decoder.items() if k != 'type'},
    call(lambda net, q, k: net(q, k, k), *ROWS, batch=1))},
    'transformer layer sequence': {
        'TransformerLayerSequence': (stack(None, encoder),
                                     call(lambda net, q: net(q, None, None), (10, 2, N), batch=1)),
        'DetrTransformerEncoder': (stack(None,
                                         {**encoder,
                                          'operation_order': ('norm', 'self_attn', 'norm', 'ffn')}),
                                          call(lambda net, q: net(q, None, None), (10, 2, N), batch=1)),
        'DetrTransformerDecoder': (stack(None, decoder, return_intermediate=True),
                                   call(lambda net, q, k: net(q, k, k), *ROWS, batch=1, out=2)),
        'DeformableDetrTransformerDecoder': (stack(None, pointed, return_intermediate=True),
                                             call(walk, (10, 2, N), (16, 2, N), (2, 10, 2),
                                                  batch=(1, 1, 0), out=2))},
    'transformer': {
        'Transformer': (dict(encoder=stack('DetrTransformerEncoder', encoder),
                             decoder=stack('DetrTransformerDecoder', decoder, return_intermediate=True)),
                        call(lambda net, x, ask: whole(net, x, ask)[0], (2, N, 3, 4), (5, N),
                             batch=(0, None), out=1)),
        'DeformableDetrTransformer': (
    dict(num_feature_levels=2, encoder=stack('DetrTransformerEncoder', {**encoder, 'attn_cfgs': points}),
                                           decoder=stack('DeformableDetrTransformerDecoder', pointed,
                                                         return_intermediate=True)),
                                      call(deformable, (2, N, 3, 4), (2, N, 2, 2), (5, 2*N),
                                           batch=(0, 0, None), out=2)),
        'DynamicConv': (dict(in_channels=N, feat_channels=4, input_feat_shape=3),
                        call(lambda net, q, r: net(q, r), (10, N), (10, N, 3, 3)))}}


def registries():
    "Registries that belong to the pages of layers, by name."
    owned = {id(v): v for m in MODULES for v in vars(importlib.import_module(m)).values()
             if isinstance(v, Registry) and v.name not in ('plugin_layer',)}
    return {r.name: r for r in owned.values()}


def found():
    for name, registry in registries().items():
        for kind in registry:
            yield pytest.param(name, kind, id=f'{name.replace(" ", "_")}-{kind}')


each = pytest.mark.parametrize('role,kind', list(found()))
pytestmark = pytest.mark.filterwarnings('ignore')


def settings(role, kind):
    assert role in LAYERS, f'a registry without small settings: add {role!r} to LAYERS'
    s = LAYERS[role].get(kind) or LAYERS[role].get('*')
    assert s, f'{kind} has no small settings: add them to LAYERS[{role!r}]'
    return s


def build(role, kind):
    "`(layer, f(layer, *tensors), shapes, rest)`."
    kw, how = settings(role, kind)
    torch.manual_seed(0)
    registry = registries()[role]
    if role == 'norm layer': net = build_norm_layer(dict(type=kind, **kw), N)[1]
    elif role == 'activation layer': net = build_activation_layer(dict(type=kind))
    elif role == 'upsample layer':
        net = build_upsample_layer(dict(type=kind, **kw))
    else:
        net = registry[kind](**{k: v for k, v in kw.items() if k != 'type'})
    for p in net.parameters():                          # zeros at the start would hide what a layer does
        if p.is_floating_point(): p.data += .05*torch.randn_like(p)
    return net.eval(), how.get('call', lambda net, x: net(x)), how.get('shapes', IMAGE), how


def given(shapes, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(s) for s in shapes]


def same(got, want, tol=2e-4):
    assert got.shape == want.shape and (got - want).abs().max() <= tol*max(1., float(want.abs().max()))


class Called(nn.Module):
    "A layer with the way it is called, for export."
    def __init__(self, net, f): super().__init__(); self.net, self.f = net, f
    def forward(self, *xs): return self.f(self.net, *xs)


@each
@torch.no_grad()
def test_layer_is_one_graph(role, kind):
    torch._dynamo.reset()
    net, f, shapes, _ = build(role, kind)
    xs = given(shapes)
    want = f(net, *xs)
    same(torch.compile(Called(net, f), fullgraph=True, backend='eager')(*xs), want)
    same(torch.export.export(Called(net, f), tuple(xs), strict=False).module()(*xs), want)


@each
@torch.no_grad()
def test_layer_on_any_device_without_a_wait(role, kind):
    net, f, shapes, _ = build(role, kind)
    xs = given(shapes)
    assert count(lambda: f(net, *xs))['syncs'] == 0
    with FakeTensorMode():
        pretend = lambda t: torch.empty(t.shape, dtype=t.dtype, device='cuda')
        state = {f'net.{k}': pretend(v)
                 for k, v in {**dict(net.named_parameters()), **dict(net.named_buffers())}.items()}
        out = torch.func.functional_call(Called(net, f), state, tuple(map(pretend, xs)))
    assert out.device.type == 'cuda'


@each
@torch.no_grad()
def test_one_image_alone(role, kind):
    net, f, shapes, how = build(role, kind)
    xs, axes = given(shapes), how.get('batch', 0)
    axes = axes if isinstance(axes, tuple) else (axes,)*len(xs)
    first = [x if a is None else x.narrow(a, 0, 1) for x, a in zip(xs, axes)]
    both, alone = f(net, *xs), f(net, *first)
    same(alone, both.narrow(how.get('out', axes[0]), 0, 1))


@each
@torch.no_grad()
def test_layout_of_memory(role, kind):
    net, f, shapes, _ = build(role, kind)
    xs = given(shapes)
    last = lambda t: t.to(memory_format={4: torch.channels_last,
                                         5: torch.channels_last_3d}[t.dim()]) if t.dim() in (4, 5) else t
    want = f(net, *xs)
    if not isinstance(net, (nn.Conv3d, nn.ConvTranspose3d)):
        net = net.to(memory_format=torch.channels_last)
    same(f(net, *map(last, xs)), want)


@each
def test_odd_sizes_and_half_precision(role, kind):
    net, f, shapes, _ = build(role, kind)
    odd = ((1, N, 7, 11),) if shapes == IMAGE else shapes
    xs = [x.requires_grad_() for x in given(odd)]
    with torch.autocast('cpu', torch.bfloat16): out = f(net, *xs)
    assert out.isfinite().all()
    if not out.requires_grad: return                    # nothing is learned, nothing comes in by numbers
    out.float().pow(2).mean().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in xs)
    with torch.no_grad():
        assert (f(net, *xs) - out.float()).abs().max() <= .1*max(1., float(out.abs().max()))


@each
def test_training_reaches_every_weight(role, kind):
    net, f, shapes, _ = build(role, kind)
    (f(net.train(), *given(shapes)).pow(2).mean().backward()
     if any(p.requires_grad for p in net.parameters()) else None)
    idle = [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, f'no gradient: {idle}'


@each
@torch.no_grad()
def test_checkpoints_go_out_and_come_in(role, kind):
    (a, f, shapes, _), (b, *_) = build(role, kind), build(role, kind)
    xs = given(shapes)
    for p in b.parameters(): p.data += 1
    b.load_state_dict(a.state_dict())
    same(f(b, *xs), f(a, *xs), 1e-6)


@each
@torch.no_grad()
def test_evaluation_is_repeatable_and_changes_nothing(role, kind):
    net, f, shapes, _ = build(role, kind)
    xs = given(shapes); kept = [x.clone() for x in xs]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    same(f(net, *xs), f(net, *xs), 0.)
    assert (all(torch.equal(x, k) for x, k in zip(xs, kept))
            and all(torch.equal(v, state[k]) for k, v in net.state_dict().items()))


def test_every_registry_of_layers_is_covered():
    assert set(registries()) == set(LAYERS)
    for role, kinds in LAYERS.items(): assert set(kinds) - {'*'} <= set(registries()[role]), role


FLAT = [k for k in registries()['conv layer'] if not k.endswith(('1d', '3d'))]
NEEDS_ZEROS = {'Conv2dAdaptivePadding', 'deconv', 'ConvTranspose2d'}   # pads by the size, or takes away


@pytest.mark.parametrize('kind,mode',
                         [(k, m) for k in FLAT for m in ('zeros', 'reflect', 'replicate', 'circular')
                          if m == 'zeros' or k not in NEEDS_ZEROS])
@torch.no_grad()
def test_brick_of_every_convolution(kind, mode):
    "Any convolution, any border: parts inside a convolution start as they do by themselves."
    brick = ConvModule(N, 8, 3, padding=1, padding_mode=mode, conv_cfg=dict(type=kind),
                       norm_cfg=dict(type='BN'))
    assert brick(torch.randn(2, N, 8, 12)).shape == (2, 8, 8, 12)
    if hasattr(brick.conv, 'conv_offset'):
        assert not any(p.any() for p in brick.conv.conv_offset.parameters())
    if hasattr(brick.conv, 'weight_diff'):
        assert not brick.conv.weight_diff.any() and not brick.conv.switch.weight.any()


# The switchable convolution with every border, against a loop over places and samples
def place(i, size, mode):
    "The pixel that stands at `i`, inside or outside of a row; None: a zero."
    if 0 <= i < size: return i
    if mode == 'zeros': return None
    if mode == 'replicate': return min(max(i, 0), size - 1)
    if mode == 'circular': return i % size
    return abs(i) if i < 0 else 2*(size - 1) - i


def look_at(x, weight, mode, stride, pad, hole):
    "A 3×3 convolution of one image `(C, H, W)`, sample by sample."
    sides = [range(0, n + 2*pad - 2*hole, stride) for n in x.shape[1:]]
    out = x.new_zeros(len(weight), *map(len, sides))
    for a, top in enumerate(sides[0]):
        for b, left in enumerate(sides[1]):
            for dy in range(3):
                for dx in range(3):
                    i, j = (place(start + hole*d - pad, n, mode)
                            for start, d, n in zip((top, left), (dy, dx), x.shape[1:]))
                    if i is not None and j is not None: out[:, a, b] += weight[:, :, dy, dx] @ x[:, i, j]
    return out


@pytest.mark.parametrize('mode', ['zeros', 'reflect', 'replicate', 'circular'])
@pytest.mark.parametrize('stride,hole', [(1, 1), (2, 1), (1, 2)])
@torch.no_grad()
def test_switchable_convolution_at_every_border(mode, stride, hole):
    torch.manual_seed(0)
    SAC = registries()['conv layer']['SAC']
    net = SAC(3, 4, 3, stride, hole, hole, padding_mode=mode)
    net.switch.weight.normal_(); net.weight_diff.normal_()
    x = torch.randn(2, 3, 7, 8)
    near_mean = nn.functional.avg_pool2d(nn.functional.pad(x, (2,)*4, mode='reflect'), 5, 1)
    switch, weight = net.switch(near_mean), net.scaled(net.weight)
    looks = [torch.stack([look_at(image, w, mode, stride, k*hole, k*hole) for image in x])
             for k, w in ((1, weight), (3, weight + net.weight_diff))]
    same(net(x), switch*looks[0] + (1 - switch)*looks[1])


@pytest.mark.parametrize('mode', ['zeros', 'reflect', 'replicate', 'circular'])
@torch.no_grad()
def test_switchable_deformable_convolution_at_every_border(mode):
    "The samples move on the map with its border."
    torch.manual_seed(0)
    net = registries()['conv layer']['SAC'](3, 4, 3, padding=1, use_deform=True, padding_mode=mode)
    for p in net.parameters(): p.normal_(0, .2)
    net.pre_context.weight.zero_(); net.pre_context.bias.zero_()
    net.post_context.weight.zero_(); net.post_context.bias.zero_()
    x = torch.randn(2, 3, 7, 8)
    near_mean = nn.functional.avg_pool2d(nn.functional.pad(x, (2,)*4, mode='reflect'), 5, 1)
    switch, weight = net.switch(near_mean), net.scaled(net.weight)
    kind = 'constant' if mode == 'zeros' else mode
    looks = [deform_conv2d(nn.functional.pad(x, (k,)*4, mode=kind), offset(near_mean), w, 1, 0, k)
             for k, w, offset in ((1, weight, net.offset_s), (3, weight + net.weight_diff, net.offset_l))]
    same(net(x), switch*looks[0] + (1 - switch)*looks[1])


# Files of older versions
def deformable(kind):
    torch.manual_seed(0)
    net = ResNet(50, base_channels=8, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1),
                 dcn=dict(type=kind), stage_with_dcn=(False, True), zero_init_residual=False).eval()
    return net, torch.randn(1, 3, 32, 32)


def old_file(kind):
    "A net with offsets, its output, and its state under the names of old files."
    net, x = deformable(kind)
    for name, p in net.named_parameters():
        if 'conv_offset' in name: p.data.normal_(0, .5)
    state = {k.replace('conv2.conv_offset', 'conv2_offset'): v.clone() for k, v in net.state_dict().items()}
    assert sum('conv2_offset' in k for k in state) == 2*4 and not any('conv2.conv_o' in k for k in state)
    return state, x, net(x)


@pytest.mark.parametrize('kind', ['DCN', 'DCNv2'])
@torch.no_grad()
def test_old_names_of_offsets(kind, tmp_path):
    state, x, want = old_file(kind)
    names, path = list(state), tmp_path/'old.pth'
    torch.save(dict(state_dict=state, meta=dict(epoch=1, iter=2)), path)

    def loaded(load, wrap=lambda net: net):
        net, _ = deformable(kind)
        assert not all(torch.equal(a, b) for a, b in zip(net(x), want))
        report = load(wrap(net))
        for a, b in zip(net(x), want): same(a, b, 0.)
        return report

    loaded(lambda net: net.load_state_dict(state, strict=True))
    loaded(lambda net: net.load_state_dict({f'backbone.{k}': v for k, v in state.items()}, strict=True),
           lambda net: nn.ModuleDict(dict(backbone=net)))
    report = loaded(lambda net: load_state(net, state, strict=True))
    assert len(report.loaded) == len(state) and not report.missing + report.unexpected
    loaded(lambda net: load_state(net, {f'module.{k}': v for k, v in state.items()}, strict=True))
    assert not loaded(lambda net: load_checkpoint(net, path)).missing
    loaded(lambda net: resume_checkpoint(path, net))
    assert list(state) == names                         # the caller's own stays as it is

    net, _ = deformable(kind)
    net.init_cfg = dict(type='Pretrained', checkpoint=str(path))
    report, = load_pretrained(net).values()
    assert not report.missing + report.unexpected
    for a, b in zip(net(x), want): same(a, b, 0.)

    new = tmp_path/'new.pth'                            # what goes out has today's names, and comes in
    save_checkpoint(new, net)
    assert not loaded(lambda net: load_checkpoint(net, new)).missing


@torch.no_grad()
def test_a_new_name_counts_more_than_an_old_one():
    net, _ = deformable('DCN')
    state = net.state_dict()
    for k in [k for k in state if 'conv_offset' in k]:
        state[k.replace('conv2.conv_offset', 'conv2_offset')] = state[k] + 1
    assert len(load_state(net, state).unexpected) == 2*4
    assert not any(p.any() for n, p in net.named_parameters() if 'conv_offset' in n)


@torch.no_grad()
def test_ordinary_weights_for_an_adaptive_convolution_are_complete():
    conv, brick = nn.Conv2d(N, 8, 3), ConvModule(N, 8, 3, conv_cfg=dict(type='ConvAWS'), act_cfg=None)
    state = {f'conv.{k}': v for k, v in conv.state_dict().items()}
    assert not load_state(brick, state, strict=True).missing
    x = torch.randn(1, N, 6, 6)
    same(brick(x), conv(x))
