"Real files in every format agree; the linter finds what is known to be wrong, and every spoiled file gives a sentence."
import contextlib, csv, io, json, os, re, warnings
from pathlib import Path
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from pycocotools.coco import COCO
from detlearn.core.shapes import ToyShapes, to_coco
from detlearn.data.coco import AnnotationError, CocoDataset, decode_masks, use_coco, write_coco
from detlearn.data.lint import lint, repair, write_gallery
from detlearn.data.lint_rules import RULES
from detlearn.data.transforms import LoadImageFromFile
from detlearn.data.voc import VOCDataset, XMLDataset, read_voc, write_voc
from detlearn.data.yolo import YOLODataset, read_labels, to_annotation, write_yolo

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT.parent/'shared'/'data'
here = pytest.mark.skipif(not PHOTOS.is_dir(), reason=f'SKIPPED LOUDLY: the real data sets are not here '
                                                      f'({PHOTOS}); nothing is said about them')

# ---- the same boxes in many formats
def by_photo(rows):
    "{stem: sorted [(name, x1, y1, x2, y2)]}"
    out = {}
    for stem,name,*box in rows: out.setdefault(stem, []).append((name, *[float(v) for v in box]))
    return {k: sorted(v) for k,v in out.items()}

def of_dataset(data):
    return by_photo((Path(data.data_infos[i]['filename']).stem, data.CLASSES[l], *b)
                    for i in range(len(data)) for k in ('', '_ignore')
                    for info in [data.get_ann_info(i)]
                    for b,l in zip(info[f'bboxes{k}'], info[f'labels{k}']))

def of_voc_folder(folder):
    return by_photo((f.stem, o['name'], *o['box']) for f in sorted(Path(folder).glob('*.xml'))
                    for o in read_voc(f)['objects'])

def of_yolo_folder(folder, sizes):
    names = (folder/'obj.names').read_text().split('\n')[:-1]
    def rows():
        for f in (folder/'obj_train_data').glob('*.txt'):
            for o in read_labels(f, len(names)):
                a = to_annotation(o, *sizes[f.stem]); x,y,w,h = a['bbox']
                yield f.stem,names[a['category_id']-1],x,y,x+w,y+h
    return by_photo(rows())

def of_cvat(path):
    import defusedxml.ElementTree as ET
    return by_photo((Path(im.get('name')).stem, b.get('label'),
                     *[b.get(k) for k in ('xtl', 'ytl', 'xbr', 'ybr')])
                     for im in ET.parse(path).getroot().iter('image') for b in im.iter('box'))

def of_openimages(path, sizes):
    num = lambda r, k: float(r[k].replace(',', '.'))
    def rows():
        for r in csv.DictReader(open(path)):
            w,h = sizes[Path(r['ImageID']).stem]
            yield Path(r['ImageID']).stem,r['LabelName'],num(r, 'XMin')*w,num(r, 'YMin')*h,num(
                r, 'XMax')*w,num(r, 'YMax')*h
    return by_photo(rows())

def fields(b):
    "The fields of a protobuf message: number, bytes or whole number."
    i = 0
    def varint():
        nonlocal i
        value = shift = 0
        while True:
            byte = b[i]; i += 1; value |= (byte & 127) << shift; shift += 7
            if byte < 128: return value
    while i < len(b):
        key = varint(); kind = key & 7
        n = varint() if kind == 2 else {1: 8, 5: 4}.get(kind, 0)
        yield key >> 3, varint() if kind == 0 else b[i:i+n]
        i += n

def of_tfrecord(path, sizes):
    raw,at = path.read_bytes(),0
    floats = lambda v: np.frombuffer(dict(fields(v))[1], '<f4') if v else []
    def rows():
        nonlocal at
        # length, its checksum, an Example, its checksum
        while at < len(raw):
            n = int.from_bytes(raw[at:at+8], 'little'); record = raw[at+12:at+12+n]; at += 16+n
            facts = {e[1].decode(): dict(fields(e[2])) for _,v in fields(dict(fields(record))[1])
                     for e in [dict(fields(v))]}
            texts = [t.decode() for _,t in fields(facts['image/object/class/text'].get(1, b''))]
            stem = Path(dict(fields(facts['image/filename'][1]))[1].decode()).stem; w,h = sizes[stem]
            x1,y1,x2,y2 = [floats(facts[f'image/object/bbox/{k}'].get(2))
                           for k in ('xmin', 'ymin', 'xmax', 'ymax')]
            for k,name in enumerate(texts): yield stem,name,x1[k]*w,y1[k]*h,x2[k]*w,y2[k]*h
    return by_photo(rows())

FORMATS = PHOTOS/'annotation_formats'/'gts'

@pytest.fixture(scope='module')
def reference(): return of_voc_folder(FORMATS/'pascalvoc_format')

@pytest.fixture(scope='module')
def sizes():
    return {f.stem: (v['width'], v['height']) for f in (FORMATS/'pascalvoc_format').glob('*.xml')
            for v in [read_voc(f)]}

def of_coco(path): return of_dataset(CocoDataset(path, [], test_mode=True))

READERS = {'coco_format_v1': lambda f, s: of_coco(f/'instances_default.json'),
           'coco_format_v2': lambda f, s: of_coco(f/'instances_v2.json'),
           'imagenet_format': lambda f, s: of_voc_folder(f/'Annotations'), 'yolo_format': of_yolo_folder,
           'cvat_format': lambda f, s: of_cvat(f/'annotations.xml'),
           'openimages_format': lambda f, s: of_openimages(f/'all_bounding_boxes.csv', s),
           'tfrecord_format': lambda f, s: of_tfrecord(f/'default.tfrecord', s)}

@here
@pytest.mark.parametrize('name', READERS)
def test_formats_agree_box_by_box(name, reference, sizes):
    "Seven formats against the eighth, VOC's xml: all of them."
    assert {*READERS, 'pascalvoc_format'} == {p.name for p in FORMATS.iterdir()}
    found = READERS[name](FORMATS/name, sizes)
    assert found.keys() == reference.keys() and len(found) == 100
    assert sum(map(len, found.values())) == sum(map(len, reference.values())) == 273
    for stem,rows in reference.items():
        for a,b in zip(rows, found[stem]):
            assert a[0] == b[0], (stem, a, b)
            np.testing.assert_allclose(a[1:], b[1:], atol=.01, err_msg=f'{name} {stem}')

@here
def test_reader_and_origin(reference, tmp_path):
    (tmp_path/'Annotations').symlink_to(FORMATS/'pascalvoc_format')
    for origin in (0, 1):
        found = of_dataset(VOCDataset(None, [], img_prefix=str(tmp_path), origin=origin, test_mode=True))
        for stem,rows in reference.items():
            for a,b in zip(rows, found[stem]):
                np.testing.assert_allclose(np.array(a[1:]) - origin, b[1:])

# ---- counts of the READMEs
SETS = {'bccd/train.json': (205, 2804), 'bccd/val.json': (87, 1137), 'bccd/test.json': (72, 945),
        'bccd/trainval.json': (292, 3941),
        'fruits_nuts/train.json': (14, 130), 'fruits_nuts/val.json': (4, 35),
        'fruits_nuts/trainval_original.json': (18, 165),
        'nuclei_dsb2018/train.json': (96, 3365), 'nuclei_dsb2018/val.json': (32, 679),
        'trees_neon/train.json': (1, 279), 'trees_neon/val.json': (2, 98),
        'trees_neon/polygons_sample.json': (1, 4),
        'coco_eval_reference/padilla_sampled_gts_bbox_area.json': (100, 830)}

