"""The command line that all recipes share: four dataclasses, a YAML file under the flags, W&B that never blocks."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
import wandb
from datasets import Dataset
from transformers import EarlyStoppingCallback, HfArgumentParser
from transformers.trainer_utils import SaveStrategy
from trl import ModelConfig, SFTConfig, TrlParser

from grades_trl.config import TOWERS, GradESConfig
from grades_trl.recipe import data
from grades_trl.report import timing as accounting

# What a validation loss must fall by to count as better: that of the early stopping the paper compares with.
EARLY_STOPPING_THRESHOLD = 0.0005

EMBEDDED = ("dates", "docstrings", "digits")

# What --help shows of TRL's 200 training and model arguments; --help_all shows the rest.
COMMON_FLAGS = (
    "output_dir max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps learning_rate "
    "lr_scheduler_type warmup_steps weight_decay max_grad_norm optim max_length gradient_checkpointing bf16 fp16 "
    "packing logging_steps eval_strategy eval_steps save_strategy save_steps resume_from_checkpoint report_to "
    "run_name seed model_name_or_path dtype attn_implementation use_peft lora_r lora_alpha lora_dropout "
    "lora_target_modules load_in_4bit"
)

# What the scores of a model depend on, beside its weights: `result.json` keeps it, evaluate.py starts from it.
# `ROWS` say which rows are scored.
ROWS = (
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "dataset_test_split",
    "test_size",
    "max_eval_samples",
    "dataset_text_field",
    "seed",
)
SCORING = (
    *ROWS,
    "generate",
    "samples",
    "max_new_tokens",
    "per_device_eval_batch_size",
    "max_length",
    "packing",
    "completion_only_loss",
    "assistant_only_loss",
    "dtype",
    "load_in_4bit",
    "load_in_8bit",
    "attn_implementation",
    "bf16",
    "fp16",
    "use_cpu",
    "trust_remote_code",
)
# What --help of evaluate.py shows beside `ROWS`.
SCORING_FLAGS = (
    "generate samples max_new_tokens max_length per_device_eval_batch_size dtype load_in_4bit "
    "trust_remote_code output_dir"
)


@dataclass
class RecipeArguments:
    """
    What a recipe is run on.

    Parameters:
        backend (`str`, *optional*, defaults to `"auto"`):
            `"unsloth"`, `"transformers"`, or `"auto"`: Unsloth if it is installed and a GPU is there.
        dataset_name (`str`, *optional*):
            Hub id, local folder or file in one of TRL's formats; or an embedded set: `dates`, `docstrings` (text),
            `digits` (pictures).
        dataset_config (`str`, *optional*):
            Configuration of a data set on the hub.
        dataset_train_split (`str`, *optional*, defaults to `"train"`), dataset_test_split (`str`, *optional*):
            Names of the splits. Without a test split, `test_size` of the training split is held out.
        test_size (`float`, *optional*, defaults to `0.1`):
            Fraction held out. The first half of what is held out is for validation during training, the second half
            for the scores at the end.
        max_train_samples (`int`, *optional*):
            Train on that many examples at most.
        max_eval_samples (`int`, *optional*):
            Validate on that many examples at most, and test on as many.
        grades (`bool`, *optional*, defaults to `True`):
            `--grades false` trains plainly.
        early_stopping_patience (`int`, *optional*):
            End the run when the validation loss has not fallen by 0.0005 for that many evaluations, and go back to the
            best checkpoint. It sets all that this needs: what is saved, when, and what is loaded at the end.
        train_towers (`list[str]`, *optional*, defaults to all):
            What trains of a vision-language model.
        generate (`int`, *optional*, defaults to `200`):
            Held-out prompts that are answered after training and compared with the expected answer; 0 for none.
        samples (`int`, *optional*, defaults to `4`):
            Held-out prompts that are answered before training and after, and shown.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Longest answer, in tokens.
    """

    _argument_group_name = "recipe"

    backend: str = field(
        default="auto",
        metadata={
            "help": "auto takes Unsloth if it is installed and a GPU is there.",
            # Not from backend.py: to import it can mean to import Unsloth, which evaluate.py does without
            "choices": ["auto", "unsloth", "transformers"],
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, local folder or file; or an embedded set: dates, docstrings, digits."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Name of the training split."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Name of the held-out split; without it, test_size is split off."}
    )
    test_size: float = field(default=0.1, metadata={"help": "Fraction of the training split to hold out."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on that many examples at most."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Validate, and test, on that many examples at most."}
    )
    grades: bool = field(default=True, metadata={"help": "Watch and freeze matrices; false trains plainly."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "End when the validation loss has not fallen for that many evaluations; back to the best."},
    )
    train_towers: list[str] = field(
        default_factory=lambda: ["vision", "projector", "language"],
        metadata={"help": "What trains of a vision-language model.", "choices": list(TOWERS)},
    )
    generate: int = field(default=200, metadata={"help": "Held-out prompts to answer and score after training."})
    samples: int = field(default=4, metadata={"help": "Held-out prompts to answer and show before and after."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    dataset_text_field: str = field(default="text", init=False)  # what the column is called in the source


def parse(
    description: str, demo_config: Path, argv: list[str] | None = None
) -> tuple[RecipeArguments, SFTConfig, ModelConfig, GradESConfig]:
    """Reads the command line of a recipe: flags, over the YAML file of `--config`, over the recipes' own defaults.

    Args:
        description (`str`): the first lines of `--help`.
        demo_config (`Path`): what is run when neither a config nor a model is named.
        argv (`list[str]`, *optional*): defaults to `sys.argv[1:]`.

    Raises:
        SystemExit: an unknown flag, or a value of the wrong type; also after `--help`.
        ValueError: a key in the YAML file that is no argument, a value that GradESConfig does not take, or early
            stopping without validation.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = TrlParser(
        (RecipeArguments, GradESConfig, ModelConfig, SFTConfig),
        description=description,
        formatter_class=_HelpFormatter,
        usage="%(prog)s [--config configs/X.yaml] [--flag value ...]     (all flags: --help_all)",
        allow_abbrev=False,
    )
    if "--help_all" in argv:
        argv.append("--help")
        argv.remove("--help_all")
    elif "--help" in argv or "-h" in argv:
        own = {field.name for field in (*fields(RecipeArguments), *fields(GradESConfig)) if field.init}
        _hide_rare_flags(parser, own | {*COMMON_FLAGS.split(), "help"})
    # TrlParser looks for the file in a word of its own.
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    parser.set_defaults_with_config(report_to="wandb", output_dir="outputs/run", metric="heldout_gain")
    if not torch.accelerator.is_available():  # TRL's default, bf16, is an error there
        parser.set_defaults_with_config(use_cpu=True, bf16=False)
    flags = {word.partition("=")[0] for word in argv}
    if not flags & {"--config", "--model_name_or_path", "--help", "-h"}:
        if "--dataset_name" in flags:
            print("No --model_name_or_path and no --config: the tiny model of the demo trains on these data.")
        argv = ["--config", str(demo_config), *argv]
    recipe, grades, model, training = parser.parse_args_and_config(argv)
    if recipe.early_stopping_patience is not None:
        _keep_the_best(training)
    if "wandb" in training.report_to:
        start_wandb(training)
    return recipe, training, model, grades


