"""Write a trained model for other tools, and check its answers: merged 16-bit weights, a GGUF file with an Ollama
modelfile, or the adapter alone; with tokenizer, processor and chat template.

A model is a folder that a recipe has written (all weights, or a LoRA adapter) or a hub id. The prompts of the check
are held-out rows of the run, or of --dataset_name.

  python recipes/export.py outputs/demo_text
  python recipes/export.py outputs/qwen3_qlora --export merged gguf --gguf_converter llama.cpp
  ollama create my_model -f outputs/qwen3_qlora/gguf/Modelfile

The same at the end of a run: --export merged.
"""

from dataclasses import dataclass, field
from pathlib import Path

from grades_trl.recipe.backend import BACKEND  # isort: skip  Unsloth, if it is used, must be imported before all else

import vlm.builtin
from grades_trl.distributed import refuse_several_processes
from grades_trl.recipe import builtin
from grades_trl.recipe.arguments import parse_scoring
from grades_trl.recipe.bad_input import printable, run
from grades_trl.recipe.console import set_up_console
from grades_trl.recipe.data import first, load_data
from grades_trl.recipe.export import export
from grades_trl.recipe.trained import base_of, has_vision


@dataclass
class ExportArguments:
    """What only this script takes."""

    to: str | None = field(default=None, metadata={"help": "Folder to write to; by default that of the model."})
    gguf_type: str = field(
        default="q8_0",
        metadata={"help": "f32, f16, bf16 or q8_0; with Unsloth also its other ones (q4_k_m, ...)."},
    )
    gguf_converter: str | None = field(
        default=None,
        metadata={"help": "llama.cpp's folder or its convert_hf_to_gguf.py; by default looked up on the PATH."},
    )


SHOWN = "export backend num_samples max_new_tokens dtype load_in_4bit trust_remote_code"


def main() -> None:
    refuse_several_processes()
    set_up_console()
    models, recipe, training, model_args, own = parse_scoring(__doc__, None, [ExportArguments], SHOWN.split())
    if len(models) != 1:
        raise ValueError(f"One model at a time; there are {len(models)}: {' '.join(models)}")
    name, exports = models[0], recipe.export or ["merged"]
    base = base_of(name)
    vision = has_vision(base, training.trust_remote_code)

    # Prompts to compare answers to: those that the recipe shows at the end of a run.
    rows = None
    if recipe.dataset_name is not None or vision:
        datasets = vlm.builtin.DATASETS if vision else builtin.DATASETS
        test = load_data(recipe, training, datasets, vision=vision, test_only=True)["test"]
        if "prompt" in test.column_names:
            rows = first(test, max(1, recipe.num_samples))

    folder = Path(own.to) if own.to else Path(name) if Path(name).is_dir() else Path("outputs") / Path(name).name
    written = export(
        exports,
        name,
        folder,
        model_args,
        rows,
        vision=vision,
        backend=BACKEND,
        trust_remote_code=training.trust_remote_code,
        max_new_tokens=recipe.max_new_tokens,
        gguf_type=own.gguf_type,
        converter=own.gguf_converter,
    )
    for kind, path in written.items():
        print(printable(f"{kind}: {path}"))


if __name__ == "__main__":
    run(main)
