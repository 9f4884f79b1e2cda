"""The comparison of runs: its arithmetic by hand, what it takes over from earlier runs, and a real one."""

import importlib.util
import json
import runpy
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict
from PIL import Image

from grades_trl.recipe import data
from grades_trl.recipe.arguments import configure_bema, parse
from grades_trl.recipe.comparison import (
    COLORS_AND_MARKS,
    RUN_ID,
    VARIANTS,
    draw,
    flops_of_run,
    format_comparison,
    markdown,
    matched_steps,
    reordered,
    split_flags,
    summarize,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def compare_py():
    """recipes/compare.py as a module."""
    spec = importlib.util.spec_from_file_location("compare", ROOT / "recipes" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_of(
    variant,
    seed,
    *,
    steps=100,
    total_steps=100,
    test=1.0,
    validation=1.0,
    seconds=100.0,
    flops=1.0,
    history=(),
    choice=1.0,
    **x,
):
    return {
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "total_steps": total_steps,
        "flops": flops,
        "choice": {"step": choice},
        "seconds": {"total": seconds, "training": seconds - 30, "validation": 20.0, "saving": 6.0, "grades": 4.0},
        "validation": [{"step": i, "seconds": 9.0 * i, "eval_loss": loss} for i, loss in enumerate(history)],
        "results": {"final/test_loss": test, "final/validation_loss": validation, **x},
        "peak_memory_mib": 1000.0 + seed,
    }


RUNS = [
    run_of("baseline", 0, test=0.5, history=(0.9, 0.4, 0.45), **{"final/exact_match": 0.9}),
    run_of("grades", 0, steps=60, test=0.6, validation=0.4, seconds=50.0, flops=0.5),
    run_of("baseline_matched_flops", 0, steps=60, total_steps=60, test=0.55, seconds=60.0),
    run_of("early_stopping", 0, steps=70, test=0.7, flops=0.7),
    run_of("baseline", 1, test=0.7, history=(0.9, 0.4), **{"final/exact_match": 0.8}),
    run_of("grades", 1, steps=40, test=0.4, validation=0.41, seconds=25.0, flops=0.3),
    run_of("baseline_matched_flops", 1, steps=40, total_steps=40, test=0.45, seconds=40.0),
    {"variant": "random_order", "seed": 0, "skipped": "nothing froze"},
    {"variant": "random_order", "seed": 1, "skipped": "nothing froze"},
]


# Arithmetic


def test_summary_by_hand():
    summary = summarize(RUNS)
    variants = summary["variants"]
    assert list(variants) == ["baseline", "grades", "baseline_matched_flops", "early_stopping", "random_order"]
    assert variants["baseline"]["test_loss"] == {"mean": pytest.approx(0.6), "sd": pytest.approx(0.1 * 2**0.5)}
    assert variants["baseline"]["exact_match"]["mean"] == pytest.approx(0.85)
    assert variants["grades"]["exact_match"] == {"mean": None, "sd": None}
    assert variants["grades"]["steps"]["mean"] == 50
    assert variants["grades"]["flops"]["mean"] == pytest.approx(0.4)
    # All of a schedule of 60 and of 40 steps, where the whole one has 100
    assert variants["baseline_matched_flops"]["flops"]["mean"] == pytest.approx(0.5)
    assert variants["grades"]["baseline_time_ratio"]["mean"] == pytest.approx(3.0)  # 2x and 4x
    assert variants["grades"]["validation_seconds"]["mean"] == 20
    assert variants["early_stopping"]["test_loss"] == {"mean": 0.7, "sd": None}
    assert variants["early_stopping"]["runs"] == 1
    assert variants["random_order"] == {"skipped": "nothing froze"}
    first, second = summary["seeds"]
    assert first["baseline_best_validation_loss"] == 0.4
    assert (first["as_good"], second["as_good"]) == (True, False)
    assert (first["fraction_of_baseline_time"], second["fraction_of_baseline_time"]) == (0.5, 0.25)
    assert first["grades_minus_matched_flops"] == pytest.approx(0.05)
    assert first["grades_minus_early_stopping"] == pytest.approx(-0.1)
    assert second["grades_minus_early_stopping"] is None


def test_tables_and_figure(tmp_path):
    summary = summarize(RUNS)
    lines = [[column.strip() for column in line.split("|")[1:-1]] for line in markdown(summary).splitlines()]
    baseline = ["baseline", "100", "0.6000 ± 0.1414", "85.0 ± 7.1", "100.0", "20.0", "4.00", "1.00", "1,000", "1.00x"]
    assert lines[2] == baseline
    assert lines[3][:5] == ["grades", "50", "0.5000 ± 0.1414", "-", "37.5"]
    assert lines[6][:2] == ["random_order", "not applicable: nothing froze"]
    assert lines[-2] == ["0", "0.4000", "0.4000", "yes", "50 %", "+0.0500", "-0.1000"]
    assert lines[-1][-1] == "-"
    screen = format_comparison(summary).splitlines()
    assert screen[0].split() == ["variant", "steps", "test", "loss", "exact,", "%", "seconds", "FLOPs"]
    assert screen[1].split() == ["baseline", "100", "0.6000", "±", "0.1414", "85.0", "±", "7.1", "100.0", "1.00"]
    assert screen[2].split() == ["grades", "50", "0.5000", "±", "0.1414", "-", "37.5", "0.40"]
    assert screen[5].split(maxsplit=1) == ["random_order", "not applicable: nothing froze"]
    assert screen[-2].split() == ["0", "0.4000", "0.4000", "50", "%", "+0.0500", "-0.1000"]
    for jobs, panels in ((1, 3), (2, 2)):  # no times of runs that slowed each other down
        path = tmp_path / f"{jobs}.png"
        draw({**summary, "jobs": jobs, "runs": RUNS}, path)
        assert Image.open(path).width == panels * 660


def test_the_tables_on_a_terminal_fit_80_columns():
    """Whatever the numbers, of every variant; what is longer goes on below."""
    runs = [
        run_of(
            *(variant, seed),
            steps=123_456,
            total_steps=1_000_000,
            test=10.1234 + 30 * seed,
            validation=12.5,
            **{"seconds": 100_000.0, "history": (12.5, 11.25), "final/exact_match": 1.0 - 0.5 * seed},
        )
        for variant in VARIANTS
        for seed in (0, 1)
        if variant != "bottom_up"
    ]
    reason = "there is no GradES run to make it from, " * 3
    screen = format_comparison(summarize([*runs, {"variant": "bottom_up", "seed": 0, "skipped": reason}]))
    assert max(map(len, screen.splitlines())) <= 80
    assert reason.strip() in " ".join(screen.split())
    for variant in VARIANTS:
        assert sum(line.startswith(f"{variant} ") for line in screen.splitlines()) == 1
    assert "- early stopping" in screen and "exact, %" in screen


def test_what_was_not_measured_has_no_column_on_a_terminal():
    screen = format_comparison(summarize([run_of("baseline", 3), run_of("grades", 3, steps=60, flops=0.5)]))
    assert "exact" not in screen and "early" not in screen and "time" in screen
    assert "seed" not in format_comparison(summarize([run_of("baseline", 3)]))


def test_a_comparison_without_baseline_or_validation():
    summary = summarize([run_of("grades", 3, steps=60, flops=0.5), run_of("paper", 3, steps=90, flops=0.8)])
    assert summary["variants"]["paper"]["flops"]["mean"] == 0.8
    assert set(summary["seeds"][0].values()) == {3, 1.0, None}
    assert "| 3 " in markdown(summary)


def test_flops_of_a_choice_count_what_does_not_train_too():
    """A step costs 0.8 of one in which everything trains, and the run a quarter of its schedule."""
    half = run_of("baseline", 0, steps=50, flops=0.25, choice=0.8)
    assert flops_of_run(half) == pytest.approx(0.8 * 0.25)
    vision_frozen = run_of("vision_frozen", 0, choice=0.75)
    summary = summarize([run_of("baseline", 0), vision_frozen])
    assert summary["variants"]["vision_frozen"]["flops"]["mean"] == pytest.approx(0.75)
    of_choice = [run_of("baseline", 0, choice=0.8), run_of("vision_frozen", 0, choice=0.6)]
    assert summarize(of_choice)["variants"]["vision_frozen"]["flops"]["mean"] == pytest.approx(0.75)
    assert summarize(of_choice)["variants"]["baseline"]["flops"]["mean"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("grades", "steps"),
    [
        (run_of("grades", 0, steps=60, flops=0.3), 30),
        (run_of("grades", 0, steps=100, flops=1.02), 102),  # nothing froze, and measuring was not free
        (run_of("grades", 0, steps=60, flops=0.3, choice=0.8), round(100 * 0.3)),
        (run_of("grades", 0, steps=1, flops=0.001), 1),
    ],
)
def test_a_baseline_with_the_flops_of_a_grades_run(grades, steps):
    assert matched_steps(grades) == steps
    matched = run_of("baseline_matched_flops", 0, steps=steps, total_steps=steps, choice=0.8)
    whole = run_of("baseline", 0, choice=0.8)
    assert summarize([whole, matched])["variants"]["baseline_matched_flops"]["flops"]["mean"] == pytest.approx(
        steps / 100
    )


def test_every_variant_has_a_color_and_a_place():
    assert COLORS_AND_MARKS.keys() == VARIANTS.keys()
    assert all(len(set(kinds)) == len(VARIANTS) for kinds in zip(*COLORS_AND_MARKS.values(), strict=True))
    runs = [run_of(variant, 0) for variant in reversed(VARIANTS)]
    assert list(summarize(runs)["variants"]) == list(VARIANTS)


def test_reordered_keeps_the_steps_and_gives_them_to_other_matrices():
    tracked = [
        {"matrix": f"{tower}.{layer}.{role}", "tower": tower, "layer": layer}
        for tower in ("language", "vision")
        for layer in (0, 1)
        for role in ("q", "k")
    ]
    events = [{"step": step, "tau": 0.5, **tracked[i]} for step, i in ((5, 3), (5, 2), (9, 7))]
    assert reordered(events, tracked, "bottom_up", seed=0) == [
        {"matrix": "vision.0.q", "step": 5},
        {"matrix": "vision.0.k", "step": 5},
        {"matrix": "vision.1.q", "step": 9},
    ]
    drawn = {tuple(e["matrix"] for e in reordered(events, tracked, "random_order", seed)) for seed in range(50)}
    assert all(len(set(names)) == 3 for names in drawn)
    assert {name for names in drawn for name in names} == {m["matrix"] for m in tracked}  # also those that never froze
    assert reordered(events, tracked, "random_order", 1) == reordered(events, tracked, "random_order", 1)


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


# The flags of the variants


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_recipe_understands_the_flags_of_every_variant(compare_py, variant, tmp_path):
    made_by = run_of("grades", 0, steps=60, flops=0.5) | {"warmup_steps": 10}
    (tmp_path / "schedule.jsonl").touch()
    config = str(ROOT / "configs" / "demo_text.yaml")
    towers = ["vision", "projector", "language"]
    of_variant = compare_py.variant_flags(variant, tmp_path, made_by, '{"language": 6.0}', towers)
    recipe, training, _, grades = parse("", Path(config), ["--config", config, "--report_to", "none", *of_variant])
    with_engine = ("grades", "nothing_frozen", "random_order", "bottom_up", "paper", "vision_frozen")
    assert recipe.grades == (variant in with_engine)
    assert recipe.train_towers == (["projector", "language"] if variant == "vision_frozen" else None)
    assert [type(callback).__name__ for callback in configure_bema(recipe, training)] == ["BEMA"] * (variant == "bema")
    assert (training.max_steps, training.warmup_steps) == ((50, 5) if "matched" in variant else (500, 50))
    is_scheduled = variant in ("random_order", "bottom_up")
    metrics = {"paper": "grad_change", "vision_frozen": "none", "nothing_frozen": "none"}
    assert grades.metric == ("schedule" if is_scheduled else metrics.get(variant, "gain"))
    assert (grades.schedule is not None) == is_scheduled
    assert grades.tau == ({"language": 6.0} if variant == "paper" else None)
    assert grades.sample_fraction == (1 if variant == "paper" else None)
    ends = {"paper": ("all_frozen", "last"), "vision_frozen": ("end_of_schedule", "last")}
    assert (grades.stopping, grades.keep) == ends.get(variant, ("auto", "auto"))


@pytest.mark.parametrize(
    ("recipe_name", "flags", "config", "towers"),
    [
        ("sft_vlm", [], {}, ["projector", "language"]),
        ("sft_vlm", ["--train_towers", "vision", "language", "--use_peft"], {}, ["language"]),
        ("sft_vlm", [], {"train_towers": ["vision", "language"]}, ["language"]),
        ("sft_vlm", ["--train_towers=language", "vision"], {"train_towers": ["vision"]}, ["language"]),
        ("sft_vlm", ["--train_towers", "language"], {}, "what trains is language"),
        ("sft_vlm", ["--train_towers", "vision"], {}, "what trains is vision"),
        ("sft_text", [], {}, "the model has no vision tower"),
    ],
)
def test_the_vision_tower_is_frozen_where_it_would_train(
    compare_py, recipe, tmp_path, recipe_name, flags, config, towers
):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config | {"stopping": "heldout", "max_steps": 8}))
    run = run_variant(compare_py, tmp_path, *flags, variant="vision_frozen", config=str(file), recipe_name=recipe_name)
    if isinstance(towers, str):
        assert (run["skipped"], recipe.commands) == (towers, [])
        return
    (command,) = recipe.commands
    assert [word.partition("=")[0] for word in command].count("--train_towers") == 1
    start = command.index("--train_towers") + 1
    assert command[start : start + len(towers) + 1] == [*towers, "--seed"]
    written = yaml.safe_load((result_file(tmp_path, "vision_frozen").parent / "config.yaml").read_text())
    assert written == {"max_steps": 8}


