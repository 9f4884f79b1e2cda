"""RunReport: what is logged while a run trains, and the summary of it."""

import json

import numpy as np
import pytest
import torch
import transformers as T
from datasets import Dataset
from matplotlib.image import imread
from torch import nn
from toy_runs import ENVIRONMENT, Run, freeze, matrix, summary, toy_matrices
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from grades_trl.model.matrices import find_matrices
from grades_trl.recipe import builtin
from grades_trl.report.environment import Environment
from grades_trl.report.run_report import RunReport
from grades_trl.report.strict_json import write_json
from grades_trl.report.summary import (
    CacheSummary,
    Flops,
    Heldout,
    Outcome,
    SkippedLayers,
    TowerCount,
    format_summary,
    run_result,
)
from grades_trl.report.timing import RunClock, Seconds, Speedup

N = 4 * 8


@pytest.fixture
def now(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


class ToyRun:
    """A run of a report, whose clock only the test moves."""

    def __init__(self, directory, now, matrices=None, state=None, step=0, **changes):
        self.matrices = matrices or toy_matrices()
        self.run = Run(now, step=step)
        arguments = {"metric": "grad_change", "settings": {"tau": 0.5}, "grace_steps": 10, "checkpointing": False}
        arguments |= {"environment": ENVIRONMENT, "clock": self.run.clock, "resume_step": step}
        self.report = RunReport(directory, self.matrices, 100, **(arguments | changes))
        if state is not None:
            self.report.load_state_dict(state["report"])
            self.run.clock.load_state_dict(state["clock"])

    def step(self, frozen=(), values=None, skipped=None, seconds=1.0, rows=2, length=8, gains=None, caches=0):
        step = self.run.state.global_step + 1
        self.report.count_batch({"input_ids": torch.ones(rows, length)}, None)
        events = [freeze(self.matrices, name, step) for name in frozen]
        self.report.record(step, events, values or {}, skipped or {}, gains, caches)
        self.run.step(seconds)
        return events

    def end(self, **changes):
        self.run.end()
        steps = self.run.state.global_step
        outcome = {"frozen": {}, "stop_reason": "early stopping", "weights": "last", "steps": steps}
        return self.report.summarize(Outcome(**(outcome | changes)))


# ---- scalars ----


def test_steps_are_a_baseline_until_something_freezes_or_is_read_from_a_cache(tmp_path, now):
    """Layers that the user froze are skipped in a baseline as well."""
    run = ToyRun(tmp_path, now)
    for _ in range(25):
        run.step(seconds=2.0, skipped={"vision.layers": 2})
    for _ in range(10):
        run.step(seconds=1.0, skipped={"vision.layers": 2}, caches=1)
    found = run.end()
    # The step in which a cache is first read still counts to what was before it.
    assert found.speedup.cheaper_steps.seconds_saved == pytest.approx(35 * 2.0 - 60.0)
    assert run.report.logs()["grades/step_speedup"] == pytest.approx(2.0)


def test_what_the_caches_did_is_told(tmp_path, now):
    run = ToyRun(tmp_path, now)
    run.step()
    caches = {"encoder": CacheSummary(30, 10, 120.4, 12.34, ""), "frozen_layers": CacheSummary(0, 9, 0.0, 0.0, "why")}
    found = run.end(caches=caches)
    text = format_summary(found)
    assert "  cache     vision tower: 30 of 40 passes read, 120 MiB, +12.3 s\n" in text
    assert "  cache     frozen layers: off: why\n" in text
    assert found.to_json()["caches"]["encoder"]["saved_seconds"] == 12.34


def test_logs_before_the_first_step_has_ended(tmp_path, now):
    """Issue 12, 23: StatisticsError when a subclass logs in the first step."""
    run = ToyRun(tmp_path, now)
    assert run.report.logs() == {
        "grades/frozen_fraction": 0.0,
        "grades/frozen_params_fraction": 0.0,
        "grades/step_speedup_predicted": 1.0,
        "grades/language/frozen_fraction": 0.0,
        "grades/language/backward_skipped_layers": 0.0,
    }


def test_logs_of_what_froze_and_what_that_saves(tmp_path, now):
    vision = [matrix(f"vision.{i}.fc1", i, "fc1", "vision", "vision") for i in range(2)]
    matrices = toy_matrices() | {m.name: m for m in vision}
    run = ToyRun(tmp_path, now, matrices)
    for _ in range(20):
        run.step(seconds=2.0)
    run.step(["layers.0.q_proj", "layers.0.down_proj", "layers.2.q_proj", "vision.0.fc1"], skipped={"layers": 1})
    for _ in range(10):
        run.run.clock.add_overhead(0.25)
        run.step(skipped={"layers": 1}, seconds=1.6)
    logs = run.report.logs()
    assert logs.pop("grades/step_time") == pytest.approx(1.6)
    assert logs.pop("grades/step_speedup") == pytest.approx(2.0 / 1.6)
    assert logs == {
        "grades/frozen_fraction": 4 / 8,
        "grades/frozen_params_fraction": 4 / 8,
        # No image was in the batches: language alone. 2 of 6 skipped, 1 without the gradient of its weight.
        "grades/step_speedup_predicted": 6 * 6 / (2 * 2 + 4 + 3 * 6),
        "grades/overhead_ms": 1e3 * 10 * 0.25 / 25,  # mean over the last 25 steps
        "grades/language/frozen_fraction": 3 / 6,
        "grades/language/backward_skipped_layers": 1.0,
        "grades/vision/frozen_fraction": 1 / 2,
        "grades/vision/backward_skipped_layers": 0.0,
    }


def test_logs_are_of_the_steps_since_the_last_ones(tmp_path, now):
    vision = matrix("vision.0.fc1", 0, "fc1", "vision", "vision")
    run = ToyRun(tmp_path, now, toy_matrices() | {vision.name: vision})
    run.step(values={"layers.0.q_proj": 5.0, "layers.1.q_proj": 2.0, "vision.0.fc1": 7.0})
    run.step(values={"layers.0.q_proj": 4.0})
    run.report.record_heldout("loss", 3.5, 16)
    run.report.record_heldout("loss", 3.25, 16)
    logs = run.report.logs()
    measured = {key: value for key, value in logs.items() if "metric" in key or "heldout" in key}
    expected = {"grades/language/metric": 3.0, "grades/vision/metric": 7.0, "grades/heldout_loss": 3.25}
    assert measured == expected
    run.step()
    assert not expected.keys() & run.report.logs().keys()


def test_without_tokens_in_the_trained_towers_nothing_is_predicted(tmp_path, now):
    vision = matrix("vision.0.fc1", 0, "fc1", "vision", "vision")
    run = ToyRun(tmp_path, now, {vision.name: vision})
    run.step()  # text alone
    assert "grades/step_speedup_predicted" not in run.report.logs()
    assert run.end().flops == Flops(0.0, 0.0, 0.0, None)


# ---- summary ----


def test_summary_of_a_run(tmp_path, now):
    run = ToyRun(tmp_path, now)
    names = list(run.matrices)
    for _ in range(20):
        run.step(seconds=2.0)
    run.step(names[:2], seconds=2.0)  # skipped from the step after
    run.step(skipped={"layers": 1}, seconds=2.0)
    for _ in range(8):
        run.step(skipped={"layers": 1})
    frozen = dict.fromkeys(names[:2], 21)
    changes = {"without_gradient": 3, "untracked_parameters": 77, "frozen": frozen, "weights": "best average"}
    found = run.end(stop_reason="held-out loss", **changes)
    tokens = 16
    run_flops = tokens * N * (21 * 36 + 1 * (2 * 4 + 4 * 6) + 8 * (2 * 2 + 4 * 6))
    assert found.flops.run == run_flops
    assert found.flops.baseline_same_length == tokens * N * 36 * 30
    assert found.flops.baseline_full_schedule == tokens * N * 36 * 100
    assert found.flops.fraction == run_flops / (tokens * N * 36 * 100)
    assert found.seconds == Seconds(52.0, 52.0, 0.0, 0.0, 0.0)
    assert found.towers == {"language": TowerCount(6, 2)}
    assert found.skipped_layers == [SkippedLayers(22, {"layers": 1})]
    assert (found.tracked_matrices, found.frozen, found.without_gradient) == (6, 2, 3)
    assert (found.tracked_parameters, found.untracked_parameters) == (6 * N, 77)
    assert (found.steps, found.total_steps, found.stop_reason) == (30, 100, "held-out loss")
    assert (found.metric, found.settings, found.environment) == ("grad_change", {"tau": 0.5}, ENVIRONMENT)
    assert found.speedup.cheaper_steps.ratio == pytest.approx(30 * 2.0 / (25 * 2.0 + 5 * 1.0))
    assert found.speedup.steps_not_run.steps == 70
    assert found.heldout is None and found.weights == "best average"


def test_overhead_is_per_step_and_of_training(tmp_path, now):
    run = ToyRun(tmp_path, now)
    for _ in range(10):
        now[0] += 0.5
        run.run.clock.add_overhead(0.5)
        run.step(seconds=2.0)
    run.run.end()
    run.run.clock.add_overhead(5.0)
    found = run.end()
    assert found.seconds == Seconds(30.0, 20.0, 0.0, 0.0, 10.0)
    assert (found.overhead.ms_per_step, found.overhead.fraction) == (1000.0, 10 / 30)


def test_forward_passes_that_a_cache_saves_are_deducted(tmp_path, now):
    """Batches have 3 and 5 patches in turns, and are read from step 4 on. Layers that are not tracked were not counted
    to begin with."""
    vision = [matrix(f"v.{i}.fc1", i, "fc1", "vision", "v") for i in range(3)]
    matrices = {m.name: m for m in (*vision, matrix("layers.0.q_proj"), matrix("layers.1.q_proj", 1))}
    found = []
    for reads in (False, True):
        state, run = None, ToyRun(tmp_path / str(reads), now, matrices)
        for step in range(1, 7):
            if step == 5:  # resumed
                state = {"report": run.report.state_dict(), "clock": run.run.clock.state_dict()}
                run = ToyRun(tmp_path / str(reads), now, matrices, json.loads(json.dumps(state)), step=4)
            batch = {"input_ids": torch.ones(2, 4), "pixel_values": torch.ones(3 if step % 2 else 5, 7)}
            run.report.count_batch(batch, None)
            if reads and step >= 4:
                run.report.count_read({"v": 2, "layers": 1, "untracked": 9} if step == 6 else {"v": 2})
            run.report.record(step, [], {}, {"v": 2, "layers": 1})
            run.run.step(1.0)
        found.append(run.end().flops)
    without, with_cache = found
    assert without.run - with_cache.run == 2 * N * (2 * (5 + 3 + 5) + 8)
    assert with_cache.baseline_full_schedule == without.baseline_full_schedule
    assert with_cache.fraction == pytest.approx(with_cache.run / with_cache.baseline_full_schedule)


def test_heldout_measurements_cost_forward_passes(tmp_path, now):
    run = ToyRun(tmp_path, now)
    for _ in range(10):
        run.step(rows=4, length=8)
    run.report.record_heldout("loss", 2.0, 12)
    run.report.record_heldout("loss", 1.5, 12)
    found = run.end(heldout_examples=12, heldout_every=5, best_step=10, best_score=1.5)
    assert found.flops.run - found.flops.baseline_same_length == 24 * 8 * 6 * 2 * N
    assert found.heldout == Heldout("loss", 12, 5, 2, 24 / 40, 10, 1.5)


def test_the_gain_and_the_flops_of_the_same_steps(tmp_path, now):
    """Layer 0 freezes in step 3 and is skipped from step 4 on."""
    run = ToyRun(tmp_path, now)
    names, layer = list(run.matrices), "language/layers/{}".format
    live, one_frozen = {layer(i): i + 1.0 for i in range(3)}, {layer(i): i + 1.0 for i in (1, 2)}
    run.step()
    run.step(gains=live)
    run.step(names[:2], skipped={"layers": 1}, gains=live)
    for _ in range(2):
        run.step(skipped={"layers": 1}, gains=one_frozen)
    found = run.end(frozen=dict.fromkeys(names[:2], 3)).gain
    assert (found.steps, found.total) == (4, 2 * 6 + 2 * 5)
    # Measured at steps 2 to 5, of which the last two are cheaper.
    whole, skipped = 2 * 3 * 2, 2 * 2
    total = 4 * 2 * whole + 2 * whole + 2 * skipped
    assert [share.gain for share in found.layers.values()] == pytest.approx([2 / 22, 8 / 22, 12 / 22])
    cost = [(2 * whole + 2 * last) / total for last in (skipped, whole, whole)]
    assert [share.cost for share in found.layers.values()] == pytest.approx(cost)
    assert found.towers["language"].gain == found.towers["language"].cost == 1.0


def test_towers_cost_as_much_as_their_tokens_if_all_are_counted(tmp_path, now):
    vision = matrix("vision.0.fc1", 0, "fc1", "vision", "vision")
    matrices = {m.name: m for m in (vision, matrix("layers.0.q_proj"))}
    shares = []
    for pixels in ({"pixel_values": torch.ones(32, 5)}, {"images": torch.ones(32, 5)}):
        run = ToyRun(tmp_path, now, matrices)
        run.report.count_batch({"input_ids": torch.ones(2, 48)} | pixels, None)
        run.report.record(2, [], {}, {}, {"vision/vision/0": 1.0, "language/layers/0": 1.0})
        run.run.step(1.0)
        shares.append(run.end().gain.towers["vision"].cost)
    assert shares == [32 / 128, 1 / 2]


def test_run_flops_of_steps_with_fewer_batches(tmp_path, now):
    """The last step of an epoch accumulates what is left of it."""
    run = ToyRun(tmp_path, now)
    for batches in (3, 3, 1):
        for _ in range(batches - 1):
            run.report.count_batch({"input_ids": torch.ones(2, 8)}, None)
        run.step()
    assert run.end().flops.run == pytest.approx(7 * 16 * 36 * N)


def test_a_run_without_countable_tokens_has_its_fraction(tmp_path, now):
    """Issue 12, 19: no tokens counted cost the finished run."""
    run = ToyRun(tmp_path, now)
    for step in range(1, 51):
        run.report.count_batch({"pixels": torch.ones(3)}, None)
        run.report.record(step, [], {}, {})
        run.run.step(1.0)
    run.report.record_heldout("loss", 1.0, 4)
    found = run.end(heldout_examples=4, heldout_every=50)
    assert found.flops == Flops(None, None, None, 0.5)
    assert found.heldout.passes_per_training_example is None
    run.report.write(found)


def test_a_run_that_ends_before_its_first_step(tmp_path, now):
    """Issue 12, 23."""
    run = ToyRun(tmp_path, now)
    found = run.end()
    assert found.speedup == Speedup() and found.overhead.ms_per_step is None
    run.report.write(found)
    assert "0 of 100 steps" in format_summary(found)
    facts = {"environment": ENVIRONMENT, "scores": {}, "warmup_steps": 0, "argv": [], "scored_with": {}}
    assert run_result(None, run.run.clock, steps=0, total_steps=100, **facts).flops == 0.0


def test_a_schedule_longer_than_the_data_is_no_saving(tmp_path, now):
    """Issue 12, 18."""
    run = ToyRun(tmp_path, now)
    for _ in range(20):
        run.step()
    found = run.end(stop_reason="data ended")
    assert found.flops.fraction == 1.0
    assert found.speedup.steps_not_run.steps == 0 and found.speedup.against_full_schedule == 1.0
    assert found.total_steps == 100


def test_a_run_that_diverged_has_no_speedup(tmp_path, now):
    """Issue 12, 11: "all matrices frozen", "5.00x" and NaN weights."""
    run = ToyRun(tmp_path, now)
    for _ in range(20):
        run.step()
    found = run.end(diverged_at=3, stop_reason="diverged", best_score=None, heldout_every=5, best_step=0)
    assert found.speedup == Speedup() and found.flops.fraction is None
    assert found.overhead.ms_per_step is None and found.overhead.fraction is None
    assert found.heldout.best_score is None and found.heldout.best_step is None
    text = format_summary(found)
    assert "diverged at step 3" in text and "speed-up" not in text
    facts = {"environment": ENVIRONMENT, "warmup_steps": 0, "argv": [], "scored_with": {}}
    result = run_result(None, run.run.clock, steps=20, total_steps=100, scores={}, diverged_at=3, **facts)
    assert result.flops is None and result.diverged_at == 3


# ---- files ----


def strict(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_the_files_of_a_run(tmp_path, now):
    run = ToyRun(tmp_path / "grades", now)
    for _ in range(20):
        run.step(values=dict.fromkeys(run.matrices, 1.0), gains={"language/layers/0": 0.5})
    run.step(list(run.matrices))
    found = run.end(frozen=dict.fromkeys(run.matrices, 21))
    found.results = {"final/test_loss": float("nan"), "final/exact_match": np.float32(0.5)}
    run.report.write(found)
    folder = tmp_path / "grades"
    names = {
        "events.jsonl",
        "heldout.jsonl",
        "metrics.jsonl",
        "history.parquet",
        "summary.json",
        "timeline.png",
        "report.html",
    }
    names |= {"gain.parquet", "gain.png"}
    assert {path.name for path in folder.iterdir()} == names
    written = strict(folder / "summary.json")
    assert written == found.to_json()
    assert written["gain"]["towers"] == {"language": {"gain": 1.0, "error": 0.0, "cost": 1.0}}
    assert written["results"] == {"final/test_loss": None, "final/exact_match": 0.5}
    assert written["seconds"] == {"total": 21.0, "training": 21.0, "validation": 0.0, "saving": 0.0, "grades": 0.0}
    pixels = imread(folder / "timeline.png")
    assert pixels.shape[1] == 1560 and pixels.shape[0] > 500
    assert len(np.unique(pixels @ np.arange(1, 1 + pixels.shape[-1]))) > 100


def test_files_are_utf_8_whatever_the_terminal_speaks(tmp_path, now, monkeypatch):
    """Issue 12, 19."""
    monkeypatch.setattr("io.text_encoding", lambda encoding, stacklevel=2: encoding or "ascii")
    run = ToyRun(tmp_path, now, settings={"名": "値"}, environment=Environment("模型", "CPU", {}))
    run.step()
    found = run.end()
    run.report.write(found)
    assert strict(tmp_path / "summary.json")["environment"]["model"] == "模型"
    assert "模型" in (tmp_path / "report.html").read_bytes().decode("utf-8")
    assert format_summary(found).isascii()


def test_numbers_that_json_cannot_hold_are_null():
    found = summary(
        settings={"nan": float("nan"), "deep": [{"inf": float("-inf")}, (1, 2.5)], "dtype": torch.float32},
        peak_memory_mib=np.float32(0.5),
        steps=np.int64(3),
    )
    text = json.dumps(found.to_json(), allow_nan=False)
    written = json.loads(text)
    assert written["settings"] == {"nan": None, "deep": [{"inf": None}, [1, 2.5]], "dtype": "torch.float32"}
    assert written["peak_memory_mib"] == 0.5 and written["steps"] == 3


def test_a_killed_run_leaves_no_torn_file(tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    path = tmp_path / "result.json"
    write_json(path, {"steps": 1})
    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"steps": 2})
    assert strict(path) == {"steps": 1}


# ---- result.json and the console ----


FACTS = {"environment": ENVIRONMENT, "warmup_steps": 5, "argv": ["sft.py"], "scored_with": {"seed": 0}}


def test_result_and_summary_cannot_disagree(tmp_path, now):
    """Issue 12, 1: two clocks and two stop reasons."""
    run = ToyRun(tmp_path, now)
    for _ in range(20):
        run.step()
    found = run.end(stop_reason="held-out loss", frozen={"layers.0.q_proj": 3})
    run.run.clock.add_overhead(100.0)  # after the summary: the report itself
    scores = {"final/test_loss": 1.5}
    result = run_result(
        found, run.run.clock, steps=20, total_steps=100, scores=scores, matrices=run.matrices.values(), **FACTS
    )
    written, told = result.to_json(), found.to_json()
    for key in ("steps", "total_steps", "stop_reason", "diverged_at", "seconds", "peak_memory_mib", "environment"):
        assert written[key] == told[key], key
    assert written["flops"] == told["flops"]["fraction"] == 0.2
    assert written["frozen"] == told["frozen"] == 1
    assert written["tracked"][0] == {
        "matrix": "layers.0.q_proj",
        "layer": 0,
        "role": "q_proj",
        "tower": "language",
        "params": N,
    }
    assert len(written["tracked"]) == told["tracked_matrices"]


def test_result_of_a_run_without_grades(now):
    run = Run(now, eval_strategy="steps")
    run.steps(10, 2.0)
    run.evaluate(5.0, loss=float("nan"))
    run.save(3.0)
    run.control.should_training_stop = True  # by a callback
    run.end()
    facts = {"steps": 10, "total_steps": 100, "scores": {"final/test_loss": float("inf")}} | FACTS
    result = run_result(None, run.clock, **facts)
    written = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert written.pop("id") == result.id != run_result(None, run.clock, **facts).id
    assert written.pop("peak_memory_mib") > 0
    assert written == {
        "steps": 10,
        "total_steps": 100,
        "stop_reason": "early stopping",
        "diverged_at": None,
        "seconds": {"total": 28.0, "training": 20.0, "validation": 5.0, "saving": 3.0, "grades": 0.0},
        "flops": 0.1,
        "validation": [{"step": 10, "seconds": 25.0, "eval_loss": None, "dataset": None}],
        "results": {"final/test_loss": None},
        "warmup_steps": 5,
        "environment": {"model": "toy", "device": "CPU, toy", "versions": {"torch": "2.13"}},
        "argv": ["sft.py"],
        "scored_with": {"seed": 0},
        "frozen": 0,
        "tracked": [],
    }


def test_a_stream_that_ended_is_a_whole_baseline(now):
    run = Run(now)
    run.steps(10, 2.0)
    run.end()  # nobody asked for it
    result = run_result(None, run.clock, steps=10, total_steps=100, scores={}, **FACTS)
    assert (result.stop_reason, result.flops) == ("data ended", 1.0)


def test_the_summary_on_the_console():
    text = format_summary(summary())
    assert max(map(len, text.splitlines())) <= 80
    assert (
        text
        == """\
GradES: 30 of 100 steps; all matrices frozen
  weights   best average, of step 25: held-out loss 1.2346
  frozen    6 of 6 matrices
  time      70.0 s: training 50.1, GradES 1.9, validation 10.0, saving 8.0
  speed-up  2.50x (+/- 0.10) against the whole schedule: steps 1.03x as fast,
            588 steps not run (31.0 s), validation not run (4.0 s)
  FLOPs     30 % of the whole schedule's
  held-out  7 measurements of 64 examples, 1.4 % of the training examples,
            forward only
  gain      The vision tower has 12 % (+/- 1) of the gain for 25 % of the FLOPs;
            the language tower has 88 % (+/- 1) of the gain for 75 % of the
            FLOPs, over the 28 steps measured.
  memory    812 MiB at most, on CPU, toy"""
    )
    short = format_summary(
        summary(heldout=None, weights="last", peak_memory_mib=None, speedup=Speedup(), without_gradient=2)
    )
    assert "6 of 6 matrices (2 never got a gradient)" in short
    assert "held-out" not in short and "  weights   last\n" in short and "  memory    not measured at most" in short
    assert "speed-up  not measurable: steps before" in short


def test_what_froze_in_one_line(tmp_path, now):
    run = ToyRun(tmp_path, now)
    names = list(run.matrices)
    events = run.step(names[:4])
    assert run.report.console_line(1, events) == ("step 1: froze language layers 0 to 1; 4 of 6 frozen")
    assert run.report.console_line(2, run.step(names[4:5])) == "step 2: froze language 2 q_proj; 5 of 6 frozen"


# ---- resuming ----


def scenario(run, first, last):
    logs = []
    for step in range(first, last + 1):
        values = {name: step + i for i, name in enumerate(run.matrices)}
        frozen = {12: ["layers.0.q_proj"], 25: ["layers.0.down_proj", "layers.2.q_proj"]}.get(step, [])
        run.step(frozen, values, {"layers": 1} if step >= 25 else {}, seconds=2.0 if step < 25 else 1.5)
        if step % 7 == 0:
            run.report.record_heldout("loss", 10 / step, 4)
        if step % 4 == 0:
            logs.append(run.report.logs())
    return logs


def test_a_resumed_report_ends_as_the_straight_one(tmp_path, now):
    outcome = {"frozen": {}, "heldout_every": 7, "heldout_examples": 4}
    straight = ToyRun(tmp_path / "straight", now)
    expected = scenario(straight, 1, 50)
    ends = [straight.end(**outcome).to_json()]

    killed = ToyRun(tmp_path / "resumed", now)
    scenario(killed, 1, 21)  # one step after a log, and with a held-out loss that is not logged yet
    killed.report.flush()
    state = {"report": killed.report.state_dict(), "clock": killed.run.clock.state_dict()}
    state = json.loads(json.dumps(state))
    scenario(killed, 22, 27)

    now[0] += 1e6
    resumed = ToyRun(tmp_path / "resumed", now, state=state, step=21)
    assert scenario(resumed, 22, 50) == expected[5:]
    ends.append(resumed.end(**outcome).to_json())
    assert ends[0].pop("peak_memory_mib") and ends[1].pop("peak_memory_mib")
    assert ends[0] == ends[1]
    events = [(tmp_path / name / "events.jsonl").read_text() for name in ("straight", "resumed")]
    assert events[0] == events[1]


# ---- with a real trainer ----


class Reporting(TrainerCallback):
    """Freezes one matrix a step from step 8 on, as far as a report can tell."""

    def __init__(self, directory, model, clock):
        self.matrices = find_matrices(model)
        self.report = RunReport(
            directory,
            self.matrices,
            20,
            metric="none",
            settings={},
            grace_steps=0,
            environment=Environment.gather(model),
            clock=clock,
            checkpointing=False,
        )
        self.events, self.logged = [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        step = state.global_step + 1
        events = [freeze(self.matrices, list(self.matrices)[step - 8], step)] if step >= 8 else []
        self.events += events
        self.report.record(step, events, {}, {})

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append(self.report.logs())


def train(trainer_class, directory, model, arguments, dataset, **kwargs):
    clock = RunClock()
    reporting = Reporting(directory / "grades", model, clock)

    class Counting(trainer_class):
        def training_step(self, model, inputs, *args, **kwargs):
            reporting.report.count_batch(inputs, getattr(model, "config", None))
            return super().training_step(model, inputs, *args, **kwargs)

    callbacks = [clock, reporting]
    defaults = {"max_steps": 20, "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    defaults |= {"disable_tqdm": True}
    arguments = arguments(output_dir=str(directory), per_device_train_batch_size=2, **defaults)
    trainer = Counting(model, arguments, train_dataset=dataset, callbacks=callbacks, **kwargs)
    trainer.train()
    outcome = Outcome({event.matrix: event.step for event in reporting.events}, "schedule finished", "last", 20)
    found = reporting.report.summarize(outcome)
    reporting.report.write(found)
    return reporting.logged, found


def test_the_report_of_a_trainer_s_run(tmp_path):
    model, tokenizer = builtin.tiny_qwen3()
    rows = Dataset.from_dict({"prompt": ["1 May 1998 "] * 8, "completion": ["1998-05-01"] * 8})
    arguments = lambda **kwargs: SFTConfig(bf16=False, gradient_checkpointing=False, **kwargs)  # noqa: E731
    logged, found = train(SFTTrainer, tmp_path, model, arguments, rows, processing_class=tokenizer)
    fractions = [row["grades/frozen_fraction"] for row in logged]
    assert fractions == [max(0, step - 7) / 28 for step in (*range(1, 21), 20)]  # and at the end
    assert found.frozen == 13 and found.steps == 20
    tokens = 2 * len(tokenizer("1 May 1998 1998-05-01")["input_ids"] + [tokenizer.eos_token_id])
    assert found.flops.baseline_same_length == 20 * 6 * tokens * found.tracked_parameters
    assert found.flops.baseline_same_length * 4 / 6 < found.flops.run < found.flops.baseline_same_length
    seconds = found.seconds
    assert seconds.total == pytest.approx(seconds.training + seconds.grades) and seconds.total > 0


class Plain(nn.Module):
    """Layers without a config, whose batches hold no tokens."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(8))

    def forward(self, x, labels=None):
        for layer in self.layers:
            x = layer(x)
        return {"loss": (x - labels).square().mean()}


def test_the_report_of_a_plain_module(tmp_path):
    """Issue 12, 19: no `.config` and no tokens counted cost the finished run."""
    rows = Dataset.from_dict({"x": torch.ones(8, 4).tolist(), "labels": torch.ones(8, 4).tolist()})
    logged, found = train(T.Trainer, tmp_path, Plain(), T.TrainingArguments, rows)
    assert found.environment.model == "Plain" and found.frozen == 13
    assert found.flops.run is None and 4 / 6 < found.flops.fraction < 1
    assert logged[0]["grades/step_speedup_predicted"] == 1 < logged[-1]["grades/step_speedup_predicted"]