@here
@pytest.mark.parametrize('name', SETS)
def test_counts_and_pycocotools(name):
    "Counts as written down; pycocotools and our reader agree on boxes, areas, crowds and masks."
    data = CocoDataset(PHOTOS/name, [], test_mode=True)
    with contextlib.redirect_stdout(io.StringIO()): theirs = COCO(str(PHOTOS/name))
    assert (len(data), len(data.rows)) == SETS[name]
    ids = [im['id'] for im in data.data_infos]
    by_image = {i: theirs.imgToAnns[i] for i in ids}
    for k,(lo,hi) in enumerate(zip(data.ends, data.ends[1:])):
        rows,anns = data.rows[lo:hi],by_image[ids[k]]
        assert (rows['box'].tolist() == [a['bbox'] for a in anns]
                and rows['area'].tolist() == [a['area'] for a in anns])
        assert rows['crowd'].tolist() == [bool(a.get('iscrowd')) for a in anns]
        assert [data.cat_ids[l] for l in rows['label']] == [a['category_id'] for a in anns]
        if anns and anns[0].get('segmentation'):
            im = data.data_infos[k]
            ours = decode_masks(data.segmentations[lo:hi], im['height'], im['width'])
            assert all((m == theirs.annToMask(a)).all() for m,a in zip(ours, anns))

@here
def test_bccd_xml_agrees_with_its_json():
    voc = of_voc_folder(PHOTOS/'bccd'/'annotations_voc')
    assert len(voc) == 364 and sum(map(len, voc.values())) == 4888
    found = {k: v for s in ('train', 'val', 'test')
             for k,v in of_dataset(CocoDataset(PHOTOS/f'bccd/{s}.json', [], test_mode=True)).items()}
    for stem,rows in found.items(): assert rows == [r for r in voc[stem] if r[1:3] != r[3:5]]
    from collections import Counter
    assert Counter(r[0] for rows in voc.values() for r in rows) == dict(RBC=4155, WBC=372, Platelets=361)

@here
def test_trees_xml():
    found = read_voc(PHOTOS/'trees_neon/annotations_original/OSBS_029.xml')
    assert len(found['objects']) == 61
    assert (
        (len(
        read_voc(PHOTOS/'trees_neon/annotations_original/2019_YELL_2_541000_4977000_image_crop.xml')[
        'objects']) == 279))

# ---- the linter on real files
@pytest.fixture(scope='module')
def bccd(): return lint(PHOTOS/'bccd/annotations_voc', PHOTOS/'bccd/images')

def named(report, rule):
    return sorted(re.search(r'(\d{5})', f.image)[1] for f in report.findings if f.rule == rule)

@here
def test_linter_finds_the_errors_that_are_known(bccd):
    assert named(bccd, 'empty-box') == ['00338', '00343']
    assert named(bccd, 'duplicate-object') == ['00020', '00100', '00104', '00251', '00284', '00331',
                                               '00403']
    pair = next(f for f in bccd.findings if f.rule == 'duplicate-object')
    other = re.search(r'covers (\S+?):(\d+):', pair.message)
    # named by file and line
    assert (other and other[1] == pair.place.file
            and '<object>' in Path(other[1]).read_text().splitlines()[int(other[2])-1])
    large = ['00008', '00009', '00035', '00042', '00139', '00140', '00143', '00241', '00294', '00325',
             '00336', '00339', '00362', '00405', '00409']
    wrong_class = ['00113', '00133', '00135']
    assert set(large + wrong_class) <= set(named(bccd, 'absurd-size'))
    serious = [f for f in bccd.findings if f.rule == 'absurd-size' and f.severity == 'warning']
    assert set(wrong_class) <= {re.search(r'(\d{5})', f.image)[1] for f in serious} and len(serious) <= 5
    # and nothing that is not there
    assert {f.rule for f in bccd.findings} == {'empty-box', 'duplicate-object', 'absurd-size'}
    zero = next(f for f in bccd.findings if '00338' in f.image and f.rule == 'empty-box')
    assert '<object>' in Path(zero.place.file).read_text().splitlines()[zero.place.line-1]

@here
@pytest.mark.parametrize('notes', [False, True])
def test_linter_is_silent_on_the_repaired_copy(bccd, tmp_path, notes):
    before = (PHOTOS/'bccd/annotations_voc/BloodImage_00338.xml').read_bytes()
    after = repair(bccd.sources[0], tmp_path/'good.json', notes=notes)
    assert (after.count['error'] == after.count['warning'] == 0 and (not notes or len(after) == 0)), str(
        after)
    assert (PHOTOS/'bccd/annotations_voc/BloodImage_00338.xml').read_bytes() == before
    assert len(json.loads((tmp_path/'good.json').read_text())['annotations']) >= 4888 - 2 - 7*notes

@here
def test_linter_on_the_other_sets():
    rules = lambda p, photos=None: {f.rule for f in lint(PHOTOS/p, photos and PHOTOS/photos).findings
                                    if f.severity != 'note'}
    # run lengths with iscrowd 0 are fine
    assert rules('nuclei_dsb2018/train.json') == set() == rules('nuclei_dsb2018/val.json')
    assert rules('fruits_nuts/train.json') == rules('fruits_nuts/val.json') == set()
    original = lint(PHOTOS/'fruits_nuts/trainval_original.json')
    assert 'image-ids' in {f.rule for f in original.findings} and original.ok
    assert rules('trees_neon/annotations_original/OSBS_029.xml', 'trees_neon/images') == {'name-differs'}
    assert rules('annotation_formats/gts/pascalvoc_format') == set()

def test_size_is_taken_from_the_photo(toys, tmp_path):
    root,file = toys; coco = json.loads(file.read_text()); del coco['images'][2]['width']
    (tmp_path/'bad.json').write_text(json.dumps(coco))
    report = lint(tmp_path/'bad.json', root/'images')
    after = repair(report.sources[0], tmp_path/'good.json')
    assert after.ok and json.loads((tmp_path/'good.json').read_text())['images'][2]['width'] == 160

# ---- there and back
@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    root = tmp_path_factory.mktemp('toys')
    file = to_coco(ToyShapes(12, (160, 120), min_objects=2, seed=1), root); return root,file

def test_round_trips(toys, tmp_path):
    root,file = toys; data = CocoDataset(file, [], img_prefix=str(root/'images'))
    whole = of_dataset(data)
    for folder,write,read in (('v', write_voc,
                               lambda p: XMLDataset(p, [], img_prefix=str(tmp_path/'v'))),
                               ('y', write_yolo, lambda p: YOLODataset(p, []))):
        path = write(data, tmp_path/folder)
        place = tmp_path/folder/('JPEGImages' if folder == 'v' else 'images/train')
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(root/'images'); again = read(path); back = of_dataset(again)
        assert back.keys() == whole.keys()
        for k in whole:
            assert [r[0] for r in back[k]] == [r[0] for r in whole[k]]
            np.testing.assert_allclose([r[1:] for r in back[k]], [r[1:] for r in whole[k]], atol=1e-4)
        texts = {p: p.read_bytes() for p in (tmp_path/folder).rglob('*') if p.is_file()
                 and p.suffix in ('.xml', '.txt', '.yaml')}
        write(again, tmp_path/folder); assert texts == {p: p.read_bytes() for p in texts}

