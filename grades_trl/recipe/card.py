"""The model card of a run, and the run on the hub."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import upload_folder
from peft import PeftModel
from trl import ModelConfig

from grades_trl.recipe.arguments import BUILTIN_DATASETS, RecipeArguments
from grades_trl.recipe.record import command_line
from grades_trl.report.environment import Environment
from grades_trl.report.summary import before_and_after, format_score, rows_of
from grades_trl.report.timing import RunClock
from grades_trl.wording import counted

logger = logging.getLogger(__name__)

# What is on the disk beside a model and is nobody else's business: copies of the data in samples, tokens in arguments.
NOT_UPLOADED = ["checkpoint-*", "wandb/*", "runs/*", "samples.png", "training_args.bin", "_*"]


def write_card(
    trainer: Any,
    clock: RunClock,
    environment: Environment,
    results: Mapping[str, float],
    recipe: RecipeArguments,
    model_args: ModelConfig,
    dataset: Mapping[str, Dataset],
) -> None:
    """
    Writes the model card, `README.md`: TRL's, with what froze when, what ran, the data, the scores and the command.

    Call it after `save_results`. A card that cannot be written is a warning: the run is whole without it. A run that
    has diverged gets none.

    Args:
        trainer: after `train()`.
        clock (`RunClock`): was among its callbacks.
        environment (`Environment`): gathered before training.
        results (`Mapping[str, float]`): the final scores.
        recipe (`RecipeArguments`), model_args (`ModelConfig`): as [`arguments.parse`] gave them.
        dataset (`Mapping[str, Dataset]`): split -> its rows.
    """
    if trainer.diverged_at is not None:
        return
    folder = Path(trainer.args.output_dir)
    try:
        on_hub = recipe.dataset_name not in (None, *BUILTIN_DATASETS) and not Path(str(recipe.dataset_name)).exists()
        name = (trainer.args.hub_model_id or folder.resolve().name).split("/")[-1]
        trainer.create_model_card(model_name=name, dataset_name=recipe.dataset_name if on_hub else None)
        text = (folder / "README.md").read_text("utf-8")
        sections = [
            _what_ran(trainer, clock, environment, model_args),
            _what_froze(trainer, folder),
            _data(recipe, trainer.args.seed, dataset),
            _scores(results),
            f"### Command\n\n```bash\n{command_line()}\n```",
        ]
        card = complete(text, sections, model_args.model_name_or_path, trainer, dataset["train"])
        (folder / "README.md").write_text(card, encoding="utf-8")
    except Exception:
        logger.warning(
            f"The model card could not be written. The model and its scores are in {folder}.", exc_info=True
        )


def complete(text: str, sections: list[str], base: str | None, trainer: Any, train: Dataset) -> str:
    """TRL's card with sections of our own before the versions, and without links to a model named None."""
    place = trainer.hub_model_id or trainer.args.output_dir
    before, versions, after = text.partition("### Framework versions")
    if not versions:
        raise ValueError("TRL's card has no section of versions, before which ours would come.")
    start, end = before.index("## Quick start"), before.index("## Training procedure")
    before = f"{before[:start]}{_quick_start(place, 'images' in train.column_names)}\n\n{before[end:]}"
    if "[None](https://huggingface.co/None)" in before:  # a folder, or made in memory
        named = f"`{Path(base).name}`" if base else f"a {type(trainer.model).__name__} made by the recipe"
        before = before.replace("[None](https://huggingface.co/None)", named)
    return before + "\n\n".join([*sections, versions + after])


def push(trainer: Any) -> None:
    """
    Uploads the folder of a run with `--push_to_hub`: model, card, report and exports. Checkpoints, W&B's files, copies
    of the data and the pickled arguments stay here.

    Raises:
        SystemExit: it failed; with what to do. All is on disk.
    """
    args = trainer.args
    if not args.push_to_hub:
        return
    try:
        commit = upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=args.output_dir,
            commit_message="End of training",
            token=args.hub_token,
            revision=args.hub_revision,
            ignore_patterns=NOT_UPLOADED,
        )
    except Exception as error:
        excluded = " ".join(f"--exclude {shlex.quote(pattern)}" for pattern in NOT_UPLOADED)
        raise SystemExit(
            f"The upload failed ({error}). The run is whole in {args.output_dir}. To upload it again: hf upload "
            f"{trainer.hub_model_id} {shlex.quote(args.output_dir)} . {excluded}"
        ) from error
    print(f"On the hub: {commit.commit_url}")


# ---- sections ----


