"Methods of the zoo's mask structures, called by name."
from detlearn.core import masks as ours


def method(name):
    def call(masks, **args): return getattr(masks, name)(**args)
    return call


FUNCTIONS = {f'{cls}.{name}': method(name) for cls in ('BitmapMasks', 'PolygonMasks')
             for name in 'rescale resize flip pad crop crop_and_resize get_bboxes expand translate to_bitmap'.split()}


def argument(d): return getattr(ours, d['type'])(d['masks'], d['height'], d['width'])
