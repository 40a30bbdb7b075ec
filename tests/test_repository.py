"""The rules of the house, measured on the notebooks and the exported package."""
import ast, configparser, io, json, re, statistics, tokenize
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS, LIB = ROOT/'nbs', ROOT/'detlearn'
PAGES = [p for p in sorted(NBS.rglob('*.ipynb'))
         if not any(x[0] in '._' for x in p.relative_to(NBS).parts)]
EXPORT, HIDDEN = re.compile(r'^#\|\s*exports?\b', re.M), re.compile(r'^#\|\s*exporti\b', re.M)
ASSERT = re.compile(r'^\s*(assert\b|test_\w+\()|[;:] *(assert |test_\w+\()', re.M)


class Page:
    def __init__(self, path):
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        self.path, self.name = path, path.relative_to(NBS).as_posix()
        self.code = [(''.join(c['source']), c['outputs']) for c in cells if c['cell_type'] == 'code'
                     and ''.join(c['source']).strip()]
        self.prose = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
        self.exported = [s for s, _ in self.code if EXPORT.search(s)]
        self.tests = [s for s, _ in self.code if not EXPORT.search(s) and not HIDDEN.search(s)]
        found = [m[1] for s, _ in self.code if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', s, re.M))]
        assert len(found) <= 1, f'{self.name} has two default_exp'
        self.module = found[0] if found else None

    def trees(self):
        return [ast.parse('\n'.join(l for l in s.splitlines() if not l.startswith('#|')))
                for s in self.exported]

    def public(self):
        return [n for t in self.trees() for n in t.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
                and not n.name.startswith('_')]


ALL = [Page(p) for p in PAGES]
EXPORTING = [p for p in ALL if p.module]
one_each = pytest.mark.parametrize('page', EXPORTING, ids=lambda p: p.name)


def lines_of(source):
    "Lines of a cell without directives, blank lines, docstrings and the further lines of signatures."
    source = '\n'.join(l for l in source.splitlines() if not l.startswith('#|'))
    left_out = set()
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, ast.FunctionDef): left_out |= set(range(n.lineno+1, n.body[0].lineno))
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(n):
            left_out |= set(range(n.body[0].lineno, n.body[0].end_lineno+1))
    return len([l for i, l in enumerate(source.splitlines(), 1) if l.strip() and i not in left_out])


def test_one_page_one_module():
    modules = [p.module for p in EXPORTING]
    assert len(modules) == len(set(modules)), 'two pages export one module'
    for p in EXPORTING:
        wanted = '.'.join(re.sub(r'^\d+[a-z]?_', '', x) for x in Path(p.name).with_suffix('').parts)
        assert p.module == wanted, f'{p.name} exports {p.module}; its path says {wanted}'
    names = [p.path.name for p in ALL]
    files = {f.relative_to(LIB).with_suffix('').as_posix().replace('/', '.') for f in LIB.rglob('*.py')
             if f.name not in ('__init__.py', '_modidx.py')
             and 'configs' not in f.relative_to(LIB).parts}
    assert files == set(
        modules), f'modules without a page: {files-set(modules)}; pages without a module: {set(modules)-files}'
    assert len(names) == len(set(names)), 'two pages of one file name'


def test_imports_point_backwards():
    order = {f'detlearn.{p.module}': i for i, p in enumerate(EXPORTING)}
    for i, p in enumerate(EXPORTING):
        for tree in p.trees():
            for n in ast.walk(tree):
                if isinstance(n, ast.ImportFrom) and n.module in order:
                    assert order[n.module] < i, f'{p.name} imports {n.module}, which comes later'


@one_each
def test_width(page):
    wide = [l.strip() for c, _ in page.code for l in c.split('\n') if len(l) > 105]
    assert not wide, f'{page.name}: code lines wider than 105 characters: {wide}'


