"""Bytes of tensors that live at once, counted as they are made."""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from tudsr_core.vae import feature_maps, layer_pass, stream
from tudsr_core.vae.feature_maps import reserve


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made while it is on, as long as they live."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.sizes = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.count(tensor, tensor.untyped_storage().nbytes())
        return result

    def count(self, tensor, size):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key):
        self.live -= self.sizes.pop(key)


def device_peak(run, given, monkeypatch):
    """Return the most bytes alive at once on the device, which on a CPU is all but the feature maps and `given`."""
    live = LiveBytes()

    def uncounted(*args):
        with no_dispatch():
            memory = reserve(*args)
        live.count(memory, 0)
        return memory

    for module in (feature_maps, layer_pass, stream):
        monkeypatch.setattr(module, "reserve", uncounted)
    for tensor in given:
        live.count(tensor, 0)
    with live:
        run()
    return live.peak
