"""``mimdet bench``: its options, their former names, its errors."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import CONFIG, OVERRIDES

from mimdet.bench.experiments import backbone, roofline
from mimdet.bench.row import Results

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("ops", "table1", "table7", "table8", "backbone", "packed", "roofline", "detectron2", "launches", "static",
            "gpu", "compare", "plot", "readme")  # fmt: skip
ERRORS = {
    "ops --op cake": "no operation 'cake'; choose from add_layer_norm",
    "ops --op bias_gelu --shape 1xtwo": "sizes are numbers with x between them",
    "ops --op bias_gelu --shape 2x3": "the shape must have 3 positive sizes, got 2x3",
    "ops --dtype int8": "no int8 as dtype; choose from fp32",
    "ops --direction up": "no up as direction; choose from forward",
    "ops --size 100x100": "multiples of 32",
    "ops --output x.txt": "must end in .json or .csv",
    "ops --op bias_gelu --shape 1x2x8 --impl magic": "no magic for bias_gelu here; choose from eager",
    "table1 --impl theirs": "no theirs to measure; choose from ours",
    "table7 --part wheel": "no wheel to measure; choose from backbone, detector",
    "table8 --part wheel": "no wheel to measure; choose from backbone, detector",
    "table7 --config ablations/table8_window": "has no decoder to vary; mimdet bench table8 measures it",
    "backbone --ratio 1.5": "a keep ratio is in (0, 1], got 1.5",
    "backbone --dtype int4": "no dtype 'int4'",
    "backbone --config nothing": "no config file 'nothing'",
    "packed --size 64x96": "two sizes or more, got 1",
    "packed --mode both": "no both to measure",
    "packed --size 64x90": "multiples of 32",
    "table8 --rounds 2": "an interval needs at least 3 rounds",
    "roofline --rounds 0": "a roofline needs at least 3 rounds, got 0",
    "roofline --impl sdpa-compile": "no sdpa-compile to measure",
    "roofline --model clean": "no sdpa-compile to measure",
    "detectron2 --original nowhere": "nowhere is not a checkout of the original MIMDet",
    "detectron2 --original . --mode both": "no both to measure; choose from train, inference",
    "detectron2 --original . --impl theirs": "no theirs to measure; choose from ours, ours-fast-step",
    "launches --config nothing": "no config file 'nothing'",
    "launches --size 800": "--size must be HxW, multiples of 32, got '800'",
    "launches --size 800x1333": "--size must be HxW, multiples of 32, got '800x1333'",
    "launches --dtype fp16": "no fp16 to count; choose from fp32, bf16",
    "launches --output x.txt": "must end in .json or .csv",
    "launches --original nowhere": "nowhere is not a checkout of the original MIMDet",
    "launches --original . --config mimdet_b_retinanet": "the original has no detector of config mimdet_b_retinanet",
    "static --arch sm_70": "no sm_70 to compile for; choose from sm_80, sm_89, sm_90, sm_100, gfx942",
    "static --impl cpp": "no cpp to compile; choose from triton, cuda",
    "static --dtype fp8": "no fp8 to compile; choose from fp32, bf16",
}


@pytest.mark.parametrize("words", ERRORS)
def test_errors_are_one_message(bench, capsys, words):
    device = () if words.startswith(("launches", "static")) else ("--device", "cpu")
    assert bench(*words.split(), *device) == 1
    message = capsys.readouterr().err
    assert ERRORS[words] in message
    assert "Traceback" not in message


def test_numbers_are_in_range(bench, capsys):
    assert bench("launches", "--batch", 0) == 2
    assert "--batch" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(bench, capsys, command):
    assert bench(command, "--help") == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) > 8
    assert "--peers" not in out


def test_former_options_and_names_are_accepted(bench, monkeypatch):
    """Commands recorded in files of results still run."""
    asked = []
    for module in (backbone, roofline):
        monkeypatch.setattr(module, "run", asked.append)
    words = ("table1", "--part", "detector", "--peers", "ours", "--peers", "original-kept", "--peers", "clean")
    assert bench(*words, "--config", CONFIG, "--device", "cpu", *OVERRIDES) == 0
    assert bench("roofline", "--model", "original-sdpa-kept", "--config", CONFIG, "--device", "cpu") == 0
    table, counted = asked
    assert table.implementations == ("ours", "original-no-checkpoint", "sdpa-compile")
    assert table.overrides == OVERRIDES
    assert table.output.as_posix() == "output/bench/table1_detector.json"
    assert (counted.implementation, counted.part, counted.depth) == ("original-sdpa-no-checkpoint", "detector", 2)
    assert counted.output.as_posix() == "output/bench/roofline.json"


def test_runs_from_a_checkout_without_installing():
    command = [sys.executable, "-m", "mimdet", "bench", "ops", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--direction" in done.stdout


def test_the_command_line_starts_without_torch():
    code = "import sys; import mimdet.bench.cli, mimdet.bench.row; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_compare_and_plot_say_which_file_is_broken(bench, tmp_path, capsys):
    Results("mimdet bench", {}, {}).write(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("{")
    assert bench("compare", tmp_path / "a.json", tmp_path / "b.json") == 1
    assert "b.json: not a file of results" in capsys.readouterr().err
