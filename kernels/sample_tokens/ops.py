"""``mimdet::sample_tokens``. Its results are integers: there is no gradient."""

from __future__ import annotations

import torch

from .. import build, library, registry

NAME = "sample_tokens"

registry.register(NAME, triton=registry.can_run_triton, cuda=registry.can_run_cuda, cpp=registry.can_run_cpp)


def _run(noise, valid, count, impl):
    batch, length = noise.shape
    noise, valid = noise.contiguous(), valid.contiguous()
    keep, drop, restore = (
        torch.empty((batch, n), dtype=torch.int64, device=noise.device) for n in (count, length - count, length)
    )
    if restore.numel() == 0:
        return keep, drop, restore
    if impl == "triton":
        from .triton import launch_sample_tokens

        launch_sample_tokens(noise, valid, keep, drop, restore)
    elif impl == "cuda":
        build.call_cuda(NAME, noise, valid, keep, drop, restore, batch, length, count)
    else:
        build.call_cpp(NAME, noise, valid, keep, drop, restore)
    return keep, drop, restore


def _fake(noise, valid, count, impl):
    batch, length = noise.shape
    return tuple(noise.new_empty((batch, n), dtype=torch.int64) for n in (count, length - count, length))


run = library.define(
    NAME,
    "(Tensor noise, Tensor valid, SymInt count, str impl) -> (Tensor keep, Tensor drop, Tensor restore)",
    _run,
    _fake,
)
