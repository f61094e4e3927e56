"""Convolutions whose weight's gradient is fast on a CPU too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

# Elements of the patches that are multiplied at once: they stay in the cache.
_BAND = 2**19


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` for square kernels without bias.

    In float32 and channels_last memory oneDNN takes 2-3 times as long over the gradient of such a weight as the same
    sums take as matrix products, so on a CPU these are used. Gradients are of first order there.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H', W')."""
        if (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and x.shape[1] >= 16  # rows of fewer channels are slow to copy
            and x.is_contiguous(memory_format=torch.channels_last)
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and torch.is_grad_enabled()
            and self.weight.requires_grad
        ):
            return _Convolution.apply(x, self.weight, self.stride[0], self.padding[0])
        return super().forward(x)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.stride, ctx.padding = stride, padding
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, stride=stride, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            stride, padding = [ctx.stride] * 2, [ctx.padding] * 2
            grad_x = torch.ops.aten.convolution_backward(
                grad, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, [True, False, False]
            )[0]
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(grad, x, weight.shape[-1], ctx.stride, ctx.padding)
        return grad_x, grad_weight, None, None


def weight_gradient(grad: torch.Tensor, x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """Gradient of a convolution's square weight as products of matrices, a band of rows at a time.

    Args:
        grad: (B, out_channels, H', W') gradient of the output.
        x: (B, in_channels, H, W) input.
        kernel: side of the weight.
        stride: of the convolution.
        padding: of the convolution, on every side.

    Returns:
        (out_channels, in_channels, kernel, kernel) in channels_last memory.
    """
    channels, grad = x.shape[1], grad.permute(0, 2, 3, 1)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    patches = padded.unfold(1, kernel, stride).unfold(2, kernel, stride).movedim(3, -1)
    band = max(1, _BAND // patches[0, :1].numel())
    result = x.new_zeros(grad.shape[-1], kernel * kernel * channels)
    for of_sample, patches_of_sample in zip(grad, patches, strict=True):
        for rows, taken in zip(of_sample.split(band), patches_of_sample.split(band), strict=True):
            result.addmm_(rows.flatten(0, 1).t(), taken.reshape(-1, result.shape[1]))
    return result.view(-1, kernel, kernel, channels).permute(0, 3, 1, 2)
