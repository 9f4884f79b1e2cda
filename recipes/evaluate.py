"""Score models side by side on held-out data: loss on the response, perplexity, exact match and character error rate
of what they answer; and on published benchmarks (--tasks), by lm-eval or, with images, lmms-eval.

A model is a folder that a recipe has written (all weights, or a LoRA adapter) or a hub id. Rows and settings are those
of the first run among them, so that its scores come out again. Flags override them, for all models alike.

  python recipes/evaluate.py outputs/demo_vlm
  python recipes/evaluate.py outputs/demo_text outputs/demo_text_baseline
  python recipes/evaluate.py Qwen/Qwen3-0.6B outputs/qwen3_lora --dataset_name my_chats.jsonl
  python recipes/evaluate.py outputs/qwen3_lora --tasks boolq,piqa,siqa     (and its base model, the score before)
"""

import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grades_trl.recipe.quiet  # noqa: F401  isort: skip  before transformers

import torch
from datasets import Dataset
from trl import SFTTrainer

import vlm.builtin
import vlm.generation
from grades_trl.distributed import refuse_several_processes
from grades_trl.recipe import builtin
from grades_trl.recipe.arguments import parse_scoring, scored_with
from grades_trl.recipe.bad_input import printable, run
from grades_trl.recipe.console import set_up_console, show_progress
from grades_trl.recipe.data import first, load_data, whole_conversations_problem
from grades_trl.recipe.generation import (
    answers,
    character_error_rate,
    exact_match,
    format_samples,
    warn_long_replies,
)
from grades_trl.recipe.harness import check_harness, run_tasks
from grades_trl.recipe.packed import warn_if_packed_examples_mix
from grades_trl.recipe.places import command_of, this_command
from grades_trl.recipe.results import format_scores
from grades_trl.recipe.scored import rows_scored
from grades_trl.recipe.trained import base_of, has_vision, load_trained, release
from grades_trl.report import tracking
from grades_trl.report.environment import device_name, versions
from grades_trl.report.strict_json import write_json
from grades_trl.wording import counted


@dataclass
class EvaluationArguments:
    """What only this script takes."""

    tasks: list[str] | None = field(
        default=None,
        metadata={"help": "Tasks of lm-eval or lmms-eval: names or YAML files, separated by commas or spaces."},
    )
    tasks_limit: int | None = field(default=None, metadata={"help": "Examples of each task, at most; all by default."})
    category_column: str | None = field(
        default=None, metadata={"help": "Column of the data by whose values all scores are given, too."}
    )


SHOWN = (
    "num_eval_generations num_samples max_new_tokens max_length per_device_eval_batch_size dtype load_in_4bit "
    "trust_remote_code report_to output_dir"
)