def test_flags_are_taken_out_with_their_values(compare_py):
    flags = ["--tau", "1e9", "--metric=none", "--max_steps", "8", "--train_towers", "vision", "language", "--use_peft"]
    taken, left = split_flags(flags, ("tau", "metric", "train_towers"))
    assert left == ["--max_steps", "8", "--use_peft"]
    assert taken == ["--tau", "1e9", "--metric=none", "--train_towers", "vision", "language"]


def test_variants_that_need_grades(compare_py, monkeypatch, capsys):
    flags = "compare.py --recipe sft_text --variants baseline baseline_matched_flops random_order"
    monkeypatch.setattr(sys, "argv", flags.split())
    with pytest.raises(SystemExit):
        compare_py.parse()
    assert "baseline_matched_flops, random_order need the GradES run of the same seed" in capsys.readouterr().err


# What is taken over from earlier runs


class Recipe:
    """In place of the process of a recipe: notes the commands, and leaves the result that it is told to."""

    def __init__(self):
        self.commands, self.ids, self.exit_code, self.result = [], [], 0, run_of("", 0)

    def __call__(self, command, run_id, variant, log_file):
        self.commands.append(command)
        self.ids.append(run_id)
        folder = Path(command[command.index("--output_dir") + 1])
        log_file.write_text("line\n" * 30 + "the last line\n")
        if self.result is not None:
            own = {"id": run_id, "diverged_at": None, "stop_reason": "schedule finished", **self.result}
            del own["variant"], own["seed"]  # which only a comparison knows
            (folder / "result.json").write_text(json.dumps(own))
        return self.exit_code


