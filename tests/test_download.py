"Downloads from a server of the tests' own that drops, lies, changes and refuses; archives that attack; the real sets in small."
import contextlib, gzip, hashlib, io, json, os, shutil, signal, socket, stat, subprocess, sys, tarfile
import threading, time, zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from detlearn.apis.cli import main
from detlearn.core.shapes import ToyShapes, to_coco
from detlearn.data import download as downloads, extract as archives, real_sets
from detlearn.data.coco import AnnotationError, CocoDataset, decode_masks
from detlearn.data.download import DownloadError, Partial, download, file_hash, open_url
from detlearn.data.extract import ArchiveError, extract
from detlearn.data.folder import find_data
from detlearn.data.lint import lint
from detlearn.data.loader import build_dataset
from detlearn.data.real_sets import ARCHIVES, SETS, download_dataset, plan_text
from detlearn.data.voc import VOCDataset, XMLDataset, write_voc

ROOT = Path(__file__).resolve().parents[1]
DATA = np.random.default_rng(0).integers(0, 256, 200_000, np.uint8).tobytes()
OTHER = DATA[:50_000] + bytes(150_000)
sha = lambda data: hashlib.sha256(data).hexdigest()
PATIENCE = 300  # seconds until a wait is given up; no test that passes takes so long

def until(what):
    "Wait for something that happens for certain; no test asks how long it took."
    end = time.monotonic() + PATIENCE
    while not (found := what()):
        assert time.monotonic() < end, 'it never happened'
        time.sleep(.005)
    return found

@contextlib.contextmanager
def held_back(n):
    "For `server.plan`: `n` bytes are sent, and no more before the end of this context."
    gate = threading.Event()
    try: yield dict(hold=n, gate=gate)
    finally: gate.set()


# ---- the server
class Handler(BaseHTTPRequestHandler):
    "Serves `server.files`; each request takes the next dict of `server.plan` (what goes wrong), and is logged."
    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        s = self.server; todo = s.plan.pop(0) if s.plan else {}
        s.files.update(todo.get('files', {})); s.tag = todo.get('tag', s.tag)
        data, path = s.files.get(self.path), self.path
        s.headers.append(dict(self.headers))
        if 'status' in todo or data is None:
            return self.refuse(todo.get('status', 404), todo.get('headers', {}))
        wish = self.headers.get('Range', '') if s.ranges else ''
        same = self.headers.get('If-Range') in (None, s.tag, s.date) or s.ignores_if_range
        first = int(wish[6:-1]) if wish and same else 0
        if first >= len(data) > 0: return self.refuse(416, {'Content-Range': f'bytes */{len(data)}'})
        body = data[first:]; sent = body[:todo.get('drop')] + todo.get('more', b'')
        s.log.append((path, first, len(sent)))
        self.send_response(206 if first else 200)
        if s.tag: self.send_header('ETag', s.tag)
        if s.date: self.send_header('Last-Modified', s.date)
        if first:
            self.send_header('Content-Range',
                             f'bytes {first + todo.get("shift", 0)}-{len(data)-1}/{len(data)}')
        length = todo.get('length', len(body))
        if todo.get('chunked'): self.send_header('Transfer-Encoding', 'chunked')
        elif length is not None: self.send_header('Content-Length', str(length))
        self.send_header('Connection', 'close'); self.close_connection = True; self.end_headers()
        self.send(sent, todo)

    def send(self, data, todo):
        held = todo.get('hold', len(data))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_pieces(data[:held], todo)
            if 'hold' in todo: todo['gate'].wait(PATIENCE)     # until the test lets it go on
            self.send_pieces(data[held:], todo)
            if todo.get('chunked') and 'drop' not in todo: self.wfile.write(b'0\r\n\r\n')
            if todo.get('reset'):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
                self.connection.close()

    def send_pieces(self, data, todo):
        step = todo.get('step', 2**15)
        for i in range(0, len(data), step):
            piece = data[i:i+step]
            self.wfile.write(b'%x\r\n%s\r\n' % (len(piece), piece) if todo.get('chunked') else piece)
            self.wfile.flush()

    def refuse(self, status, headers):
        self.server.log.append((self.path, status, 0)); self.send_response(status)
        for k, v in headers.items(): self.send_header(k, v)
        self.send_header('Content-Length', '0'); self.end_headers()

    def log_message(self, *args): pass


class Shelf:
    def __init__(self):
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), Handler); self.http.daemon_threads = True
        self.port = self.http.server_port
        self.set()
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=.02),
                         daemon=True).start()

    def set(self, *plan, files=None, ranges=True, tag='"v1"', date='', ignores_if_range=False):
        vars(self.http).update(files={'/a.bin': DATA} if files is None else files, plan=list(plan),
                               ranges=ranges, tag=tag, date=date,
                               ignores_if_range=ignores_if_range, log=[], headers=[])
        return self.url('a.bin')

    def url(self, name): return f'http://127.0.0.1:{self.port}/{name}'

    @property
    def log(self): return [(first, n) for _, first, n in self.http.log]


@pytest.fixture(scope='module', autouse=True)
def shelf():
    with pytest.MonkeyPatch.context() as m:
        m.setenv('no_proxy', '*')                        # also where the machine goes through a proxy
        s = Shelf(); yield s; s.http.shutdown(); s.http.server_close()


def get(url, folder, sha256=sha(DATA), **kw):
    "A download that must succeed; its bytes."
    kw = dict(dict(wait=0, say=lambda text: None), **kw)
    return download(url, folder/'a.bin', sha256, **kw).read_bytes()


def fails(url, folder, *words, sha256=None, **kw):
    "A download that must fail with one sentence, and leave nothing under its name."
    kw = dict(dict(wait=0, tries=2, say=lambda text: None), **kw)
    with pytest.raises(DownloadError) as e: download(url, folder/'a.bin', sha256, **kw)
    text = str(e.value)
    for w in words: assert w in text, f'{w!r} is not in: {text}'
    assert not (folder/'a.bin').exists() and '\n' not in text
    return text


# ---- one file: what works
def test_plain(shelf, tmp_path):
    url = shelf.set(); assert get(url, tmp_path) == DATA and shelf.log == [(0, len(DATA))]
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.bin', 'a.bin.sha256']
    assert subprocess.run(['sha256sum', '-c', 'a.bin.sha256'], cwd=tmp_path,
                          capture_output=True).returncode == 0
    # a second call asks nothing
    assert get(url, tmp_path) == DATA and len(shelf.log) == 1
    assert (shelf.http.headers[0]['Accept-Encoding'] == 'identity'
            and 'Range' not in shelf.http.headers[0])

