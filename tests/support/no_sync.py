"""An error for what would wait for a GPU, on fake CUDA tensors."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class SyncError(AssertionError):
    """An operation would wait for the GPU."""


class NoSync(TorchDispatchMode):
    """Refuses copies from the GPU, and copies to it from memory that is not pinned.

    Fake tensors themselves refuse shapes and numbers that depend on data.
    """

    def __init__(self):
        super().__init__()
        self.pinned = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            self.pinned.add(out.untyped_storage()._cdata)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source, target = (args[0], out) if func is torch.ops.aten._to_copy.default else (args[1], args[0])
            if source.device.type != target.device.type:
                host = source if source.device.type == "cpu" else target
                waits = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
                if not (waits and host.untyped_storage()._cdata in self.pinned):
                    raise SyncError(f"{func}: {source.device} to {target.device}, {tuple(source.shape)}")
        return out