@pytest.fixture
def recipe(compare_py, monkeypatch):
    recipe = Recipe()
    monkeypatch.setattr(compare_py, "run_recipe", recipe)
    return recipe


def run_variant(compare_py, tmp_path, *flags, variant="baseline", grades=None, config=None, recipe_name="sft_text"):
    args = Namespace(recipe=recipe_name, config=config, output_dir=str(tmp_path / "out"), paper_tau="auto")
    return compare_py.run_variant(args, list(flags), variant, 0, grades)


def result_file(tmp_path, variant="baseline"):
    return tmp_path / "out" / f"{variant}-seed0" / "result.json"


def test_a_run_is_taken_over_unless_its_flags_change(compare_py, recipe, tmp_path, capsys):
    first = run_variant(compare_py, tmp_path, "--max_steps", "8")
    assert run_variant(compare_py, tmp_path, "--max_steps", "8") == first
    assert len(recipe.commands) == 1
    assert capsys.readouterr().out.count("(from an earlier run)") == 1
    run_variant(compare_py, tmp_path, "--max_steps", "9")
    assert len(recipe.commands) == 2


def test_a_run_is_repeated_when_a_value_of_its_config_changes(compare_py, recipe, tmp_path):
    config = tmp_path / "run.yaml"
    for text, runs in (("max_steps: 8\n", 1), ("# a comment\nmax_steps: 8\n", 1), ("max_steps: 9\n", 2)):
        config.write_text(text)
        run_variant(compare_py, tmp_path, config=str(config))
        assert len(recipe.commands) == runs, text