@pytest.mark.parametrize('tag, date', [('"v1"', ''), ('', 'Mon, 01 Jan 2024 00:00:00 GMT'),
                                       ('W/"v1"', 'Mon, 01 Jan 2024 00:00:00 GMT')])
def test_resume_after_drops(shelf, tmp_path, tag, date):
    "Nothing is fetched twice; a strong ETag or the date names the version."
    url = shelf.set(dict(drop=70_000), dict(drop=30_000), tag=tag, date=date)
    assert get(url, tmp_path) == DATA
    assert shelf.log == [(0, 70_000), (70_000, 30_000), (100_000, 100_000)]
    assert [h.get('If-Range') for h in shelf.http.headers] == [None] + [tag if tag.startswith('"')
                                                                        else date]*2

@pytest.mark.parametrize('how', [dict(reset=True), dict(chunked=True), dict(step=1000)])
def test_kinds_of_drops(shelf, tmp_path, how):
    assert get(shelf.set(dict(drop=70_000, **how)), tmp_path) == DATA
    assert len(shelf.log) == 2 and sum(n for _, n in shelf.log) <= 270_000

def test_no_version_starts_again(shelf, tmp_path):
    assert (get(shelf.set(dict(drop=70_000), tag=''), tmp_path) == DATA
            and shelf.log == [(0, 70_000), (0, len(DATA))])
    shelf.set(dict(drop=70_000), tag='W/"weak"'); (tmp_path/'a.bin').unlink()
    get(shelf.url('a.bin'), tmp_path); assert shelf.log[1][0] == 0

def test_no_range_support_starts_again(shelf, tmp_path):
    assert get(shelf.set(dict(drop=70_000), dict(drop=120_000), ranges=False), tmp_path) == DATA
    assert shelf.log == [(0, 70_000), (0, 120_000), (0, len(DATA))]

@pytest.mark.parametrize('ignores', [False, True])
def test_file_changes_between_tries(shelf, tmp_path, ignores):
    "Also where the server gives a part although If-Range says no."
    url = shelf.set(dict(drop=70_000), dict(files={'/a.bin': OTHER}, tag='"v2"'),
                    ignores_if_range=ignores)
    assert get(url, tmp_path, sha(OTHER)) == OTHER and shelf.log[-1] == (0, len(OTHER))

def test_file_becomes_shorter(shelf, tmp_path):
    short = DATA[:60_000]; url = shelf.set(dict(drop=70_000), dict(files={'/a.bin': short}, tag='"v2"'))
    assert get(url, tmp_path, sha(short)) == short

def test_part_that_does_not_fit(shelf, tmp_path):
    "Longer than the file (416): removed, and fetched anew."
    url = shelf.set(); part = Partial(tmp_path/'a.bin'); part.begin(url=url, tag='"v1"', total=10**6)
    part.file.write_bytes(b'x'*300_000)
    assert get(url, tmp_path) == DATA and shelf.log == [(416, 0), (0, len(DATA))]

def test_part_of_another_address_or_without_a_note(shelf, tmp_path):
    url = shelf.set(); part = Partial(tmp_path/'a.bin')
    part.begin(url=url + '?old', tag='"v1"', total=9); part.file.write_bytes(b'xxx')
    assert get(url, tmp_path) == DATA
    (tmp_path/'a.bin').unlink(); part.file.write_bytes(b'xxx'); assert get(url, tmp_path) == DATA
    (tmp_path/'a.bin').unlink(); part.file.write_bytes(b'xxx'); part.note.write_text('[1]')
    assert get(url, tmp_path) == DATA

def test_whole_part_needs_no_request(shelf, tmp_path):
    "Killed between the last byte and the new name."
    url = shelf.set(); part = Partial(tmp_path/'a.bin'); part.begin(url=url, tag='"v1"', total=len(DATA))
    part.file.write_bytes(DATA)
    assert get(url, tmp_path) == DATA and shelf.log == []

def test_whole_part_of_another_address(shelf, tmp_path):
    "Without a fingerprint, too, the bytes of one address do not pass for those of another."
    url = shelf.set(); part = Partial(tmp_path/'a.bin')
    part.begin(url=url + '?old', tag='"v1"', total=len(OTHER)); part.file.write_bytes(OTHER)
    assert get(url, tmp_path, None) == DATA and shelf.log == [(0, len(DATA))]

def test_500_then_200(shelf, tmp_path):
    said = []
    assert get(shelf.set(dict(status=500), dict(status=503, headers={'Retry-After': '0'})), tmp_path,
               say=said.append) == DATA
    assert [s.split(';')[0] for s in said] == ['status 500: Internal Server Error',
                                               'status 503: Service Unavailable']

def test_waits_are_doubled(shelf, tmp_path, monkeypatch):
    waits = []; monkeypatch.setattr(downloads, 'time', SimpleNamespace(sleep=waits.append))
    get(shelf.set(*[dict(status=503)]*4), tmp_path, wait=.5)
    assert waits == [.5, 1, 2, 4]
    waits.clear(); (tmp_path/'a.bin').unlink()
    get(shelf.set(dict(status=429, headers={'Retry-After': '7'})), tmp_path, wait=1); assert waits == [7]

def test_redirect(shelf, tmp_path):
    url = shelf.set(dict(status=302, headers={'Location': '/b.bin'}), dict(drop=70_000),
                    dict(status=302, headers={'Location': '/b.bin'}), files={'/b.bin': DATA})
    assert get(url, tmp_path) == DATA
    assert [(p, f) for p, f, _ in shelf.http.log] == [('/a.bin', 302), ('/b.bin', 0), ('/a.bin', 302),
                                                      ('/b.bin', 70_000)]

def test_without_content_length(shelf, tmp_path):
    assert get(shelf.set(dict(length=None)), tmp_path) == DATA
    (tmp_path/'a.bin').unlink(); assert get(shelf.set(dict(chunked=True)), tmp_path) == DATA

def test_md5(shelf, tmp_path):
    url = shelf.set(); md5 = hashlib.md5(DATA).hexdigest()
    assert get(url, tmp_path, None, md5=md5) == DATA
    assert (tmp_path/'a.bin.sha256').read_text().startswith(sha(DATA)); (tmp_path/'a.bin').unlink()
    (tmp_path/'a.bin.sha256').unlink()
    fails(url, tmp_path, 'its md5 is ' + md5, 'expected ' + '1'*32, md5='1'*32)


