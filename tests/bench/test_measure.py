"""Timing, with a simulated clock."""

import itertools
import random

import pytest
import torch

from mimdet.bench.environment import command, describe
from mimdet.bench.limits import gemm_key, measure_limits
from mimdet.bench.measure import Ratio, measure, paired_ratio, peak_bytes, unpaired_ratio


def fake(cost, drift=0.0, noise=0.01, seed=0):
    """Runs that advance a simulated clock, and the timer that reads it."""
    ticks, shaken, order = itertools.count(), random.Random(seed), []

    def timer(run, calls):
        name = run()
        order.append(name)
        return cost[name] * (1 + drift * next(ticks)) * (1 + shaken.gauss(0, noise))

    return {name: lambda name=name: name for name in cost}, timer, order


def speedup(timings, name, over):
    return paired_ratio(timings.samples[over], timings.samples[name])


def test_a_slowdown_of_a_fifth_is_seen_and_the_control_sees_nothing():
    runs, timer, _ = fake({"a": 1.0, "b": 1.2})
    timings = measure(runs, 15, timer=timer)
    assert timings.rounds == 15
    ratio = speedup(timings, "a", "b")
    assert ratio.differs
    assert 1.18 < ratio.low < ratio.median < ratio.high < 1.22
    assert str(ratio).startswith("1.20x [")
    control = timings.control_ratio()
    assert not control.differs
    assert str(control).startswith("no difference [")


def test_equal_runs_on_a_noisy_machine_make_no_claim():
    claims = 0
    for seed in range(40):
        runs, timer, _ = fake({"a": 1.0, "b": 1.0}, noise=0.1, seed=seed)
        claims += speedup(measure(runs, 15, timer=timer), "b", "a").differs
    assert claims <= 6, "a 95% interval should leave 1 out about once in twenty times"


def test_drift_falls_on_all_alike():
    runs, timer, _ = fake({"a": 1.0, "b": 1.0, "c": 1.0}, drift=0.05, noise=0.0)
    timings = measure(runs, 9, timer=timer)
    for name in "bc":
        assert speedup(timings, name, "a").median == pytest.approx(1.0)


def test_order_is_forwards_and_backwards_with_the_first_as_control():
    runs, timer, order = fake({"a": 1.0, "b": 1.0})
    measure(runs, 3, timer=timer)
    calibration, rounds = order[:3], order[3:]
    assert calibration == ["a", "b", "a"]
    assert rounds == ["a", "b", "a", "a", "b", "a"] * 3


def test_short_runs_are_repeated_within_a_pass():
    seen = []

    def timer(run, calls):
        seen.append(calls)
        return 0.001

    measure({"a": lambda: None}, 3, timer=timer, least=0.005)
    assert set(seen[2:]) == {5}


def test_wall_clock_is_the_default():
    p20, p50, p80 = measure({"a": lambda: sum(range(1000))}, 3).percentiles("a")
    assert 0 < p20 <= p50 <= p80 < 1


@pytest.mark.parametrize(
    ("runs", "rounds", "message"),
    [({"a": int}, 2, "at least 3"), ({}, 5, "one or more"), ({"control": int}, 5, "control")],
    ids=["rounds", "nothing", "name"],
)
def test_measure_refuses(runs, rounds, message):
    with pytest.raises(ValueError, match=message):
        measure(runs, rounds)


def test_unpaired_intervals_are_wider_than_paired_ones_under_common_noise():
    shaken = random.Random(0)
    fast = [1 + 0.3 * shaken.random() for _ in range(15)]
    slow = [1.2 * t for t in fast]
    paired, unpaired = paired_ratio(slow, fast), unpaired_ratio(slow, fast)
    assert paired.high - paired.low < 1e-9 < unpaired.high - unpaired.low
    assert unpaired.low < 1.2 < unpaired.high


def test_slower_is_said_as_plainly_as_faster():
    assert str(Ratio(0.8, 0.7, 0.9)) == "0.80x [0.70, 0.90]"
    assert f"{Ratio(0.8, 0.7, 1.1):.1f}" == "no difference [0.7, 1.1]"


def test_limits_are_positive_and_named():
    rates = measure_limits("cpu", [torch.float32, torch.bfloat16], scale=0.02)
    assert set(rates) == {"copy_gb_s", gemm_key(torch.float32), "gemm_bfloat16_tflop_s"}
    assert min(rates.values()) > 0


def test_environment_names_no_place(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "bench", "ops", "--output", "/somewhere/else/a b.json"])
    assert command() == "mimdet bench ops --output 'a b.json'"
    described = describe("cpu")
    assert described["threads"] == torch.get_num_threads()
    assert torch.__version__.startswith(described["versions"]["torch"])
    assert "/" not in described["device"]


def test_peak_counts_what_is_alive_at_once():
    """Up to a few bytes of scalars."""
    x = torch.zeros(1 << 18)
    for run, megabytes in (
        (lambda: x + 1, 1),
        (lambda: (x + 1) * 2, 2),
        (lambda: [(x + 1).sum(), (x + 2).sum()], 1),
    ):
        assert 0 <= peak_bytes(run, "cpu") - megabytes * 2**20 < 1024