def test_a_result_of_another_process_is_not_taken_over(compare_py, recipe, tmp_path):
    """A recipe that an earlier comparison left behind may finish at any time."""
    run_variant(compare_py, tmp_path)
    orphan = json.loads(result_file(tmp_path).read_text()) | {"id": "an earlier one", "steps": 400}
    result_file(tmp_path).write_text(json.dumps(orphan))
    assert run_variant(compare_py, tmp_path)["steps"] == 100
    assert len(recipe.commands) == 2
    assert len(set(recipe.ids)) == 2


def test_a_result_that_another_process_writes_during_the_run_is_an_error(compare_py, recipe, tmp_path):
    recipe.result |= {"id": "an earlier one"}
    with pytest.raises(SystemExit, match="baseline, seed 0 failed"):
        run_variant(compare_py, tmp_path)


@pytest.mark.parametrize("torn", ["result.json", "run.json"])
def test_a_torn_file_is_redone(compare_py, recipe, tmp_path, torn):
    run_variant(compare_py, tmp_path)
    file = result_file(tmp_path).with_name(torn)
    file.write_text(file.read_text()[:50])
    run_variant(compare_py, tmp_path)
    assert len(recipe.commands) == 2
    assert json.loads(result_file(tmp_path).read_text())["id"] == recipe.ids[1]