@one_each
def test_cells(page):
    sizes = [lines_of(s) for s in page.exported]
    assert max(sizes) <= 40, f'{page.name}: an exported cell of {max(sizes)} lines'
    assert statistics.median(sizes) <= 15
    own = [s for s in [c for c, _ in page.code] if not s.lstrip().startswith('#| hide')]
    share = sum(bool(ASSERT.search(s)) for s in own)/len(own)
    assert share >= .3, f'{page.name}: {share:.0%} of the code cells assert'
    assert 10 <= len(page.code) <= 60, f'{page.name}: {len(page.code)} code cells'


@one_each
def test_anatomy(page):
    assert re.match(r'\s*# .+\n+> ', page.prose), 'no title with a subtitle'
    assert re.search(r'^#+ .*exercise', page.prose, re.I | re.M), 'no exercises'
    assert any('image/png' in o.get('data', {}) for _, os in page.code for o in os), 'no figure'
    assert len(page.prose.split()) >= 150
    assert page.path.stat().st_size <= 300*1024, f'{page.path.stat().st_size//1024} KB'
    assert not any(re.search(r'^\s*from \S+ import \*', s, re.M) for s, _ in page.code), 'star import'
    assert not any(o.get('output_type') == 'error' for _, os in page.code
                   for o in os), 'a cell ends in an error'


@one_each
def test_public_names(page):
    tests = '\n'.join(page.tests)
    for n in page.public():
        assert ast.get_docstring(n), f'{page.name}: {n.name} has no docstring'
        assert re.search(rf'\b{n.name}\b', tests), f'{page.name}: {n.name} is used in no test cell'
        functions = ([n] if isinstance(n, ast.FunctionDef)
                     else [m for m in n.body if isinstance(m, ast.FunctionDef)])
        source = next(s for s in page.exported
                      if re.search(rf'^(class|def) {n.name}\b', s, re.M)).splitlines()
        for f in functions:
            if f.name.startswith('_') and f.name != '__init__': continue
            assert (f.name == '__init__'
                    or ast.get_docstring(f)), f'{page.name}: {n.name}.{f.name} has no docstring'


def own_nodes(f):
    "What belongs to a function itself, not to a function or class inside it."
    for n in ast.iter_child_nodes(f):
        if not isinstance(n, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            yield n; yield from own_nodes(n)


def untold(source):
    "What an exported cell does not say: for public functions and methods and for `__init__`, not for what is inside of them."
    told = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(source).readline)
            if t.type == tokenize.COMMENT}
    # on a line of its own, above
    told |= {n+1 for n in told if source.splitlines()[n-1].lstrip().startswith('#')}
    wanted = lambda name: name == '__init__' or not name.startswith('_')
    for n in ast.parse(source).body:
        if n.__class__ not in (ast.FunctionDef, ast.ClassDef) or n.name.startswith('_'): continue
        for f in [n] if isinstance(n,
                                   ast.FunctionDef) else [m for m in n.body
                                                          if isinstance(m, ast.FunctionDef)
                                                          and wanted(m.name)]:
            name, a = f.name if f is n else f'{n.name}.{f.name}', f.args
            plain = a.posonlyargs + a.args
            default = dict(zip(reversed(plain), reversed(a.defaults))) | {
                k: d for k, d in zip(a.kwonlyargs, a.kw_defaults) if d}
            for p in plain + a.kwonlyargs:
                lines = range(p.lineno, default.get(p, p).end_lineno+1)
                if p.arg not in ('self', 'cls') and not told & set(lines):
                    yield f'{name}: no comment at the parameter {p.arg}'
            if '\n' in (ast.get_docstring(f) or ''): yield f'{name}: more than one line of docstring'
            if f.name == '__init__' or not any(isinstance(x, (ast.Yield, ast.YieldFrom))
                                               or isinstance(x, ast.Return) and x.value
                                               for x in own_nodes(f)):
                continue
            if not f.returns: yield f'{name}: no annotation of what is returned'
            elif f.returns.end_lineno not in told: yield f'{name}: no comment at what is returned'


@one_each
def test_docments(page):
    found = [x for s in page.exported for x in untold(s)]
    assert not found, f'{page.name}: {found}'


