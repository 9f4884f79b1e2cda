"""The command line that all recipes share: four dataclasses, and a YAML file under the flags."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import shlex
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import yaml
from transformers import EarlyStoppingCallback, HfArgumentParser
from transformers.trainer_utils import SaveStrategy
from trl import ModelConfig, SFTConfig, TrlParser

from grades_trl.config import CRITERION_SETTINGS, GradESConfig, expect_number
from grades_trl.criteria import CRITERIA
from grades_trl.model import TOWERS
from grades_trl.recipe.bad_input import blamed_on
from grades_trl.recipe.bema import BEMA
from grades_trl.recipe.other_names import refuse_unknown
from grades_trl.recipe.places import find_config, this_command
from grades_trl.recipe.secret import hide_secrets
from grades_trl.report import tracking

logger = logging.getLogger(__name__)

BUILTIN_DATASETS = ("dates", "docstrings", "digits", "digits_dashes", "digits_backwards", "digits_inverted")

# What a validation loss must fall by to count as better: that of the early stopping the paper compares with.
EARLY_STOPPING_THRESHOLD = 0.0005

# What --help shows of TRL's 200 training and model arguments; --help_all shows the rest.
COMMON_FLAGS = (
    "output_dir max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps learning_rate "
    "lr_scheduler_type warmup_steps weight_decay max_grad_norm optim max_length gradient_checkpointing bf16 fp16 "
    "packing logging_steps eval_strategy eval_steps save_strategy save_steps resume_from_checkpoint report_to "
    "run_name seed model_name_or_path dtype attn_implementation use_peft lora_r lora_alpha lora_dropout "
    "lora_target_modules load_in_4bit"
)

# Arguments whose default depends on what trains, and their help: TRL's defaults are those of full fine-tuning. LoRA
# hardly learns at that rate, and a base model that does not train needs no 32 bits.
BY_METHOD = {
    "learning_rate": "The highest learning rate. (default: 2e-5; 2e-4 with --use_peft)",
    "dtype": "Load the weights in this type. (default: float32; bfloat16 with --use_peft and --bf16 true)",
}

# What says which rows are scored, and how. `result.json` keeps it and evaluate.py starts from it, whoever has written
# that file: nothing here may run code, name a place to write to, or load anything but rows. A revision is one of a
# model that is loaded anyway.
ROWS: dict[str, Any] = {
    "dataset_name": str | None,
    "dataset_config": str | None,
    "dataset_train_split": str,
    "dataset_test_split": str | None,
    "test_size": int | float,
    "max_eval_samples": int | None,
    "dataset_text_field": str,
    "columns": list | None,
    "train_on": str,
    "seed": int,
}
SCORING: dict[str, Any] = ROWS | {
    "num_eval_generations": int,
    "num_samples": int,
    "max_new_tokens": int,
    "per_device_eval_batch_size": int,  # TRL's loss is a mean of the losses of batches
    "max_length": int | None,
    "packing": bool,
    "completion_only_loss": bool | None,
    "assistant_only_loss": bool,
    "dtype": str | None,
    "load_in_4bit": bool,
    "load_in_8bit": bool,
    "bnb_4bit_quant_type": str,
    "use_bnb_nested_quant": bool,
    "model_revision": str,  # of the base of an adapter; a folder has none
    "bf16": bool | None,
    "fp16": bool,
}


@dataclass
class RecipeArguments:
    """
    What a recipe is run on.

    Parameters:
        backend (`str`, *optional*, defaults to `"auto"`):
            `"unsloth"`, `"transformers"`, or `"auto"`: Unsloth if it is installed and there is a GPU.
        dataset_name (`str`, *optional*):
            Hub id, local folder or file in one of TRL's formats or another tool's; or a built-in dataset: `dates`,
            `docstrings` (text), `digits`, `digits_dashes`, `digits_backwards`, `digits_inverted` (images).
        dataset_config (`str`, *optional*):
            Configuration of a dataset on the hub.
        dataset_train_split (`str`, *optional*, defaults to `"train"`), dataset_test_split (`str`, *optional*):
            Names of the splits. Without a test split, `test_size` of the training split is held out.
        test_size (`float`, *optional*, defaults to `0.1`):
            What is held out: a fraction below 1, or a number of rows. The first half of it is for validation during
            training, the second half for the scores at the end.
        columns (`list[str]`, *optional*):
            What columns of other names stand for, as `NAME=COLUMN`: `prompt=question completion=answer`.
        train_on (`str`, *optional*, defaults to `"all"`):
            Which replies of a conversation are learned: `"all"`, or the `"last"`.
        preview (`bool`, *optional*, defaults to `False`):
            Show one example as the model will read it, with the learned tokens marked, and end without training.
        max_train_samples (`int`, *optional*):
            Train on that many examples at most, drawn with `seed`.
        max_eval_samples (`int`, *optional*):
            Validate on that many examples at most, and test on as many.
        grades (`bool`, *optional*, defaults to `True`):
            `--grades false` trains without GradES: the baseline.
        early_stopping_patience (`int`, *optional*):
            Stop after that many evaluations in which the validation loss did not fall by 0.0005, and load the best
            checkpoint. It sets all that this needs: what is saved, when, and what is loaded at the end.
        train_towers (`list[str]`, *optional*, defaults to all):
            What trains of a vision-language model: `vision`, `projector`, `language`.
        train_layers (`str`, *optional*, defaults to all):
            The layers that train: indices of language layers (`14-29`), a part of the depth (`0.5-1.0`), or a glob
            pattern of paths; several are separated by commas. See [`choice.chosen_modules`].
        resume (`str`, *optional*):
            `"auto"`: go on from the newest whole checkpoint of `output_dir`, start if there is none, or return if the
            run has finished. Or the folder of a checkpoint. See [`resume.set_up_resume`].
        bema (`bool`, *optional*, defaults to `False`):
            Average the weights of the baseline by TRL's `BEMACallback`; the model gets the average in the end.
        plan (`bool`, *optional*, defaults to `False`):
            Print what the run will take, and end: memory by part, the cards that it fits on, steps, tokens and FLOPs.
            No weights are loaded.
        num_eval_generations (`int`, *optional*, defaults to `200`):
            Held-out prompts that are answered after training and compared with the expected answer; 0 for none.
        num_samples (`int`, *optional*, defaults to `4`):
            Held-out prompts that are answered before training and after, and shown.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Longest answer, in tokens.
        export (`list[str]`, *optional*):
            Write the trained model for other tools too, and compare its answers: `merged` (16-bit weights), `gguf`
            (with an Ollama modelfile), `adapter` (LoRA alone). Into folders of those names in `output_dir`; see
            [`export.export`].

    Raises:
        ValueError: a number out of range, `test_size` among them: a fraction, or a number of rows.
    """

    _argument_group_name = "recipe"

    backend: str = field(
        default="auto",
        metadata={
            "help": "auto takes Unsloth if it is installed and there is a GPU.",
            # Not from backend.py: to import it can mean to import Unsloth, which evaluate.py does without
            "choices": ["auto", "unsloth", "transformers"],
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, local folder or file; or a built-in dataset: " + ", ".join(BUILTIN_DATASETS) + "."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Name of the training split."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Name of the held-out split; without it, test_size is split off."}
    )
    test_size: float = field(
        default=0.1, metadata={"help": "What to hold out of the training split: a fraction below 1, or rows."}
    )
    columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of other names: prompt=question completion=answer."}
    )
    train_on: str = field(
        default="all", metadata={"help": "Replies of a conversation that are learned.", "choices": ["all", "last"]}
    )
    preview: bool = field(default=False, metadata={"help": "Show one example as the model will read it; no training."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on that many examples at most."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Validate, and test, on that many examples at most."}
    )
    grades: bool = field(default=True, metadata={"help": "Measure and freeze matrices; false trains the baseline."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after N evaluations without improvement and load the best checkpoint."},
    )
    train_towers: list[str] | None = field(
        default=None,
        metadata={"help": "What trains of a vision-language model; all by default.", "choices": list(TOWERS)},
    )
    train_layers: str | None = field(
        default=None,
        metadata={"help": "Layers that train: 14-29, 0.5-1.0, glob patterns; all by default."},
    )
    resume: str | None = field(
        default=None,
        metadata={"help": "auto goes on from the newest whole checkpoint of output_dir, or starts; or a checkpoint."},
    )
    bema: bool = field(
        default=False, metadata={"help": "Average the weights of the baseline (BEMA, arXiv 2508.00180)."}
    )
    plan: bool = field(
        default=False, metadata={"help": "Print memory, cards, steps and FLOPs of the run, and end. Loads no weights."}
    )
    num_eval_generations: int = field(
        default=200, metadata={"help": "Held-out prompts to answer and score after training."}
    )
    num_samples: int = field(default=4, metadata={"help": "Held-out prompts to answer and show before and after."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    export: list[str] | None = field(
        default=None,
        metadata={
            "help": "Write the model for other tools, and compare: 16-bit weights, GGUF with an Ollama modelfile.",
            "choices": ["merged", "gguf", "adapter"],  # export.EXPORTS, which imports more than --help needs
        },
    )
    dataset_text_field: str = field(default="text", init=False)  # what the column is called in the source

    def __post_init__(self) -> None:
        if self.train_layers is not None:
            self.train_layers = str(self.train_layers)  # one layer is a number to YAML
        expect_number(self, "test_size", "a fraction below 1, or a number of rows", 0, above=True)
        if self.test_size >= 1 and self.test_size == int(self.test_size):
            self.test_size = int(self.test_size)
        elif not 0 < self.test_size < 1:
            raise ValueError(f"test_size is {self.test_size}; expected a fraction below 1, or a number of rows.")
        if self.train_on not in ("all", "last"):  # argparse checks no choice of a YAML file
            raise ValueError(f"train_on is {self.train_on!r}; expected all or last.")
        for name in ("max_train_samples", "max_eval_samples"):
            expect_number(self, name, "a whole number of rows, 1 or more", 1, whole=True)
        for name in ("num_eval_generations", "num_samples"):
            expect_number(self, name, "a whole number of prompts, or 0 for none", 0, whole=True)
        expect_number(self, "max_new_tokens", "a whole number of tokens, 1 or more", 1, whole=True)
        expect_number(self, "early_stopping_patience", "a whole number of evaluations, 1 or more", 1, whole=True)


@blamed_on("", ValueError, TypeError, KeyError, ImportError, yaml.YAMLError)
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
        FileNotFoundError: `--config` is neither a file nor the name of a config.
        ValueError: a YAML file that is no mapping, a key in it that is no argument or is nested, a value out of range,
            a setting in the YAML file that belongs to another metric than `--metric`, settings of LoRA without
            `use_peft`, or a schedule that the run would overwrite.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = TrlParser(
        (RecipeArguments, GradESConfig, ModelConfig, SFTConfig),
        description=description,
        formatter_class=_HelpFormatter,
        prog=shlex.join(this_command()),
        usage="%(prog)s [--config NAME or FILE] [--flag value ...]     (all flags: --help_all)",
        allow_abbrev=False,
    )
    if "--help_all" in argv:
        argv.append("--help")
        argv.remove("--help_all")
    elif "--help" in argv or "-h" in argv:
        own = {field.name for field in (*fields(RecipeArguments), *fields(GradESConfig)) if field.init}
        _hide_rare_flags(parser, own | {*COMMON_FLAGS.split(), "help"})
        for action in parser._actions:
            if action.dest not in own:  # some of TRL's go on and on
                action.help = (action.help or "").partition(". ")[0]
    for action in parser._actions:
        action.help = BY_METHOD.get(action.dest, action.help)
    # TrlParser looks for the file in a word of its own.
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    parser.set_defaults_with_config(report_to="wandb", output_dir="outputs/run", hub_strategy="end")
    parser.set_defaults_with_config(**dict.fromkeys(BY_METHOD))
    if not torch.accelerator.is_available():  # TRL's default, bf16, is an error there
        parser.set_defaults_with_config(use_cpu=True, bf16=False)
    flags = {word.partition("=")[0] for word in argv}
    if not flags & {"--config", "--model_name_or_path", "--help", "-h"}:
        if "--dataset_name" in flags:
            logger.info("No --model_name_or_path and no --config: the tiny model of the demo trains on these data.")
        argv = ["--config", str(demo_config), *argv]
    if "--config" in argv[:-1]:
        place = argv.index("--config") + 1
        argv[place] = str(find_config(argv[place]))
        _check_config(Path(argv[place]), argv)
    if argv and argv[-1] == "--config":
        raise ValueError("--config has no value; expected a YAML file or the name of a config.")
    if "--num_train_epochs" in flags and "--max_steps" not in flags:
        argv += ["--max_steps", "-1"]  # max_steps of the file would win over the flag
    recipe, grades, model, training, of_file, of_flags = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    refuse_unknown(of_file, of_flags, [action.dest for action in parser._actions])
    hide_secrets(training)
    _set_defaults_by_method(training, model)
    _check_ranges(training, model)
    _check_best_metric(training)
    _check_lora(model, flags)
    training.report_to = tracking.drop_if_missing(training.report_to)
    if isinstance(grades.schedule, str) and _is_within(Path(grades.schedule), Path(training.output_dir) / "grades"):
        raise ValueError(
            f"schedule is {grades.schedule}, which this run would overwrite with its own record: give another "
            "--output_dir."
        )
    _take_text_field(recipe, training)
    if recipe.preview:
        training.report_to = []  # nothing happens that could be recorded
    return recipe, training, model, grades


def _check_config(path: Path, argv: list[str]) -> None:
    """Refuses what TrlParser would silently keep of a YAML file. (It finds unknown keys itself.)"""
    config = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(config, Mapping):
        raise ValueError(f"{path} is a {type(config).__name__}; expected a mapping: a line `name: value` for each.")
    takes_mapping = {"env", "tau", "schedule"}  # `env`: environment variables, as in TRL
    takes_mapping |= {name for name, kind in get_type_hints(SFTConfig).items() if "dict" in str(kind)}
    for key, value in config.items():
        if isinstance(value, Mapping) and key not in takes_mapping:
            raise ValueError(f"{path}: {key} is nested: {value!r}. All arguments are at the top level.")

    flags = dict(itertools.pairwise([*argv, ""]))
    flags |= {flag: value for flag, equals, value in (word.partition("=") for word in argv) if equals}
    of_config = config.get("metric", GradESConfig.metric)
    metric = flags.get("--metric", of_config)
    settings = CRITERIA[of_config].defaults if of_config in CRITERIA else CRITERION_SETTINGS
    kept = [name for name in settings if config.get(name) is not None and f"--{name}" not in flags]
    if metric != of_config and kept:
        raise ValueError(
            f"{path} sets {', '.join(kept)} for metric {of_config}, and --metric is {metric}: give them again for "
            f"{metric}, or remove them from the file."
        )


def _set_defaults_by_method(training: SFTConfig, model: ModelConfig) -> None:
    if training.learning_rate is None:
        training.learning_rate = 2e-4 if model.use_peft else 2e-5
    if model.dtype is None:
        model.dtype = "bfloat16" if model.use_peft and training.bf16 else "float32"


def _check_ranges(training: SFTConfig, model: ModelConfig) -> None:
    """What TRL and Transformers take, and fail on later or run with as if nothing were wrong."""
    if training.max_steps != -1:
        steps = "a whole number of steps, 1 or more, or -1 to train for num_train_epochs"
        expect_number(training, "max_steps", steps, 1, whole=True)
    expect_number(training, "num_train_epochs", "a number above 0", 0, above=True)
    expect_number(training, "max_length", "a whole number of tokens, 1 or more; null cuts nothing off", 1, whole=True)
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        expect_number(training, name, "a whole number, 1 or more", 1, whole=True)
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"):
        expect_number(training, name, "a number of at least 0", 0)
    for name in ("logging_steps", "eval_steps", "save_steps"):
        expect_number(training, name, "a number of steps, or a fraction of all steps, above 0", 0, above=True)
    for name in ("save_total_limit", "dataset_num_proc"):
        expect_number(training, name, "a whole number, 1 or more", 1, whole=True)
    expect_number(training, "seed", "a whole number from 0 to 4294967295", 0, 2**32 - 1, whole=True)
    expect_number(model, "lora_r", "a whole number, 1 or more", 1, whole=True)
    expect_number(model, "lora_alpha", "a number above 0", 0, above=True)
    expect_number(model, "lora_dropout", "a fraction from 0 to below 1", 0, math.nextafter(1, 0))
    if training.activation_offloading and not torch.accelerator.is_available():
        raise ValueError(
            "activation_offloading moves activations from a GPU to the host, and there is none: remove it."
        )
    if Path(training.output_dir).exists() and not Path(training.output_dir).is_dir():
        raise ValueError(f"output_dir is {training.output_dir}, which is a file; expected a folder, or a new name.")


def _check_best_metric(training: SFTConfig) -> None:
    """The Trainer would look for it after the first evaluation, and fail."""
    if training.metric_for_best_model is None:
        return
    of_evaluation = ("loss", "mean_token_accuracy", "entropy")  # that of TRL's SFTTrainer
    if training.metric_for_best_model.removeprefix("eval_") not in of_evaluation:
        raise ValueError(
            f"metric_for_best_model is {training.metric_for_best_model}; expected one of {', '.join(of_evaluation)}, "
            "which an evaluation gives. To end by answers and keep the best average, add --heldout_metric exact_match."
        )


def _check_lora(model: ModelConfig, flags: Collection[str]) -> None:
    """Settings of LoRA without `use_peft` would be ignored, and all weights train."""
    of_lora = [f for f in fields(ModelConfig) if f.name.startswith("lora_") or f.name in ("use_rslora", "use_dora")]
    given = [f.name for f in of_lora if getattr(model, f.name) != f.default]
    for name in ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save"):
        value = getattr(model, name) or []
        for word in [value] if isinstance(value, str) else value:
            if "," in word and all(part.strip().isidentifier() for part in word.split(",")):
                raise ValueError(f"{name} is {word!r}; expected names with spaces between them, or a list in YAML.")
    if model.use_peft or not given:
        return
    if "--use_peft" in flags:  # it was turned off on purpose, over a config file
        logger.warning(f"use_peft is false: {', '.join(given)} are ignored, and all weights train.")
        return
    raise ValueError(f"{', '.join(given)} without use_peft, so all weights would train: add --use_peft, or remove it.")


def _is_within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _take_text_field(recipe: RecipeArguments, training: SFTConfig) -> None:
    """TRL ends a text with <eos> only if its column is called `text`; `data.load` renames the column."""
    recipe.dataset_text_field, training.dataset_text_field = training.dataset_text_field, "text"


def configure_early_stopping(recipe: RecipeArguments, training: SFTConfig) -> list[EarlyStoppingCallback]:
    """Sets all that early stopping needs beside its callback, and returns the callback; an empty list if it is off.

    Raises:
        ValueError: early stopping without validation.
    """
    if recipe.early_stopping_patience is None:
        return []
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
    training.restore_callback_states_from_checkpoint = True  # how many evaluations it has waited
    training.metric_for_best_model, training.greater_is_better = "eval_loss", False
    return [EarlyStoppingCallback(recipe.early_stopping_patience, EARLY_STOPPING_THRESHOLD)]


def configure_bema(recipe: RecipeArguments, training: SFTConfig) -> list[BEMA]:
    """The callback of `--bema true`; an empty list if it is off.

    Raises:
        ValueError: something else decides which weights are kept, or the checkpoint has no averages.
    """
    if not recipe.bema:
        return []
    if recipe.grades or recipe.early_stopping_patience is not None or training.load_best_model_at_end:
        raise ValueError(
            "bema decides which weights are kept, and so do GradES, early_stopping_patience and "
            "load_best_model_at_end: add --grades false, and leave out the others."
        )
    return [BEMA(training.resume_from_checkpoint)]


@blamed_on("", ValueError, TypeError, KeyError, ImportError, yaml.YAMLError)
def parse_scoring(
    description: str, argv: list[str] | None = None, own: Sequence[type] = (), shown: Collection[str] = ()
) -> tuple[Any, ...]:
    """Reads the command line of evaluate.py and export.py: flags, over what the first run among the models was scored
    with.

    On other data than that run's (`--dataset_name`), nothing is taken over that says which rows are scored. What is
    taken over is in `SCORING`, and nothing else: a model folder may be anyone's.

    Args:
        description (`str`): the first lines of `--help`.
        argv (`list[str]`, *optional*): defaults to `sys.argv[1:]`.
        own (`Sequence[type]`, *optional*): dataclasses of flags that this script alone has.
        shown (`Collection[str]`, *optional*): what `--help` shows beside those and the flags of the rows.

    Returns:
        `tuple`: the models, each once; the recipe's, training and model arguments as [`parse`] gives them; and those
            of `own`.

    Raises:
        SystemExit: no model, an unknown flag, or a value of the wrong type; also after `--help`.
        ValueError: a value out of range, or of the wrong type in the `result.json` of a run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        (*own, RecipeArguments, ModelConfig, SFTConfig),
        description=description,
        formatter_class=_HelpFormatter,
        prog=shlex.join(this_command()),
        usage="%(prog)s MODEL [MODEL ...] [--flag value ...]     (all flags: --help_all)",
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder of a run or of an adapter, or hub id")
    # As the model is stored, and nothing cut off: for models that no run here has left
    parser.set_defaults(
        report_to="none", output_dir="outputs/evaluate", dtype="auto", max_length=None, gradient_checkpointing=False
    )
    without_gpu = not torch.accelerator.is_available()
    if without_gpu:  # before the settings of the run, which may have scored in bf16
        parser.set_defaults(use_cpu=True, bf16=False)
    if "--help_all" in argv:
        argv = ["--help"]
    else:
        _hide_rare_flags(parser, {"models", "help", *ROWS, *shown, *(f.name for kind in own for f in fields(kind))})
        for action in parser._actions:
            action.help = (action.help or "").partition(". ")[0]  # some of TRL's go on and on
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"not understood: {' '.join(unknown)}. Models come first, then flags.")
    models = list(dict.fromkeys(given.models))
    runs = {model: settings for model in models if (settings := _read_scored_with(model))}
    if runs:
        first, settings = next(iter(runs.items()))
        same_data = given.dataset_name in (None, settings.get("dataset_name"))
        parser.set_defaults(**{key: settings[key] for key in settings if same_data or key not in ROWS})
        of_run = "rows and settings" if same_data else "settings"
        logger.info(f"Scored with the {of_run} of {first}; flags override them.")
    if without_gpu:
        parser.set_defaults(fp16=False)  # CPUs have no such kernels
    *of_script, recipe, model_args, training, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    hide_secrets(training)
    _check_ranges(training, model_args)
    _take_text_field(recipe, training)
    for model, settings in runs.items():
        held_out = {"test_size": recipe.test_size, "seed": training.seed}
        theirs = {key: settings.get(key) for key in held_out}
        same_data = settings.get("dataset_name") == recipe.dataset_name and recipe.dataset_test_split is None
        if same_data and recipe.dataset_name not in BUILTIN_DATASETS and theirs != held_out:
            logger.warning(f"{model} held out other rows ({theirs}), and may have learned some that are scored here.")
    return models, recipe, training, model_args, *of_script