def parse_scoring(
    description: str, argv: list[str] | None = None
) -> tuple[list[str], RecipeArguments, SFTConfig, ModelConfig]:
    """Reads the command line of evaluate.py: flags, over what the first run among the models was scored with.

    On other data than that run's (`--dataset_name`), nothing is taken over that says which rows are scored.

    Args:
        description (`str`): the first lines of `--help`.
        argv (`list[str]`, *optional*): defaults to `sys.argv[1:]`.

    Returns:
        `tuple`: the models, each once; and the arguments as [`parse`] gives them.

    Raises:
        SystemExit: no model, an unknown flag, or a value of the wrong type; also after `--help`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        (RecipeArguments, ModelConfig, SFTConfig),
        description=description,
        formatter_class=_HelpFormatter,
        usage="%(prog)s MODEL [MODEL ...] [--flag value ...]     (all flags: --help_all)",
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder of a run or of an adapter, or hub id")
    # As the model is stored, and nothing cut off: for models that no run here has left
    parser.set_defaults(
        report_to="none", output_dir="outputs/evaluate", dtype="auto", max_length=None, gradient_checkpointing=False
    )
    if "--help_all" in argv:
        argv = ["--help"]
    else:
        _hide_rare_flags(parser, {"models", "help", *ROWS, *SCORING_FLAGS.split()})
        for action in parser._actions:
            action.help = (action.help or "").partition(". ")[0]  # some of TRL's go on and on
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"not understood: {' '.join(unknown)}. Models come first, then flags.")
    models = list(dict.fromkeys(given.models))
    runs = {model: settings for model in models if (settings := _scored_with(model))}
    if runs:
        first, settings = next(iter(runs.items()))
        same_data = given.dataset_name in (None, settings["dataset_name"])
        parser.set_defaults(**{key: settings[key] for key in settings if same_data or key not in ROWS})
        print(f"Scored {'on the data and ' if same_data else ''}with the settings of {first}; flags go before them.")
    if not torch.accelerator.is_available():
        parser.set_defaults(use_cpu=True, bf16=False, fp16=False)
    recipe, model_args, training, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    for model, settings in runs.items():
        held_out = {"test_size": recipe.test_size, "seed": training.seed}
        theirs = {key: settings[key] for key in held_out}
        same_data = settings["dataset_name"] == recipe.dataset_name and recipe.dataset_test_split is None
        if same_data and recipe.dataset_name not in EMBEDDED and theirs != held_out:
            print(f"CAUTION: {model} held out other rows ({theirs}), and may have learned some that are scored here.")
    return models, recipe, training, model_args


def _scored_with(model: str) -> dict[str, Any] | None:
    """What a recipe scored the model in this folder with; a checkpoint is in the folder of its run."""
    for result in (Path(model) / "result.json", Path(model).parent / "result.json"):
        if result.exists():
            return json.loads(result.read_text()).get("scored_with")  # runs of before this was kept have none
    return None


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=119)


def _hide_rare_flags(parser: argparse.ArgumentParser, shown: set[str]) -> None:
    """Leaves the flags that are needed most, the recipe's own first."""
    for action in parser._actions:
        if action.dest not in shown or any(option.startswith("--no_") for option in action.option_strings):
            action.help = argparse.SUPPRESS
        action.option_strings = [o for o in action.option_strings if "-" not in o[2:]]
        if action.choices and len(list(action.choices)) > 5:
            action.metavar = action.dest.upper()
    parser._action_groups.sort(key=lambda group: group.title not in ("positional arguments", "recipe", "GradES"))


