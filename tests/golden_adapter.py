"""The zoo's calls, answered by our parts, for the golden cases.

A golden case names a type or function of the zoo and calls it the zoo's way: one image, `bboxes` first, lists of indices. Where our call
differs, the module of the group in `golden_calls/` translates; where it doesn't, our part is called as it is.

    build(group, cfg)       our part of that type, behind the zoo's methods; None if the package has no such type
    function(group, name)   the zoo's function; None if the package has none of that name
    argument(dict)          an argument that the zoo passes as an object
"""
import importlib, sys
from pathlib import Path
from types import SimpleNamespace
from detlearn._modidx import d as INDEX
from detlearn.core.registry import MATCH_COST

sys.path.insert(0, str(Path(__file__).parent))
PLACES = {sym.rsplit('.', 1)[1]: mod for mod, syms in INDEX['syms'].items() for sym in syms
          if sym.count('.') == mod.count('.') + 1}


def calls(group):
    "What is translated in a group: `TYPES` {type: {method: f(part, **args)}}, `FUNCTIONS` {name: f(**args)}, `NAMES` {the zoo's: ours}, `DIFFERS` {type: (reason, test of both numbers)}."
    try: module = importlib.import_module(f'golden_calls.{group}')
    except ModuleNotFoundError as e:
        if e.name != f'golden_calls.{group}': raise
        module = None
    return SimpleNamespace(**{k: getattr(module, k, {})
                              for k in ('TYPES', 'FUNCTIONS', 'NAMES', 'DIFFERS')})


def find(group, name):
    "Our class or function for a name of the zoo, or None."
    name = calls(group).NAMES.get(name, name)
    return getattr(importlib.import_module(PLACES[name]), name) if name in PLACES else None


class Translated:
    "A part behind the zoo's methods; whatever is not translated is the part's own."
    def __init__(self, part, methods): self.__dict__.update(part=part, methods=methods)
    def __getattr__(self, name):
        f = self.methods.get(name)
        return (lambda **args: f(self.part, **args)) if f else getattr(self.part, name)
    def __setattr__(self, name, value): setattr(self.part, name, value)
    def __call__(self, **args):
        return (self.methods['__call__'](self.part, **args) if '__call__' in self.methods
                else self.part(**args))


def build(group, cfg):
    cfg = dict(cfg); name = cfg.pop('type')
    cls, methods = find(group, name), calls(group).TYPES
    if cls is None: return None
    methods = methods.get(name) or methods.get('*')
    # dicts that the part builds itself
    own = {k: cfg.pop(k) for k in getattr(cls, 'specs', ()) if k in cfg}
    # parts among the settings are built first, as from a config
    part = cls(**MATCH_COST.build(cfg), **own)
    return Translated(part, methods) if methods else part


def function(group, name): return calls(group).FUNCTIONS.get(name) or find(group, name)


def argument(d):
    if d.get('type') in ('BitmapMasks', 'PolygonMasks'):
        return importlib.import_module('golden_calls.masks').argument(d)
    return SimpleNamespace(**d) if {'gt_inds', 'max_overlaps'} <= set(d) else d


def there(group, case):
    return (find(group, case['type']) if case['call'] else function(group, case['type'])) is not None