# ---- one file: what does not
def test_404(shelf, tmp_path):
    assert (shelf.set(files={}) in fails(shelf.url('a.bin'), tmp_path,
                                         'status 404: there is no such file') and len(shelf.log) == 1)

def test_403(shelf, tmp_path):
    fails(shelf.set(dict(status=403)), tmp_path, 'status 403: the server refuses it')

def test_always_500(shelf, tmp_path):
    fails(shelf.set(*[dict(status=500)]*9), tmp_path, 'status 500', tries=3); assert len(shelf.log) == 3

def test_no_network(tmp_path, monkeypatch):
    "A port where nobody listens; a name that nobody knows (no real name server is asked: some lie)."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        fails(f'http://127.0.0.1:{s.getsockname()[1]}/a.bin', tmp_path, 'no answer',
              'is there a network?')
    def unknown(*a, **kw): raise socket.gaierror(socket.EAI_NONAME, 'Name or service not known')
    monkeypatch.setattr(socket, 'getaddrinfo', unknown)
    fails('http://no.such.host.invalid/a.bin', tmp_path, 'no answer', 'is there a network?')

def test_other_schemes(shelf, tmp_path):
    for url in ('file:///etc/passwd', 'ftp://127.0.0.1/x', 'a.bin', ''):
        with pytest.raises(ValueError, match='http or https'): download(url, tmp_path/'x')
    for to in ('file:///etc/passwd', 'ftp://127.0.0.1/x', 'gopher://x'):
        fails(shelf.set(dict(status=302, headers={'Location': to})), tmp_path)
    fails(shelf.set(*[dict(status=302, headers={'Location': '/a.bin'})]*40), tmp_path, 'status 302')

def test_https_is_not_left_for_http(monkeypatch):
    answer = io.BytesIO(); answer.url = 'http://elsewhere/a'
    monkeypatch.setattr(downloads.web.OpenerDirector, 'open', lambda *a, **kw: answer)
    with pytest.raises(DownloadError, match='leads to http://elsewhere/a, which is not protected'):
        open_url('https://x/a')

def test_wrong_hash_names_both(shelf, tmp_path):
    fails(shelf.set(), tmp_path, sha(DATA), '1'*64, 'another file', 'It was removed', sha256='1'*64)
    # so that the next try begins anew
    assert list(tmp_path.iterdir()) == []

def test_no_hash_at_all(tmp_path):
    with pytest.raises(ValueError, match='expected 64 hex digits'):
        download('http://x/a', tmp_path/'a', 'abc')

def test_the_first_download_is_the_measure(shelf, tmp_path):
    get(shelf.set(), tmp_path, None); (tmp_path/'a.bin').unlink()
    fails(shelf.set(files={'/a.bin': OTHER}), tmp_path, sha(OTHER), sha(DATA),
          'a.bin.sha256, written at the first download')
    get(shelf.set(), tmp_path, None)
    # spoiled on the disk, later
    (tmp_path/'a.bin').write_bytes(OTHER)
    with pytest.raises(DownloadError, match='expected ' + sha(DATA)):
        download(shelf.set(), tmp_path/'a.bin')

@pytest.mark.parametrize('kw, words', [(dict(size=199_999), 'announces 200,000 bytes, expected 199,999'),
                                       (dict(max_bytes=100_000), 'more than max_bytes=100,000')])
def test_size_is_asked_before(shelf, tmp_path, kw, words):
    fails(shelf.set(), tmp_path, words, **kw); assert Partial(tmp_path/'a.bin').have == 0

@pytest.mark.parametrize('chunked', [False, True])
def test_more_than_announced(shelf, tmp_path, chunked):
    "Nobody says how much; the limit holds while the bytes come."
    todo = dict(chunked=True) if chunked else dict(length=None)
    fails(shelf.set(todo), tmp_path, 'sends more than 100,000 bytes', max_bytes=100_000)
    assert not list(tmp_path.glob('*.part'))
    fails(shelf.set(todo), tmp_path, 'sends more than 150,000 bytes', size=150_000)

def test_length_too_small(shelf, tmp_path):
    "The header says 100,000, the server sends 200,000: what was announced arrives, and is not the file."
    fails(shelf.set(dict(length=100_000)), tmp_path, 'its sha256 is ' + sha(DATA[:100_000]),
          sha256=sha(DATA))
    fails(shelf.set(dict(length=100_000)), tmp_path, 'announces 100,000 bytes, expected 200,000',
          size=200_000)

def test_length_too_large(shelf, tmp_path):
    "The header says 300,000 and 200,000 come: a dropped line, as far as one can tell."
    text = fails(shelf.set(*[dict(length=300_000)]*9, ranges=False), tmp_path,
                 'the line dropped at 200,000 of 300,000')
    assert 'run it again to go on' in text

def test_short_without_length(shelf, tmp_path):
    fails(shelf.set(dict(length=None, drop=70_000)), tmp_path, 'has 70,000 bytes, expected 200,000',
          size=200_000)
    fails(shelf.set(dict(length=None, drop=70_000)), tmp_path, 'its sha256', sha256=sha(DATA))

def test_range_at_the_wrong_place(shelf, tmp_path):
    "A server that begins elsewhere than asked for: the whole is fetched."
    assert (get(shelf.set(dict(drop=70_000), dict(shift=5)), tmp_path) == DATA
            and shelf.log[-1] == (0, len(DATA)))

def test_empty_answers(shelf, tmp_path):
    fails(shelf.set(files={'/a.bin': b''}), tmp_path, 'an empty file')
    fails(shelf.set(dict(status=204)), tmp_path, 'an empty file')

def test_hanging_server(shelf, tmp_path):
    "It answers, and then sends nothing for as long as anybody waits."
    with held_back(0) as todo: fails(shelf.set(todo, todo), tmp_path, 'timed out', timeout=.2)

def test_not_http(tmp_path):
    s = socket.create_server(('127.0.0.1', 0))
    threading.Thread(target=lambda: [s.accept()[0].sendall(b'\x00\xff hello\r\n\r\n') for _ in range(2)],
                     daemon=True).start()
    fails(f'http://127.0.0.1:{s.getsockname()[1]}/a.bin', tmp_path); s.close()

