"""Configs that are wrong, or mean harm: each gets its sentence, in little time, and nothing is executed."""
import os, time, warnings
import pytest
from detlearn.core.config import Config, ConfigError, find_config, parse_set
from detlearn.detectors.build import build_detector

R18 = 'retinanet/retinanet_r18_fpn_1x8_1x_coco'
DOUBLING = 'a = "x" * 50000\n' + ''.join(f'{b} = {a} + {a}\n' for a, b in zip('abcdefgh', 'bcdefghi'))
TOWER = 'a = [0] * 1000\n' + ''.join(f'{b} = [{a}] * 1000\n' for a, b in zip('abcd', 'bcde'))
LOOPS = 'x = [0' + ''.join(f' for {v} in range(1000)' for v in 'abcdef') + ']'
BILLION = 'a: &a [0, 0, 0, 0]\n' + ''.join(f'{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n'
                                           for a, b in zip('abcdefgh', 'bcdefghi'))

TEXTS = {
    'import': ('x = 1\nimport os', 'bad.py:2: an import'),
    'import from': ('from os import path', 'bad.py:1: an import'),
    'dunder import': ("x = __import__('os').system('touch hacked')",
                      'bad.py:1: only dict, range, len, enumerate'),
    'call': ("a = 1\n\nb = open('hacked', 'w')", 'bad.py:3: only dict, range, len, enumerate'),
    'eval': ("x = eval('1')", 'can be called in a config'),
    'method': ("x = 'a'.join(['b'])", 'can be called in a config'),
    'attribute': ('x = (1).real', 'an attribute'),
    'subclasses': ('x = ().__class__.__base__.__subclasses__()', 'can be called in a config'),
    'dunder name': ('x = __file__', "'__file__': names that begin with __ are refused"),
    'dunder set': ('__builtins__ = dict()', "'__builtins__': names that begin with __"),
    'dunder keyword': ('x = dict(__class__=1)', "'__class__': names that begin with __"),
    'dunder loop': ('x = [1 for __y in [1]]', "'__y': names that begin with __"),
    'lambda': ('x = lambda: 1', 'a function'),
    'decorated': ('@print\nclass A: pass', 'a class'),
    'condition': ('x = 1 if True else 2', 'a condition'),
    'loop': ('for i in [1]: x = i', 'a loop'),
    'walrus': ('x = (y := 1)', ':='),
    'rebind dict': ('dict = 3', "'dict' is a word of the config language"),
    'undefined': ('depth = 1\nx = dept', "bad.py:2: 'dept' is not defined above; did you mean 'depth'?"),
    'missing item': ("a = dict(mean=1)\nb = a['maen']", "did you mean 'mean'?"),
    'twice': ("a = dict(b=1)\nc = dict(b=2, **a)", "'b' is given twice"),
    'set': ('x = {1, 2}', 'a set'),
    'bytes': ("x = b'1'", 'bytes is no type of a config'),
    'star': ('x = [*[1]]', 'a star'),
    'power': ('x = 9 ** 9 ** 9', 'only + - * / //'),
    'zero': ('x = 1 / 0', 'division by zero'),
    'syntax': ('x = (1,\ny = 2', 'bad.py:1: '),
    'null byte': ('x = 1\0', 'bad.py:1: '),
    'range value': ('x = range(3)', 'a range is good for loops only'),
    'self': ('d = dict()\nd.update(d=d)', 'nested too deep'),
    'own base': ("_base_ = 'bad.py'", 'leads in a circle: '),
    'base number': ('_base_ = 3', 'must be a path or a list of paths'),
    'base absolute': ("_base_ = '/etc/passwd'", 'lies outside'),
    'base up': ("_base_ = '../../../../../../etc/passwd'", 'lies outside'),
    'base link': ("_base_ = 'link.py'", 'lies outside'),
    'base gone': ("_base_ = '_base_/modle.py'", "is not there; did you mean 'model.py'?"),
    'base folder': ("_base_ = '_base_'", 'is not there'),
    'base null': (r"_base_ = 'a\0b'", 'is no path'),
    'base kind': ("_base_ = '_base_/notes.txt'", 'must end in .py, .json, .yaml'),
    'same key': ("_base_ = ['_base_/model.py', '_base_/twin.py']", "two _base_ files define 'model': "),
    'dict over list': ("_base_ = '_base_/model.py'\nmodel = dict(levels=dict(a=1))",
                       'write levels=dict(_delete_=True, ...)'),
    'placeholder': ("_base_ = '_base_/model.py'\nx = {{ _base_.model.dept }}", "have no 'model.dept'"),
    'no base': ('x = {{ _base_.model }}', "have no 'model'"),
}

BOMBS = {'doubling': DOUBLING, 'tower': TOWER, 'loops': LOOPS, 'long': "x = 'a' * 1000000000",
         'list': 'x = [0] * 100000000',
         'range': 'x = [i for i in range(1000000000000)]', 'number': 'x = 99999999999 * 99999999999',
         'brackets': 'x = ' + '['*5000 + ']'*5000,
         'minus': 'x = ' + '-'*20000 + '1', 'sum': 'x = ' + '+'.join('1'*50000),
         'many': ''.join(f'x{i} = [{"0, "*2000}]\n' for i in range(200)),
         'format': "x = f'{1:>1000000000}'"}


@pytest.fixture
def house(tmp_path):
    "A folder with a `_base_`, and a file outside of it that a link leads to."
    base = tmp_path/'house/_base_'
    base.mkdir(parents=True)
    (base/'model.py').write_text('model = dict(depth=50, levels=[1, 2])\n')
    (base/'twin.py').write_text('model = dict(depth=18)\n')
    (base/'notes.txt').write_text('x = 1\n')
    (tmp_path/'outside.py').write_text('secret = 1\n')
    (tmp_path/'house/link.py').symlink_to(tmp_path/'outside.py')
    return tmp_path/'house'