@here
@pytest.mark.parametrize('name', SETS)
def test_coco_there_and_back(name, tmp_path):
    "Read and written again, a real file is the same: images, categories, and annotations with every key, only gathered by image."
    raw = json.loads((PHOTOS/name).read_text()); data = CocoDataset(PHOTOS/name, [], test_mode=True)
    path = write_coco(data, tmp_path/'a.json'); back = json.loads(path.read_text())
    at = {im['id']: i for i,im in enumerate(raw['images'])}
    assert (back['images'] == raw['images'] and sorted(map(str, back['categories']))
            == sorted(map(str, raw['categories'])))
    full = lambda a: {**a, 'iscrowd': a.get('iscrowd', 0), 'segmentation': a.get('segmentation') or None}
    assert list(map(full, back['annotations'])) == [
        full(a) for a in sorted(raw['annotations'], key=lambda a: at[a['image_id']])]
    assert write_coco(CocoDataset(path, [], test_mode=True),
                      tmp_path/'b.json').read_bytes() == path.read_bytes()

@here
@pytest.mark.parametrize('name', ['fruits_nuts/train.json', 'fruits_nuts/val.json'])
def test_outlines_survive_yolo(name, tmp_path):
    "Real polygons as shares of the photo and back: every point within a thousandth of a pixel, every class."
    data = CocoDataset(PHOTOS/name, [], img_prefix=str(PHOTOS/'fruits_nuts'/'images'))
    write_yolo(data, tmp_path)
    (tmp_path/'images').mkdir(); (tmp_path/'images'/'train').symlink_to(PHOTOS/'fruits_nuts'/'images')
    (tmp_path/'list.txt').write_text('\n'.join(f"images/train/{im['file_name']}"
                                               for im in data.data_infos))
    (tmp_path/'data.yaml').write_text(
        (tmp_path/'data.yaml').read_text().replace('images/train', 'list.txt'))
    again = YOLODataset(tmp_path/'data.yaml', [])
    assert len(again.segmentations) == len(data.segmentations) and again.CLASSES == data.CLASSES
    for a,b,r,q in zip(data.segmentations, again.segmentations, data.rows, again.rows):
        np.testing.assert_allclose(a[0], b[0], atol=1e-3)
        assert (r['image'], r['label']) == (q['image'], q['label'])

def test_evaluation_takes_voc(toys, tmp_path):
    from detlearn.evaluation.coco_eval import evaluate
    root,file = toys; write_voc(CocoDataset(file, []), tmp_path)
    (tmp_path/'JPEGImages').symlink_to(root/'images')
    voc = XMLDataset(None, [], img_prefix=str(tmp_path)); coco = voc.coco
    perfect = [dict(image_id=a['image_id'], category_id=a['category_id'], bbox=a['bbox'], score=.9)
               for a in coco['annotations']]
    assert evaluate(coco, perfect, voc.CLASSES)['AP'] > .999

# ---- spoiled files: each mutation gives its rule and its place
def ann(i, **kw): return lambda c: c['annotations'][i].update(kw)
def img(i, **kw): return lambda c: c['images'][i].update(kw)
def cat(i, **kw): return lambda c: c['categories'][i].update(kw)
def drop(kind, i, key): return lambda c: c[kind][i].pop(key)
def put(kind, i, v): return lambda c: c[kind].__setitem__(i, v)
def corners(c):
    for a in c['annotations']: x,y,w,h = a['bbox']; a['bbox'] = [x, y, x+w, y+h]; a.pop('segmentation')
def normalised(c):
    for a in c['annotations']:
        x,y,w,h = a['bbox']; a['bbox'] = [x/160, y/120, w/160, h/120]; a.pop('segmentation')
def twice(shift):
    return lambda c: c['annotations'].append(dict(c['annotations'][5], id=900,
                                                  bbox=[c['annotations'][5]['bbox'][0]+shift,
                                                        *c['annotations'][5]['bbox'][1:]]))
def clear(c): c['annotations'].clear()
def nobox(i, box):
    return lambda c: (c['annotations'][i].pop('segmentation'), c['annotations'][i].update(bbox=box))