def main() -> None:
    refuse_several_processes()
    set_up_console()
    models, recipe, training, model_args, own = parse_scoring(__doc__, None, [EvaluationArguments], SHOWN.split())
    tasks = [task for word in own.tasks or [] for task in word.split(",") if task]

    # 1. Text or vision? The configs of the models say it. An adapter's tasks are scored before and after.
    bases = {name: base_of(name) for name in models}
    if tasks and len(models) == 1 and bases[models[0]] != models[0]:
        models = [bases[models[0]], models[0]]
        bases = {name: bases.get(name, name) for name in models}
        print(printable(f"Scored before and after: {models[0]} is what the adapter was trained on"))
    seeing = [name for name in models if has_vision(bases[name], training.trust_remote_code)]
    if seeing and seeing != models:
        raise ValueError(f"Some of these models see and some do not: score them apart. Vision: {', '.join(seeing)}")
    vision = bool(seeing)
    if tasks:
        check_harness(bases, model_args, vision)
    if "wandb" in training.report_to:
        training.run_name = tracking.start(training.output_dir, training.run_name)

    # 2. The rows that the recipes score at the end of a run, not those used for decisions during training.
    scores: dict[str, dict[str, float]] = {name: {} for name in models}
    given: dict[str, dict[str, list[str]]] = {name: {} for name in models}
    tests: dict[str, Dataset] = {}
    asked: dict[str, Dataset] = {}
    if recipe.dataset_name is not None or not tasks:  # tasks bring rows of their own
        datasets = vlm.builtin.DATASETS if vision else builtin.DATASETS
        keep = [own.category_column] if own.category_column else []
        tests = load_data(recipe, training, datasets, vision=vision, test_only=True, keep=keep)
        test = tests["test"]
        groups = rows_by_category(test, own.category_column)
        if recipe.num_eval_generations and "prompt" in test.column_names:
            asked = {split: first(rows, recipe.num_eval_generations) for split, rows in tests.items()}
        print(f"{counted(len(test), 'example')} to score, {len(asked.get('test', [])):,} to answer")

    # 3. One model after the other: TRL's evaluation, as during training; then greedy answers; then the tasks, in a
    #    process of their own.
    ask: Any = vlm.generation.answers if vision else answers
    scored: dict[str, int] = {}
    records, assistant_only_loss = {}, training.assistant_only_loss
    for name in models:
        print(f"\n{printable(name)}", flush=True)
        found = scores[name]
        if tests:
            model, processor = load_trained(
                name, model_args, vision=vision, trust_remote_code=training.trust_remote_code
            )
            if model.num_parameters() < 10_000_000:
                torch.set_num_threads(1)  # faster than more, on matrices this small
            warn_if_packed_examples_mix(model, training, "transformers")
            # As in training, where this model's chat template can. With images the rows of one reply never are.
            can = not (vision or whole_conversations_problem(processor))
            training.assistant_only_loss = assistant_only_loss and can
            row = test.select([0])  # the trainer wants something to train on
            trainer = SFTTrainer(model, training, train_dataset=row, eval_dataset=test, processing_class=processor)
            show_progress(trainer)
            of_rows, scored[name] = losses(trainer, len(test), groups)
            found |= of_rows
            warn_long_replies(processor, recipe.max_new_tokens, *asked.values())
            given[name] = {k: ask(model, processor, asked[k], max_new_tokens=recipe.max_new_tokens) for k in asked}
            for split, rows in asked.items():
                kind = split.removeprefix("test")
                found[f"exact_match{kind}"] = exact_match(given[name][split], rows, processor)
                found[f"character_error_rate{kind}"] = character_error_rate(given[name][split], rows, processor)
            for score in (exact_match, character_error_rate) if asked else ():
                found |= by_category(score, given[name]["test"], asked["test"], groups, processor)
            if vision and asked:  # what can be answered without seeing
                blind = ask(model, processor, asked["test"], max_new_tokens=recipe.max_new_tokens, blank=True)
                found["exact_match_blank_images"] = exact_match(blind, asked["test"], processor)
            del model, trainer
            release()
        if tasks:
            folder = Path(training.output_dir) / "tasks" / Path(name).name
            of_tasks, records[name] = run_tasks(
                tasks,
                name,
                bases[name],
                folder,
                model_args,
                vision=vision,
                batch_size=training.per_device_eval_batch_size,
                limit=own.tasks_limit,
                trust_remote_code=training.trust_remote_code,
            )
            found |= of_tasks

    # 4. Show and save the scores.
    if asked and recipe.num_samples:
        shown = first(asked["test"], recipe.num_samples)
        print(format_samples(shown, {name: given[name]["test"] for name in models}))
    print(f"\n{format_scores(scores)}")
    record = {"scores": scores, "examples": {split: len(rows) for split, rows in tests.items()}, "answers": given}
    record |= {"rows_of_losses": scored}
    record |= {"tasks": records, "scored_with": scored_with(recipe, training, model_args), "argv": sys.argv}
    record |= {"device": device_name(), "versions": versions()}
    path = Path(training.output_dir) / "scores.json"
    write_json(path, record)
    tracking.log_comparison(scores, training.report_to)
    tracking.finish()
    print(printable(f"\nThe same, with all answers: {path}"))
    if len(models) == 1:
        other = bases[models[0]] if bases[models[0]] != models[0] else "ANOTHER_MODEL"
        place = sys.argv.index(models[0])
        command = [*this_command(), *sys.argv[1:place], other, *sys.argv[place:]]
        print(printable(f"Next, side by side: {shlex.join(command)}"))
    else:
        print(f"Next, is the difference more than chance? Several seeds: {shlex.join(command_of('compare'))} --help")


def rows_by_category(test: Dataset, column: str | None) -> dict[str, list[int]]:
    """The rows of each value of that column, by their index; empty without one."""
    groups: dict[str, list[int]] = {}
    for i, value in enumerate(test[column] if column else ()):
        groups.setdefault(str(value), []).append(i)
    return dict(sorted(groups.items()))


def losses(trainer: SFTTrainer, given: int, groups: dict[str, list[int]]) -> tuple[dict[str, float], int]:
    """Loss, perplexity and token accuracy on the trainer's held-out rows, the losses of each category, and how many
    rows these are. Fewer than given are said."""
    rows: Any = trainer.eval_dataset
    if groups and len(rows) != sum(map(len, groups.values())):
        raise ValueError("--category_column scores rows one by one, and they are packed: add --packing false.")
    trainer.args.dataloader_persistent_workers = False  # as in `results.final_eval`
    with rows_scored(trainer.model) as scored:
        found = trainer.evaluate()
    scores = {"test_loss": found["eval_loss"], "perplexity": math.exp(found["eval_loss"])}
    scores["token_accuracy"] = found["eval_mean_token_accuracy"]
    if scored.count < given:
        print(
            f"The losses are of {scored.count:,} of {given:,} rows: the others have no reply left within --max_length "
            f"{trainer.args.max_length}."
        )
    for category, indices in groups.items():
        scores[f"{category}/test_loss"] = trainer.evaluate(rows.select(indices))["eval_loss"]
    return scores, scored.count


def by_category(
    score: Callable[[list[str], Dataset, Any], float],
    given: list[str],
    asked: Dataset,
    groups: dict[str, list[int]],
    processor: Any,
) -> dict[str, float]:
    """A score of the answers of each category; those of which no row was asked are left out."""
    scores = {}
    for category, indices in groups.items():
        of_category = [i for i in indices if i < len(asked)]
        if of_category:
            rows = asked.select(of_category)
            scores[f"{category}/{score.__name__}"] = score([given[i] for i in of_category], rows, processor)
    return scores


if __name__ == "__main__":
    run(main)