def start_wandb(training: SFTConfig) -> None:
    """Online if this machine is logged in to W&B, else offline with one line that says so. Never asks.

    A `WANDB_MODE` or `WANDB_PROJECT` in the environment is respected.
    """
    os.environ.setdefault("WANDB_PROJECT", "grades-trl")
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_DIR", training.output_dir)
    Path(os.environ["WANDB_DIR"]).mkdir(parents=True, exist_ok=True)
    training.run_name = training.run_name or Path(training.output_dir).name
    if not os.environ.get("WANDB_MODE") and not wandb.login(prompt=False):
        os.environ["WANDB_MODE"] = "offline"
        wandb.teardown()  # login() has read the environment; let init() read it again
        print(
            f"W&B: not logged in, recording offline. Later: wandb login; wandb sync {os.environ['WANDB_DIR']}/wandb/*",
            flush=True,
        )


def _keep_the_best(training: SFTConfig) -> None:
    """All settings that early stopping needs beside its callback."""
    if training.eval_strategy == "no":
        raise ValueError(
            'early_stopping_patience needs validation, and eval_strategy is "no": add --eval_strategy epoch, or '
            "--eval_strategy steps --eval_steps N."
        )
    if training.save_strategy == "no":  # nobody asked for checkpoints to resume from
        training.save_only_model = True
    training.save_strategy = SaveStrategy(training.eval_strategy.value)
    training.save_steps = training.eval_steps
    training.save_total_limit = 1
    training.load_best_model_at_end = True
    training.metric_for_best_model, training.greater_is_better = "eval_loss", False