COCO_CASES = {  # name: (mutation of the lists, rule, pointer)
    'box-zero-width': (nobox(2, [5, 5, 0, 9]), 'empty-box', '/annotations/2/bbox'),
    'box-zero-height': (nobox(2, [5, 5, 9, 0]), 'empty-box', '/annotations/2/bbox'),
    'box-negative': (nobox(2, [50, 50, -9, -9]), 'empty-box', '/annotations/2/bbox'),
    'box-one-pixel': (nobox(2, [5, 5, 1, 1]), 'tiny-box', '/annotations/2/bbox'),
    'box-half-pixel': (nobox(2, [5, 5, 20, .5]), 'tiny-box', '/annotations/2/bbox'),
    'box-right-of-image': (nobox(2, [161, 5, 9, 9]), 'outside-image', '/annotations/2/bbox'),
    'box-below-image': (nobox(2, [5, 500, 9, 9]), 'outside-image', '/annotations/2/bbox'),
    'box-left-of-image': (nobox(2, [-30, 5, 9, 9]), 'outside-image', '/annotations/2/bbox'),
    'box-above-image': (nobox(2, [5, -30, 9, 9]), 'outside-image', '/annotations/2/bbox'),
    'box-sticks-out-right': (nobox(2, [140, 5, 40, 40]), 'sticks-out', '/annotations/2/bbox'),
    'box-sticks-out-left': (nobox(2, [-10, 5, 40, 40]), 'sticks-out', '/annotations/2/bbox'),
    'box-nan': (ann(2, bbox=[5, float('nan'), 9, 9]), 'not-finite', '/annotations/2/bbox'),
    'box-infinite': (ann(2, bbox=[5, 5, float('inf'), 9]), 'not-finite', '/annotations/2/bbox'),
    'box-three-numbers': (ann(2, bbox=[1, 2, 3]), 'bad-value', '/annotations/2/bbox'),
    'box-text': (ann(2, bbox='1 2 3 4'), 'bad-value', '/annotations/2/bbox'),
    'box-of-texts': (ann(2, bbox=['1', '2', '3', '4']), 'bad-value', '/annotations/2/bbox'),
    'box-null': (ann(2, bbox=None), 'bad-value', '/annotations/2/bbox'),
    'box-dict': (ann(2, bbox=dict(x=1)), 'bad-value', '/annotations/2/bbox'),
    'box-missing': (drop('annotations', 2, 'bbox'), 'missing-key', '/annotations/2'),
    'one-box-normalised': (nobox(2, [.5, .5, .2, .2]), 'box-format', '/annotations/2/bbox'),
    'all-boxes-corners': (corners, 'box-format', None),
    'all-boxes-normalised': (normalised, 'box-format', '/annotations/0/bbox'),
    'image-id-unknown': (ann(2, image_id=99), 'unknown-id', '/annotations/2/image_id'),
    'image-id-missing': (drop('annotations', 2, 'image_id'), 'missing-key', '/annotations/2/image_id'),
    'image-id-list': (ann(2, image_id=[1]), 'bad-value', '/annotations/2/image_id'),
    'image-id-float': (ann(2, image_id=1.5), 'bad-value', '/annotations/2/image_id'),
    'category-id-unknown': (ann(2, category_id=9), 'unknown-id', '/annotations/2/category_id'),
    'category-id-zero': (ann(2, category_id=0), 'unknown-id', '/annotations/2/category_id'),
    'category-id-missing': (drop('annotations', 2, 'category_id'), 'missing-key',
                            '/annotations/2/category_id'),
                            'category-id-name': (ann(2, category_id='circle'), 'unknown-id',
                                                 '/annotations/2/category_id'),
    'annotation-id-twice': (ann(2, id=1), 'duplicate-id', '/annotations/2/id'),
    'annotation-id-null': (ann(2, id=None), 'bad-value', '/annotations/2/id'),
    'annotation-is-a-list': (put('annotations', 2, [1]), 'bad-value', '/annotations/2'),
    'annotation-is-null': (put('annotations', 2, None), 'bad-value', '/annotations/2'),
    'object-twice': (twice(0), 'duplicate-object', None),
    'object-nearly-twice': (twice(.5), 'duplicate-object', None),
    'object-huge': (lambda c: (nobox(2, [0, 0, 160, 120])(c),
                               [a.update(category_id=1) for a in c['annotations']]), 'absurd-size',
                               '/annotations/2/bbox'),
    'mask-of-two-points': (ann(2, segmentation=[[1, 2, 3, 4]]), 'bad-mask',
                           '/annotations/2/segmentation'),
                           'mask-odd': (ann(2, segmentation=[[1, 2, 3, 4, 5, 6, 7]]), 'bad-mask',
                                        '/annotations/2/segmentation'),
    'mask-text': (ann(2, segmentation='x'), 'bad-mask', '/annotations/2/segmentation'),
    'mask-nan': (ann(2, segmentation=[[1, 2, 3, 4, 5, float('nan')]]), 'bad-mask',
                 '/annotations/2/segmentation'),
    'mask-other-size': (ann(2, segmentation=dict(size=[5, 5], counts=[25])), 'bad-mask',
                        '/annotations/2/segmentation'),
                        'mask-wrong-sum': (ann(2, segmentation=dict(size=[120, 160], counts=[3])),
                                           'bad-mask', '/annotations/2/segmentation'),
    'mask-elsewhere': (nobox(2, [100, 100, 12, 12]), None, None),
    'image-id-twice': (img(2, id=1), 'duplicate-id', '/images/2/id'),
    'image-without-id': (drop('images', 2, 'id'), 'missing-key', '/images/2/id'),
    'image-id-0': (lambda c: (img(0, id=0)(c), [a.update(image_id=0) for a in c['annotations']
                                                if a['image_id'] == 1]), 'image-ids', '/images/0/id'),
    'image-name-missing': (drop('images', 2, 'file_name'), 'missing-key', '/images/2/file_name'),
    'image-name-number': (img(2, file_name=7), 'bad-value', '/images/2/file_name'),
    'image-name-empty': (img(2, file_name=' '), 'leaves-root', '/images/2/file_name'),
    'image-name-up': (img(2, file_name='../../etc/passwd'), 'leaves-root', '/images/2/file_name'),
    'image-name-absolute': (img(2, file_name='/etc/passwd'), 'leaves-root', '/images/2/file_name'),
    'image-name-drive': (img(2, file_name='C:\\x.png'), 'leaves-root', '/images/2/file_name'),
    'image-name-backslash': (img(2, file_name='a\\..\\..\\x.png'), 'leaves-root', '/images/2/file_name'),
    'image-name-twice': (img(2, file_name='train_00001.png'), 'duplicate-image', '/images/2/file_name'),
    'image-missing': (img(2, file_name='gone.png'), 'missing-file', '/images/2/file_name'),
    'image-name-long': (img(2, file_name='x'*5000), 'missing-file', '/images/2/file_name'),
    'image-width-missing': (drop('images', 2, 'width'), 'missing-key', '/images/2/width'),
    'image-width-text': (img(2, width='160'), 'bad-value', '/images/2/width'),
    'image-height-zero': (img(2, height=0), 'bad-value', '/images/2/height'),
    'image-height-nan': (img(2, height=float('nan')), 'not-finite', '/images/2/height'),
    'image-size-wrong': (img(2, width=320, height=240), 'wrong-size', '/images/2/file_name'),
    'image-size-swapped': (img(2, width=120, height=160), 'wrong-size', '/images/2/file_name'),
    'image-size-bomb': (img(2, width=2**30, height=2**30), 'image-bomb', '/images/2/file_name'),
    'class-twice': (cat(1, id=1), 'duplicate-id', '/categories/1/id'),
    'class-by-case': (cat(1, name='Circle'), 'category-names', '/categories/1/name'),
    'class-by-blank': (cat(1, name='circle '), 'category-names', '/categories/1/name'),
    'class-trailing-blank': (cat(1, name=' square'), 'category-names', '/categories/1/name'),
    'class-without-name': (drop('categories', 1, 'name'), 'missing-key', '/categories/1/name'),
    'class-name-null': (cat(1, name=None), 'bad-value', '/categories/1/name'),
    'class-unused': (lambda c: c['categories'].append(dict(id=4, name='hat')), 'no-objects',
                     '/categories/3/name'),
    'class-ids-with-gap': (lambda c: (c['categories'].append(dict(id=9, name='hat'))), 'category-ids',
                           '/categories/0/id'), 'no-objects': (clear, 'no-objects', None),
    'objects-missing': (lambda c: c.pop('annotations'), 'missing-key', None),
    'images-missing': (lambda c: c.pop('images'), 'missing-key', None),
    'classes-missing': (lambda c: c.pop('categories'), 'missing-key', None),
    'images-a-dict': (lambda c: c.update(images={}), 'missing-key', None)}
COCO_CASES.pop('mask-elsewhere')

@pytest.mark.parametrize('name', COCO_CASES)
def test_spoiled_coco(name, toys, tmp_path):
    change,rule,pointer = COCO_CASES[name]; root,file = toys
    coco = json.loads(file.read_text()); change(coco); path = tmp_path/'bad.json'
    path.write_text(json.dumps(coco, indent=1))
    report = lint(path, root/'images'); hits = [f for f in report.findings if f.rule == rule]
    assert hits, str(report)
    if pointer:
        assert pointer in {f.place.pointer for f in hits}
        place = next(f.place for f in hits if f.place.pointer == pointer)
        line = path.read_text().splitlines()[place.line-1]
        if pointer.count('/') == 3 and f'"{pointer.split("/")[-1]}"' in path.read_text().split(
            '"annotations"')[0] + line:
            assert line.strip().startswith(f'"{pointer.split("/")[-1]}"') or 'missing' in hits[0].message
    else: assert hits[0].place.line >= 1
    # and the repaired copy is silent
    if rule not in ('no-objects', 'missing-key', 'image-bomb') or 'missing' not in name:
        after = repair(report.sources[0], tmp_path/'good.json')
        assert (rule in ('category-ids', 'no-objects', 'missing-key', 'image-bomb', 'image-ids')
                or rule not in {f.rule for f in after.findings if f.severity != 'note'}), str(after)
    # the reader: a sentence or nothing
    try: use_coco(json.loads(path.read_text()), path)
    except AnnotationError: pass

def text_case(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))

