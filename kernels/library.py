"""Registration of operations under ``torch.ops.mimdet``, once."""

from __future__ import annotations

from collections.abc import Callable

import torch

_library = torch.library.Library("mimdet", "FRAGMENT")


def define(name: str, schema: str, run: Callable, fake: Callable) -> Callable:
    """Register ``mimdet::<name>`` and return its overload.

    Args:
        name: of the operation.
        schema: "(Tensor x, ...) -> Tensor"; functional, outputs never alias inputs.
        run: the implementation on CPU and GPU tensors.
        fake: shapes, dtypes and strides of the outputs, for meta and fake tensors.
    """
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"mimdet::{name}", fake, lib=_library)
    return getattr(torch.ops.mimdet, name).default


def autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Attach the gradient formula of ``mimdet::<name>``."""
    torch.library.register_autograd(f"mimdet::{name}", backward, setup_context=setup_context, lib=_library)
