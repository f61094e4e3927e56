"""Triton's kernels are compiled before the first step of a training, and none of them in a later one."""

import logging
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from support.compilations import Fabric, canvases, compilations, image_sizes, varied
from support.engine_fakes import FakeDetector, fake_config
from support.kernels import needs_compiler
from torch._subclasses import FakeTensorMode

from mimdet.bench import workload
from mimdet.bench.fake_gpu import supposed_gpu
from mimdet.config import apply_overrides, load
from mimdet.engine import trainer, warm_up
from mimdet.engine.warm_up import compile_kernels
from mimdet.kernels import KernelCompilationError, ahead, batch_norm, gather_add_pos, use

# More blocks launch the same kernels. The encoder's first block is never dropped, the second one is.
SHALLOW = [f"model.backbone.bottom_up.{part}.depth={depth}" for part, depth in (("encoder", 2), ("decoder", 1))]
STEPS = 1000
# Kernels that a training of the Base model compiles, where Triton's are chosen for all operations.
MOST = 40

pytestmark = needs_compiler


def config(*overrides):
    return load("configs/mimdet_b_mask_rcnn.py", [*SHALLOW, *overrides])


def batch(*sizes):
    """Samples of random images."""
    samples = []
    for number, size in enumerate(sizes):
        (image,), (target,) = workload.random_batch(1, size, 80, "cpu")
        samples.append({"image": image, "image_id": number, "targets": target})
    return samples


def compiled(cfg, samples, evaluates=False):
    """(kernel, key) of all that ``compile_kernels`` compiles."""
    with compilations() as keys:
        compile_kernels(cfg, samples, Fabric(), evaluates)
    return keys


def test_the_simulated_images_are_those_of_multi_scale_training():
    sizes = image_sizes(config(), STEPS)
    assert {min(size) for size in sizes} <= {480, 512, 544, 576, 608, 640, 736, 768, 800, *range(400, 800)}
    assert max(max(size) for size in sizes) == 1333
    assert len(canvases(sizes)) > 80


@pytest.fixture(scope="module")
def ahead_of_training():
    return compiled(config(), batch((608, 800)), evaluates=True)


def test_no_later_size_compiles_a_kernel(ahead_of_training):
    cfg = config()
    for size in varied(canvases(image_sizes(cfg, STEPS))):
        training = compiled(cfg, batch(size))
        assert training < ahead_of_training, size
        assert len(training) <= MOST, Counter(kernel for kernel, _ in training)


def test_no_evaluation_compiles_a_kernel(ahead_of_training):
    assert compiled(config(), batch((800, 1333)), evaluates=True) == ahead_of_training


def test_no_later_packed_batch_compiles_a_kernel():
    cfg = config("model.backbone.bottom_up.batch_mode=packed")
    first = compiled(cfg, batch((512, 683), (480, 640)))
    assert {kernel.removeprefix("_").rsplit("_", 2)[0] for kernel, _ in first} >= {"batch_norm", "sample_tokens"}
    assert compiled(cfg, batch((512, 512), (480, 512))) == first


def test_a_size_that_is_specialized_would_be_seen(monkeypatch):
    from mimdet.kernels import triton_rows

    kernel = triton_rows._gather_rows_kernel
    monkeypatch.setattr(triton_rows, "_gather_rows_kernel", type(kernel)(kernel.fn))
    with compilations() as keys:
        for length in (48, 49):
            ahead.warm_up(lambda length=length: gather(length))
    assert len(keys) == 2


def gather(length):
    with FakeTensorMode():
        x, index = torch.empty(2, 64, 32, device="cuda"), torch.empty(2, length, dtype=torch.int64, device="cuda")
        return gather_add_pos(x, None, index)


def test_compiled_ahead_a_kernel_is_not_compiled_again(monkeypatch, tmp_path):
    from support.aot import target
    from triton import knobs

    from mimdet.kernels import triton_rows

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = []
    with target(90), supposed_gpu():
        triton_rows._gather_rows_kernel.device_caches.pop(90, None)  # of other tests
        assert ahead.warm_up(lambda: gather(48), lambda *numbers: done.append(numbers)) == 1
        assert done == [(0, 1)]
        assert list(tmp_path.rglob("*.cubin"))
        again = []
        monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **options: again.append(options))
        assert ahead.warm_up(lambda: gather(49)) == 0
        assert not again


def test_an_error_names_the_kernel(monkeypatch):
    from support.aot import target
    from triton import knobs

    from mimdet.kernels import triton_rows

    kernel = triton_rows._gather_rows_kernel
    monkeypatch.setattr(triton_rows, "_gather_rows_kernel", type(kernel)(kernel.fn))
    triton_rows._gather_rows_kernel._unsafe_update_src(kernel.src.replace("BLOCK_M)", "BLOCK_M, 0)", 1))
    with compilations(), target(90):
        knobs.runtime.jit_cache_hook = None
        with pytest.raises(KernelCompilationError, match=r"(?s)_gather_rows_kernel: .*arange"):
            ahead.warm_up(lambda: gather(48))


def test_other_processes_wait_and_learn_of_an_error(monkeypatch):
    """The second process of a machine compiles nothing."""
    monkeypatch.setattr(warm_up, "_compile", lambda *_: pytest.fail("compiled"))
    fabric = SimpleNamespace(device=torch.device("cuda", 1), local_rank=1, world_size=2)

    def gathered(errors, error):
        assert error is None
        errors[:] = ["Triton cannot compile k: why", None]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    with pytest.raises(KernelCompilationError, match="cannot compile k: why"):
        compile_kernels(fake_config("unused"), [], fabric)


def test_a_model_that_cannot_compute_shapes_trains(caplog, monkeypatch):
    """Its kernels compile when they are launched. Random numbers are drawn as without the attempt."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    monkeypatch.setattr(warm_up, "build_model", lambda *_, **__: torch.nn.Linear(torch.rand(1).numel(), 1))
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO, "mimdet"), compilations() as keys:
        compile_kernels(config(), batch((64, 64)), Fabric())
    assert not keys
    assert "kernels compile when they are first launched" in caplog.text
    assert torch.equal(torch.get_rng_state(), state)
    assert JITFunction.run is run


def test_fake_tensors_are_not_exchanged(monkeypatch):
    """One process computes with them, others would never answer."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for name in ("all_reduce", "all_gather_into_tensor"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, name=name: pytest.fail(name))
    with FakeTensorMode():
        x = torch.empty(2, 8, 4, 4, requires_grad=True)
        batch_norm(x, None, None, training=True, sync=True).sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize(("device", "impl"), [("cpu", "auto"), ("cuda", "auto"), ("cuda", "cuda")])
def test_without_a_gpu_or_triton_nothing_happens(monkeypatch, device, impl):
    monkeypatch.setattr(warm_up, "_compile", lambda *_: pytest.fail("compiled"))
    fabric = SimpleNamespace(device=torch.device(device), local_rank=0, world_size=1)
    with supposed_gpu() if impl == "cuda" else nullcontext(), use(impl):
        compile_kernels(fake_config("unused"), [], fabric)


def test_a_run_compiles_before_its_first_step(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(trainer, "compile_kernels", lambda cfg, batch, fabric, *_: order.append(batch))
    forward = FakeDetector.forward
    monkeypatch.setattr(FakeDetector, "forward", lambda *arguments: order.append(arguments[1]) or forward(*arguments))
    trainer.train(apply_overrides(fake_config(tmp_path / "a", max_iter=1), ["dataloader.test=null"]))
    first, trained = order
    assert all(torch.equal(sample["image"], image) for sample, image in zip(first, trained, strict=True))