@pytest.mark.parametrize('name, change',
                         {'empty': lambda b: b'', 'blank': lambda b: b' \n',
                          'cut-half': lambda b: b[:len(b)//2], 'cut-last': lambda b: b[:-1],
                          'comma': lambda b: b.replace(b'], ', b'],, ', 1),
    'xml': lambda b: b'<annotation/>', 'binary': lambda b: b'\x89PNG\xff\xfe' + b,
    'deep': lambda b: b'['*100000, 'list': lambda b: b'[]', 'number': lambda b: b'7',
    'huge-number': lambda b: b'9'*5000, 'null': lambda b: b'null'}.items())
def test_unparseable_coco(name, change, toys, tmp_path):
    path = tmp_path/'bad.json'; path.write_bytes(change(toys[1].read_bytes()))
    report = lint(path)
    assert ([f.rule for f in report.findings][:1] == ['not-parseable'] and not report.ok
            and report.findings[0].place.file == str(path))
    with pytest.raises(AnnotationError): CocoDataset(path, [])

# ---- photos
def photo_cases():
    def exif(p): note = Image.Exif(); note[0x112] = 6; Image.new('RGB', (160, 120)).save(p, exif=note)
    return {'empty': (lambda p: p.write_bytes(b''), 'unreadable-image'),
            'html': (lambda p: p.write_text('<html>'), 'unreadable-image'),
            'cut': (lambda p: p.write_bytes(p.read_bytes()[:600]), 'unreadable-image'),
            'other-size': (lambda p: Image.new('RGB', (99, 99)).save(p), 'wrong-size'),
            'exif': (exif, 'exif-rotation'),
            'bomb': (lambda p: Image.new('1', (20000, 10000)).save(p), 'image-bomb'),
            'copy': (lambda p: p.write_bytes((p.parent/'train_00001.png').read_bytes()),
                     'duplicate-image'), 'gone': (lambda p: p.unlink(), 'missing-file'),
                     'folder': (lambda p: (p.unlink(), p.mkdir()), 'missing-file')}

@pytest.mark.parametrize('name', photo_cases())
def test_spoiled_photo(name, tmp_path):
    change,rule = photo_cases()[name]; file = to_coco(ToyShapes(3, (160, 120), seed=1), tmp_path)
    change(tmp_path/'images'/'train_00000.png')
    hits = [f for f in lint(file).findings if f.rule == rule]
    assert (hits and {'train_00000.png', 'train_00001.png'} & {f.image for f in hits}
            and hits[0].place.pointer.startswith('/images/'))

# ---- photos that their EXIF note turns
def turned_set(root, turn, boxes, said='stored', photos=1):
    "Photos of 160 x 120 with rectangles in colours of their own; annotations as a tool writes them that does not turn (polygons, run lengths)."
    from pycocotools import mask as codec
    (root/'images').mkdir(parents=True, exist_ok=True)
    coco = dict(images=[], annotations=[], categories=[dict(id=1, name='card')])
    for n in range(photos):
        pixels = np.zeros((120, 160, 3), np.uint8); note = Image.Exif(); note[0x112] = turn
        for k,(x,y,w,h) in enumerate(boxes):
            pixels[y:y+h, x:x+w] = 60 + 40*k; mask = np.zeros((120, 160), np.uint8, 'F')
            mask[y:y+h, x:x+w] = 1; runs = codec.encode(mask)
            seg = ([[x, y, x+w, y, x+w, y+h, x, y+h]] if k % 2
                   else dict(size=[120, 160], counts=runs['counts'].decode()))
            coco['annotations'].append(dict(id=len(coco['annotations'])+1, image_id=n+1, category_id=1,
                                            bbox=[x, y, w, h], area=w*h, iscrowd=0, segmentation=seg))
        Image.fromarray(pixels).save(root/'images'/f'{n}.png', exif=note)
        Image.fromarray(pixels[:, :, ::-1] + np.uint8(n)).save(root/'images'/f'{n}.png', exif=note)
        size = (160, 120) if said == 'stored' or turn < 5 else (120, 160)
        coco['images'].append(dict(id=n+1, file_name=f'{n}.png', width=size[0], height=size[1]))
    (root/'a.json').write_text(json.dumps(coco)); return root/'a.json'

WIDE = [[125, 10, 30, 20], [120, 60, 20, 40], [142, 80, 15, 30]]
BOTH = [[10, 10, 30, 20], [40, 60, 20, 40]]

@pytest.mark.parametrize('turn', [5, 6, 7, 8])
def test_turned_boxes_are_repaired(turn, tmp_path):
    "The oracle is Pillow: each rectangle is looked for in the photo as it turns it."
    from PIL import ImageOps
    report = lint(turned_set(tmp_path, turn, WIDE + BOTH))
    f, = [f for f in report.findings if f.rule == 'exif-rotation']
    assert (f.severity == 'error' and '3 of its 5 boxes fit only 160 x 120' in f.message
            and f.place.pointer == '/images/0/file_name')
    after = repair(report.sources[0], tmp_path/'good.json')
    assert after.ok and {f.severity for f in after.findings} == {'note'}, str(after)
    # the old file is as it was
    assert json.loads((tmp_path/'a.json').read_text())['images'][0]['width'] == 160
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        data = CocoDataset(tmp_path/'good.json', [LoadImageFromFile()],
                           img_prefix=str(tmp_path/'images'))
    image, info = data[0]['img'], data.get_ann_info(0)
    seen = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path/'images'/'0.png')))
    assert tuple(image.shape[1:]) == seen.shape[:2] == (160, 120)
    masks = decode_masks(info['masks'], 160, 120)
    for k,(box,mask) in enumerate(zip(info['bboxes'].astype(int), masks)):
        rows,cols = np.nonzero(seen[..., 0] == 60 + 40*k)
        assert box.tolist() == [cols.min(), rows.min(), cols.max()+1, rows.max()+1]
        assert ((mask == (seen[..., 0] == 60 + 40*k)).all() and (image[0].numpy() == 60 + 40*k).sum()
                == mask.sum())

TALL = [10, 125, 20, 30]
@pytest.mark.parametrize('boxes, said, turn',
                         [(BOTH, 'stored', 6), ([WIDE[0], TALL], 'stored', 6),
                          ([TALL, *BOTH], 'stored', 5), ([WIDE[0], *BOTH], 'seen', 6), (BOTH, 'seen', 8),
                          (WIDE, 'stored', 3), (WIDE, 'stored', 2)])
def test_what_is_not_clear_is_left_alone(boxes, said, turn, tmp_path):
    "It says so; the repaired copy has the same boxes, also those that leave the photo as it is said to be, since that may be the wrong one."
    file = turned_set(tmp_path, turn, BOTH, said); coco = json.loads(file.read_text())
    coco['annotations'] = [dict(id=k+1, image_id=1, category_id=1, bbox=b, area=1, iscrowd=0)
                           for k,b in enumerate(boxes)]
    file.write_text(json.dumps(coco))
    report = lint(file); f, = [f for f in report.findings if f.rule == 'exif-rotation']
    assert f.fix is None and ('not clear' in f.message or 'tools disagree' in f.message)
    assert f.severity == ('error' if said == 'stored' and turn > 4 else 'note')
    for notes in (False, True):
        repair(report.sources[0], tmp_path/f'{notes}.json', notes)
        good = json.loads((tmp_path/f'{notes}.json').read_text())
        assert [a['bbox'] for a in good['annotations']] == boxes and good['images'] == coco['images']

def test_other_photos_of_the_file_are_witnesses(tmp_path):
    "A photo without a witness of its own goes with the others; sizes alone are repaired where boxes were drawn after turning."
    file = turned_set(tmp_path, 6, WIDE, photos=2); coco = json.loads(file.read_text())
    coco['annotations'] = [a for a in coco['annotations'] if a['image_id'] == 1] + [
        dict(id=99, image_id=2, category_id=1, bbox=BOTH[0], area=1, iscrowd=0)]
    file.write_text(json.dumps(coco))
    found = [f for f in lint(file).findings if f.rule == 'exif-rotation']
    assert len(found) == 2 and 'other turned photos' in found[1].message
    repair(lint(file).sources[0], tmp_path/'good.json')
    good = json.loads((tmp_path/'good.json').read_text())
    assert good['annotations'][-1]['bbox'] == [90, 10, 20, 30]
    for a in coco['annotations']: a.update(bbox=[10, 130, 30, 25]); a.pop('segmentation', None)
    coco['annotations'][1]['bbox'] = [60, 125, 30, 30]; coco['annotations'][2]['bbox'] = [60, 10, 30, 30]
    coco['annotations'].append(dict(coco['annotations'][0], id=100, bbox=[10, 125, 30, 20]))
    file.write_text(json.dumps(coco)); (tmp_path/'good.json').unlink()
    after = repair(lint(file).sources[0], tmp_path/'good.json')
    good = json.loads((tmp_path/'good.json').read_text())
    assert (after.ok and {(im['width'], im['height']) for im in good['images']} == {(120, 160)}
            and good['annotations'][0]['bbox'] == [10, 130, 30, 25])

