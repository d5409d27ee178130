"""The chooser: wrong algorithms are rejected, the faster GEMM wins, choices are remembered."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.sparsity.gemms import choice
from megasparse.sparsity.gemms.choice import MIN_FLOPS, Choice, GemmChooser

DENSE = torch.ones(4, 4)


@pytest.fixture
def clock(monkeypatch):
    """Times by the value that a run returns: nothing is measured on a machine without a GPU."""
    times = {}
    monkeypatch.setattr(choice, "milliseconds", lambda run, repeats: times[id(run())])
    return times


def _sparse(clock, results):
    for result, time in results.values():
        clock[id(result)] = time

    def run(algorithm):
        if algorithm not in results:
            raise RuntimeError("no such algorithm")
        return results[algorithm][0]

    return run


def test_fastest_right_algorithm_wins(clock, tmp_path):
    clock[id(DENSE)] = 3.0
    results = {
        0: (DENSE.clone(), 2.0),
        3: (DENSE * 2, 0.1),  # fast and wrong
        5: (DENSE.clone(), 1.0),
        9: (DENSE * float("nan"), 0.1),
    }
    path = tmp_path / "cache" / "gemms.json"
    choice = GemmChooser(path).choose("k", MIN_FLOPS, _sparse(clock, results), lambda: DENSE)
    assert choice == Choice(5, 1.0, 3.0, rejected=2) and not choice.dense_wins

    def never(*_):
        raise AssertionError("measured again")

    assert GemmChooser(path).choose("k", MIN_FLOPS, never, never) == choice


def test_dense_wins_when_faster_or_when_nothing_is_right(clock):
    clock[id(DENSE)] = 0.5
    right = {0: (DENSE.clone(), 2.0)}
    assert GemmChooser(None).choose("k", MIN_FLOPS, _sparse(clock, right), lambda: DENSE).dense_wins
    wrong = {0: (DENSE * 2, 0.1)}
    assert GemmChooser(None).choose("k", MIN_FLOPS, _sparse(clock, wrong), lambda: DENSE).dense_wins


def test_small_products_are_not_measured(clock):
    choice = GemmChooser(None).choose("k", 2**31 - 1, _sparse(clock, {}), lambda: DENSE)
    assert choice == Choice.untuned() == Choice(0, 0.0, 0.0, rejected=0) and not choice.dense_wins
    clock[id(DENSE)] = 3.0
    nothing = GemmChooser(None).choose("k", 2**31, _sparse(clock, {}), lambda: DENSE)
    assert nothing == Choice(0, float("inf"), 0.0, rejected=0)


def test_every_algorithm_is_tried_and_the_best_are_measured_longer(monkeypatch):
    """Two runs each; nine of four finalists and of the dense product, which decide."""
    first = {4: 5.0, 0: 1.0, 60: 2.0, 63: 3.0, 7: 4.0}
    last = {0: 4.0, 60: 1.5, 63: 3.0, 7: 6.0}
    tried, timed, told = set(), [], []

    def sparse(algorithm):
        tried.add(algorithm)
        if algorithm not in first:
            raise RuntimeError("no such algorithm")
        return DENSE + algorithm / 1e6

    def milliseconds(run, repeats):
        found = run()
        algorithm = round(float(found[0, 0] - 1) * 1e6)
        timed.append((None if found is DENSE else algorithm, repeats))
        return 2.0 if found is DENSE else (first if repeats == 2 else last)[algorithm]

    monkeypatch.setattr(choice, "milliseconds", milliseconds)
    monkeypatch.setattr(choice, "log_once", lambda *words: told.append(words))
    found = GemmChooser(None).choose("k", MIN_FLOPS, sparse, lambda: DENSE)
    assert tried == set(range(64)) and found == Choice(60, 1.5, 2.0)
    assert timed == [
        *((a, 2) for a in (0, 4, 7, 60, 63)),
        *((a, 9) for a in (0, 60, 63, 7)),
        (None, 9),
    ]
    assert told == [(told[0][0], "k", "2:4 is used", 1.5, 60, 2.0)]


def test_an_error_is_relative_to_the_product(clock):
    clock[id(DENSE)] = 3.0
    results = {1: (DENSE * 1.011, 0.5), 2: (DENSE * 1.009, 1.0)}
    found = GemmChooser(None).choose("k", MIN_FLOPS, _sparse(clock, results), lambda: DENSE)
    assert (found.algorithm, found.rejected) == (2, 1)


def test_nothing_is_measured_in_a_step_that_is_captured(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    chooser, sparse = GemmChooser(None), _sparse(clock, {})
    with pytest.raises(KernelError, match="k: no GEMM was chosen before the step was captured"):
        chooser.choose("k", MIN_FLOPS, sparse, lambda: DENSE)
    assert chooser.choose("small", 1, sparse, lambda: DENSE) == Choice.untuned()


def test_a_cache_that_cannot_be_written_is_said_and_no_reason_to_stop(clock, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(choice, "log_once", lambda *words: told.append(words[0]))
    (tmp_path / "file").write_text("no folder")
    clock[id(DENSE)] = 3.0
    results = {0: (DENSE.clone(), 2.0)}
    chooser = GemmChooser(tmp_path / "file" / "gemms.json")
    found = chooser.choose("k", MIN_FLOPS, _sparse(clock, results), lambda: DENSE)
    assert found.algorithm == 0 and told[-1].startswith("GEMM choices are not kept")


def test_the_choices_of_a_gpu_are_under_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    made = []
    monkeypatch.setattr(choice, "GemmChooser", made.append)
    for variable, folder in (("XDG_CACHE_HOME", ""), ("HOME", ".cache")):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv(variable, str(tmp_path))
        choice.shared_chooser.__wrapped__(torch.device("cpu"))
        path = made[-1]
        assert path.parent == tmp_path / folder / "megasparse"
        assert path.name.startswith(f"gemms-NVIDIA-H200-torch{torch.__version__}-cusparselt")


@pytest.mark.parametrize(("host", "waited"), [(0.001, 0.008), (0.05, 0.1)])
def test_the_device_waits_until_the_host_has_sent_all(monkeypatch, host, waited):
    """By a device that takes 5 ms for each run, and waits as long as it is told."""
    now, device, ran, slept, synchronized = [0.0], [0.0], [], [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = device[0]

        def synchronize(self):
            synchronized.append(self)

        def elapsed_time(self, end):
            assert synchronized == [end]
            return end.at - self.at

    def run():
        ran.append(1)
        now[0] += host
        device[0] += 5.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(choice.time, "perf_counter", lambda: now[0])
    now[0] = 7.0
    assert choice.milliseconds(run, 4) == 5.0
    assert len(ran) == 6 and slept == [pytest.approx(2e9 * waited, abs=2)]


def test_a_damaged_cache_is_as_good_as_none(tmp_path):
    path = tmp_path / "gemms.json"
    for text in ("", "[]", '{"k": {"x": 1}}', "\x00"):
        path.write_text(text)
        assert GemmChooser(path)._choices == {}


def test_no_clock_decides_in_deterministic_mode(clock, tmp_path):
    clock[id(DENSE)] = 0.5
    results = {2: (DENSE * 2, 0.1), 3: (DENSE.clone(), 2.0), 5: (DENSE.clone(), 1.0)}
    path = tmp_path / "gemms.json"
    sparse = _sparse(clock, results)
    assert GemmChooser(path).choose("k", MIN_FLOPS, sparse, lambda: DENSE).dense_wins
    kept = path.read_text()
    torch.use_deterministic_algorithms(True)
    try:
        choice = GemmChooser(path).choose("k", MIN_FLOPS, sparse, lambda: DENSE)
    finally:
        torch.use_deterministic_algorithms(False)
    assert choice == Choice(3, 0.0, 0.0, rejected=1) and not choice.dense_wins
    assert path.read_text() == kept
