"""Convolutions with less activation memory and, on a CPU, a faster gradient of the weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from ..kernels import use
from ..kernels.dispatch import requested
from .recompute import Recomputed

# CPU cache: weight_gradient multiplies patches of at most this many elements at once.
_BAND = 2**19
# Channels of 16 bits that one load of cuDNN's kernels for tensor cores takes: 16 bytes.
_VECTOR = 8


class RecomputeConv2d(nn.Conv2d):
    """``nn.Conv2d`` with a square kernel and no bias that saves the sources of a ``Recomputed`` input for backward.

    On a CPU, in float32 and channels_last memory, the weight's gradient is a sum of matrix products: 2-3 times as fast
    as oneDNN. There is no second-order gradient. On an NVIDIA GPU, in 16 bits and channels_last memory, images and
    weight get channels of zeros up to a multiple of 8, as cuDNN's kernels for tensor cores need.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)

    def forward(self, x: torch.Tensor | Recomputed) -> torch.Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H', W')."""
        value, function, sources = (x, _identity, (x,)) if isinstance(x, torch.Tensor) else x
        device, weight = value.device.type, self.weight
        dtype = value.dtype
        autocast = torch.is_autocast_enabled(device) and dtype != torch.float64
        if autocast:
            dtype = torch.get_autocast_dtype(device)
        if function is _identity and _needs_more_channels(value, dtype):
            value = _with_more_channels(value, dtype)
            weight = F.pad(weight.to(dtype), (0, 0, 0, 0, 0, -weight.shape[1] % _VECTOR))
            sources = (value,)
        value = value.to(dtype)
        if (
            torch.compiler.is_compiling()
            or not (torch.is_grad_enabled() and weight.requires_grad)
            or (function is _identity and not _use_matrix_products(value))
        ):
            return self._conv_forward(value, weight, None)
        if autocast:  # cast inside the graph, so that the parameter's gradient has the parameter's dtype
            weight = weight.to(dtype)
        sources = [source.detach() for source in sources]
        return _Convolution.apply(value, weight, self.stride[0], self.padding[0], function, *sources)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, stride, padding, function, *sources):
        ctx.shape, ctx.stride, ctx.padding, ctx.function = x.shape[2:], stride, padding, function
        ctx.kernels = requested()
        ctx.save_for_backward(weight, *sources)
        return F.conv2d(x, weight, stride=stride, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, *sources = ctx.saved_tensors
        kernel, stride, padding = weight.shape[-1], ctx.stride, ctx.padding
        grad_x = grad_weight = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[1]:
                with use(ctx.kernels):
                    x = ctx.function(*sources).to(grad.dtype)
                if _use_matrix_products(x):
                    grad_weight = weight_gradient(grad, x, kernel, stride, padding)
                else:
                    grad_weight = torch.nn.grad.conv2d_weight(x, weight.shape, grad, stride, padding)
                del x
            if ctx.needs_input_grad[0]:
                # conv_transpose2d needs no temporary tensor of the input's size, unlike convolution_backward.
                output_padding = [
                    size - (of_grad - 1) * stride + 2 * padding - kernel
                    for size, of_grad in zip(ctx.shape, grad.shape[2:], strict=True)
                ]
                grad_x = F.conv_transpose2d(grad, weight, None, stride, padding, output_padding)
        return grad_x, grad_weight, None, None, None, *(None for _ in sources)


def weight_gradient(grad: torch.Tensor, x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """Gradient of a convolution's square weight as matrix products, a band of rows at a time.

    Args:
        grad: (B, out_channels, H', W') gradient of the output.
        x: (B, in_channels, H, W) input.
        kernel: side of the weight.
        stride: of the convolution.
        padding: of the convolution, on every side.

    Returns:
        (out_channels, in_channels, kernel, kernel) in channels_last memory.
    """
    x, grad = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
    height, channels = x.shape[1], x.shape[3]
    result = x.new_zeros(grad.shape[-1], kernel * kernel * channels)
    band = max(1, _BAND // (grad.shape[2] * result.shape[1]))
    for sample, of_sample in zip(x, grad, strict=True):
        for first in range(0, grad.shape[1], band):
            rows = of_sample[first : first + band]
            top = first * stride - padding
            bottom = top + (len(rows) - 1) * stride + kernel
            inputs = sample[max(top, 0) : bottom]
            inputs = F.pad(inputs, (0, 0, padding, padding, max(-top, 0), max(bottom - height, 0)))
            patches = inputs.unfold(0, kernel, stride).unfold(1, kernel, stride).movedim(2, -1)
            columns = patches[:, : rows.shape[1]].reshape(-1, result.shape[1])
            result.addmm_(rows.flatten(0, 1).t(), columns)
    return result.view(-1, kernel, kernel, channels).permute(0, 3, 1, 2)


def _needs_more_channels(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether cuDNN would pad the channels of x, cast to dtype, itself: in forward, and again in backward."""
    on_nvidia = x.device.type == "cuda" and torch.version.hip is None
    is_padded = x.shape[1] % _VECTOR == 0
    return on_nvidia and not is_padded and dtype.itemsize == 2 and x.is_contiguous(memory_format=torch.channels_last)


def _with_more_channels(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x (B, C, H, W) in dtype and channels_last memory, with channels of zeros up to a multiple of ``_VECTOR``."""
    batch, channels, height, width = x.shape
    padded = x.new_zeros(batch, height, width, channels + -channels % _VECTOR, dtype=dtype).permute(0, 3, 1, 2)
    padded[:, :channels] = x  # casts too: the padding costs no copy of its own
    return padded


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _use_matrix_products(x: torch.Tensor) -> bool:
    """Whether ``weight_gradient`` is faster than oneDNN for an input x. With few channels it is not."""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return on_cpu and x.shape[1] >= 16 and x.is_contiguous(memory_format=torch.channels_last)