def test_gallery_shows_both_ways(tmp_path):
    import base64
    report = lint(turned_set(tmp_path, 6, BOTH))
    page = write_gallery(report, tmp_path/'g.html').read_text()
    shown = Image.open(
        io.BytesIO(base64.b64decode(re.search('exif-rotation.*?base64,([^"]+)', page, re.S)[1])))
    assert shown.size == (180, 135 + 180 + 6) or shown.size == (180, 120 + 160 + 6), shown.size

def test_leakage_and_gallery(tmp_path):
    for s in ('train', 'val'): to_coco(ToyShapes(2, 64, sizes=(12, 20), seed=1), tmp_path, s)
    report = lint(tmp_path)
    assert [f.rule for f in report.findings if f.severity == 'error'] == ['leakage']*2

# ---- VOC and YOLO
XML = '''<annotation><filename>a.png</filename><size><width>160</width><height>120</height></size>
<object><name>cat</name><bndbox><xmin>11</xmin><ymin>12</ymin><xmax>41</xmax><ymax>52</ymax></bndbox></object>
<object><name>dog</name><bndbox><xmin>61</xmin><ymin>12</ymin><xmax>91</xmax><ymax>52</ymax></bndbox></object>
</annotation>'''
BOMB = '<!DOCTYPE a [<!ENTITY b "x">' + ''.join(f'<!ENTITY {chr(99+i)} "{f"&{chr(98+i)};"*10}">'
                                                for i in range(8)) + ']><annotation>&j;</annotation>'
VOC_CASES = {'cut': (lambda t: t[:120], 'not-parseable', 2), 'empty': (lambda t: '', 'not-parseable', 0),
             'text': (lambda t: 'hello', 'not-parseable', 1),
             'bomb': (lambda t: BOMB, 'not-parseable', 0),
    'external': (lambda t: '<!DOCTYPE a [<!ENTITY b SYSTEM '
                           '"file:///etc/passwd">]><annotation>&b;</annotation>', 'not-parseable', 0),
                           'no-size': (lambda t: re.sub('<size>.*</size>', '', t), 'missing-key', 1),
    'no-name': (lambda t: t.replace('<name>dog</name>', ''), 'missing-key', 3),
    'empty-name': (lambda t: t.replace('dog', ''), 'bad-value', 3),
    'no-box': (lambda t: re.sub('<bndbox><xmin>61.*</bndbox>', '', t), 'missing-key', 3),
    'no-xmax': (lambda t: t.replace('<xmax>91</xmax>', ''), 'missing-key', 3),
    'word': (lambda t: t.replace('>91<', '>ninety<'), 'bad-value', 3),
    'nan': (lambda t: t.replace('>91<', '>nan<'), 'not-finite', 3),
    'infinite': (lambda t: t.replace('>91<', '>inf<'), 'not-finite', 3),
    'swapped': (lambda t: t.replace('>91<', '>51<'), 'empty-box', 3),
    'zero': (lambda t: t.replace('>91<', '>61<'), 'empty-box', 3),
    'outside': (lambda t: t.replace('>61<', '>261<').replace('>91<', '>291<'), 'outside-image', 3),
    'sticks-out': (lambda t: t.replace('>91<', '>291<'), 'sticks-out', 3),
    'case': (lambda t: t.replace('dog', 'Cat'), 'category-names', 0),
    'other-photo': (lambda t: t.replace('a.png', 'b.tif'), 'name-differs', 1),
    'wrong-size': (lambda t: t.replace('>160<', '>640<'), 'wrong-size', 1),
    'top': (lambda t: t.replace('annotation>', 'annotations>'), 'not-parseable', 1),
    'width-word': (lambda t: t.replace('>160<', '>wide<'), 'bad-value', 1)}

@pytest.mark.parametrize('name', VOC_CASES)
def test_spoiled_voc(name, tmp_path):
    change,rule,line = VOC_CASES[name]
    for d in ('Annotations', 'JPEGImages'): (tmp_path/d).mkdir()
    Image.effect_noise((160, 120), 50).convert('RGB').save(tmp_path/'JPEGImages'/'a.png')
    path = tmp_path/'Annotations'/'a.xml'
    path.write_text(XML); assert not len(lint(tmp_path)), str(lint(tmp_path))
    path.write_text(change(XML)); hits = [f for f in lint(tmp_path).findings if f.rule == rule]
    assert hits and (line == 0 or line in {f.place.line for f in hits}), str(lint(tmp_path))
    try: XMLDataset(None, [], img_prefix=str(tmp_path), test_mode=True)
    except AnnotationError as e: assert 'a.xml' in str(e)

GOOD = '0 .5 .5 .25 .25\n1 .2 .3 .2 .3\n'
YOLO_CASES = {'class-high': ('7 .5 .5 .2 .2', 'unknown-id'),
              'class-word': ('cat .5 .5 .2 .2', 'bad-value'),
              'class-negative': ('-1 .5 .5 .2 .2', 'bad-value'), 'three': ('0 .5 .5 .2', 'bad-value'),
              'five': ('0 .5 .5 .2 .2 .9', 'bad-value'),
    'word': ('0 .5 .5 x .2', 'bad-value'), 'pixels': ('0 80 60 20 20', 'box-format'),
    'nan': ('0 .5 nan .2 .2', 'not-finite'), 'infinite': ('0 .5 inf .2 .2', 'not-finite'),
    'zero': ('0 .5 .5 0 .2', 'empty-box'),
    'outside': ('0 1.5 .5 .2 .2', 'outside-image'), 'sticks-out': ('0 .95 .5 .3 .3', 'sticks-out'),
    'twice': ('0 .5 .5 .25 .25', 'duplicate-object'), 'click': ('0 .5 .5 .001 .001', 'tiny-box')}

@pytest.mark.parametrize('name', YOLO_CASES)
def test_spoiled_yolo(name, tmp_path):
    line,rule = YOLO_CASES[name]
    for d in ('images/train', 'labels/train'): (tmp_path/d).mkdir(parents=True)
    Image.effect_noise((160, 120), 50).convert('RGB').save(tmp_path/'images/train/a.png')
    (tmp_path/'data.yaml').write_text('names: [cat, dog]\ntrain: images/train\n')
    path = tmp_path/'labels/train/a.txt'; path.write_text(GOOD)
    assert not len(lint(tmp_path)), str(lint(tmp_path))
    path.write_text(GOOD + line + '\n'); hits = [f for f in lint(tmp_path).findings if f.rule == rule]
    assert hits and hits[0].place.file == str(path) and hits[0].place.line == 3, str(lint(tmp_path))
    try: YOLODataset(tmp_path/'data.yaml', [], test_mode=True)
    except AnnotationError as e: assert 'a.txt:3' in str(e)

# ---- numbers read another way, data sets as they are, lists of VOC
def as_voc(root, toys, change=lambda x1, y1, x2, y2: (x1, y1, x2, y2), origin=1):
    where,file = toys; write_voc(CocoDataset(file, []), root, origin=origin)
    (root/'JPEGImages').symlink_to(where/'images')
    for p in (root/'Annotations').glob('*.xml'):
        new = lambda m: ''.join(f'<{t}>{v}</{t}>' for t,v in zip(('xmin', 'ymin', 'xmax', 'ymax'),
                                                                 change(*map(float, m.groups()))))
        p.write_text(re.sub('<xmin>(.*?)</xmin><ymin>(.*?)</ymin><xmax>(.*?)</xmax><ymax>(.*?)</ymax>',
                            new, p.read_text()))
    return root

