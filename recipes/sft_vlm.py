"""Fine-tune a vision-language model with GradES: leading layers that could gain far less than they cost are
frozen, and the run ends when the model has stopped improving.

Without arguments: a tiny LLaVA that reads handwritten numbers learns to answer in another form, in under two minutes,
nothing downloaded.

  python recipes/sft_vlm.py
  python recipes/sft_vlm.py --config configs/qwen2_5_vl_7b_qlora.yaml --dataset_name my_images/
  python recipes/sft_vlm.py --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --dataset_name my_images/ --use_peft
"""

from pathlib import Path

from grades_trl.recipe.backend import BACKEND  # isort: skip  Unsloth, if it is used, must be imported before all else

import torch
from datasets import Dataset

from grades_trl.distributed import is_main, main_first, others_end
from grades_trl.extras import installed
from grades_trl.recipe.arguments import configure_bema, configure_early_stopping, parse
from grades_trl.recipe.bad_input import printable, run
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
from grades_trl.recipe.generation import exact_match, format_samples, warn_long_replies
from grades_trl.recipe.lora import refuse_resized_embeddings
from grades_trl.recipe.models import check_model, load_model, make_trainable
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
from vlm import GradESVLMTrainer, builtin
from vlm.generation import answers
from vlm.samples import save_samples

CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> None:
    set_up_console()
    exit_with_comparison()
    recipe, training, model_args, grades = parse(__doc__, CONFIGS / "demo_vlm.yaml")
    if recipe.plan:
        print_plan(recipe, training, model_args, grades, builtin.DATASETS, builtin.tiny_llava, vision=True)
        return
    early_stopping = configure_early_stopping(recipe, training)
    check_model(model_args, vision=True, trust_remote_code=training.trust_remote_code)

    # 1. Data: images with prompts and replies; only the reply is learned. One half of the held-out rows is used for
    #    decisions during training (validation), the other only for the scores at the end (test).
    with main_first():  # it downloads and prepares them for all processes
        dataset = load_data(recipe, training, builtin.DATASETS, vision=True)
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

    # 2. Model: from the hub or a folder. Without a name, the tiny pretrained one that comes with this repository.
    if model_args.model_name_or_path == "tiny_llava":  # untrained
        model, processor = builtin.tiny_llava(seed=training.seed)
        model = make_trainable(model, model_args, recipe.train_towers, recipe.train_layers, training.seed)
    else:
        model_args.model_name_or_path = model_args.model_name_or_path or str(builtin.READER)
        model, processor = load_model(
            model_args,
            BACKEND,
            vision=True,
            towers=recipe.train_towers,
            layers=recipe.train_layers,
            trust_remote_code=training.trust_remote_code,
            max_length=training.max_length,
            seed=training.seed,
        )
    if model.num_parameters() < 10_000_000:
        torch.set_num_threads(1)  # faster than more, on matrices this small
    refuse_resized_embeddings(model, processor, training)
    train = training_rows(train, processor, training, recipe.train_on, vision=True)
    check_exports(recipe, model_args, BACKEND)
    environment, clock = Environment.gather(model), RunClock()

    def ask(rows: Dataset, blank: bool = False) -> list[str]:
        return answers(trainer.model, processor, rows, max_new_tokens=recipe.max_new_tokens, blank=blank)

    def score(count: int) -> float:  # for heldout_metric: exact_match
        rows = validation.select(range(count))
        return exact_match(ask(rows), rows, processor)

    trainer = GradESVLMTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=processor,
        grades=grades if recipe.grades else None,
        heldout_answers=HeldoutAnswers(score, len(validation), recipe.max_new_tokens),
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

    # 3. Train, with a few answers before and after. The model is saved as soon as it is trained.
    shown = first(test, recipe.num_samples)
    asked = first(test, recipe.num_eval_generations)
    measured = [validation] if recipe.grades and grades.heldout_metric == "exact_match" else []
    warn_long_replies(processor, recipe.max_new_tokens, asked, *measured)

    before = ask(shown) if len(shown) else []
    results = {"before/exact_match": exact_match(ask(asked), asked, processor)} if len(asked) else {}
    train_and_save(trainer, clock, training.resume_from_checkpoint)

    # 4. Score it: the loss of the held-out rows, and exact answers, beside those of the same model given blank images,
    #    which tell what can be answered without seeing.
    results, samples = results | final_eval(trainer, test), []
    if trainer.diverged_at is None:
        if len(asked):
            results["final/exact_match"] = exact_match(ask(asked), asked, processor)
            results["final/exact_match_blank_images"] = exact_match(ask(asked, blank=True), asked, processor)
            results |= dict.fromkeys(("rows/exact_match", "rows/exact_match_blank_images"), len(asked))
        if len(shown):
            after = ask(shown)
            samples = samples_of(shown, before, after)
            print(format_samples(shown, {"before": before, "after": after}))
            if installed("matplotlib") and is_main():
                sheet = Path(training.output_dir) / "samples.png"
                save_samples(shown, before, after, sheet, processor)
                print(printable(f"With their images: {sheet}"))

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