def refused(path, text, why, seconds=5):
    path.write_text(text)
    before, here = time.process_time(), set(os.listdir('.'))
    with pytest.raises(ConfigError) as e: Config.fromfile(path)
    assert why in str(e.value), str(e.value)
    assert time.process_time()-before < seconds and set(os.listdir('.')) == here


@pytest.mark.parametrize('fault', TEXTS)
def test_text(fault, house): refused(house/'bad.py', *TEXTS[fault])


@pytest.mark.parametrize('bomb', BOMBS)
def test_bomb(bomb, house): refused(house/'bad.py', BOMBS[bomb], 'bad.py')


def test_circle(house):
    (house/'a.py').write_text("_base_ = 'b.py'")
    refused(house/'b.py', "_base_ = 'a.py'", 'b.py -> ')


def test_many_files(house):
    for i in range(150): (house/f'c{i}.py').write_text(f"_base_ = 'c{i+1}.py'")
    (house/'c150.py').write_text('x = 1')
    with pytest.raises(ConfigError, match='too many _base_ files'): Config.fromfile(house/'c0.py')


def test_fan_of_files(house):
    "Each file has two bases that have two bases ...: few files, very many readings."
    for i in range(30): (house/f'f{i}.py').write_text(f"_base_ = ['f{i+1}.py', './f{i+1}.py']")
    (house/'f30.py').write_text('')
    with pytest.raises(ConfigError, match='too many _base_ files'): Config.fromfile(house/'f0.py')


def test_kinds_of_files(house):
    refused(house/'bad.yaml', BILLION, 'an alias (*name)')
    refused(house/'bad.yaml', '!!python/object/apply:os.system ["touch hacked"]',
            'could not determine a constructor')
    refused(house/'bad.yaml', 'day: 2020-01-01', 'bad.yaml:1: date is no type of a config')
    refused(house/'bad.json', '{"a": [1, 2', 'bad.json: ')
    refused(house/'bad.json', '['*200000, 'nested too deep')
    refused(house/'bad.json', '[1]', 'a config is a dict of values')
    refused(house/'bad.py', '#'*600_000, 'larger than 500,000 bytes')
    (house/'bad.py').write_bytes(b"x = '\xff'")
    with pytest.raises(ConfigError, match='no text in UTF-8'): Config.fromfile(house/'bad.py')
    with pytest.raises(ConfigError, match='no such file'): Config.fromfile(house/'nothing.py')


def test_custom_imports_are_data(house):
    (house/'evil.py').write_text('open("hacked", "w")')
    path = house/'mine.py'
    path.write_text("custom_imports = dict(imports=['evil'])")
    with pytest.warns(UserWarning, match="'evil' was not imported; allow_custom_imports=True"):
        cfg = Config.fromfile(path)
    assert cfg.custom_imports.imports == ['evil'] and not os.path.exists('hacked')


def test_missing_key():
    cfg = Config.fromfile(R18)
    for get in (lambda: cfg.modle, lambda: cfg['modle']):
        with pytest.raises(KeyError, match="there is no key 'modle' here; did you mean 'model'?"): get()
    with pytest.raises(KeyError, match="'model.backbone' ends before 'dept'; did you mean 'depth'?"):
        cfg.where('model.backbone.dept')
    with pytest.raises(ConfigError, match='did you mean'):
        find_config('retinanet/retinanet_r50_fpn_1x_koko')


@pytest.mark.parametrize('option, why', {
    'depth': 'KEY=VALUE is needed', '=3': 'KEY=VALUE is needed', 'a b=3': 'KEY=VALUE is needed',
    'a=[1,(2]': 'brackets do not match',
    'a=' + '['*99 + ']'*99: 'brackets do not match',
    'model.backbone.depth.x=1': 'is a dict here, but a int',
    'model.neck.in_channels.9=1': "has 4 items; '9' is none of 0 to 3",
    'model.neck.in_channels.x=1': 'is none of 0 to 3'}.items())
def test_set(option, why):
    with pytest.raises(ConfigError) as e: Config.fromfile(R18).merge_from_dict(parse_set([option]))
    assert why in str(e.value)


def test_set_in_conflict():
    with pytest.raises(ConfigError, match='set to something else in the same call'):
        Config.fromfile(R18).merge_from_dict(parse_set(['work_dir=1', 'work_dir.x=2']))


def test_set_misspelt():
    with pytest.warns(UserWarning, match="'dept' is a new key; did you mean 'depth'?"):
        Config.fromfile(R18).merge_from_dict(parse_set(['model.backbone.dept=18']))


@pytest.mark.parametrize('option, error, why', [
    ('model.backbone.type=ResNot', KeyError, "'ResNot' .* did you mean 'ResNet'"),
    ('model.type=RetinaNt', KeyError, "did you mean 'RetinaNet'"),
    ('model.backbone.dept=18', TypeError, "ResNet .*has no setting 'dept'; did you mean 'depth'?"),
    ('model.bbox_head.loss_cls.gama=2', TypeError, "no setting 'gama'; did you mean 'gamma'?"),
    ('model.test_cfg.scor_thr=.1', (TypeError, ValueError),
     "no setting 'scor_thr'; did you mean 'score_thr'?")])
def test_build(option, error, why):
    cfg = Config.fromfile(R18)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        cfg.merge_from_dict(parse_set([option]))
    with pytest.raises(error, match=why): build_detector(cfg.model)