def test_a_folder_of_something_else_is_left_alone(compare_py, recipe, tmp_path):
    folder = result_file(tmp_path).parent
    folder.mkdir(parents=True)
    run_variant(compare_py, tmp_path)  # empty: an earlier comparison was killed here
    (folder / "run.json").unlink()
    with pytest.raises(ValueError, match="was not made by a comparison: choose another --output_dir"):
        run_variant(compare_py, tmp_path)


@pytest.mark.parametrize(("exit_code", "result"), [(1, run_of("", 0)), (0, None)])
def test_a_run_that_fails_shows_the_end_of_its_log(compare_py, recipe, tmp_path, exit_code, result):
    recipe.exit_code, recipe.result = exit_code, result
    with pytest.raises(
        SystemExit, match=r"baseline, seed 0 failed. The end of .*log\.txt:\n\n(line\n){19}the last line"
    ):
        run_variant(compare_py, tmp_path)


def test_a_run_that_diverges_is_skipped_with_the_reason(compare_py, recipe, tmp_path):
    recipe.exit_code, recipe.result = 1, run_of("", 0, test=None, validation=None) | {"diverged_at": 7}
    grades = run_variant(compare_py, tmp_path, variant="grades")
    assert grades["skipped"] == "diverged at step 7"
    shortened = run_variant(compare_py, tmp_path, variant="baseline_matched_flops", grades=grades)
    assert shortened["skipped"] == "there is no GradES run to make it from"
    assert summarize([grades, shortened])["variants"]["grades"] == {"skipped": "diverged at step 7"}


def test_a_reordered_run_gets_a_schedule_in_place_of_a_metric(compare_py, recipe, tmp_path):
    config = tmp_path / "paper.yaml"
    config.write_text("metric: weight_change\ntau: 1.5\nalpha: 0.3\nstopping: all_frozen\nmax_steps: 8\n")
    flags = ["--patience", "3", "--learning_rate", "0.1"]
    tracked = [{"matrix": name, "tower": "language", "layer": i} for i, name in enumerate("ab")]
    grades = run_variant(compare_py, tmp_path, *flags, variant="grades", config=str(config)) | {"tracked": tracked}
    events = result_file(tmp_path, "grades").parent / "grades" / "events.jsonl"
    events.parent.mkdir()
    events.write_text('{"matrix": "b", "step": 3, "value": 0.1}\n')
    run_variant(compare_py, tmp_path, *flags, variant="bottom_up", grades=grades, config=str(config))
    folder = result_file(tmp_path, "bottom_up").parent
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"stopping": "all_frozen", "max_steps": 8}
    assert (folder / "schedule.jsonl").read_text() == '{"matrix": "a", "step": 3}\n'
    command = recipe.commands[-1]
    assert "--patience" not in command and "--learning_rate" in command
    assert command[:5] == [sys.executable, "-P", "-m", "grades_trl.cli", "text"]
    _, _, _, parsed = parse("", ROOT / "unused", [*command[5:], "--report_to", "none"])
    assert (parsed.metric, parsed.schedule) == ("schedule", str(folder / "schedule.jsonl"))

    events.write_text("")
    nothing = run_variant(compare_py, tmp_path, *flags, variant="bottom_up", grades=grades, config=str(config))
    assert nothing["skipped"] == "nothing froze"


# Processes

CHILD = f"""
import os, socket, time
from grades_trl.recipe.comparison import exit_with_comparison
exit_with_comparison()
connection = socket.create_connection(("127.0.0.1", int(os.environ["PORT"])))
connection.sendall(os.environ["{RUN_ID}"].encode())
time.sleep(600)
"""


