"""Score models side by side on held-out data: loss on the response, perplexity, exact match of what they answer.

A model is a folder that a recipe has written (all weights, or a LoRA adapter) or a hub id. Rows and settings are those
of the first run among them, so that its scores come out again. Flags override them, for all models alike.

  python recipes/evaluate.py outputs/demo_vlm
  python recipes/evaluate.py outputs/demo_text outputs/demo_text_baseline
  python recipes/evaluate.py Qwen/Qwen3-0.6B outputs/qwen3_lora --dataset_name my_chats.jsonl
"""

import dataclasses
import gc
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.utils import find_adapter_config_file
from trl import ModelConfig, SFTTrainer

import vlm.builtin
import vlm.generation
from grades_trl.recipe import builtin
from grades_trl.recipe.arguments import parse_scoring, scored_with
from grades_trl.recipe.console import set_up_console
from grades_trl.recipe.data import load_data
from grades_trl.recipe.generation import answers, exact_match, format_samples
from grades_trl.recipe.models import find_gguf, load_model
from grades_trl.recipe.places import command_of, this_command
from grades_trl.recipe.results import format_scores
from grades_trl.report.environment import device_name, versions
from grades_trl.report.strict_json import write_json


def main() -> None:
    set_up_console()
    models, recipe, training, model_args = parse_scoring(__doc__)

    # 1. Text or vision? The configs of the models say it.
    bases = {name: base_of(name) for name in models}
    seeing = [name for name in models if sees(bases[name], training.trust_remote_code)]
    if seeing and seeing != models:
        raise SystemExit(f"Some of these models see and some do not: score them apart. Vision: {', '.join(seeing)}")
    vision = bool(seeing)

    # 2. The rows that the recipes score at the end of a run, not those used for decisions during training.
    of_text: Any = {"dates": builtin.dates, "docstrings": builtin.docstrings}
    of_images: Any = vlm.builtin.DATASETS
    tests = load_data(recipe, training, of_images if vision else of_text, vision=vision, test_only=True)
    test, asked = tests["test"], {}
    if recipe.num_eval_generations and "prompt" in test.column_names:
        asked = {k: rows.select(range(min(recipe.num_eval_generations, len(rows)))) for k, rows in tests.items()}
    print(f"{len(test):,} examples to score, {len(asked.get('test', [])):,} to answer")

    # 3. One model after the other: TRL's evaluation, as during training; then greedy answers.
    ask: Any = vlm.generation.answers if vision else answers
    scores: dict[str, dict[str, float]] = {}
    given: dict[str, dict[str, list[str]]] = {}
    for name in models:
        print(f"\n{name}", flush=True)
        model, processor = load(name, bases[name], vision, training.trust_remote_code, model_args)
        if model.num_parameters() < 10_000_000:
            torch.set_num_threads(1)  # faster than more, on matrices this small
        first = test.select([0])  # the trainer wants something to train on
        trainer = SFTTrainer(model, training, train_dataset=first, eval_dataset=test, processing_class=processor)
        found = trainer.evaluate()
        scores[name] = {"test_loss": found["eval_loss"], "perplexity": math.exp(found["eval_loss"])}
        scores[name]["token_accuracy"] = found["eval_mean_token_accuracy"]
        given[name] = {k: ask(model, processor, asked[k], max_new_tokens=recipe.max_new_tokens) for k in asked}
        for split, rows in asked.items():
            scores[name][f"exact_match{split.removeprefix('test')}"] = exact_match(given[name][split], rows)
        if vision and asked:  # what can be answered without seeing
            blind = ask(model, processor, asked["test"], max_new_tokens=recipe.max_new_tokens, blank=True)
            scores[name]["exact_match_blank_images"] = exact_match(blind, asked["test"])
        del model, trainer
        gc.collect()  # a trainer refers to itself: without this, its model would stay beside the next one
        torch.cuda.empty_cache()

    # 4. Show and save the scores.
    if asked and recipe.num_samples:
        shown = asked["test"].select(range(min(recipe.num_samples, len(asked["test"]))))
        print(format_samples(shown, {name: given[name]["test"] for name in models}))
    print(f"\n{format_scores(scores)}")
    record = {"scores": scores, "examples": {split: len(rows) for split, rows in tests.items()}, "answers": given}
    record |= {"scored_with": scored_with(recipe, training, model_args), "argv": sys.argv}
    record |= {"device": device_name(), "versions": versions()}
    path = Path(training.output_dir) / "scores.json"
    write_json(path, record)
    print(f"\nThe same, with all answers: {path}")
    if len(models) == 1:
        other = bases[models[0]] if bases[models[0]] != models[0] else "ANOTHER_MODEL"
        place = sys.argv.index(models[0])
        command = [*this_command(), *sys.argv[1:place], other, *sys.argv[place:]]
        print(f"Next, side by side: {shlex.join(command)}")
    else:
        print(f"Next, is the difference more than chance? Several seeds: {shlex.join(command_of('compare'))} --help")


def load(name: str, base: str, vision: bool, trust_remote_code: bool, args: ModelConfig) -> tuple[Any, Any]:
    """Model and processor; of an adapter, on the model that it was trained on."""
    # The Trainer takes no quantized model without adapters; new ones change nothing, as one factor is zero.
    quantized = args.load_in_4bit or args.load_in_8bit
    args = dataclasses.replace(args, model_name_or_path=base, use_peft=quantized)
    model, processor = load_model(args, "transformers", vision=vision, trust_remote_code=trust_remote_code)
    if name != base:
        model = model.unload() if quantized else model
        model = PeftModel.from_pretrained(model, name, is_trainable=True)  # TRL then casts it as in training
        if (Path(name) / "tokenizer_config.json").exists():
            processor = (AutoProcessor if vision else AutoTokenizer).from_pretrained(name)
    return model, processor


def base_of(name: str) -> str:
    """The model that an adapter was trained on; all other models are their own."""
    adapter = find_adapter_config_file(name)
    if adapter is None:
        return name
    base = json.loads(Path(adapter).read_text())["base_model_name_or_path"]
    if not base:
        raise SystemExit(f"{name} is the adapter of a model that was not saved: train it on a folder or a hub id.")
    return base


def sees(name: str, trust_remote_code: bool) -> bool:
    config = None if find_gguf(name) else AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    return hasattr(config, "vision_config")


if __name__ == "__main__":
    main()
