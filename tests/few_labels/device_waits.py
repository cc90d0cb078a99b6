"""What would wait for a GPU in a piece of code, found on the CPU.

Tensors that are made of a CPU generator, of Python numbers (`torch.tensor`), or of such tensors alone would lie on the
CPU; constants anywhere; all others, and all that is made of one of those, on the GPU. A wait is a question to the GPU (a number for Python,
a shape that depends on values), or a tensor of the CPU that meets one of the GPU without having been sent by `upload`.
What this cannot see: a tensor of the CPU that was there before the block and is not given as `on_cpu`."""

import sys
import weakref
from collections import Counter
from functools import partialmethod

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kd_aif.foundation import batches

QUESTIONS = {
    *(
        '_local_scalar_dense',
        'nonzero',
        'equal',
        'masked_select',
        '_unique2',
        'unique_dim',
        'unique_consecutive',
    ),
    *('bincount', 'repeat_interleave', 'is_nonzero'),
}


FETCHING = 'cpu', 'tolist', 'numpy'  # methods that bring values to the CPU, unseen by the dispatcher


def _fetch(tensor, waits, name):
    return getattr(torch._C.TensorBase, name)(waits.fetched(tensor, name))


def storage_key(tensor):
    return tensor.untyped_storage()._cdata


class DeviceWaits(TorchDispatchMode):
    "Counts the waits inside the block, by kind: `.found`"

    def __init__(self, on_cpu=()):
        super().__init__()
        self.found, self._cpu, self._free, self._kept = Counter(), set(), set(), list(on_cpu)
        for t in self._kept:
            self._cpu.add(storage_key(t))

    def __enter__(self):
        original = batches.upload

        def upload(tensor, device):
            return self._sent(tensor)

        self._replaced = []
        for module in [m for name, m in sys.modules.items() if name.startswith('kd_aif.') and m is not None]:
            if vars(module).get('upload') is original:
                self._replaced.append(module)
                module.upload = upload
        self._original = original
        for name in FETCHING:
            setattr(torch.Tensor, name, partialmethod(_fetch, self, name))
        return super().__enter__()

    def __exit__(self, *error):
        for name in FETCHING:
            delattr(torch.Tensor, name)
        for module in self._replaced:
            module.upload = self._original
        return super().__exit__(*error)

    def _sent(self, tensor):
        copy = tensor.clone()
        self._place(copy, None)
        return copy

    def fetched(self, tensor, name):
        "A copy that lies on the CPU"
        if storage_key(tensor) in self._cpu | self._free:
            return tensor
        self.found[name] += 1
        copy = tensor.clone()
        self._place(copy, self._cpu)
        return copy

    def _place(self, tensor, place):
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        for keys in (self._cpu, self._free):
            if keys is not place:
                keys.discard(key)
        if place is not None and key not in place:
            place.add(key)
            weakref.finalize(storage, place.discard, key)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, op.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        ours = [storage_key(t) in self._cpu for t in given]
        free = [storage_key(t) in self._free for t in given]
        if name == 'lift_fresh' or isinstance(kwargs.get('generator'), torch.Generator):
            place = self._cpu
        elif all(free):
            place = self._free
        else:
            place = self._cpu if all(a or b for a, b in zip(ours, free)) else None
        if place is None:
            self._note(name, args, given, ours)
        out = op(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._place(t, place)
        return out

    def _note(self, name, args, given, ours):
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name == 'index' else []
        if name in ('index_put', 'index_put_', '_index_put_impl_') and args[2].numel() > 1:
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
        if name in QUESTIONS or masks:
            self.found['mask' if masks else name] += 1
        late = {storage_key(t) for t, here in zip(given, ours) if here and t.ndim}
        self.found.update({f'CPU tensor in {name}': len(late)} if late else {})
        self._cpu -= late  # sent once