def load_data(
    recipe: RecipeArguments,
    training: SFTConfig,
    embedded: dict[str, Callable[..., Any]],
    *,
    vision: bool = False,
    test_only: bool = False,
) -> dict[str, Dataset]:
    """The rows of a recipe, from `--dataset_name`. The loss is on the response alone.

    Of what is held out, one half decides during training (validation), the other is scored at the end alone (test).

    Args:
        recipe (`RecipeArguments`), training (`SFTConfig`): which data; their seed splits them.
        embedded (`dict[str, Callable]`): the embedded sets of this kind, by name.
        vision (`bool`, *optional*, defaults to `False`): rows have pictures.
        test_only (`bool`, *optional*, defaults to `False`): leaves training and validation out.

    Returns:
        `dict[str, Dataset]`: `train`, `validation`, `test`; of some embedded sets also a `test_...` of another kind.

    Raises:
        SystemExit: no data is named, or an embedded set of the other kind.
        DataError: see [`data.load`].
    """
    name = recipe.dataset_name
    if name is None:
        columns = "`image` or `images`, and " if vision else ""
        raise SystemExit(
            "No data: give --dataset_name a hub id, a local folder or file (jsonl, parquet, ... with "
            f"{columns}`messages`, `prompt` and `completion`{'' if vision else ', or `text`'}), or an embedded set: "
            f"{', '.join(embedded)}."
        )
    if name in EMBEDDED and name not in embedded:
        raise SystemExit(
            f"The embedded set {name} is for {'language' if vision else 'vision-language'} models; expected "
            f"{' or '.join(embedded)}, or data of your own."
        )
    if name in embedded:
        splits = embedded[name](seed=0, test=600)
    else:
        splits = data.load(
            name,
            config=recipe.dataset_config,
            train_split=recipe.dataset_train_split,
            test_split=recipe.dataset_test_split,
            test_size=recipe.test_size,
            seed=training.seed,
            vision=vision,
            text_column=training.dataset_text_field,
        )
        # TRL ends a text with <eos> only if its column is called `text`
        recipe.dataset_text_field, training.dataset_text_field = training.dataset_text_field, "text"
    splits = data.with_validation(splits, recipe.max_eval_samples)
    wanted = [split for split in splits if split.startswith("test") or not test_only]
    return {split: data.response_only(splits[split]) for split in wanted}


def report_cut_rows(trainer: Any, given: dict[str, Dataset]) -> None:
    """Says how many examples `max_length` has cut. TRL drops those that lose their whole response without a word.

    Args:
        trainer: an SFTTrainer, which has prepared its data.
        given (`dict[str, Dataset]`): what it was given as `train` and `validation`.

    Raises:
        SystemExit: nothing is left to train on, or to validate on.
    """
    length = trainer.args.max_length
    if length is None or trainer.args.packing:  # packing puts several examples into a row
        return
    for split, prepared in (("train", trainer.train_dataset), ("validation", trainer.eval_dataset)):
        dropped = len(given[split]) - len(prepared)
        tables = prepared.select_columns("input_ids").with_format("arrow").iter(1000)
        cut = sum(pc.sum(pc.equal(pc.list_value_length(table["input_ids"]), length)).as_py() for table in tables)
        found = f"{split}: of {len(given[split]):,} examples, {dropped:,} have no response left"
        if len(prepared) == 0:
            raise SystemExit(f"{found} within --max_length {length}: raise it.")
        if dropped or cut:
            print(f"CAUTION: {found} within --max_length {length}: dropped. {cut:,} more reach it and may be cut.")