def test_a_recipe_ends_with_its_comparison(tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text(CHILD)
    parent = f"""
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("compare", {str(ROOT / "recipes" / "compare.py")!r})
compare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare)
child = [sys.executable, {str(tmp_path / "child.py")!r}]
compare.run_recipe(child, "the id", "grades", Path({str(tmp_path / "log")!r}))
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        monkeypatch.setenv("PORT", str(server.getsockname()[1]))
        comparison = subprocess.Popen([sys.executable, "-c", parent])
        connection, _ = server.accept()
        connection.settimeout(60)
        assert connection.recv(100) == b"the id"
        comparison.kill()
        comparison.wait()
        assert connection.recv(100) == b""  # the recipe has ended, and its connection with it


def compare(cwd, *flags):
    command = f"{ROOT}/recipes/compare.py --recipe sft_text --config {ROOT}/configs/demo_text.yaml --seeds 0"
    command += " --output_dir out --max_steps 8 --eval_steps 3 --per_device_train_batch_size 4 --max_train_samples 32"
    command += " --num_eval_generations 2 --num_samples 0 --max_new_tokens 2 --report_to none"
    command += " --metric grad_norm --alpha 0.5 --patience 1"
    return subprocess.run(
        [sys.executable, *command.split(), *map(str, flags)], cwd=cwd, capture_output=True, text=True, timeout=300
    )


def test_a_real_comparison(tmp_path):
    flags = ["--tau", 1e9, "--variants", "baseline", "grades", "random_order"]
    first = compare(tmp_path, *flags)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.startswith("3 runs: 3 variants, seeds 0. Fewer: ")
    assert first.stdout.count(" seed 0: ") == 3
    assert "earlier run" not in first.stdout
    out = tmp_path / "out"
    baseline, grades, scheduled = (
        json.loads((out / f"{variant}-seed0" / "result.json").read_text())
        for variant in ("baseline", "grades", "random_order")
    )

    for result in (baseline, grades):
        seconds = result["seconds"]
        assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"])
        assert seconds["training"] > 0
        assert seconds["validation"] > 0
        assert result["total_steps"] == 8
        assert result["argv"][-4:-1] == ["--seed", "0", "--output_dir"]
        assert result["environment"]["versions"]["torch"]
        assert result["peak_memory_mib"] > 0
        assert {"final/test_loss", "final/validation_loss", "final/exact_match_test"} <= set(result["results"])
        assert result["results"]["final/test_loss"] != result["results"]["final/validation_loss"]
    assert (baseline["steps"], baseline["stop_reason"], baseline["flops"]) == (8, "schedule finished", 1.0)
    assert baseline["choice"] == grades["choice"] == {"step": 1.0}
    assert [entry["step"] for entry in baseline["validation"]] == [3, 6, 8]
    assert baseline["validation"][-1]["eval_loss"] == pytest.approx(baseline["results"]["final/validation_loss"])
    assert baseline["seconds"]["grades"] == 0
    assert (baseline["frozen"], baseline["tracked"]) == (0, [])
    assert (grades["steps"], grades["stop_reason"]) == (5, "all matrices frozen")
    assert (grades["frozen"], len(grades["tracked"])) == (28, 28)
    assert grades["flops"] == pytest.approx(5 / 8)  # all froze in the last step
    assert grades["seconds"]["grades"] > 0
    assert grades["validation"][0]["eval_loss"] == baseline["validation"][0]["eval_loss"]  # same data, same order
    assert (scheduled["steps"], scheduled["stop_reason"]) == (grades["steps"], grades["stop_reason"])
    named = [
        [json.loads(line)["matrix"] for line in (out / file).read_text().splitlines()]
        for file in ("grades-seed0/grades/events.jsonl", "random_order-seed0/schedule.jsonl")
    ]
    assert named[0] != named[1]
    assert sorted(named[0]) == sorted(named[1])
    record = json.loads((out / "compare.json").read_text())
    assert [run["variant"] for run in record["runs"]] == ["baseline", "grades", "random_order"]
    assert record["variants"]["grades"]["steps"]["mean"] == 5
    assert (out / "compare.png").stat().st_size > 10_000
    assert (out / "compare.md").read_text("utf-8").startswith("| variant ")
    table = first.stdout.partition("\n\n")[2].splitlines()
    assert table[0].split()[:2] == ["variant", "steps"]
    assert max(map(len, table)) <= 80
    assert str(Path("out", "compare.md")) in table[-2] and "compare.html" in table[-1]


def test_the_page_of_results_has_the_tables_of_the_records():
    """After a change of a record: python benchmarks/results_page.py."""
    written = runpy.run_path(str(ROOT / "benchmarks" / "results_page.py"))
    assert written["page"]() == written["PAGE"].read_text("utf-8")
