"""Fine-tune a language model with GradES: leading layers that could gain far less than they cost are
frozen, and the run ends when the model has stopped improving.

Without arguments: a tiny Qwen3 learns to write dates as ISO 8601, in about a minute, nothing downloaded.

  python recipes/sft_text.py
  python recipes/sft_text.py --config configs/qwen3_0.6b_qlora.yaml
  python recipes/sft_text.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name my_chats.jsonl --use_peft
"""

from pathlib import Path

from grades_trl.recipe.backend import BACKEND  # isort: skip  Unsloth, if it is used, must be imported before all else

import torch
from datasets import Dataset

from grades_trl import GradESTrainer
from grades_trl.distributed import is_main, main_first, others_end
from grades_trl.recipe import builtin
from grades_trl.recipe.arguments import configure_bema, configure_early_stopping, parse
from grades_trl.recipe.bad_input import run
from grades_trl.recipe.card import push, write_card
from grades_trl.recipe.choice import choice_flops, format_choice
from grades_trl.recipe.comparison import exit_with_comparison
from grades_trl.recipe.console import format_start, set_up_console, show_progress
from grades_trl.recipe.data import (
    LeaveNoFolder,
    first,
    load_data,
    show_example,
    training_rows,
    warn_truncated_examples,
)
from grades_trl.recipe.export import check_exports, export_run
from grades_trl.recipe.generation import answers, exact_match, format_samples, warn_long_replies
from grades_trl.recipe.lora import refuse_resized_embeddings
from grades_trl.recipe.models import check_model, load_model, make_trainable
from grades_trl.recipe.packed import warn_if_packed_examples_mix
from grades_trl.recipe.plan import print_plan
from grades_trl.recipe.record import record_arguments, samples_of
from grades_trl.recipe.results import exit_if_diverged, final_eval, format_run, save_results, train_and_save
from grades_trl.recipe.resume import mark_finished, set_up_resume
from grades_trl.recipe.scored import rows_left
from grades_trl.recipe.stop_tokens import set_stop_tokens, warn_if_answers_do_not_end
from grades_trl.recipe.trainer_settings import check_trainer_settings
from grades_trl.report import tracking
from grades_trl.report.environment import Environment
from grades_trl.report.timing import RunClock
from grades_trl.trainers.heldout import HeldoutAnswers

CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> None:
    set_up_console()
    exit_with_comparison()
    recipe, training, model_args, grades = parse(__doc__, CONFIGS / "demo_text.yaml")
    if recipe.train_towers is not None:
        raise ValueError(
            "--train_towers chooses among the towers of a vision-language model, which recipes/sft_vlm.py trains. Of "
            "a text model, choose layers with --train_layers."
        )
    if recipe.plan:
        print_plan(recipe, training, model_args, grades, builtin.DATASETS, builtin.tiny_qwen3)
        return
    if training.ddp_find_unused_parameters is None:
        training.ddp_find_unused_parameters = False  # as with checkpointing: in text, each has a gradient in each step
    early_stopping = configure_early_stopping(recipe, training)
    check_model(model_args, vision=False, trust_remote_code=training.trust_remote_code)

    # 1. Data: prompts and replies; only the reply is learned. One half of the held-out rows is used for decisions
    #    during training (validation), the other only for the scores at the end (test).
    with main_first():  # it downloads and prepares them for all processes
        dataset = load_data(recipe, training, builtin.DATASETS)
    train, validation, test = dataset["train"], dataset["validation"], dataset["test"]

    # From here on, something is written.
    record = set_up_resume(recipe, training, model_args, grades)
    if record is None:
        return  # the run had finished before
    callbacks = [record, *early_stopping, *configure_bema(recipe, training)]
    if recipe.preview:
        callbacks.append(LeaveNoFolder(training.output_dir))
    if "wandb" in training.report_to and is_main():
        training.run_name = tracking.start(training.output_dir, training.run_name)

    # 2. Model: from the hub, a folder or a GGUF file; without a name, the tiny one that is built here.
    if model_args.model_name_or_path is None:
        torch.set_num_threads(1)  # faster than more, on matrices this small
        model, tokenizer = builtin.tiny_qwen3(seed=training.seed)
        model = make_trainable(model, model_args, layers=recipe.train_layers, seed=training.seed)
    else:
        model, tokenizer = load_model(
            model_args,
            BACKEND,
            towers=("language",),  # of a vision-language model, only its text
            layers=recipe.train_layers,
            trust_remote_code=training.trust_remote_code,
            max_length=training.max_length,
            seed=training.seed,
        )
    warn_if_packed_examples_mix(model, training, BACKEND)
    refuse_resized_embeddings(model, tokenizer, training)
    train = training_rows(train, tokenizer, training, recipe.train_on)
    check_exports(recipe, model_args, BACKEND)
    environment, clock = Environment.gather(model), RunClock()
    has_prompts = "prompt" in test.column_names

    def ask(rows: Dataset) -> list[str]:
        return answers(trainer.model, tokenizer, rows, max_new_tokens=recipe.max_new_tokens)

    def score(count: int) -> float:  # for heldout_metric: exact_match
        rows = validation.select(range(count))
        return exact_match(ask(rows), rows, tokenizer)

    trainer = GradESTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        grades=grades if recipe.grades else None,
        heldout_answers=HeldoutAnswers(score, len(validation), recipe.max_new_tokens) if has_prompts else None,
        callbacks=[clock, *callbacks],
    )
    check_trainer_settings(trainer)
    set_stop_tokens(trainer)
    warn_if_answers_do_not_end(trainer, train)
    show_progress(trainer)
    choice = choice_flops(trainer)
    rows = rows_left(trainer, {"train": train, "validation": validation, "test": test})
    print(format_start(environment, rows, training.output_dir))
    print(format_choice(trainer.model, choice))
    warn_truncated_examples(rows, training.max_length)
    show_example(trainer, rows, whole=recipe.preview)
    if recipe.preview:
        return
    record_arguments(trainer, recipe, model_args)

    # 3. Train, with a few answers and their exact match before and after. The model is saved as soon as it is trained.
    shown = first(test, recipe.num_samples) if has_prompts and recipe.num_samples else None
    asked = {
        split: first(rows, recipe.num_eval_generations)
        for split, rows in dataset.items()
        if has_prompts and recipe.num_eval_generations and split.startswith("test")
    }
    measured = [validation] if has_prompts and recipe.grades and grades.heldout_metric == "exact_match" else []
    warn_long_replies(tokenizer, recipe.max_new_tokens, *asked.values(), *measured)

    before = ask(shown) if shown else []
    results = {f"before/exact_match_{split}": exact_match(ask(rows), rows, tokenizer) for split, rows in asked.items()}
    train_and_save(trainer, clock, training.resume_from_checkpoint)

    # 4. Score it: the loss of the held-out rows, and exact answers.
    results |= final_eval(trainer, test)
    samples = []
    if trainer.diverged_at is None:
        results |= {
            f"final/exact_match_{split}": exact_match(ask(rows), rows, tokenizer) for split, rows in asked.items()
        }
        results |= {f"rows/exact_match_{split}": len(rows) for split, rows in asked.items()}
        if shown:
            after = ask(shown)
            samples = samples_of(shown, before, after)
            print(format_samples(shown, {"before": before, "after": after}))

    if others_end():
        return  # the main process goes on

    # 5. Save and show the results.
    save_results(trainer, clock, environment, results, recipe, model_args, choice, samples)
    print(format_run(trainer, results))
    write_card(trainer, clock, environment, results, recipe, model_args, dataset)
    tracking.finish()
    exit_if_diverged(trainer, results)
    export_run(trainer, recipe, model_args, test, BACKEND)
    push(trainer)
    mark_finished(training)


if __name__ == "__main__":
    run(main)
