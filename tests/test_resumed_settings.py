"""A run that is resumed with other settings: what takes effect from when, and what is refused. And what a resumed run
says of its seconds and FLOPs."""

import json
import sys

import pytest
from transformers import TrainerCallback

from grades_trl import GradES, GradESConfig, GradESTrainer
from grades_trl.recipe import builtin
from grades_trl.recipe.arguments import parse
from grades_trl.recipe.results import next_commands, train_and_save
from grades_trl.recipe.resume import set_up_resume
from grades_trl.report.summary import format_summary
from grades_trl.report.timing import RunClock
from grades_trl.trainers.checkpoint import read_values
from helpers import arguments, model_for, qwen3, warnings_in

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def text():
    return builtin.dates(train=128, test=32), builtin.tiny_qwen3()[1]


def build(text, folder, grades, evaluated=False, callbacks=(), **changes):
    dataset, tokenizer = text
    return GradESTrainer(
        model=model_for(tokenizer),
        args=arguments(folder, **({"save_strategy": "steps", "save_steps": 4} | changes)),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"] if evaluated else None,
        processing_class=tokenizer,
        grades=grades,
        callbacks=list(callbacks),
    )


def summary_of(folder):
    return json.loads((folder / "grades" / "summary.json").read_text())


# ---- in a run ----

PAPER = {"metric": "grad_norm", "stopping": "all_frozen", "keep": "last"}


@pytest.mark.parametrize(
    ("before", "after", "frozen"),
    [
        ({"tau": 1e9, "alpha": 0.5}, {"tau": 0.0, "alpha": 0.5}, 0),
        ({"tau": 0.0, "alpha": 0.5}, {"tau": 1e9, "alpha": 0.5}, 14),
        ({"tau": "auto", "auto_ratio": 1e9, "alpha": 0.5}, {"tau": 0.0, "alpha": 0.5}, 0),
        ({"auto_ratio": 1e-9, "alpha": 0.25}, {"auto_ratio": 1e9, "alpha": 0.25}, 14),
        ({"tau": 1e9, "alpha": 0.5}, {"tau": 1e9, "alpha": 1.0}, 0),
        ({"tau": 1e9, "alpha": 0.5}, {"tau": 1e9, "alpha": 0.5, "patience": 99}, 0),
        ({"tau": 1e9, "alpha": 0.5}, {"tau": 1e9, "alpha": 0.5, "measure_every": 99}, 0),
    ],
    ids=["tau down", "tau up", "tau from auto", "auto_ratio", "alpha", "patience", "measure_every"],
)
def test_a_setting_that_may_change_takes_effect_and_is_recorded(tmp_path, text, before, after, frozen):
    build(text, tmp_path, GradESConfig(**PAPER, **before), max_steps=12, save_total_limit=9).train()
    resumed = build(text, tmp_path, GradESConfig(**PAPER, **after))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(resumed.grades.frozen) == frozen
    found = summary_of(tmp_path)
    defaults = {"tau": "auto", "auto_ratio": 0.5, "patience": 1, "measure_every": 1}
    for change in found["setting_changes"]:
        name = change["setting"]
        assert change["step"] == 5
        assert change["before"] == before.get(name, defaults.get(name))
        assert change["after"] == after.get(name, defaults.get(name)) == found["settings"][name]
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert {change["setting"] for change in found["setting_changes"]} == changed
    assert "from step 5 on, and was" in format_summary(resumed.grades_summary)
    assert "Settings changed when the run was resumed" in (tmp_path / "grades" / "report.html").read_text()


def test_a_second_resume_keeps_what_the_first_one_changed(tmp_path, text):
    for tau, checkpoint in ((0.0, None), (0.5, 4), (0.25, 8)):
        trainer = build(text, tmp_path, GradESConfig(**PAPER, tau=tau, alpha=1.0))
        trainer.train(
            resume_from_checkpoint=None if checkpoint is None else str(tmp_path / f"checkpoint-{checkpoint}")
        )
    changes = [(c["step"], c["before"], c["after"]) for c in summary_of(tmp_path)["setting_changes"]]
    assert changes == [(5, 0.0, 0.5), (9, 0.5, 0.25)]


