"""add_layer_norm and bias_gelu against their references: one comparison for every implementation and dtype."""

import torch
from support.kernels import BF16, F32, Guarded, poisoned_allocations, quantized

from mimdet.kernels import add_layer_norm, bias_gelu
from mimdet.testing import assert_within_budget

# dtypes of residual, x and y
DTYPES = {
    "fp32": (F32, F32, F32),
    "bf16": (BF16, BF16, BF16),
    "amp": (F32, BF16, BF16),
    "amp_fp32_out": (F32, BF16, F32),
    "fp32_bf16_out": (F32, F32, BF16),
}


def add_layer_norm_inputs(shape, dtypes, has_x=True, scale=True, mean=0.5, std=1.0, seed=0):
    """residual, x, scale, weight, bias, and the gradients of both outputs."""
    residual_dtype, x_dtype, y_dtype = dtypes
    batch, channels = shape[0], shape[-1]
    inputs = {
        "residual": quantized(*shape, dtype=residual_dtype, seed=seed, mean=mean, std=std),
        "x": quantized(*shape, dtype=x_dtype, seed=seed + 1) if has_x else None,
        "scale": (torch.arange(batch) % 3).float() * 1.25 if has_x and scale else None,
        "weight": quantized(channels, seed=seed + 2, mean=1.0, std=0.3),
        "bias": quantized(channels, seed=seed + 3),
    }
    gradients = [
        quantized(*shape, dtype=residual_dtype, seed=seed + 4),
        quantized(*shape, dtype=y_dtype, seed=seed + 5, mean=0.3),
    ]
    return inputs, gradients


def differentiate(function, inputs, gradients):
    """Outputs of ``function(**inputs)`` and gradients of its float inputs, by name. scale has none."""
    leaves = {k: v if v is None or k == "scale" else v.detach().requires_grad_() for k, v in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
    torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
    tensors = {f"output{i}": o.detach() for i, o in enumerate(outputs)}
    return tensors | {f"grad_{k}": v.grad for k, v in leaves.items() if v is not None and v.grad is not None}


def compare(function, inputs, gradients, impl, device="cpu"):
    """Outputs and gradients of ``impl`` within the error budget; inputs unharmed. Returns the worst error / budget."""

    def double(t):
        return None if t is None else t.double()

    inputs = {k: v if v is None else v.to(device) for k, v in inputs.items()}
    gradients = [g if g is None else g.to(device) for g in gradients]
    exact = differentiate(
        lambda **kw: function(**kw, impl="eager", exact=True),
        {k: double(v) for k, v in inputs.items()},
        [double(g) for g in gradients],
    )
    same = differentiate(lambda **kw: function(**kw, impl="eager"), inputs, gradients)
    guards = {k: _guarded(v) for k, v in inputs.items()}
    guarded_gradients = [_guarded(g) for g in gradients]
    with poisoned_allocations():
        actual = differentiate(
            lambda **kw: function(**kw, impl=impl),
            {k: getattr(g, "tensor", g) for k, g in guards.items()},
            [getattr(g, "tensor", g) for g in guarded_gradients],
        )
    for guard in [*guards.values(), *guarded_gradients]:
        if isinstance(guard, Guarded):
            guard.check()
    assert actual.keys() == exact.keys()
    rows = next(iter(inputs.values())).shape[:-1].numel()
    worst = 0.0
    for name, expected in exact.items():
        reduction = rows if name in ("grad_weight", "grad_bias") else 1
        worst = max(worst, assert_within_budget(actual[name], same[name], expected.cpu(), reduction, name))
    return worst


def _guarded(tensor):
    """``Guarded``, except expanded tensors, into which nothing can be copied."""
    return tensor if tensor is None or 0 in tensor.stride() else Guarded(tensor)


def check_add_layer_norm(impl, shape, dtypes, device="cpu", eps=1e-6, used=(True, True), **options):
    """Compare over inputs of ``add_layer_norm_inputs``; ``used`` says which outputs get a gradient."""
    inputs, gradients = add_layer_norm_inputs(shape, dtypes, **options)
    gradients = [g if u else None for g, u in zip(gradients, used, strict=True)]

    def function(exact=False, impl=None, **kw):
        return add_layer_norm(**kw, eps=eps, dtype=torch.float64 if exact else dtypes[2], impl=impl)

    return compare(function, inputs, gradients, impl, device)


def check_bias_gelu(impl, shape, dtype, device="cpu"):
    """Compare on x of ``shape``; the bias is float32."""
    inputs = {"x": quantized(*shape, dtype=dtype, std=2.0), "bias": quantized(shape[-1], seed=1)}
    gradients = [quantized(*shape, dtype=dtype, seed=2, mean=0.3)]
    return compare(lambda x, bias, impl, exact=False: bias_gelu(x, bias, impl=impl), inputs, gradients, impl, device)
