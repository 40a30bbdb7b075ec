"""Every config of the zoo: the same dict, nothing executed, and a detector with the same keys.

The configs are plain files of the wheel `mmdet==2.28.2` (a requirement of the dev extra), found through its metadata; it is never imported.
`golden_zoo/zoo.json` holds the sha1 of each resolved dict and, for a model, of its sorted `name (shape)` lines.
A model with a part that does not exist yet is an expected failure that names the part; they are counted at the end.
"""
import codecs, collections, functools, hashlib, json, sys, warnings
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
import pytest
import torch
import yaml
from detlearn.core.config import Config
from detlearn.core.registry import DETECTORS, NotFound
from detlearn.detectors.build import build_detector

VERSION, FILES = '2.28.2', 666
ZOO = json.loads((Path(__file__).parent/'golden_zoo/zoo.json').read_text())
MODELS = {name: case for name, case in ZOO.items() if 'keys' in case}
EVENTS, watching = [], False
MISSING, BUILT = collections.defaultdict(list), []


def watch(event, args):
    "What a config could do if it were executed."
    if watching and event.split('.')[0] in ('exec', 'import', 'os', 'subprocess', 'socket', 'ctypes',
                                            'shutil', 'builtins'):
        if event not in ('os.listdir', 'os.scandir'): EVENTS.append((event, str(args)[:80]))
    if watching and event == 'open' and args[1] not in ('r', 'rb'):
        EVENTS.append((event, str(args)[:80]))


codecs.lookup('utf-8-sig')   # imports its codec now, before anybody watches
sys.addaudithook(watch)


@functools.cache
def root():
    "The folder of the configs; an error with the remedy where it is not there."
    try: wheel = distribution('mmdet')
    except PackageNotFoundError: wheel = None
    if wheel is None or wheel.version != VERSION:
        pytest.fail(f"the zoo's configs are not installed: pip install mmdet=={VERSION} (part of pip "
                    "install -e '.[dev]')", pytrace=False)
    return Path(wheel.locate_file('mmdet/.mim/configs')).resolve()


@functools.cache
def resolved(name):
    "A config of the zoo, with whatever happened while it was read."
    global watching
    folder = root()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        watching = True
        try: return Config.fromfile(folder/name, root=folder).to_dict()
        finally: watching = False


def plain(value):
    "As JSON can tell it: keys are strings, a tuple is marked."
    if isinstance(value, dict): return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple): return {'()': [plain(v) for v in value]}
    return [plain(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize('name', sorted(ZOO)[::40])
def test_other_languages(name):
    "Written as YAML it is the same, for PyYAML's own loader too; as JSON it is the same but for its tuples."
    values = resolved(name)
    text = Config(values).dump()
    assert Config.fromstring(text, '.py').to_dict() == values
    config = Config(values, 'x.yaml')
    assert Config.fromstring(config.dump(), '.yaml').to_dict() == values
    assert repr(yaml.load(config.dump(), yaml.FullLoader)) == repr(values)
    with pytest.warns(UserWarning, match='.json can.t hold'): text = Config(values, 'x.json').dump()
    assert json.loads(text) == json.loads(json.dumps(values))


def sha1(text): return hashlib.sha1(text.encode()).hexdigest()


def look_up(model, where='model'):
    "Find the detector and its large parts, outermost first; `NotFound` for one that is not there."
    DETECTORS.find(model['type'], where)
    for key, part in model.items():
        large = key in ('backbone', 'neck', 'teacher_config') or key.endswith('head')
        for one in part if isinstance(part, (list, tuple)) else [part]:
            if large and isinstance(one, dict) and 'type' in one: look_up(one, f'{where}.{key}')


@functools.cache
def keys_of(model):
    "Names and shapes of a model, given as its `repr`; on the meta device, where nothing is computed."
    # our own repr of plain values
    model, train_cfg, test_cfg = eval(model, {'inf': float('inf'), 'nan': float('nan')})
    look_up(model)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            with torch.device('meta'): state = build_detector(model, train_cfg, test_cfg).state_dict()
        except (NotImplementedError, RuntimeError) as e:           # a part that computes its buffers
            if 'meta' not in str(e).lower(): raise
            state = build_detector(model, train_cfg, test_cfg).state_dict()
    return sorted(f'{k} {tuple(v.shape)}' for k, v in state.items())


@pytest.mark.parametrize('name', ZOO)
def test_config(name):
    assert sha1(json.dumps(plain(resolved(name)), sort_keys=True)) == ZOO[name]['config']


def test_all_files():
    names = sorted(p.relative_to(root()).as_posix() for p in root().rglob('*.py'))
    assert len(names) == FILES and set(ZOO) <= set(names)
    raised = {}
    for name in names:
        try: resolved(name)
        except Exception as e: raised[name] = f'{type(e).__name__}: {e}'
    assert not raised, '\n'.join(f'{k}: {v}' for k, v in raised.items())


def test_nothing_was_executed():
    for name in list(ZOO)[:5]: resolved(name)
    assert not EVENTS, EVENTS[:5]
    assert 'mmdet' not in sys.modules and 'mmcv' not in sys.modules


@pytest.mark.parametrize('name', MODELS)
def test_keys(name):
    cfg, case = resolved(name), MODELS[name]
    try: keys = keys_of(repr((cfg['model'], cfg.get('train_cfg'), cfg.get('test_cfg'))))
    except NotFound as e:
        if not str(e).startswith('unknown '): raise
        part = str(e).split("'")[1]
        MISSING[part].append(name)
        pytest.xfail(f'{part} does not exist yet')
    BUILT.append(name)
    assert cfg['model']['type'] == case['type']
    assert (len(keys), sha1('\n'.join(keys))) == (case['n'], case['keys'])


def test_count(capsys):
    "Not a check: how many models there are, and what the others wait for."
    with capsys.disabled():
        print(f'\n{len(BUILT)} of {len(MODELS)} models of the zoo were built and have its keys, or '
              'failed above')
        for part, names in sorted(MISSING.items(), key=lambda x: -len(x[1])):
            print(f'{len(names):5} wait for {part}')