def test_a_longer_patience_lets_a_run_that_has_ended_go_on(tmp_path, text, caplog):
    heldout = {"metric": "none", "stopping": "heldout", "heldout_every": 1, "heldout_cost": 1.0, "heldout_grace": 0.0}
    changes = {"learning_rate": 0.1, "lr_scheduler_type": "constant"}
    first = build(text, tmp_path, GradESConfig(**heldout), True, **changes)
    first.train()
    ended = first.state.global_step
    assert ended < 12
    assert first.grades.restored_best
    again = build(text, tmp_path, GradESConfig(**heldout, heldout_patience=99), True, **changes)
    caplog.clear()
    again.train(resume_from_checkpoint=True)
    said = f"The checkpoint of step {ended} is the end of a run: it has the best average of its weights"
    assert sum(said in warning for warning in warnings_in(caplog)) == 1
    assert again.state.global_step == 12
    assert [c["step"] for c in summary_of(tmp_path)["setting_changes"]] == [ended + 1]


def test_a_longer_schedule_keeps_the_rows_of_its_heldout_score(tmp_path, text):
    settings = GradESConfig(metric="none")
    first = build(text, tmp_path, settings, True, max_steps=60, save_steps=58)
    first.train()
    rows, every = first._heldout_rows, first.grades.heldout.every
    longer = build(text, tmp_path, settings, True, max_steps=240, save_strategy="no")

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step > 58

    longer.add_callback(Stop())
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-58"))
    assert (longer._heldout_rows, longer.grades.heldout.every) == (rows, every)
    assert [c["setting"] for c in summary_of(tmp_path)["setting_changes"]] == ["total_steps"]


REFUSED = {
    "metric": ({"metric": "grad_norm"}, {"metric": "grad_change"}, "values cannot be compared"),
    "tau": ({"metric": "grad_norm", "tau": 1.0}, {"metric": "grad_norm"}, "keeps no level of its matrices"),
    "sample_fraction": ({"metric": "grad_norm"}, {"metric": "grad_norm", "sample_fraction": 1.0}, "other elements"),
    "alpha": ({}, {"alpha": 0.5}, "the windows of steps that metric gain compares have begun"),
    "heldout_metric": ({}, {"heldout_metric": "token_accuracy"}, "would be of other rows, or of another kind"),
    "heldout_every": ({}, {"heldout_every": 3}, "would be of other rows"),
    "heldout_cost": ({}, {"heldout_cost": 0.5}, "would be of other rows"),
    "heldout_samples": ({}, {"heldout_samples": 9}, "would be of other rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_may_not_change_is_refused_with_the_reason(name):
    before, after, reason = REFUSED[name]
    heldout = {"stopping": "heldout"} if name.startswith("heldout") else {}
    state = GradES(qwen3(), GradESConfig(**before, **heldout), 20, None, lambda: 1.0).state_dict()
    other = GradES(qwen3(), GradESConfig(**after, **heldout), 20, None, lambda: 1.0)
    with pytest.raises(ValueError, match=f"written with {name} .*: resume with --{name} .* cannot change.*{reason}"):
        other.load_state_dict(state)


@pytest.mark.parametrize("other", [{"*.layers.0.*": 4, "*.layers.1.*": 5}, {"*.layers.0.*": 5}, {"language": 4}])
def test_a_schedule_is_compared_by_what_it_says(tmp_path, other):
    def engine(schedule):
        return GradES(qwen3(), GradESConfig(metric="schedule", schedule=schedule), 20)

    state = engine({"*.layers.0.*": 4}).state_dict()
    file = tmp_path / "events.jsonl"
    names = [name for name in engine({"language": 4}).matrices if ".layers.0." in name]
    file.write_text("\n".join(json.dumps({"matrix": name, "step": 4}) for name in names))
    engine(str(file)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"schedule that freezes .* (at step 4|never), and this one freezes it"):
        engine(other).load_state_dict(state)


# ---- in a recipe ----


@pytest.fixture
def checkpoint(text, tmp_path):
    """Of a run of a recipe with tau 1.0, killed after its second step."""
    words = ["--tau", "1.0", "--max_steps", "4"]
    set_up_resume(*_parsed(tmp_path, *words)).write()
    trainer = build(text, tmp_path, GradESConfig(metric="grad_norm", tau=1.0), max_steps=2, save_steps=2)
    trainer.train()
    return tmp_path / "checkpoint-2"


def _parsed(folder, *words):
    fixed = ["--model_name_or_path", "model", "--report_to", "none", "--metric", "grad_norm"]
    return parse("", folder, [*fixed, "--output_dir", str(folder), *words])


def resumed(folder, *words):
    recipe, training, model_args, grades = _parsed(folder, *words)
    set_up_resume(recipe, training, model_args, grades).write()
    return training.resume_from_checkpoint, grades


def test_a_named_checkpoint_goes_on_with_what_may_change(checkpoint):
    flags = ["--max_steps", "8", "--tau", "0", "--patience", "3", "--eval_strategy", "steps", "--eval_steps", "2"]
    found, grades = resumed(checkpoint.parent, "--resume", str(checkpoint), *flags)
    assert (found, grades.tau) == (str(checkpoint), 0)
    # It is the run of this folder now: a job that is submitted again goes on with these
    assert resumed(checkpoint.parent, "--resume", "auto", *flags)[0] == str(checkpoint)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            "--tau 1.0 --learning_rate 1",
            "another run: learning_rate was 2e-05 and is 1.0.*start one from these",
        ),
        ("--tau 1.0 --model_name_or_path other", "model_name_or_path was 'model' and is 'other'"),
        ("--tau 1.0 --seed 3 --dataset_name a.jsonl", "dataset_name was None and is 'a.jsonl'"),
        ("--grades false", "had GradES and would go on without: it would be neither"),
        ("--tau auto", "written with tau 1.0 and this run has 'auto'"),
        ("--tau 1.0 --sample_fraction 1", "written with sample_fraction 0.015625"),
    ],
)
def test_a_named_checkpoint_refuses_another_run(checkpoint, flags, reason):
    before = (checkpoint.parent / "arguments.json").read_text()
    with pytest.raises(ValueError, match=reason):
        resumed(checkpoint.parent, "--resume", str(checkpoint), "--max_steps", "4", *flags.split())
    assert (checkpoint.parent / "arguments.json").read_text() == before