def early_stopping(recipe: RecipeArguments) -> list[EarlyStoppingCallback]:
    """The callback, if early stopping is on."""
    if recipe.early_stopping_patience is None:
        return []
    return [EarlyStoppingCallback(recipe.early_stopping_patience, EARLY_STOPPING_THRESHOLD)]


def final_losses(trainer: Any, test: Dataset) -> dict[str, float]:
    """Scores of the trained model: on the validation half, which decided, and on the test half, which did not.

    Returns:
        `dict`: `final/validation_loss`, and of the test half `final/test_loss` and `final/eval_mean_token_accuracy`.
    """
    trainer.remove_callback(EarlyStoppingCallback)  # it would miss "eval_loss" in the scores of the test half
    validation = trainer.evaluate()
    scores = trainer.evaluate(test, metric_key_prefix="test")
    results = {"final/validation_loss": validation["eval_loss"], "final/test_loss": scores["test_loss"]}
    if "eval_mean_token_accuracy" in scores:  # TRL's own prefix; Unsloth's loss does not have it
        results["final/eval_mean_token_accuracy"] = scores["eval_mean_token_accuracy"]
    return results


def finish(
    trainer: Any,
    clock: accounting.RunClock,
    results: dict[str, float],
    recipe: RecipeArguments,
    model_args: ModelConfig,
) -> None:
    """The end of a recipe: `result.json`, the report and W&B, and a short account on the screen.

    Args:
        recipe, model_args: as [`parse`] gave them.
        trainer: after `train()`.
        clock (`RunClock`): was among its callbacks.
        results (`dict[str, float]`): the final scores.
    """
    output_dir = Path(trainer.args.output_dir)
    result = _result(trainer, clock, results) | {"scored_with": scored_with(recipe, trainer.args, model_args)}
    (output_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print("\n" + "\n".join(f"{key:<34} {value:.4g}" for key, value in sorted(results.items())))
    if wandb.run is not None:
        wandb.run.summary.update(results)
    if trainer.grades is not None:
        trainer.grades_summary["results"] = results
        trainer.timeline.write_report(trainer.grades_summary)
        trainer.log_report()
        print("\n" + account(trainer.grades_summary))
        print(f"\nWhat froze when, with pictures: {output_dir / 'grades' / 'report.html'}")
    print(f"The model: {output_dir}")
    if trainer.grades is not None:
        plain = ["--grades", "false", "--output_dir", f"{output_dir}_plain"]
        print(f"Next, the same run without freezing: {shlex.join(['python', *sys.argv, *plain])}")
    # Beside the run without freezing, whichever of the two this is
    sibling = str(output_dir).removesuffix("_plain") if trainer.grades is None else f"{output_dir}_plain"
    folders = [sibling, str(output_dir)] if (Path(sibling) / "result.json").exists() else [str(output_dir)]
    evaluate = str(Path(sys.argv[0]).with_name("evaluate.py"))
    print(f"Score it again, or beside other models: {shlex.join(['python', evaluate, *dict.fromkeys(folders)])}")


def table(scores: dict[str, dict[str, float]]) -> str:
    """Scores of several models, a line each. All but losses and perplexities are fractions, and shown in percent."""
    columns = list(next(iter(scores.values())))
    lines = [["", *columns]]
    for model, of_model in scores.items():
        numbers = [f"{of_model[c]:.4g}" if c in ("test_loss", "perplexity") else f"{of_model[c]:.1%}" for c in columns]
        lines.append([model, *numbers])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line) for line in lines)