def test_disk_full(shelf, tmp_path, monkeypatch):
    real = open
    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 100_000: raise OSError(28, 'No space left on device')
            return super().write(data)
    monkeypatch.setattr('builtins.open', lambda p, mode='r', *a, **kw: Full(p, 'ab')
                        if str(p).endswith('.part') and mode == 'ab' else real(p, mode, *a, **kw))
    text = fails(shelf.set(), tmp_path, 'the disk is full; what has arrived is kept',
                 'run it again to go on from there')
    monkeypatch.undo()
    have = Partial(tmp_path/'a.bin').have; assert 0 < have <= 100_000, text
    assert get(shelf.set(), tmp_path) == DATA and shelf.log == [(have, len(DATA) - have)]

def test_too_little_room(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads.shutil, 'disk_usage',
                        lambda p: shutil._ntuple_diskusage(10**6, 0, 1000)
                        if hasattr(shutil, '_ntuple_diskusage') else type('U', (), dict(free=1000)))
    fails(shelf.set(), tmp_path, 'needs 200.0 kB more', 'has 1.0 kB left')
    assert Partial(tmp_path/'a.bin').have == 0

def test_folder_in_the_way(shelf, tmp_path):
    (tmp_path/'a.bin').mkdir()
    with pytest.raises(ValueError, match='is a folder; name the file in it'):
        download(shelf.set(), tmp_path/'a.bin')

def test_two_at_once(shelf, tmp_path):
    with held_back(1000) as todo:
        url = shelf.set(todo)
        first = threading.Thread(target=lambda: get(url, tmp_path, timeout=PATIENCE)); first.start()
        until(lambda: shelf.log)                         # it has asked, so it holds the lock
        with pytest.raises(DownloadError, match='another process is at work'): get(url, tmp_path)
    first.join(); assert (tmp_path/'a.bin').read_bytes() == DATA and shelf.log == [(0, len(DATA))]

def start(code, *args):
    "A process of its own, that hears Ctrl-C also where the shell in the background ignores it."
    hears = 'import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n'
    return subprocess.Popen([sys.executable, '-c', hears + code, *map(str, args)], text=True,
                            env=dict(os.environ, PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)

FETCH = f'''import sys
from detlearn.data.download import download
download(*sys.argv[1:], wait=0, timeout={PATIENCE}, say=print)'''

@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_process_is_killed_in_the_middle(shelf, tmp_path, how):
    "What had arrived is there, no file of the name, no lock; the next process goes on."
    part = Partial(tmp_path/'a.bin')
    with held_back(150_000) as todo:                     # more than Python keeps in its own hands
        p = start(FETCH, shelf.set(todo), tmp_path/'a.bin')
        until(lambda: part.have or p.poll() is not None)
        p.send_signal(how); err = p.communicate()[1]; have = part.have
    assert p.returncode == -how, err
    assert 0 < have <= 150_000 and not (tmp_path/'a.bin').exists()
    assert part.version['total'] == len(DATA)
    shelf.set(); p = start(FETCH, shelf.url('a.bin'), tmp_path/'a.bin'); err = p.communicate()[1]
    assert p.returncode == 0, err
    assert (tmp_path/'a.bin').read_bytes() == DATA and shelf.log == [(have, len(DATA) - have)]
    assert sorted(f.name for f in tmp_path.iterdir()) == ['a.bin', 'a.bin.sha256']

quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck),
                 derandomize=True)
todo = st.one_of(st.builds(dict, drop=st.integers(1, 199_999)),
                 st.builds(dict, status=st.sampled_from([500, 503, 429])), st.just(dict(shift=3)),
                 st.just(dict(drop=0)),
                 st.just(dict(files={'/a.bin': OTHER}, tag='"v2"')),
                 st.just(dict(files={'/a.bin': DATA}, tag='"v1"')),
                 st.builds(dict, chunked=st.just(True), drop=st.integers(1, 199_999)))
@quick
@given(st.lists(todo, max_size=6), st.booleans(), st.booleans(), st.sampled_from(['"v1"', '']))
def test_any_story_ends_well(shelf, tmp_path_factory, plan, ranges, ignores, tag):
    "Whatever happens in whatever order: the file is one of the two that were offered, whole, or there is a sentence."
    url = shelf.set(*[dict(t) for t in plan], ranges=ranges, ignores_if_range=ignores, tag=tag)
    folder = tmp_path_factory.mktemp('story')
    for _ in range(3):
        try: found = get(url, folder, None, tries=2); break
        except DownloadError: assert not (folder/'a.bin').exists()
    else: found = None
    assert found in (DATA, OTHER) or found is None and len(plan) >= 6


# ---- archives
def make_zip(path, **files):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, data in files.items(): z.writestr(name, data)
    return path

def make_tar(path, *members, mode='w', **kw):
    "Members: `(name, bytes)`, or `(name, type, target)`."
    with tarfile.open(path, mode, **kw) as t:
        for name, *what in members:
            m = tarfile.TarInfo(name)
            if len(what) == 1: m.size = len(what[0]); t.addfile(m, io.BytesIO(what[0]))
            else: m.type, m.linkname = what; t.addfile(m)
    return path

def snapshot(folder):
    return {p.relative_to(folder).as_posix(): p.is_file() and p.read_bytes()
            for p in sorted(folder.rglob('*'))}

def refused(archive, folder, *words, **kw):
    "The archive is refused, and the world outside is as it was."
    before = snapshot(folder)
    with pytest.raises(ArchiveError) as e: extract(archive, folder/'in'/'set', **kw)
    for w in words: assert w in str(e.value), f'{w!r} is not in: {e.value}'
    (folder/'in').rmdir()
    assert snapshot(folder) == before and '\n' not in str(e.value)

NAMES = ['../x', 'a/../../x', '/tmp/x', 'a/../b', '..', 'C:/x', 'C:x', '..\\x', '\\\\host\\share\\x',
         '\\x', './../x', 'a/..']

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('kind', ['zip', 'tar', 'tar.gz'])
def test_names_that_leave(tmp_path, name, kind):
    archive = tmp_path/f'a.{kind}'
    if kind == 'zip': make_zip(archive, **{'good.jpg': b'good', name: b'evil'})
    else:
        make_tar(archive, ('good.jpg', b'good'), (name, b'evil'), mode='w:gz' if kind == 'tar.gz'
                 else 'w')
    refused(archive, tmp_path, 'leads out of the folder')