def test_auto_goes_on_with_the_settings_of_the_run(checkpoint):
    with pytest.raises(ValueError, match=r"tau was 1\.0 and is 0.*may change where a checkpoint is named: --resume F"):
        resumed(checkpoint.parent, "--resume", "auto", "--max_steps", "4", "--tau", "0")


# ---- what a resumed run says ----


class Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 9:
            raise KeyboardInterrupt


FREEZING = GradESConfig(
    metric="schedule", schedule={"*.layers.0.*": 3, "*.layers.1.mlp.*": 10}, stopping="heldout", heldout_every=2,
    heldout_cost=1.0, heldout_grace=0.0, heldout_patience=99,
)  # fmt: skip


@pytest.mark.parametrize("grades", [FREEZING, None], ids=["grades", "baseline"])
def test_seconds_and_flops_are_those_of_all_steps(tmp_path, text, grades):
    def run(name, *callbacks, checkpoint=None):
        clock = RunClock()
        changes = {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 14}
        trainer = build(text, tmp_path / name, grades, True, [clock, *callbacks], **changes)
        train_and_save(trainer, clock, checkpoint)
        return trainer, clock

    straight, whole = run("straight")
    with pytest.raises(KeyboardInterrupt):
        run("run", Killed())
    checkpoint = tmp_path / "run" / "checkpoint-8"
    if grades is None:
        first = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["clock"]
    else:
        first = read_values(checkpoint)["clock"]
    trainer, clock = run("run", checkpoint=str(checkpoint))
    seconds = clock.seconds
    parts = [seconds.training, seconds.validation, seconds.saving, seconds.grades]
    assert sum(parts) == pytest.approx(seconds.total)
    assert min(parts) >= 0
    assert first["steps"] == 8
    assert seconds.total > first["total"] > 0
    assert seconds.validation > first["validation"] > 0
    assert (clock.steps, clock.evaluations_run) == (whole.steps, whole.evaluations_run) == (14, 5)
    assert clock.planned_evaluations == whole.planned_evaluations
    if grades is not None:
        ours, theirs = trainer.grades_summary, straight.grades_summary
        assert ours.flops == theirs.flops
        assert ours.skipped_layers == theirs.skipped_layers
        assert ours.heldout == theirs.heldout
        assert ours.speedup.steps_not_run == theirs.speedup.steps_not_run
        saved = ours.speedup.steps_not_run.seconds_saved
        assert saved is None or saved >= 0
        assert ours.seconds == seconds
        assert ours.setting_changes == []


def test_the_commands_to_run_next_resume_nothing_and_upload_nothing(tmp_path, monkeypatch):
    flags = "--resume outputs/run/checkpoint-8 --resume_from_checkpoint=auto --tau 0 --push_to_hub true "
    flags += "--hub_token hf_secret --hub_model_id me/run --output_dir outputs/run --eos_token <|end|> --export gguf"
    monkeypatch.setattr(sys, "argv", ["recipes/sft_text.py", *flags.split()])
    commands = [command for _, command in next_commands(tmp_path / "run", with_grades=True)]
    assert commands[0] == "python recipes/compare.py --recipe sft_text --tau 0 --eos_token '<|end|>'"