def scored_with(recipe: RecipeArguments, training: SFTConfig, model_args: ModelConfig) -> dict[str, Any]:
    """The values of `SCORING`, from the dataclasses that they are in."""
    everything = vars(model_args) | vars(training) | vars(recipe)
    return {name: everything[name] for name in SCORING}


def _result(trainer: Any, clock: accounting.RunClock, results: dict[str, float]) -> dict[str, Any]:
    """What `result.json` holds: the same of every run, so that runs can be compared."""
    steps, total_steps = trainer.state.global_step, trainer.state.max_steps
    summary = trainer.grades_summary
    plain_reason = "schedule finished" if steps >= total_steps else "early stopping"
    of_grades = summary["seconds"] if summary else {"grades": 0.0, "grades_after_training": 0.0}
    total = clock.total + of_grades["grades_after_training"]
    result = {
        "steps": steps,
        "total_steps": total_steps,
        "stop_reason": summary.get("stop_reason", plain_reason),
        "seconds": {  # the last four are the parts of the first
            "total": total,
            "training": total - clock.validation - clock.saving - of_grades["grades"],
            "validation": clock.validation,
            "saving": clock.saving,
            "grades": of_grades["grades"],
        },
        "flops": steps / total_steps,  # as a fraction of a plain run of the whole schedule
        "validation": clock.history,
        "results": results,
        "peak_memory_mib": clock.peak_memory_mib,
        "warmup_steps": trainer.args.warmup_steps,
        "device": accounting.device_name(),
        "versions": accounting.versions(),
        "argv": sys.argv,
    }
    if summary:
        result["flops"] = summary["flops"]["run"] / summary["flops"]["plain_full_schedule"]
        result["matrices"] = {"frozen": summary["frozen"], "total": summary["matrices"]}
        result["watched"] = [
            {"matrix": m.name, "layer": m.layer, "role": m.role, "tower": m.tower, "params": m.params}
            for m in trainer.watched.values()
        ]
    return result


def account(summary: dict[str, Any]) -> str:
    """A run in a few lines, from `summary.json`. The speed-up comes in its parts; a part not measured says so."""
    speedup, seconds = summary["speedup"], summary["seconds"]
    cheaper, steps, validation = (speedup[part] for part in ("cheaper_steps", "steps_not_run", "validation_not_run"))

    never = f" ({summary['without_gradient']} never got a gradient)" if summary["without_gradient"] else ""

    def times(ratio: float | None) -> str:
        return "not measured" if ratio is None else f"{ratio:.2f}x"

    def saved(part: dict[str, Any]) -> str:
        return "" if part["seconds_saved"] is None else f"  {part['seconds_saved']:+.1f} s"

    return "\n".join(
        [
            f"GradES: {summary['steps']} of {summary['total_steps']} steps, {summary['frozen']} of "
            f"{summary['matrices']} matrices frozen{never}; {summary['stop_reason']}",
            f"  cheaper steps          {times(cheaper['ratio'])}{saved(cheaper)}",
            f"  steps not run          {times(steps['ratio'])}{saved(steps)}",
            f"  validation not run     {validation['evaluations']} evaluations{saved(validation)}",
            *_heldout_account(summary["heldout"]),
            f"  against a plain run of the same length  {times(speedup['against_same_length'])}",
            f"  against the full schedule               {times(speedup['against_full_schedule'])}",
            f"  training {seconds['training']:.1f} s, of which GradES {seconds['grades']:.2f} s; validation "
            f"{seconds['validation']:.1f} s; peak memory {summary['peak_memory_mib']:,.0f} MiB on {summary['device']}",
        ]
    )


def _heldout_account(heldout: dict[str, Any] | None) -> list[str]:
    if heldout is None:
        return []
    cost = heldout["examples_per_training_example"]
    average = (
        f"their average up to step {heldout['best_step']}" if heldout["weights"] == "average" else "the last ones"
    )
    return [
        f"  held-out readings      {heldout['readings']} of {heldout['examples']} examples: {cost:.1%} of training",
        f"  weights of the model   {average}",
    ]
