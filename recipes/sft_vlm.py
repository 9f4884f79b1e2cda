"""Fine-tune a vision-language model with GradES: every weight matrix freezes when it has converged, the run ends when
all have.

Without arguments: a tiny LLaVA learns to read handwritten numbers, in under two minutes, nothing downloaded.

  python recipes/sft_vlm.py
  python recipes/sft_vlm.py --config configs/qwen2_5_vl_7b_qlora.yaml
  python recipes/sft_vlm.py --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --dataset_name my_pictures/ --use_peft
"""

from pathlib import Path

from grades_trl.recipe.backend import BACKEND  # isort: skip  Unsloth, if it is used, must be imported before all else

import torch
import wandb

from grades_trl.recipe.arguments import early_stopping, final_losses, finish, load_data, parse
from grades_trl.recipe.generation import exact_match, show_samples
from grades_trl.recipe.models import load_model, make_trainable
from grades_trl.report.timing import RunClock
from vlm import GradESVLMTrainer, builtin
from vlm.generation import answers
from vlm.samples import save_samples

CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> None:
    recipe, training, model_args, grades = parse(__doc__, CONFIGS / "demo_vlm.yaml")

    # 1. Data: pictures with prompts and responses. The loss is on the response alone. Of what is held out, one
    #    half decides during training (validation), the other is scored at the end alone (test).
    dataset = load_data(recipe, training, {"digits": builtin.digit_pictures}, vision=True)
    train, validation, test = dataset["train"], dataset["validation"], dataset["test"]
    if recipe.max_train_samples is not None:
        train = train.select(range(min(recipe.max_train_samples, len(train))))
    print(f"{len(train):,} examples to train on, {len(validation):,} to validate on, {len(test):,} to test on")

    # 2. Model: from the hub or a folder; without a name, the tiny one that is built here.
    if model_args.model_name_or_path is None:
        torch.set_num_threads(1)  # faster than more, on matrices this small
        model, processor = builtin.tiny_llava(seed=training.seed)
        model = make_trainable(model, model_args, recipe.train_towers, training.seed)
    else:
        model, processor = load_model(
            model_args,
            BACKEND,
            vision=True,
            towers=recipe.train_towers,
            trust_remote_code=training.trust_remote_code,
            max_length=training.max_length,
            seed=training.seed,
        )
    clock = RunClock()
    trainer = GradESVLMTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=processor,
        grades=grades if recipe.grades else None,
        callbacks=[clock, *early_stopping(recipe)],
    )

    # 3. Train, with a few answers before and after.
    shown = test.select(range(min(recipe.samples, len(test))))
    before = answers(trainer.model, processor, shown, max_new_tokens=recipe.max_new_tokens) if recipe.samples else []
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    after = answers(trainer.model, processor, shown, max_new_tokens=recipe.max_new_tokens) if recipe.samples else []

    # 4. What came of it, next to the same model given blank pictures: what can be answered without seeing.
    results = final_losses(trainer, test)
    if recipe.generate:
        asked = test.select(range(min(recipe.generate, len(test))))
        for name, blank in (("exact_match", False), ("exact_match_blank_pictures", True)):
            given = answers(trainer.model, processor, asked, max_new_tokens=recipe.max_new_tokens, blank=blank)
            results[f"final/{name}"] = exact_match(given, asked)
    if recipe.samples:
        show_samples(shown, {"before": before, "after": after})
        sheet = Path(training.output_dir) / "samples.png"
        save_samples(shown, before, after, sheet)
        print(f"With their pictures: {sheet}")
        if wandb.run is not None:
            wandb.log({"samples": wandb.Image(str(sheet))})
    trainer.save_model()
    finish(trainer, clock, results, recipe, model_args)
    wandb.finish()


if __name__ == "__main__":
    main()
