from pathlib import Path

import pytest
import torch
from support.engine_fakes import FakeDataset, FakeDetector, FakeEvaluator, FakeHeads, fake_config, fake_mapper

from mimdet.config import apply_overrides
from mimdet.data import build_detection_test_loader
from mimdet.engine import evaluate, evaluate_only, train


@pytest.fixture
def trained(tmp_path):
    """(config with the trained weights as init_checkpoint, metrics of the training's end)."""
    cfg = fake_config(tmp_path / "run", max_iter=2)
    metrics = train(cfg)
    cfg.train.init_checkpoint = str(tmp_path / "run" / "model_final.pth")
    cfg.train.output_dir = str(tmp_path / "evaluation")
    return cfg, metrics


@pytest.mark.parametrize("function", [evaluate_only, evaluate])
def test_a_checkpoint_scores_as_at_the_end_of_its_training(trained, function, capsys):
    cfg, metrics = trained
    capsys.readouterr()
    torch.manual_seed(cfg.train.seed)
    results = function(cfg)
    assert results["bbox"].keys() == metrics["bbox"].keys()
    assert results["bbox_per_class"]["dog"] == 0.0
    assert FakeEvaluator.log[-1] == 5
    out = capsys.readouterr().out
    assert "COCO evaluation (%)" in out
    assert out == Path(cfg.train.output_dir, "log.txt").read_text()


def test_without_weights_there_is_nothing_to_evaluate(tmp_path):
    with pytest.raises(ValueError, match=r"train\.init_checkpoint=PATH"):
        evaluate_only(fake_config(tmp_path))


def test_a_number_of_classes_given_against_the_data_is_refused(trained):
    cfg, _ = trained
    overrides = ["model.roi_heads.num_classes=80"]
    with pytest.raises(ValueError, match="num_classes=80 was given, but the dataset has 2 classes"):
        evaluate_only(apply_overrides(cfg, overrides), overrides)


class Recorder(FakeDetector):
    def forward(self, images, targets=None, output_sizes=None):
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in self.modules())
        self.sizes = getattr(self, "sizes", []) + output_sizes
        return super().forward(images, targets, output_sizes)


def test_the_model_runs_in_eval_mode_at_original_sizes_and_gets_its_modes_back(tmp_path):
    model = Recorder(FakeHeads(2))
    model.train()
    model.stem[1].eval()  # frozen on purpose
    modes = [module.training for module in model.modules()]
    statistics = model.stem[1].running_mean.clone()
    evaluate(fake_config(tmp_path), model)
    assert [module.training for module in model.modules()] == modes
    assert model.sizes == [(8, 10)] * 5
    assert torch.equal(model.stem[1].running_mean, statistics)
    assert torch.is_grad_enabled()


def test_a_given_models_table_is_printed(tmp_path, capsys):
    evaluate(fake_config(tmp_path), FakeDetector(FakeHeads(2)))
    assert "COCO evaluation (%)" in capsys.readouterr().out


def test_modes_come_back_after_an_error_too(tmp_path, monkeypatch):
    def broken(self, samples, results):
        raise RuntimeError("broken")

    monkeypatch.setattr(FakeEvaluator, "process", broken)
    model = FakeDetector(FakeHeads(2)).train()
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(fake_config(tmp_path), model)
    assert all(module.training for module in model.modules())


def test_a_given_loader_is_scored_with_its_own_dataset(tmp_path):
    loader = build_detection_test_loader(FakeDataset(size=3), fake_mapper, num_workers=0)
    evaluate(fake_config(tmp_path), FakeDetector(FakeHeads(2)), loader)
    assert FakeEvaluator.log[-1] == 3