def _quick_start(place: str, vision: bool) -> str:
    task = "image-text-to-text" if vision else "text-generation"
    content = '[{"type": "image", "url": "image.png"}, {"type": "text", "text": "..."}]' if vision else '"..."'
    called = "text=messages" if vision else "messages"
    return f"""## Quick start

```python
from transformers import pipeline

messages = [{{"role": "user", "content": {content}}}]
generator = pipeline("{task}", model="{place}")
print(generator({called}, max_new_tokens=64, return_full_text=False)[0]["generated_text"])
```"""


def _what_ran(trainer: Any, clock: RunClock, environment: Environment, model_args: ModelConfig) -> str:
    summary, state, args = trainer.grades_summary, trainer.state, trainer.args
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    method = "all weights"
    if isinstance(trainer.model, PeftModel):
        bits = {model_args.load_in_4bit: " on a base in 4 bits", model_args.load_in_8bit: " on a base in 8 bits"}
        method = f"LoRA, r {model_args.lora_r}{bits.get(True, '')}"
    seconds = clock.seconds if summary is None else summary.seconds
    memory = clock.peak_memory_mib if summary is None else summary.peak_memory_mib
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    rows = {
        "trained": f"{method}, {trained:,} parameters",
        "steps": f"{state.global_step:,} of {state.max_steps:,}, {counted(batch, 'example')} each",
        "ended by": summary.stop_reason if summary is not None else "the schedule, or early stopping",
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
        "time": f"{seconds.total:,.1f} s on {environment.device}",
        "peak memory": "not measured" if memory is None else f"{memory:,.0f} MiB",
    }
    if summary is not None:
        fraction = summary.flops.fraction
        if fraction is not None:
            rows["FLOPs"] = (
                f"{100 * fraction:.0f} % of those of all {state.max_steps:,} steps with nothing frozen (predicted)"
            )
        rows["weights"] = summary.weights
    lines = [f"| {name} | {str(value).replace('|', '/')} |" for name, value in rows.items()]
    return "\n".join(["### What ran", "", "| | |", "|---|---|", *lines])


def _what_froze(trainer: Any, folder: Path) -> str:
    summary = trainer.grades_summary
    if summary is None:
        return "### What froze when\n\nNothing: this is a baseline, trained without GradES."
    lines = ["### What froze when", "", "![What froze when](grades/timeline.png)"]
    if (folder / "grades" / "gain.png").exists():
        lines += ["", "![Gain by layer and step](grades/gain.png)"]
    steps: dict[str, list[int]] = {}
    frozen: dict[str, tuple[str, int]] = {}
    for event in map(json.loads, (folder / "grades" / "events.jsonl").read_text("utf-8").splitlines()):
        frozen[event["matrix"]] = (event["tower"], event["step"])
        if event.get("unfrozen"):
            del frozen[event["matrix"]]
    for tower, step in frozen.values():
        steps.setdefault(tower, []).append(step)
    lines += ["", f"Metric: `{summary.metric}`. {summary.frozen} of {summary.tracked_matrices} matrices are frozen."]
    lines += ["", "| tower | matrices | frozen | at steps |", "|---|---|---|---|"]
    for tower, count in summary.towers.items():
        when = f"{min(steps[tower])} to {max(steps[tower])}" if tower in steps else "-"
        lines.append(f"| {tower} | {count.matrices} | {count.frozen} | {when} |")
    return "\n".join(lines)


def _data(recipe: RecipeArguments, seed: int, dataset: Mapping[str, Dataset]) -> str:
    name = str(recipe.dataset_name)
    kind = "built into the recipes" if name in BUILTIN_DATASETS else "local" if Path(name).exists() else "on the hub"
    sizes = ", ".join(f"{len(rows):,} ({split})" for split, rows in dataset.items())
    shown = Path(name).name if kind == "local" else name  # a path says more of this machine than of the data
    shown = shown.replace("`", "'")
    return (
        f"### Data\n\n`{shown}`, {kind}; examples: {sizes}; seed {seed}. Decisions during training were made on "
        "`validation`; `test` was scored once, at the end."
    )


def _scores(results: Mapping[str, float]) -> str:
    of_rows = rows_of(results)
    lines = ["### Scores", "", "| | before training | after | rows |", "|---|---|---|---|"]
    for name, *both in before_and_after(results):
        cells = " | ".join("-" if number is None else format_score(name, number) for number in both)
        lines.append(f"| {name.removeprefix('eval_')} | {cells} | {of_rows.get(name, '-')} |")
    return "\n".join(lines)