NEWER = {r'catch_warnings\((?!\)|record=)': 'catch_warnings(action=...)',
         r'^\s*import tomllib': 'tomllib', r'\bexcept\s*\*': 'except*',
         r'from typing import [^\n]*\b(Self|override|Never|assert_never)\b': 'a type',
         r'\bStrEnum\b|\bExceptionGroup\b|\.add_note\(': 'a class',
         r'contextlib\.chdir|import '
         r'chdir|hashlib\.file_digest|itertools\.batched|math\.(cbrt|exp2|sumprod)|datetime\.UTC|asyncio\.(timeout|TaskGroup)': 'a function'}


def test_nothing_newer_than_python_3_10():
    sources = {
        p.name: '\n\n'.join('\n'.join(l for l in s.splitlines() if l.lstrip()[:1] not in ('%', '!'))
                            for s, _ in p.code) for p in ALL}
    sources |= {f.relative_to(ROOT).as_posix(): f.read_text(encoding='utf-8') for d in ('tests', 'tools')
                for f in (ROOT/d).rglob('*.py')}
    for name, source in sources.items():
        if name == 'tests/test_repository.py': continue
        lines = source.splitlines()
        for pattern, what in NEWER.items():
            found = [m[0] for m in re.finditer(pattern, source, re.M)]
            assert (not found
                    or 'except ImportError' in source), f'{name} uses {what}, which Python 3.10 does not have: {found}'
        # a[x, *y] is a syntax error there, a[(x, *y)] is none
        for n in ast.walk(ast.parse(source, feature_version=(3, 10))):
            star = (isinstance(n, ast.Subscript) and isinstance(n.slice, ast.Tuple)
                    and any(isinstance(e, ast.Starred) for e in n.slice.elts))
            assert (not star or lines[n.slice.lineno-1].encode()[n.slice.col_offset:][:1]
                    == b'('), f'{name}: {lines[n.lineno-1]}'


def test_links_lead_somewhere():
    for p in ALL:
        for link in re.findall(r'\]\(([^)#]+\.ipynb)', p.prose):
            assert (p.path.parent/link).exists(), f'{p.name} links to {link}, which is not there'


def test_each_page_is_met_on_the_way():
    "The front page and the glossary name all; a reader who follows the links of the other pages finds them, too."
    way = [p for p in ALL if p.name not in ('index.ipynb', 'glossary.ipynb')]
    met = {(p.path.parent/link).resolve() for p in way
           for link in re.findall(r'\]\(([^)#:]+\.ipynb)', p.prose)}
    assert [p.name for p in way if p.path.resolve() not in met] == ['00_tour.ipynb']


def test_the_front_page_names_every_page():
    front = next(p for p in ALL if p.name == 'index.ipynb').prose
    missing = [p.name for p in ALL if p.name != 'index.ipynb' and f']({p.name})' not in front]
    assert not missing, f'nbs/index.ipynb does not name {missing}'
    broken = [l for l in re.findall(r'\]\(([^)#:]+\.ipynb)',
                                    (ROOT/'README.md').read_text(encoding='utf-8'))
                                    if not (ROOT/l).exists()]
    assert not broken, f'README.md links to {broken}'


def test_top_level():
    allowed = {'nbs', 'detlearn', 'tests', 'tools', 'settings.ini', 'setup.py', 'pyproject.toml',
               'MANIFEST.in', 'README.md', 'CONTRIBUTING.md', 'LICENSE'}
    import subprocess
    tracked = {l.split('/')[0] for l in subprocess.run(['git', 'ls-files'], cwd=ROOT,
                                                       capture_output=True,
                                                       text=True).stdout.splitlines()}
    assert {t for t in tracked if not t.startswith('.')} <= allowed
    ini = configparser.ConfigParser(delimiters=['=']); ini.read(ROOT/'settings.ini')
    for command in ('pip install -e . && detlearn demo',
                    "pip install -e '.[dev]' && nbdev_test --n_workers 2 && pytest -q tests"):
        assert command in (ROOT/'README.md').read_text(), f'README.md does not hold: {command}'
    assert not re.search(r'torch[<=!~]', ini['DEFAULT']['requirements'])


def test_importing_the_package_imports_no_torch():
    import subprocess, sys
    code = "import detlearn, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0
