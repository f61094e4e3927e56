"""``mimdet::sample_tokens``. Its results are integers: there is no gradient.

Without ``offsets`` every image keeps ``kept`` of its tokens and masks ``masked``: ids_keep (B, kept), ids_mask
(B, masked), tokens numbered within their image. With ``offsets`` (2, B + 1) int32, cumulative counts of the images'
kept and of their masked tokens, ``kept`` and ``masked`` are totals: ids_keep (kept,) and ids_mask (masked,) without
padding, tokens numbered through the batch.
"""

from __future__ import annotations

import torch

from .. import dispatch, library

NAME = "sample_tokens"

dispatch.register(NAME, dispatch.standard())


def _fake_forward(noise, valid_mask, offsets, kept, masked, impl):
    lead = noise.shape[:1] if offsets is None else ()
    shapes = (*lead, kept), (*lead, masked), noise.shape
    return tuple(noise.new_empty(shape, dtype=torch.int64) for shape in shapes)


def _forward(noise, valid_mask, offsets, kept, masked, impl):
    outputs = _fake_forward(noise, valid_mask, offsets, kept, masked, impl)
    if noise.numel():
        sizes = *noise.shape, kept, masked
        library.launch(f"{NAME}_fwd", impl, *library.dense(noise, valid_mask, offsets), *outputs, sizes=sizes)
    return outputs


run = library.define(
    NAME,
    "(Tensor noise, Tensor valid_mask, Tensor? offsets, SymInt kept, SymInt masked, str impl)"
    " -> (Tensor ids_keep, Tensor ids_mask, Tensor ids_restore)",
    _forward,
    _fake_forward,
)