def as_yolo(root, toys, change):
    where,file = toys; coco = json.loads(file.read_text())
    [a.pop('segmentation') for a in coco['annotations']]
    write_yolo(coco, root); (root/'images').mkdir(); (root/'images/train').symlink_to(where/'images')
    for p in (root/'labels/train').glob('*.txt'):
        rows = [l.split() for l in p.read_text().splitlines()]
        p.write_text(''.join(' '.join([c, *map(str, change(*map(float, v)))]) + '\n' for c,*v in rows))
    return root

READ_ANOTHER_WAY = {'voc-sides': lambda r, t: as_voc(r, t,
                                                     lambda x1, y1, x2, y2: (x1, y1, x2-x1, y2-y1)),
    'voc-shares': lambda r, t: as_voc(r, t, lambda x1, y1, x2, y2: (x1/160, y1/120, x2/160, y2/120), 0),
    'yolo-corners': lambda r, t: as_yolo(r, t, lambda cx, cy, w, h: (cx-w/2, cy-h/2, cx+w/2, cy+h/2)),
    'yolo-top-left': lambda r, t: as_yolo(r, t, lambda cx, cy, w, h: (cx-w/2, cy-h/2, w, h))}

@pytest.mark.parametrize('name', READ_ANOTHER_WAY)
def test_numbers_of_another_format(name, toys, tmp_path):
    "Found with its evidence and its line, and repaired to the boxes that were meant."
    report = lint(READ_ANOTHER_WAY[name](tmp_path/'set', toys))
    hits = [f for f in report.findings if f.rule == 'box-format']
    assert (hits and hits[0].place.line >= 1 and hits[0].place.file.endswith(('.xml', '.txt'))
            and report.findings[0].rule == 'box-format'), str(report)
    after = repair(report.sources[0], tmp_path/'good.json'); assert after.ok, str(after)
    good,meant = json.loads((tmp_path/'good.json').read_text()),json.loads(toys[1].read_text())
    np.testing.assert_allclose([a['bbox'] for a in good['annotations']],
                               [a['bbox'] for a in meant['annotations']], atol=.02)

def test_lint_of_data_sets(toys, tmp_path):
    "Every reader, with its own settings; wrappers; what is no data set gets a sentence."
    from detlearn.data.custom_dataset import CustomDataset
    from detlearn.data.wrappers import ConcatDataset, RepeatDataset
    root,file = toys; coco = CocoDataset(file, [], img_prefix=str(root/'images'))
    as_voc(tmp_path/'v', toys, origin=0)
    voc = XMLDataset(None, [], img_prefix=str(tmp_path/'v'), origin=0)
    (tmp_path/'two.txt').write_text('train_00001\ntrain_00003\n')
    two = XMLDataset(tmp_path/'two.txt', [], img_prefix=str(tmp_path/'v'), origin=0)
    yolo = YOLODataset(as_yolo(tmp_path/'y', toys, lambda *v: v)/'data.yaml', [])
    for data,n in ((coco, 12), (voc, 12), (two, 2), (yolo, 12), (RepeatDataset(coco, 3), 12)):
        report = lint(data)
        assert not len(report) and len(report.sources[0].coco['images']) == n, str(report)
    assert lint(voc).sources[0].coco['annotations'][0]['bbox'] == coco.coco['annotations'][0]['bbox']
    assert [s.format for s in lint(ConcatDataset([coco, voc])).sources] == ['coco', 'voc']
    (tmp_path/'mid.json').write_text(
        json.dumps([dict(filename='train_00000.png', width=160, height=120,
                         ann=dict(bboxes=[[1, 2, 300, 40]], labels=[0]))]))
    custom = lint(CustomDataset(tmp_path/'mid.json', [], classes=('a',), img_prefix=str(root/'images')))
    assert {f.rule for f in custom.findings} == {'sticks-out'}
    for wrong in (3, None, [coco]):
        with pytest.raises(TypeError, match='no path and no data set'): lint(wrong)

def test_leakage_over_the_lists_of_voc(toys, tmp_path):
    root = as_voc(tmp_path, toys); lists = root/'ImageSets/Main'; assert lint(root).ok
    (lists/'val.txt').write_text('\ntrain_00003\n')
    hit, = [f for f in lint(root).findings if f.rule == 'leakage']
    assert (hit.place.file, hit.place.line, hit.image,
            hit.severity) == (str(lists/'val.txt'), 2, 'train_00003.png', 'error')
    names = (lists/'train.txt').read_text().splitlines()
    (lists/'train.txt').write_text('\n'.join(names[:6]))
    (lists/'val.txt').write_text('\n'.join(names[6:])); assert lint(root).ok
    photos = tmp_path/'own'; photos.mkdir()
    [(photos/p.name).write_bytes(p.read_bytes()) for p in (root/'JPEGImages').iterdir()]
    (root/'JPEGImages').unlink(); photos.rename(root/'JPEGImages')
    # the same content, in train and in val
    (root/'JPEGImages'/'train_00008.png').write_bytes((root/'JPEGImages'/'train_00002.png').read_bytes())
    assert [f.image for f in lint(root).findings if f.rule == 'leakage'] == ['train_00008.png']

def test_letters_that_can_not_be_written(toys, tmp_path):
    "Half a letter in a name: report, page and repaired copy are written all the same."
    root,file = toys; coco = json.loads(file.read_text()); coco['images'][2]['file_name'] = 'a\ud800.png'
    (tmp_path/'bad.json').write_text(json.dumps(coco))
    report = lint(tmp_path/'bad.json', root/'images'); str(report).encode()
    write_gallery(report, tmp_path/'g.html'); assert repair(report.sources[0], tmp_path/'good.json').ok

@pytest.mark.parametrize('seed', range(6))
def test_fuzz_repairs(seed, toys, tmp_path):
    "Entries of a good file replaced at random, photos turned: report, page and repaired copy never fail, and the copy is silent and can be read."
    import random
    rng,(root,file) = random.Random(seed),toys; base = json.loads(file.read_text())
    (tmp_path/'images').mkdir(); note = Image.Exif(); note[0x112] = 6
    for p in (root/'images').iterdir():
        (Image.open(p).save(tmp_path/'images'/p.name, exif=note) if p.name.endswith('3.png')
         else (tmp_path/'images'/p.name).symlink_to(p))
    odd = [None, True, -1, 0, 1, .5, 2**63, 10**400, 1e308, float('nan'), float('inf'), '', '../x',
           'circle', '\0', '\ud800', 'x'*5000, [], {}, [[1]], [1, 2, 3, 4], [1e308]*4, ['1']*4,
           dict(size=[120, 160], counts='999'), dict(size='x', counts=3)]
    def places(x, at=()):
        yield at
        for k,v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
            yield from places(v, at + (k,))
    for turn in range(12):
        coco = json.loads(json.dumps(base))
        for _ in range(rng.randint(1, 5)):
            at = rng.choice([p for p in places(coco) if p]); x = coco
            for k in at[:-1]: x = x[k]
            if rng.random() < .2 and isinstance(x, dict): del x[at[-1]]
            else: x[at[-1]] = rng.choice(odd)
        (tmp_path/'bad.json').write_text(json.dumps(coco))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore'); report = lint(tmp_path/'bad.json', tmp_path/'images')
            json.dumps(report.as_dict(), allow_nan=False); write_gallery(report, tmp_path/'g.html', 2)
            after = repair(report.sources[0], tmp_path/f'good{turn}.json')
            assert not [f for f in after.findings if f.fix and f.severity != 'note'], str(after)
            if after.ok: only_own(CocoDataset, tmp_path/f'good{turn}.json', [], test_mode=True)

