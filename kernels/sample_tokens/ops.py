"""``mimdet::sample_tokens``. Its results are integers: there is no gradient.

Without ``offsets`` every picture keeps ``kept`` of its tokens and drops ``dropped``: keep (B, kept), drop (B, dropped),
tokens numbered within their picture. With ``offsets`` (2, B + 1) int32, where each picture's kept and dropped tokens
begin and end, ``kept`` and ``dropped`` are the totals: keep (kept,) and drop (dropped,) without padding, tokens
numbered through the batch.
"""

from __future__ import annotations

import torch

from .. import build, library, registry

NAME = "sample_tokens"

registry.register(NAME, triton=registry.can_run_triton, cuda=registry.can_run_cuda, cpp=registry.can_run_cpp)


def _fake(noise, valid, offsets, kept, dropped, impl):
    lead = noise.shape[:1] if offsets is None else ()
    shapes = (*lead, kept), (*lead, dropped), noise.shape
    return tuple(torch.empty(shape, dtype=torch.int64, device=noise.device) for shape in shapes)


def _run(noise, valid, offsets, kept, dropped, impl):
    made = _fake(noise, valid, offsets, kept, dropped, impl)
    if noise.numel() == 0:
        return made
    noise, valid = noise.contiguous(), valid.contiguous()
    offsets = None if offsets is None else offsets.contiguous()
    if impl == "triton":
        from .triton import launch_sample_tokens

        launch_sample_tokens(noise, valid, offsets, *made)
    elif impl == "cuda":
        build.call_cuda(NAME, noise, valid, offsets, *made, *noise.shape, kept, dropped)
    else:
        build.call_cpp(NAME, noise, valid, offsets, *made)
    return made


run = library.define(
    NAME,
    "(Tensor noise, Tensor valid, Tensor? offsets, SymInt kept, SymInt dropped, str impl)"
    " -> (Tensor keep, Tensor drop, Tensor restore)",
    _run,
    _fake,
)