S, H = tarfile.SYMTYPE, tarfile.LNKTYPE
LINKS = {'door': ([('door', S, '..'), ('door/x', b'evil')], 'leads out'),
         'door-inside': ([('d', tarfile.DIRTYPE, ''), ('door', S, 'd'), ('door/x', b'y')], ''),
    'absolute': ([('x', S, '/etc/passwd')], 'leads out'), 'hard': ([('x', H, '../secret')], 'leads out'),
    'hard-absolute': ([('x', H, '/etc/passwd')], 'leads out'),
    'deep': ([('a/b/c', S, '../../../secret')], 'leads out'),
    'chain': ([('s', S, '.'), ('t', S, 's/..'), ('t/x', b'evil')], ''),
    'nowhere': ([('x', S, 'y')], 'no file of the archive'),
    'self': ([('x', S, 'x')], 'no file'), 'circle': ([('x', S, 'y'), ('y', S, 'x')], 'no file'),
    'over-a-file': ([('x', b'1'), ('y', b'2'), ('x', S, 'y')], 'twice'),
    'file-over-a-link': ([('y', b'2'), ('x', S, 'y'), ('x', b'1')], 'twice'),
    'drive': ([('x', S, 'C:/secret')], 'leads out'), 'back': ([('x', S, '..\\secret')], 'leads out')}

@pytest.mark.parametrize('name', LINKS)
def test_links(tmp_path, name):
    members, words = LINKS[name]; (tmp_path/'secret').write_text('key')
    refused(make_tar(tmp_path/'a.tar', *members), tmp_path, words)

def test_zip_links(tmp_path):
    def linked(target):
        i = zipfile.ZipInfo('x.jpg'); i.external_attr = (stat.S_IFLNK | 0o777) << 16
        with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z:
            z.writestr('y.jpg', b'photo'); z.writestr(i, target)
        return tmp_path/'a.zip'
    refused(linked('../secret'), tmp_path, 'leads out')
    refused(linked('/etc/passwd'), tmp_path, 'leads out')
    refused(linked('z'*5000), tmp_path, 'bytes of target')
    folder = extract(linked('y.jpg'), tmp_path/'good')
    assert (folder/'x.jpg').read_bytes() == b'photo' and not (folder/'x.jpg').is_symlink()

def test_good_links_become_copies(tmp_path):
    folder = extract(make_tar(tmp_path/'a.tar', ('l', S, 'k'), ('d/a', b'1'), ('k', S, 'd/a'),
                              ('d/h', H, 'd/a'), ('d/s', S, 'a')), tmp_path/'good')
    assert all((folder/n).read_bytes() == b'1' and not (folder/n).is_symlink()
               for n in ('l', 'k', 'd/h', 'd/s'))