def test_the_corpus_is_large_enough():
    assert len(COCO_CASES) + len(VOC_CASES) + len(YOLO_CASES) + len(photo_cases()) + 12 >= 100
    named = ({r for _,r,_ in [*COCO_CASES.values(), *VOC_CASES.values()]}
             | {r for _,r in [*YOLO_CASES.values(), *photo_cases().values()]}
             | {'leakage', 'unlabelled-images', 'not-parseable'})
    assert set(RULES) <= named, set(RULES) - named

# ---- fuzz: never another exception than the project's own
fuzz = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck),
                derandomize=True)
leaf = st.one_of(st.none(), st.booleans(), st.integers(-5, 200), st.integers(), st.floats(),
                 st.text(max_size=5), st.sampled_from(['a.png', 'cat', '../x', 1e308, -1, 10**400]))
value = st.recursive(leaf,
                     lambda v: st.lists(v, max_size=4) | st.dictionaries(
    st.sampled_from(['id', 'bbox', 'size', 'counts', 'x']), v, max_size=3), max_leaves=6)
entry = lambda **keys: st.fixed_dictionaries({}, optional={k: st.one_of(st.just(v), value)
                                                           for k,v in keys.items()}) | value
lists = st.fixed_dictionaries({},
                              optional=dict(
    images=st.lists(entry(id=1, file_name='a.png', width=64, height=64), max_size=3) | value,
    categories=st.lists(entry(id=1, name='cat'), max_size=3) | value,
    annotations=st.lists(entry(id=1, image_id=1, category_id=1, bbox=[1, 2, 30, 30], area=9, iscrowd=0,
                               ignore=0, segmentation=[[1, 1, 9, 1, 9, 9]]), max_size=4) | value))

def only_own(f, *args, **kw):
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        try: return f(*args, **kw)
        except AnnotationError as e: assert str(e)

@fuzz
@given(lists | value)
def test_fuzz_coco(tmp_path_factory, coco):
    path = tmp_path_factory.getbasetemp()/'fuzz.json'; path.write_text(json.dumps(coco))
    only_own(CocoDataset, path, [])
    data = only_own(CocoDataset, path, [], test_mode=True)
    if data is not None: [data.get_ann_info(i) for i in range(len(data))]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        report = lint(path); json.dumps(report.as_dict(), allow_nan=False); str(report)

@fuzz
@given(st.binary(max_size=60)
       | st.lists(st.sampled_from([*re.findall(r'<[^>]*>|[^<]+', XML), '&x;', '<!DOCTYPE a [', ']>',
                                   '<![CDATA[', '\x00', 'nan', '-1', '1e999', '<object', '\xff']),
                                   max_size=40).map(lambda p: ''.join(p).encode()),
       st.integers(0, 400), st.integers(0, 30))
def test_fuzz_voc(tmp_path_factory, junk, at, cut):
    root = tmp_path_factory.getbasetemp()/'fuzz_voc'
    (root/'Annotations').mkdir(parents=True, exist_ok=True); data = XML.encode()
    for text in (junk, data[:at] + junk[:20] + data[at+cut:]):
        (root/'Annotations'/'a.xml').write_bytes(text)
        try: only_own(XMLDataset, None, [], img_prefix=str(root), test_mode=True)
        # no size: the photo is asked
        except FileNotFoundError as e: assert 'there is no such file' in str(e)
        str(lint(root))

@fuzz
@given(st.binary(max_size=40)
       | st.lists(st.sampled_from(['0', '1', '.5', '-1', 'nan', 'inf', '1e999', 'x', ' ', '\n', '\t',
                                   '9'*400, '\x00', '٣', '²']), max_size=30).map(
    lambda p: ' '.join(p).encode()), st.text(max_size=20))
def test_fuzz_yolo(tmp_path_factory, labels, names):
    root = tmp_path_factory.getbasetemp()/'fuzz_yolo'
    for d in ('images/train', 'labels/train'): (root/d).mkdir(parents=True, exist_ok=True)
    if not (root/'images/train/a.png').exists():
        Image.new('RGB', (64, 64)).save(root/'images/train/a.png')
    (root/'labels/train/a.txt').write_bytes(labels)
    (root/'data.yaml').write_text('names: [cat, dog]\ntrain: images/train\n')
    only_own(YOLODataset, root/'data.yaml', [], test_mode=True); str(lint(root))
    (root/'data.yaml').write_text(f'names: {names}\ntrain: images/train\n', encoding='utf-8',
                                  errors='replace')
    only_own(YOLODataset, root/'data.yaml', [], test_mode=True); str(lint(root/'data.yaml'))

# ---- memory of the workers
def shared_size(pids):
    "MiB that these processes hold together, shared pages counted once."
    pss = lambda p: next(int(l.split()[1]) for l in open(f'/proc/{p}/smaps_rollup')
                         if l.startswith('Pss:'))
    return sum(map(pss, pids))/1024

def many_objects(n, per, pipeline=()):
    "A data set of `n` photos with `per` objects each, from memory."
    coco = dict(images=[dict(id=i, file_name=f'{i}.jpg', width=640, height=480) for i in range(n)],
                categories=[dict(id=k+1, name=str(k)) for k in range(80)],
                annotations=[dict(image_id=i, category_id=(i+j) % 80+1, bbox=[j, j, 50, 60],
                                  segmentation=[[j, j, j+50, j, j+50, j+60]]) for i in range(n)
                                  for j in range(per)])
    class InMemory(CocoDataset):
        def load_annotations(self, ann_file): return coco
    data = InMemory('memory', pipeline); coco.clear()
    return data

def python_objects(root):
    "How many Python objects hang on this one, each counted once; classes and functions not followed."
    import gc, types
    seen, left = {}, [root]
    while left:
        x = left.pop()
        if id(x) in seen or isinstance(x, (type, types.ModuleType, types.FunctionType)): continue
        seen[id(x)] = x; left += gc.get_referents(x)
    return len(seen)

@pytest.mark.filterwarnings('ignore')
def test_no_python_object_for_an_object_of_a_photo():
    "A worker that reads a Python object counts its reference, which copies its page; arrays are only read."
    few, many = [python_objects(vars(many_objects(200, per))) for per in (2, 40)]
    assert abs(many - few) < 200, (few, many)  # not even one more a photo

@pytest.mark.skipif(not Path('/proc/self/smaps_rollup').exists(), reason='needs /proc/PID/smaps_rollup')
@pytest.mark.filterwarnings('ignore')
def test_memory_of_four_workers_does_not_grow():
    "How pages are counted is the machine's business, so the bound is broad; the test above is exact."
    from torch.utils.data import DataLoader
    n,per = 5000,20
    data = many_objects(n, per, lambda r: len(list(r['ann_info']['masks'])))
    loader = iter(DataLoader(data, 50, num_workers=4, collate_fn=sum, multiprocessing_context='fork'))
    pids = [w.pid for w in loader._workers] + [os.getpid()]
    seen = next(loader); before = shared_size(pids)
    # the last batches stay, so that the workers live
    for k in range(85): seen += next(loader)
    after = shared_size(pids); print(f'{before:.0f} -> {after:.0f} MiB'); del loader
    assert seen == 86*50*per and after < 1.5*before