def scored_with(recipe: RecipeArguments, training: SFTConfig, model_args: ModelConfig) -> dict[str, Any]:
    """The values of `SCORING`, from the dataclasses that they are in."""
    everything = vars(model_args) | vars(training) | vars(recipe)
    return {name: everything[name] for name in SCORING}


def _read_scored_with(model: str) -> dict[str, Any] | None:
    """What a recipe scored the model in this folder with; a checkpoint is in the folder of its run.

    The folder may come from anyone: only what is in `SCORING` is read, and it must have the right type.
    """
    path = next((p for p in (Path(model) / "result.json", Path(model).parent / "result.json") if p.exists()), None)
    settings = None if path is None else json.loads(path.read_text("utf-8")).get("scored_with")
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: scored_with is {settings!r}; expected an object of arguments.")
    for name, kind in SCORING.items():
        if name in settings and not _is_of(settings[name], kind):
            expected = kind.__name__ if isinstance(kind, type) else kind
            raise ValueError(
                f"{path}: scored_with.{name} is {settings[name]!r}; expected {expected}. Correct it, or remove it."
            )
    return {name: settings[name] for name in SCORING if name in settings}


def _is_of(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):  # which is an int to Python
        return bool in (get_args(kind) or (kind,))
    return isinstance(value, kind)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        columns = shutil.get_terminal_size((119, 0)).columns  # 119 in a pipe
        super().__init__(prog, max_help_position=32, width=min(columns, 119))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # "None" says nothing; where it stands for a default of its own, the help has that.
        return action.help if action.default is None else super()._get_help_string(action)


def _hide_rare_flags(parser: argparse.ArgumentParser, shown: set[str]) -> None:
    """Leaves the flags that are needed most, the recipe's own first."""
    for action in parser._actions:
        if action.dest not in shown or any(option.startswith("--no_") for option in action.option_strings):
            action.help = argparse.SUPPRESS
        action.option_strings = [o for o in action.option_strings if "-" not in o[2:]]
        if action.choices and len(list(action.choices)) > 5:
            action.metavar = action.dest.upper()
        elif action.const is True:
            action.metavar = "true|false"
        elif action.type in (int, float):
            action.metavar = "N" if action.type is int else "X"
        elif not action.choices and len(action.dest) > 12:  # `--dest DEST` would take a line of its own
            action.metavar = "X"
    parser._action_groups.sort(key=lambda group: group.title not in ("positional arguments", "recipe", "GradES"))
