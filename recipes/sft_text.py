"""Fine-tune a language model with GradES: every weight matrix freezes when it has converged, the run ends when all
have.

Without arguments: a tiny Qwen3 learns to write dates as ISO 8601, in about a minute, nothing downloaded.

  python recipes/sft_text.py
  python recipes/sft_text.py --config configs/qwen3_0.6b_qlora.yaml
  python recipes/sft_text.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name my_chats.jsonl --use_peft
"""

from pathlib import Path

from grades_trl.recipe.backend import BACKEND  # isort: skip  Unsloth, if it is used, must be imported before all else

import torch
import wandb
from datasets import Dataset

from grades_trl import GradESTrainer
from grades_trl.recipe import builtin
from grades_trl.recipe.arguments import early_stopping, final_losses, finish, load_data, parse, report_cut_rows
from grades_trl.recipe.generation import answers, exact_match, show_samples
from grades_trl.recipe.models import load_model, make_trainable
from grades_trl.report.timing import RunClock

CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> None:
    recipe, training, model_args, grades = parse(__doc__, CONFIGS / "demo_text.yaml")

    # 1. Data: prompts and responses. The loss is on the response alone. Of what is held out, one half decides
    #    during training (validation), the other is scored at the end alone (test).
    dataset = load_data(recipe, training, {"dates": builtin.dates, "docstrings": builtin.docstrings})
    train, validation, test = dataset["train"], dataset["validation"], dataset["test"]
    if recipe.max_train_samples is not None:
        train = train.select(range(min(recipe.max_train_samples, len(train))))
    print(f"{len(train):,} examples to train on, {len(validation):,} to validate on, {len(test):,} to test on")

    # 2. Model: from the hub, a folder or a GGUF file; without a name, the tiny one that is built here.
    if model_args.model_name_or_path is None:
        torch.set_num_threads(1)  # faster than more, on matrices this small
        model, tokenizer = builtin.tiny_qwen3(seed=training.seed)
        model = make_trainable(model, model_args, seed=training.seed)
    else:
        model, tokenizer = load_model(
            model_args,
            BACKEND,
            towers=("language",),  # of a model that sees, its text alone
            trust_remote_code=training.trust_remote_code,
            max_length=training.max_length,
            seed=training.seed,
        )
    clock = RunClock()
    trainer = GradESTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        grades=grades if recipe.grades else None,
        callbacks=[clock, *early_stopping(recipe)],
    )
    report_cut_rows(trainer, {"train": train, "validation": validation})

    # 3. Train, with a few answers and their exact match before and after.
    can_ask = "prompt" in test.column_names
    shown = test.select(range(min(recipe.samples, len(test)))) if can_ask and recipe.samples else None
    asked = {
        split: rows.select(range(min(recipe.generate, len(rows))))
        for split, rows in dataset.items()
        if can_ask and recipe.generate and split.startswith("test")
    }

    def ask(rows: Dataset) -> list[str]:
        return answers(trainer.model, tokenizer, rows, max_new_tokens=recipe.max_new_tokens)

    before = ask(shown) if shown else []
    results = {f"before/exact_match_{split}": exact_match(ask(rows), rows) for split, rows in asked.items()}
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    after = ask(shown) if shown else []

    # 4. What came of it.
    results |= final_losses(trainer, test)
    results |= {f"final/exact_match_{split}": exact_match(ask(rows), rows) for split, rows in asked.items()}
    if shown:
        show_samples(shown, {"before": before, "after": after})
    trainer.save_model()
    finish(trainer, clock, results, recipe, model_args)
    wandb.finish()


if __name__ == "__main__":
    main()
