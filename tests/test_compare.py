"""The comparison of runs: its arithmetic on figures made by hand, and a real one, interrupted and taken up again."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from grades_trl.recipe import data
from grades_trl.recipe.arguments import parse
from grades_trl.recipe.comparison import draw, markdown, replayed, summarize

ROOT = Path(__file__).parents[1]


def cell(
    arm, seed, *, steps=100, total_steps=100, test=1.0, validation=1.0, seconds=100.0, flops=1.0, history=(), **x
):
    return {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "total_steps": total_steps,
        "flops": flops,
        "seconds": {"total": seconds, "training": seconds - 30, "validation": 20.0, "saving": 6.0, "grades": 4.0},
        "validation": [{"step": i, "seconds": 9.0 * i, "eval_loss": loss} for i, loss in enumerate(history)],
        "results": {"final/test_loss": test, "final/validation_loss": validation, **x},
        "peak_memory_mib": 1000.0 + seed,
    }


CELLS = [
    cell("plain", 0, test=0.5, history=(0.9, 0.4, 0.45), **{"final/exact_match": 0.9}),
    cell("grades", 0, steps=60, test=0.6, validation=0.4, seconds=50.0, flops=0.5),
    cell("shortened", 0, steps=60, total_steps=60, test=0.55, seconds=60.0),
    cell("early_stopping", 0, steps=70, test=0.7, flops=0.7),
    cell("plain", 1, test=0.7, history=(0.9, 0.4), **{"final/exact_match": 0.8}),
    cell("grades", 1, steps=40, test=0.4, validation=0.41, seconds=25.0, flops=0.3),
    cell("shortened", 1, steps=40, total_steps=40, test=0.45, seconds=40.0),
    {"arm": "random", "seed": 0, "skipped": "nothing froze"},
    {"arm": "random", "seed": 1, "skipped": "nothing froze"},
]


def test_summary_by_hand():
    summary = summarize(CELLS)
    arms = summary["arms"]
    assert list(arms) == ["plain", "grades", "shortened", "early_stopping", "random"]
    assert arms["plain"]["test_loss"] == {"mean": pytest.approx(0.6), "sd": pytest.approx(0.1 * 2**0.5)}
    assert arms["plain"]["exact_match"]["mean"] == pytest.approx(0.85)
    assert arms["grades"]["exact_match"] == {"mean": None, "sd": None}
    assert arms["grades"]["steps"]["mean"] == 50
    assert arms["grades"]["flops"]["mean"] == pytest.approx(0.4)
    assert arms["shortened"]["flops"]["mean"] == pytest.approx(0.5)  # all of a schedule of 60 and 40, of 100
    assert arms["grades"]["plain_over_this"]["mean"] == pytest.approx(3.0)  # 2x and 4x
    assert arms["grades"]["validation_seconds"]["mean"] == 20
    assert arms["early_stopping"]["test_loss"] == {"mean": 0.7, "sd": None}
    assert arms["early_stopping"]["runs"] == 1
    assert arms["random"] == {"skipped": "nothing froze"}
    first, second = summary["seeds"]
    assert first["plain_best_validation_loss"] == 0.4
    assert (first["as_good"], second["as_good"]) == (True, False)
    assert (first["share_of_plain_time"], second["share_of_plain_time"]) == (0.5, 0.25)
    assert first["grades_minus_shortened"] == pytest.approx(0.05)
    assert first["grades_minus_early_stopping"] == pytest.approx(-0.1)
    assert second["grades_minus_early_stopping"] is None


def test_tables_and_picture(tmp_path):
    summary = summarize(CELLS)
    lines = [[column.strip() for column in line.split("|")[1:-1]] for line in markdown(summary).splitlines()]
    assert lines[2] == [
        "plain",
        "100",
        "0.6000 ± 0.1414",
        "85.0 ± 7.1",
        "100.0",
        "20.0",
        "4.00",
        "1.00",
        "1,000",
        "1.00x",
    ]
    assert lines[3][:5] == ["grades", "50", "0.5000 ± 0.1414", "-", "37.5"]
    assert lines[5][2] == "0.7000"
    assert lines[6][:2] == ["random", "not applicable: nothing froze"]
    assert lines[-2] == ["0", "0.4000", "0.4000", "yes", "50%", "+0.0500", "-0.1000"]
    assert lines[-1] == ["1", "0.4000", "0.4100", "no", "25%", "-0.0500", "-"]
    draw(CELLS, summary, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_a_comparison_without_plain_or_validation():
    summary = summarize([cell("grades", 3, steps=60, flops=0.5), cell("paper", 3, steps=90, flops=0.8)])
    assert summary["arms"]["paper"]["flops"]["mean"] == 0.8
    assert set(summary["seeds"][0].values()) == {3, 1.0, None}
    assert "| 3 " in markdown(summary)


def test_replayed_keeps_the_steps_and_gives_them_to_other_matrices():
    watched = [
        {"matrix": f"{tower}.{layer}.{role}", "tower": tower, "layer": layer}
        for tower in ("language", "vision")
        for layer in (0, 1)
        for role in ("q", "k")
    ]
    events = [{"step": step, "tau": 0.5, **watched[i]} for step, i in ((5, 3), (5, 2), (9, 7))]
    bottom_up = replayed(events, watched, "bottom_up", seed=0)
    assert [(e["step"], e["matrix"]) for e in bottom_up] == [(5, "vision.0.q"), (5, "vision.0.k"), (9, "vision.1.q")]
    assert bottom_up[0] == {"step": 5, "tau": 0.5, "matrix": "vision.0.q", "tower": "vision", "layer": 0}
    drawn = {tuple(e["matrix"] for e in replayed(events, watched, "random", seed)) for seed in range(50)}
    assert all(len(set(names)) == 3 for names in drawn)
    assert {name for names in drawn for name in names} == {m["matrix"] for m in watched}  # also those that never froze
    assert replayed(events, watched, "random", 1) == replayed(events, watched, "random", 1)


def test_validation_and_test_share_no_row():
    rows = Dataset.from_dict({"text": list("abcde")})
    splits = data.with_validation(DatasetDict(train=rows, test=rows, test_formats=rows))
    assert {split: "".join(rows["text"]) for split, rows in splits.items()} == {
        "train": "abcde",
        "validation": "ab",
        "test": "cde",
        "test_formats": "abcde",
    }
    few = data.with_validation(DatasetDict(train=rows, test=rows), limit=1)
    assert (few["validation"]["text"], few["test"]["text"]) == (["a"], ["c"])
    with pytest.raises(data.DataError, match="1 row is held out, expected at least 2"):
        data.with_validation(DatasetDict(train=rows, test=rows.select([0])))


def compare(cwd, *flags):
    command = f"{ROOT}/recipes/compare.py --recipe sft_text --config {ROOT}/configs/demo_text.yaml --seeds 0"
    command += " --output_dir out --max_steps 8 --eval_steps 3 --per_device_train_batch_size 4 --max_train_samples 32"
    command += " --generate 2 --samples 0 --max_new_tokens 2 --report_to none"
    command += " --metric grad_norm --alpha 0.5 --patience 1"
    return subprocess.run(
        [sys.executable, *command.split(), *map(str, flags)], cwd=cwd, capture_output=True, text=True, timeout=300
    )


def test_a_real_comparison_taken_up_again(tmp_path):
    flags = ["--tau", 1e9, "--arms", "plain", "grades", "random"]
    first = compare(tmp_path, *flags)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.count(" seed 0: ") == 3
    assert "earlier run" not in first.stdout
    out = tmp_path / "out"
    plain, grades, replay = (
        json.loads((out / f"{arm}-seed0" / "result.json").read_text()) for arm in ("plain", "grades", "random")
    )

    for result in (plain, grades):
        seconds = result["seconds"]
        assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"])
        assert seconds["training"] > 0
        assert seconds["validation"] > 0
        assert result["total_steps"] == 8
        assert result["argv"][-4:-1] == ["--seed", "0", "--output_dir"]
        assert result["versions"]["torch"]
        assert result["peak_memory_mib"] > 0
        assert {"final/test_loss", "final/validation_loss", "final/exact_match_test"} <= set(result["results"])
        assert result["results"]["final/test_loss"] != result["results"]["final/validation_loss"]
    assert (plain["steps"], plain["stop_reason"], plain["flops"]) == (8, "schedule finished", 1.0)
    assert [entry["step"] for entry in plain["validation"]] == [3, 6, 8]
    assert plain["validation"][-1]["eval_loss"] == pytest.approx(plain["results"]["final/validation_loss"])
    assert plain["seconds"]["grades"] == 0
    assert "matrices" not in plain
    assert (grades["steps"], grades["stop_reason"]) == (5, "all matrices frozen")
    assert grades["matrices"] == {"frozen": 28, "total": 28}
    assert len(grades["watched"]) == 28
    assert grades["flops"] == pytest.approx(5 / 8)  # all froze in the last step
    assert grades["seconds"]["grades"] > 0
    assert grades["validation"][0]["eval_loss"] == plain["validation"][0]["eval_loss"]  # same data, same order
    assert (replay["steps"], replay["stop_reason"]) == (grades["steps"], grades["stop_reason"])
    named = [
        [json.loads(line)["matrix"] for line in (out / file).read_text().splitlines()]
        for file in ("grades-seed0/grades/events.jsonl", "random-seed0/events.jsonl")
    ]
    assert named[0] != named[1]
    assert sorted(named[0]) == sorted(named[1])
    record = json.loads((out / "compare.json").read_text())
    assert [c["arm"] for c in record["cells"]] == ["plain", "grades", "random"]
    assert record["arms"]["grades"]["steps"]["mean"] == 5
    assert (out / "compare.png").stat().st_size > 10_000
    assert (out / "compare.md").read_text() in first.stdout

    shutil.rmtree(out / "plain-seed0")
    before = {arm: (out / f"{arm}-seed0" / "result.json").stat().st_mtime_ns for arm in ("grades", "random")}
    second = compare(tmp_path, *flags)
    assert second.stdout.count("earlier run") == 2, second.stdout + second.stderr
    assert (out / "plain-seed0" / "result.json").exists()
    third = compare(tmp_path, *flags)
    assert third.stdout.count("earlier run") == 3
    assert before == {arm: (out / f"{arm}-seed0" / "result.json").stat().st_mtime_ns for arm in before}

    failed = compare(tmp_path, "--arms", "plain", "grades", "--tau", "often")  # a changed flag: plain is run anew
    assert failed.returncode != 0
    assert "plain, seed 0 failed. The end of out/plain-seed0/log.txt" in failed.stderr
    assert "tau is 'often'; expected a number" in failed.stderr


def test_arms_that_need_grades(tmp_path):
    failed = compare(tmp_path, "--arms", "plain", "shortened")
    assert failed.returncode != 0
    assert "shortened need the GradES run of the same seed: add grades to --arms" in failed.stderr


@pytest.mark.parametrize("arm", ["plain", "grades", "shortened", "early_stopping", "together", "random", "paper"])
def test_the_recipe_understands_the_flags_of_every_arm(arm, tmp_path):
    arm_flags = runpy.run_path(str(ROOT / "recipes" / "compare.py"))["arm_flags"]
    made_by = {"steps": 50, "total_steps": 100, "warmup_steps": 10}
    (tmp_path / "events.jsonl").touch()  # for the replay
    config = str(ROOT / "configs" / "demo_text.yaml")
    flags = ["--config", config, "--report_to", "none", *arm_flags(arm, tmp_path, made_by, '{"language": 6.0}')]
    recipe, training, _, grades = parse("", Path(config), flags)
    assert recipe.grades == (arm in ("grades", "together", "random", "paper"))
    assert (training.max_steps, training.warmup_steps) == ((50, 5) if arm == "shortened" else (500, 50))
    assert grades.metric == ("grad_change" if arm == "paper" else "heldout_gain")
    assert grades.tau == {"together": -1e9, "paper": {"language": 6.0}}.get(arm, "auto")
    assert (grades.replay is not None) == (arm == "random")
