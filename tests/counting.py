"""What one call asks of an accelerator, counted exactly: ops, kernels (ops that are no view) and waits of the host.

    from counting import count
    count(lambda: sum(head.loss(preds, priors, gt).values()).backward())   # dict(ops=, kernels=, syncs=, where=)

A wait is an op whose value or size the host must know: `.item()`, `nonzero`, a boolean index, `unique`, NMS, or a copy between the host and
another device that is not `non_blocking`. The last kind shows only when the call runs on tensors of such a device, real or pretended.
"""
import collections
import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {'_local_scalar_dense', 'item', 'nonzero', 'masked_select', 'is_nonzero', 'equal',
         'unique_consecutive', '_unique', '_unique2',
         'unique_dim', 'bincount', 'repeat_interleave', 'nms'}
INDEXING = {'index', 'index_put', 'index_put_', '_index_put_impl_', '_unsafe_index'}
COPIES = {'_to_copy', 'copy_', 'copy'}
VIEWS = {'view', '_unsafe_view', '_reshape_alias', 'alias', 'as_strided', 'detach', 'diagonal', 'expand',
         'lift_fresh', 'permute', 'select',
         'slice', 'split', 'split_with_sizes', 'squeeze', 't', 'transpose', 'unbind', 'unfold',
         'unsqueeze', 'view_as_real'}


def waits(name, args, kwargs):
    "Why the host must wait for this op, or None."
    if name == 'repeat_interleave' and kwargs.get('output_size') is not None: return None
    if name in WAITS: return name
    if name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        return f'{name} by mask'
    if name not in COPIES: return None
    source = args[1] if name in ('copy_', 'copy') else args[0]
    target = args[0].device if name in ('copy_', 'copy') else kwargs.get('device') or source.device
    blocking = not (kwargs.get('non_blocking') or name != '_to_copy' and len(args) > 2 and args[2])
    return (f'copy {source.device.type} to {torch.device(target).type}' if blocking
            and torch.device(target).type != source.device.type else None)


class Counter(TorchDispatchMode):
    "Counts while it is entered."
    def __init__(self):
        super().__init__()
        self.ops, self.where = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split('::')[1]
        self.ops[name] += 1
        why = waits(name, args, kwargs or {})
        if why: self.where[why] += 1
        return func(*args, **(kwargs or {}))


def count(fn):
    "`dict(ops=, kernels=, syncs=, where=)` of one call of `fn`; `where` names the waits."
    with Counter() as c: fn()
    return dict(ops=c.ops.total(), kernels=sum(n for k, n in c.ops.items() if k not in VIEWS),
                syncs=c.where.total(), where=dict(c.where))