@pytest.mark.parametrize('kind', [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_devices(tmp_path, kind):
    refused(make_tar(tmp_path/'a.tar', ('good', b'1'), ('dev', kind, '')), tmp_path,
            'a device or a pipe')

def test_bombs(tmp_path):
    zeros = bytes(30_000_000)
    refused(make_zip(tmp_path/'a.zip', zeros=zeros), tmp_path, 'as a bomb does')
    refused(make_tar(tmp_path/'a.tgz', ('zeros', zeros), mode='w:gz'), tmp_path, 'as a bomb does')
    small = make_zip(tmp_path/'b.zip', **{f'{i}': b'x'*100 for i in range(50)})
    refused(small, tmp_path, 'max_files=49', max_files=49)
    refused(small, tmp_path, 'max_bytes=4,999', max_bytes=4999)
    refused(make_tar(tmp_path/'c.tar', *[(f'{i}/', tarfile.DIRTYPE, '') for i in range(50)]), tmp_path,
            'max_files=49', max_files=49)
    assert len(list(extract(small, tmp_path/'ok', max_files=50, max_bytes=5000).iterdir())) == 50

def test_bombs_of_links_headers_and_overlap(tmp_path):
    "Copies of a large file by many links; a name of gigabytes; many entries that share one content."
    refused(make_tar(tmp_path/'a.tar', ('x', bytes(1_000_000)), *[(f'l{i}', H, 'x') for i in range(99)]),
            tmp_path, 'max_bytes=5,000,000', max_bytes=5_000_000)
    long = tarfile.TarInfo('long'); long.type, long.size = tarfile.GNUTYPE_LONGNAME, 2**32
    (tmp_path/'b.tar').write_bytes(long.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    refused(tmp_path/'b.tar', tmp_path, 'a header of 4294967296 bytes')
    with tarfile.open(tmp_path/'c.tar', 'w', format=tarfile.PAX_FORMAT) as t:
        m = tarfile.TarInfo('x'); m.pax_headers = dict(comment='y'*2_000_000); t.addfile(m)
    refused(tmp_path/'c.tar', tmp_path, 'has a header of')
    with zipfile.ZipFile(tmp_path/'d.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('x0', bytes(1_000_000)); first = z.infolist()[0]
        for i in range(1, 200):
            twin = zipfile.ZipInfo(f'x{i}')
            [setattr(twin, k, getattr(first, k))
             for k in ('CRC', 'compress_size', 'file_size', 'header_offset', 'compress_type')]
            z.filelist.append(twin)
    refused(tmp_path/'d.zip', tmp_path)

def test_claims_that_lie(tmp_path):
    data = bytearray(make_zip(tmp_path/'a.zip', x=b'a'*100_000).read_bytes())
    n = (100_000).to_bytes(4, 'little'); at = data.rfind(n)
    for claim in (3, 2**32-2):
        (tmp_path/'b.zip').write_bytes(data[:at] + claim.to_bytes(4, 'little') + data[at+4:])
        refused(tmp_path/'b.zip', tmp_path)
    whole = bytearray(make_tar(tmp_path/'a.tar', ('x', b'a'*100)).read_bytes())
    m = tarfile.TarInfo('x'); m.size = 10**9; (tmp_path/'b.tar').write_bytes(m.tobuf() + whole[512:])
    refused(tmp_path/'b.tar', tmp_path)

def test_negative_sizes(tmp_path):
    "A size below zero sends a reader back to where it was: no endless loop."
    m = tarfile.TarInfo('x'); raw = bytearray(m.tobuf(tarfile.GNU_FORMAT))
    raw[124:136] = b'\xff'*10 + b'\xfc\x00'
    raw[148:156] = b'        '; raw[148:156] = b'%06o\0 ' % sum(raw)
    (tmp_path/'a.tar').write_bytes(bytes(raw)*3 + bytes(1024))
    with contextlib.suppress(ArchiveError): extract(tmp_path/'a.tar', tmp_path/'x')
    with tarfile.open(tmp_path/'b.tar', 'w', format=tarfile.PAX_FORMAT) as t:
        m = tarfile.TarInfo('x'); m.pax_headers = dict(size='-1024'); t.addfile(m)
    with contextlib.suppress(ArchiveError): extract(tmp_path/'b.tar', tmp_path/'y')

def test_twice_the_same_name(tmp_path):
    refused(make_tar(tmp_path/'a.tar', ('x', b'1'), ('./x', b'2')), tmp_path, 'twice')
    refused(make_tar(tmp_path/'b.tar', ('x', b'1'), ('x/y', b'2')), tmp_path)

@pytest.mark.parametrize('data',
                         [b'', b'PK', b'PK\x03\x04', b'<html>404</html>', bytes(3000), b'\x1f\x8b\x08',
                          b'x'*600, gzip.compress(b'hello'), gzip.compress(b'x'*5000)[:30]])
def test_no_archive(tmp_path, data):
    (tmp_path/'a.zip').write_bytes(data)
    # an empty tar
    if data == bytes(3000):
        assert list(extract(tmp_path/'a.zip', tmp_path/'empty').iterdir()) == []; return
    refused(tmp_path/'a.zip', tmp_path, 'damaged, or no zip and no tar')

def test_encrypted(tmp_path):
    data = bytearray(make_zip(tmp_path/'a.zip', x=b'a').read_bytes())
    data[data.rfind(b'PK\x01\x02')+8] |= 1; (tmp_path/'b.zip').write_bytes(data)
    refused(tmp_path/'b.zip', tmp_path, 'is encrypted')

def test_rights_and_owners_are_dropped(tmp_path):
    with tarfile.open(tmp_path/'a.tar', 'w') as t:
        m = tarfile.TarInfo('run'); m.mode, m.uid, m.size = 0o6777, 0, 1; t.addfile(m, io.BytesIO(b'x'))
    assert (extract(tmp_path/'a.tar', tmp_path/'x')/'run').stat().st_mode & 0o6111 == 0

def test_folder_is_new(tmp_path):
    archive = make_zip(tmp_path/'a.zip', x=b'1'); (tmp_path/'old').mkdir()
    (tmp_path/'old'/'mine').touch()
    with pytest.raises(ValueError, match='is already there'): extract(archive, tmp_path/'old')
    assert (extract(archive, tmp_path/'empty'/'deep').is_dir()
            and sorted(os.listdir(tmp_path)) == ['a.zip', 'empty', 'old'])
    with pytest.raises(FileNotFoundError, match='no such archive'):
        extract(tmp_path/'b.zip', tmp_path/'x')

STOP = f'''import sys, time
from detlearn.data import extract as archives
class StopsInTheFifth(archives.Meter):
    def write(self, n):
        if self.files == 5: print('now', flush=True); time.sleep({PATIENCE})
archives.Meter = StopsInTheFifth
archives.extract(*sys.argv[1:])'''

def test_unpacking_is_killed(tmp_path):
    "No folder of the name; the next call removes what was left."
    archive = make_tar(tmp_path/'a.tar', *[(f'{i}.jpg', b'x'*2000) for i in range(40)])
    p = start(STOP, archive, tmp_path/'set'); said = p.stdout.readline()
    p.kill(); assert said == 'now\n', p.communicate()[1]
    p.communicate(); work = tmp_path/'.set.unpacking'
    assert sorted(os.listdir(work)) == [f'{i}.jpg' for i in range(5)] and not (tmp_path/'set').exists()
    extract(archive, tmp_path/'set')
    assert len(os.listdir(tmp_path/'set')) == 40 and sorted(os.listdir(tmp_path)) == ['a.tar', 'set']

def test_disk_full_while_unpacking(tmp_path, monkeypatch):
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(archives.Meter, 'write', full)
    refused(make_tar(tmp_path/'a.tar', ('x', b'1')), tmp_path, 'the disk is full')

name = st.sampled_from(['a', 'a/b', 'a/b/c.jpg', '../x', '/x', 'd/../..', '.', '', 'a/', 'x\\..\\y', 'ü',
                        'n'*300, '\udcff', 'C:', 'a\0b', ' ', '-', 'a/./b'])
member = st.one_of(st.tuples(name, st.binary(max_size=50)),
                   st.tuples(name,
                             st.sampled_from([S, H, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE,
                                              b'S', b'Z']), name))
hurt = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=6)
fuzz = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck),
                derandomize=True)

@fuzz
@given(st.lists(member, max_size=6), hurt, st.sampled_from(['w', 'w:gz', 'w:bz2', 'zip']),
       st.integers(0, 3000))
def test_fuzz_archives(tmp_path_factory, members, changes, mode, cut):
    "Any members, any damage: a folder, or one sentence; and nothing outside."
    folder = tmp_path_factory.mktemp('fuzz'); archive, box = folder/'a', folder/'box'
    try:
        if mode == 'zip': make_zip(archive, **{m[0]: m[1] for m in members if len(m) == 2})
        else: make_tar(archive, *members, mode=mode)
    # the packer refuses, or fails at an empty name
    except (ValueError, UnicodeError, OSError, IndexError): return
    data = bytearray(archive.read_bytes())
    for at, value in changes:
        if data: data[at % len(data)] = value
    archive.write_bytes(data[:-cut] if changes and cut % 3 == 0 and cut else data)
    try: extract(archive, box/'set', max_bytes=10**6)
    except ArchiveError as e: assert '\n' not in str(e) and not (box/'set').exists()
    assert ({p.name for p in folder.iterdir()} <= {'a', 'box'}
            and (not box.exists() or {p.name for p in box.iterdir()} <= {'set'}))
    assert not any(p.is_symlink() for p in folder.rglob('*'))

@fuzz
@given(st.binary(max_size=300))
def test_fuzz_junk(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp('junk')
    for head in (b'', b'PK\x03\x04', b'\x1f\x8b\x08\x00'):
        (folder/'a').write_bytes(head + data)
        with contextlib.suppress(ArchiveError): extract(folder/'a', folder/f'out{len(head)}')


# ---- the real sets, small
def numbered(masks):
    out = np.zeros(masks.shape[1:], np.uint8)
    for k, m in enumerate(masks, 1): out[m.numpy() > 0] = k
    return out

def coco_folder(root, toys, split, names=None):
    coco = json.loads(to_coco(toys, root, split).read_text()); (root/f'{split}.json').unlink()
    for c, n in zip(coco['categories'], names or ()): c['name'] = n
    return coco

def build(work, toys):
    "Folders in the shape of the real archives; gives `{archive: folder}`."
    for split in ('train', 'val'):
        coco = coco_folder(work/'c', toys, split); ann = work/'ann'/'annotations'
        ann.mkdir(parents=True, exist_ok=True)
        (ann/f'instances_{split}2017.json').write_text(json.dumps(coco))
        (ann/f'captions_{split}2017.json').write_text('{"images": [], "annotations": []}')
        (work/f'{split}2017').mkdir(); (work/'c'/'images').rename(work/f'{split}2017'/f'{split}2017')
    voc = {'v07': ('VOC2007', ('train', 'val', 'trainval')), 'v07t': ('VOC2007', ('test',)),
           'v12': ('VOC2012', ('train', 'val', 'trainval'))}
    for d, (year, lists) in voc.items():
        for s in lists: as_voc(work/d/'VOCdevkit'/year, toys, s, ('cat', 'dog', 'person'))
    for s in ('train', 'val', 'test'):
        as_voc(work/'bccd'/'BCCD_Dataset-1.0'/'BCCD', toys, s, ('RBC', 'WBC', 'Platelets'))
    (work/'bccd'/'BCCD_Dataset-1.0'/'README.md').write_text('blood'); pf = work/'pf'/'PennFudanPed'
    for d in ('PNGImages', 'PedMasks', 'Annotation'): (pf/d).mkdir(parents=True)
    for i in range(len(toys)):
        stem = f'{"FudanPed" if i < 5 else "PennPed"}{i+1:05}'
        Image.fromarray(toys[i]['image'].permute(1, 2, 0).numpy()).save(pf/'PNGImages'/f'{stem}.png')
        mask = Image.fromarray(numbered(toys[i]['masks']))
        # the real ones have colours
        if i % 2: mask = mask.convert('P'); mask.putpalette([i for k in range(256) for i in (k, 0, 0)])
        mask.save(pf/'PedMasks'/f'{stem}_mask.png')
    return {'train2017.zip': work/'train2017', 'val2017.zip': work/'val2017',
            'annotations_trainval2017.zip': work/'ann', 'VOCtrainval_06-Nov-2007.tar': work/'v07',
            'VOCtest_06-Nov-2007.tar': work/'v07t', 'VOCtrainval_11-May-2012.tar': work/'v12',
            'PennFudanPed.zip': work/'pf', 'BCCD_Dataset-1.0.zip': work/'bccd'}

def as_voc(root, toys, split, names):
    coco = coco_folder(root, toys, split, names); (root/'JPEGImages').mkdir(exist_ok=True)
    for p in (root/'images').iterdir(): p.rename(root/'JPEGImages'/p.name)
    (root/'images').rmdir(); write_voc(coco, root, split)

@pytest.fixture(scope='module')
def toys(): return ToyShapes(8, 64, sizes=(12, 18), min_objects=3, seed=2)

@pytest.fixture(scope='module')
def offers(shelf, toys, tmp_path_factory):
    "The table, with small archives on our own server; and their bytes."
    work, files, rows = tmp_path_factory.mktemp('real'), {}, {}
    for name, folder in build(work, toys).items():
        made = Path(shutil.make_archive(str(work/'out'/Path(name).stem), name.rsplit('.', 1)[1],
                                        folder)).read_bytes()
        files[f'/{name}'] = made
        rows[name] = replace(ARCHIVES[name], urls=(shelf.url(name),), size=len(made),
                             sha256=ARCHIVES[name].sha256 and sha(made))
    return {k: replace(s, archives=tuple(rows[a.name] for a in s.archives))
            for k, s in SETS.items()}, files

READERS = dict(coco2017=CocoDataset, coco2017_val=CocoDataset, voc2007=VOCDataset, voc2012=VOCDataset,
               penn_fudan=CocoDataset, bccd=XMLDataset)

@pytest.mark.parametrize('name', SETS)
def test_real_sets_in_small(shelf, offers, toys, tmp_path, name):
    "Over a line that drops: fetched, checked, unpacked, and opened by the reader that the set needs."
    sets, files = offers; shelf.set(dict(drop=2000), dict(status=503), files=files); said = []
    configs = download_dataset(name, tmp_path, sets=sets, say=said.append, wait=0)
    assert configs.keys() == SETS[name].splits.keys() and any('dropped' in s for s in said)
    total = 0
    for split, cfg in configs.items():
        data = build_dataset(cfg, dict(pipeline=[], test_mode=True)); total += len(data)
        assert (type(data) is READERS[name] and len(data.rows) >= 2*len(data)
                and (name == 'penn_fudan' or len(data) == len(toys)))
        assert all((Path(data.img_prefix)/im['filename']).is_file() for im in data.data_infos)
    assert name != 'penn_fudan' or total == len(toys)
    assert (all(p.name.endswith('.sha256') for p in (tmp_path/'downloads').iterdir())
            and not list(tmp_path.rglob('.*')))
    # a second call asks nothing
    shelf.set(files=files); download_dataset(name, tmp_path, sets=sets, say=said.append)
    assert shelf.log == []
    assert ('is there' in plan_text(name, tmp_path, sets=sets)
            and '0 bytes to fetch' in plan_text(name, tmp_path, sets=sets))

def test_penn_fudan_masks(shelf, offers, toys, tmp_path):
    "Boxes and masks against torchvision's, and against the pictures themselves."
    import torch
    from torchvision.ops import masks_to_boxes
    sets, files = offers; shelf.set(files=files)
    configs = download_dataset('penn_fudan', tmp_path, sets=sets, say=len); seen = {}
    for split, cfg in configs.items():
        data = build_dataset(cfg, dict(pipeline=[], test_mode=True))
        for i, im in enumerate(data.data_infos):
            labels = torch.from_numpy(
                np.array(Image.open(
                tmp_path/'PennFudanPed/PedMasks'/im['file_name'].replace('.png', '_mask.png'))))
            info = data.get_ann_info(i); seen[im['file_name']] = split
            masks = torch.stack([labels == k for k in labels.unique() if k])
            boxes = masks_to_boxes(masks); boxes[:, 2:] += 1
            assert ((torch.from_numpy(info['bboxes']) == boxes).all()
                    and (decode_masks(info['masks'], *labels.shape) == masks.numpy()).all())
    assert {n for n, s in seen.items() if s == 'val'} == {'FudanPed00005.png', 'PennPed00008.png'}
    assert not [f for f in lint(tmp_path/'PennFudanPed').findings if f.severity == 'error']

def test_found_by_train(shelf, offers, tmp_path):
    "What the command line looks for in a folder is there."
    sets, files = offers; shelf.set(files=files)
    [download_dataset(n, tmp_path/n, sets=sets, say=len) for n in ('coco2017', 'penn_fudan', 'bccd')]
    assert find_data(tmp_path/'bccd'/'BCCD', len)['test']['classes'] == ['RBC', 'WBC', 'Platelets']
    assert (find_data(tmp_path/'penn_fudan', len)['val']['images'] == 2
            and find_data(tmp_path/'coco2017', len)['train']['images'] == 8)

def test_both_years_of_voc_in_one_folder(shelf, offers, tmp_path):
    sets, files = offers; shelf.set(files=files)
    [download_dataset(n, tmp_path, sets=sets, say=len) for n in ('voc2007', 'voc2012')]
    assert sorted(p.name for p in (tmp_path/'VOCdevkit').iterdir()) == ['VOC2007', 'VOC2012']
    years = [build_dataset(real_sets.configs_of(n, tmp_path, sets)['trainval'], dict(pipeline=[])).year
             for n in ('voc2007', 'voc2012')]
    assert years == [2007, 2012]

def test_a_set_goes_on_after_a_failure(shelf, offers, tmp_path):
    "The folders that are complete stay, the archive that broke off is gone on with."
    sets, files = offers; rest = {k: v for k, v in files.items() if k != '/train2017.zip'}
    shelf.set(files=rest)
    with pytest.raises(DownloadError, match='train2017.zip: status 404'):
        download_dataset('coco2017', tmp_path, sets=sets, say=len, wait=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['annotations', 'downloads', 'val2017']
    shelf.set(dict(drop=3000), dict(status=404), files=files)
    with pytest.raises(DownloadError, match='3.0 kB have arrived; run it again'):
        download_dataset('coco2017', tmp_path, sets=sets, say=len, wait=0)
    shelf.set(files=files); download_dataset('coco2017', tmp_path, sets=sets, say=len)
    assert shelf.log[0][0] == 3000 and len(shelf.log) == 1

def test_mirrors(shelf, offers, tmp_path):
    sets, files = offers; a = sets['bccd'].archives[0]
    shelf.set(files=dict(files, **{'/mirror.zip': files['/BCCD_Dataset-1.0.zip']}))
    two = dict(bccd=replace(sets['bccd'],
                            archives=(replace(a, urls=(shelf.url('gone.zip'), shelf.url('mirror.zip'))),
                                      )))
    shelf.http.plan[:] = [dict(), dict(drop=500), dict(status=404)]
    with pytest.raises(DownloadError, match='run it again'):
        download_dataset('bccd', tmp_path, sets=two, say=len, wait=0)
    shelf.http.log.clear(); download_dataset('bccd', tmp_path, sets=two, say=len, wait=0)
    # it begins with the address that it had
    assert [p for p, _, _ in shelf.http.log] == ['/mirror.zip'] and shelf.log[0][0] == 500

def test_an_archive_that_attacks(shelf, offers, tmp_path):
    "A right hash does not make an archive harmless."
    evil = make_zip(tmp_path/'evil.zip',
                    **{'BCCD_Dataset-1.0/BCCD/a.jpg': b'1', '../../evil.sh': b'rm'}).read_bytes()
    sets, files = offers
    row = replace(sets['bccd'].archives[0], size=len(evil), sha256=sha(evil))
    shelf.set(files={'/BCCD_Dataset-1.0.zip': evil})
    with pytest.raises(ArchiveError, match='leads out of the folder'):
        download_dataset('bccd', tmp_path/'a'/'b',
                         sets=dict(bccd=replace(sets['bccd'], archives=(row,))), say=len)
    assert (sorted(p.name for p in (tmp_path/'a'/'b').iterdir()) == ['downloads']
            and not list(tmp_path.rglob('evil.sh')))

def test_trust(shelf, offers, tmp_path):
    sets, files = offers
    wrong = dict(bccd=replace(sets['bccd'],
                              archives=(replace(sets['bccd'].archives[0], sha256='1'*64),)))
    shelf.set(files=files)
    with pytest.raises(DownloadError, match='1'*64):
        download_dataset('bccd', tmp_path, sets=wrong, say=len)
    download_dataset('bccd', tmp_path, sets=wrong, trust=True, say=len)
    assert (tmp_path/'BCCD').is_dir()

def test_the_command(shelf, offers, tmp_path, capsys, monkeypatch):
    sets, files = offers; shelf.set(files=files); monkeypatch.setattr(real_sets, 'SETS', sets)
    monkeypatch.setattr(download_dataset, '__defaults__',
                        tuple(sets if d is SETS else d for d in download_dataset.__defaults__))
    monkeypatch.setattr(plan_text, '__defaults__',
                        tuple(sets if d is SETS else d for d in plan_text.__defaults__))
    monkeypatch.setattr(real_sets.configs_of, '__defaults__', ('data', sets))
    assert main(['download']) == 0 == main(['download', '--list']); out = capsys.readouterr().out
    assert all(n in out for n in SETS)
    assert (main(['download', 'bccd', '--to', str(tmp_path/'d'), '--dry-run']) == 0
            and not (tmp_path/'d').exists() and shelf.log == [])
    assert 'to fetch, about' in capsys.readouterr().out
    assert (main(['download', 'bccd', '--to', str(tmp_path/'d'), '--keep']) == 0
            and (tmp_path/'d/downloads/BCCD_Dataset-1.0.zip').is_file())
    assert "ann_file='BCCD/ImageSets/Main/train.txt'" in capsys.readouterr().out
    assert main(['download', 'bcd']) == 2 and "did you mean 'bccd'" in capsys.readouterr().err
    shelf.set(files={}); assert main(['download', 'voc2012', '--to', str(tmp_path/'e')]) == 2
    err = capsys.readouterr().err
    assert (err.startswith('detlearn download: http://127.0.0.1') and 'status 404' in err
            and 'Traceback' not in err)

def test_the_table():
    assert set(SETS) == {'coco2017', 'coco2017_val', 'voc2007', 'voc2012', 'penn_fudan', 'bccd'}
    # an oracle: the same files, by name and folder
    from torchvision.datasets import voc
    ours = {a.name: a for a in ARCHIVES.values()}
    for key, archive in (('2012', 'VOCtrainval_11-May-2012.tar'),
                         ('2007', 'VOCtrainval_06-Nov-2007.tar'),
                         ('2007-test', 'VOCtest_06-Nov-2007.tar')):
        theirs = voc.DATASET_YEAR_DICT[key]
        assert (theirs['filename'] == archive
                and ours[archive].gives == Path(theirs['base_dir']).as_posix())
