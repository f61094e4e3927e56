"""attention_varlen against its reference: one comparison for every implementation, dtype and set of lengths."""

import contextlib

import torch
from support.kernels import Guarded, poisoned_allocations, quantized

from mimdet.kernels import attention_varlen_packed
from mimdet.testing import assert_within_budget

# Around tile sizes, with empty sequences in the middle and at both ends.
LENGTHS = (0, 1, 2, 31, 32, 0, 33, 127, 128, 129, 0)


def cumulated(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def differentiate(qkv, gradient, lengths, impl, max_seqlen=None, scale=None):
    """Output (T, heads, head_dim) and gradient (T, 3, heads, head_dim) of a packed qkv."""
    qkv = qkv.detach().requires_grad_()
    common = (cumulated(lengths).to(qkv.device), max(lengths) if max_seqlen is None else max_seqlen)
    out = attention_varlen_packed(qkv, *common, scale=scale, impl=impl)
    out.backward(gradient)
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), qkv.grad.unbind(1), strict=True))}


def one_by_one(qkv, gradient, lengths, scale):
    """``differentiate`` of each sequence by itself, in plain PyTorch."""
    rows = zip(qkv.split(lengths), gradient.split(lengths), lengths, strict=True)
    parts = [differentiate(x, g, (n,), "eager", scale=scale) for x, g, n in rows]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def check(
    impl, lengths, heads=2, head_dim=32, dtype=torch.float32, device="cpu", layout=None, poison=True, std=1.0,
    each=True, **kw,
):  # fmt: skip
    """Output and gradients of ``impl`` within the error budget; inputs unharmed. Returns the worst error / budget.

    Expected are those of each sequence alone. With ``each``, every sequence has its budget too: outputs of long
    sequences are small beside those of short ones.
    """
    total = sum(lengths)
    qkv = quantized(total, 3, heads, head_dim, dtype=dtype, std=std).to(device)
    gradient = quantized(total, heads, head_dim, dtype=dtype, seed=1, mean=0.3).to(device)
    scale = kw.get("scale")
    exact = one_by_one(qkv.double(), gradient.double(), lengths, scale)
    same = one_by_one(qkv, gradient, lengths, scale)
    if layout is not None:
        qkv, gradient = layout(qkv), layout(gradient)
    guards = [Guarded(qkv), Guarded(gradient)]
    with poisoned_allocations() if poison else contextlib.nullcontext():
        actual = differentiate(guards[0].tensor, guards[1].tensor, lengths, impl, **kw)
    for guard in guards:
        guard.check()
    worst = 0.0
    for name in exact:
        tensors = [of[name].cpu() for of in (actual, same, exact)]
        if name in ("dq", "dk") and max(lengths) <= 1:
            # Sequences of one token: these gradients are 0 but for rounding, so there is no budget.
            torch.testing.assert_close(tensors[0], tensors[1], rtol=0, atol=1e-6)
            continue
        worst = max(worst, assert_within_budget(*tensors, name=name))
        for i, rows in enumerate(zip(*(t.split(lengths) for t in tensors), strict=True)):
            if each and lengths[i] > 1:
                worst = max(worst, assert_within_budget(*rows, name=f"{name} of sequence {i}"))
    return worst
