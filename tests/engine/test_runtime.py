import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import SingleDeviceStrategy
from omegaconf import OmegaConf
from support.engine_fakes import FakeDetector, fake_config
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from mimdet.engine import train
from mimdet.engine.resume import pack, restore
from mimdet.engine.runtime import Autocast, build_fabric, choose_amp_dtype, choose_device, compression_hook

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def amp(enabled=True, dtype="auto"):
    return OmegaConf.create({"enabled": enabled, "dtype": dtype})


@pytest.mark.parametrize(
    ("setting", "expected"),
    [(amp(), None), (amp(dtype="bf16"), torch.bfloat16), (amp(False, "bf16"), None)],
    ids=["auto", "bf16", "off"],
)
def test_precision_on_a_cpu(setting, expected):
    assert choose_amp_dtype(setting, CPU) is expected


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((9, 0), "auto", torch.bfloat16),
        ((8, 0), "auto", torch.bfloat16),
        ((7, 5), "auto", torch.float16),
        ((9, 0), "fp16", torch.float16),
        ((7, 0), "bf16", torch.bfloat16),
    ],
)
def test_precision_on_a_gpu(monkeypatch, capability, dtype, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_amp_dtype(amp(dtype=dtype), CUDA) is expected


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="fp16 needs a CUDA GPU, not cpu: use bf16"):
        choose_amp_dtype(amp(dtype="fp16"), CPU)


@pytest.mark.parametrize("enabled", [True, False])
def test_an_unknown_precision_is_refused(enabled):
    with pytest.raises(ValueError, match="'float8': use auto, bf16 or fp16"):
        choose_amp_dtype(amp(enabled, "float8"), CPU)


def test_auto_device_without_a_gpu_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(RuntimeError, match="'cuda' but PyTorch sees no GPU: use cpu"):
        choose_device("cuda")


@pytest.mark.parametrize("name", ["gpu", "banana", "", "meta", "cuda:x"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' is not a device: use auto, cpu, cuda, cuda:1 or mps"):
        choose_device(name)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(RuntimeError, match="'cuda:2' but PyTorch sees 2 GPUs, cuda:0 to cuda:1"):
        choose_device("cuda:2")
    with pytest.raises(RuntimeError, match="'mps' but PyTorch has no Metal here"):
        choose_device("mps")


@pytest.mark.parametrize(
    ("compress", "device", "dtype", "hook"),
    [
        (True, CUDA, torch.float16, default_hooks.fp16_compress_hook),
        (True, CUDA, torch.bfloat16, default_hooks.bf16_compress_hook),
        (True, CUDA, None, None),
        (False, CUDA, torch.float16, None),
        (True, CPU, torch.bfloat16, None),
    ],
    ids=["fp16", "bf16", "fp32", "off", "cpu"],
)
def test_gradients_are_compressed_in_the_training_dtype(compress, device, dtype, hook):
    assert compression_hook(compress, device, dtype) is hook


def test_loss_scaling_is_part_of_a_checkpoint():
    def scaled(initial):
        precision = Autocast("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=initial))
        return Fabric(accelerator="cpu", strategy=SingleDeviceStrategy(device=CPU, precision=precision))

    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint = pack(scaled(8.0), model, optimizer, 4, {})
    resumed = scaled(65536.0)
    assert restore(checkpoint, resumed, optimizer, "here") == 5
    assert resumed.strategy.precision.scaler.get_scale() == 8.0


def test_a_gpu_for_every_process_is_demanded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="2 processes on this machine but 1 GPUs"):
        build_fabric(OmegaConf.create({"device": "cuda", "amp": {"enabled": True}, "ddp": {}}))


def test_bf16_computes_in_bf16_but_spares_boxes(tmp_path, monkeypatch):
    seen = {}
    forward = FakeDetector.forward

    def spy(self, images, targets=None, output_sizes=None):
        if self.training:
            seen["compute"] = self.stem[0](torch.rand(1, 3, 8, 8)).dtype
            seen["image"], seen["boxes"] = images[0].dtype, targets[0]["boxes"]
        else:
            seen["evaluation"] = self.stem[0](torch.rand(1, 3, 8, 8)).dtype
        return forward(self, images, targets, output_sizes)

    monkeypatch.setattr(FakeDetector, "forward", spy)
    cfg = fake_config(tmp_path, max_iter=1)
    cfg.train.amp.dtype = "bf16"
    train(cfg)
    assert seen["compute"] == torch.bfloat16
    assert seen["image"] == torch.uint8
    assert seen["boxes"].tolist() == [[0.0, 1.0, 1333.5, 7.0]], "1333.5 is not a bfloat16"
    assert seen["evaluation"] == torch.float32
    assert "precision bf16-mixed" in (tmp_path / "log.txt").read_text()
