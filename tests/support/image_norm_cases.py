"""The check of the machine code of the fused norms of feature maps."""

import re

import torch

# Registers per thread: 128 allow 2 programs of 8 warps (4 of 4 warps) on a multiprocessor.
REGISTERS = 128


def check_compiled(op, target, nhwc, run, counts):
    """The kernels that ``run(x, dy, sizes)`` would launch spill nothing and move 16 bytes where they can.

    Args:
        op: the operation.
        target: dtype, (C, H, W), whether there are sizes, and compute capability.
        nhwc: memory is channels_last.
        run: forward and backward by Triton, on maps of two images.
        counts: possible numbers of kernels: sums of one part need none that adds parts up.
    """
    from support.aot import compile_pair

    dtype, shape, has_sizes, capability = target
    memory = torch.channels_last if nhwc else torch.contiguous_format
    x, dy = (torch.empty(2, *shape, dtype=dtype).contiguous(memory_format=memory) for _ in range(2))
    sizes = torch.ones(2, 2, dtype=torch.int32) if has_sizes else None
    kernels = compile_pair(op, capability, lambda: run(x, dy, sizes))
    assert len(kernels) in counts
    # NCHW rows of another length start at any element, and with sizes neighbors in them need not be valid together.
    aligned = shape[0] % 16 == 0 if nhwc else shape[1] * shape[2] % 16 == 0 and not has_sizes
    for one in kernels:
        assert one.stack == 0, one
        assert one.registers <= REGISTERS, one
        if aligned and not re.search("combine|statistics|parts|means", one.name):
            assert one.loads_16, one
            # These kernels write few numbers, no map.
            assert one.stores_16 or "moments" in one.name or "sums" in one.name, one
