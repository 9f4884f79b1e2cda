"""Plan a run before it is started: memory by part, the cards that it fits on and the flags that make it fit, what
freezing can save, steps, tokens and FLOPs. It takes the flags of sft_text.py and sft_vlm.py. No weights are loaded.

  python recipes/plan.py --config configs/qwen3_0.6b_qlora.yaml
  python recipes/plan.py --model_name_or_path Qwen/Qwen3-8B --use_peft --load_in_4bit --dtype bfloat16
"""

from pathlib import Path

from grades_trl.recipe.backend import BACKEND  # noqa: F401  isort: skip  as in the recipes: before all else

from grades_trl.recipe import builtin as text
from grades_trl.recipe.arguments import parse
from grades_trl.recipe.bad_input import run
from grades_trl.recipe.console import set_up_console
from grades_trl.recipe.models import read_config
from grades_trl.recipe.plan import print_plan
from vlm import builtin as images

CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> None:
    set_up_console()
    run = recipe, training, model_args, _ = parse(__doc__, CONFIGS / "demo_text.yaml")
    if model_args.model_name_or_path in (None, "tiny_llava"):
        vision = recipe.dataset_name in images.DATASETS
    else:
        vision = hasattr(read_config(model_args, training.trust_remote_code), "vision_config")
    if vision:
        print_plan(*run, images.DATASETS, images.tiny_llava, vision=True)
    else:
        print_plan(*run, text.DATASETS, text.tiny_qwen3)


if __name__ == "__main__":
    run(main)
