"""Score the saved models of a comparison of the demo on more images. 1,000 images leave an error of 1.3 points.

  python benchmarks/score_again.py outputs/compare

The images are drawn as those of the built-in test set are, from the same held-out scans, and none of them was used for
a decision or a score before: the first 2,000 of the generator, validation and test half, are left out.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import DatasetDict
from trl import ModelConfig

from grades_trl.recipe.generation import exact_match
from grades_trl.recipe.trained import load_trained
from vlm.builtin import DATASETS
from vlm.generation import answers

USED = 2000  # test images that the recipes draw, in `load_data`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of recipes/compare.py, run with --config configs/demo_vlm.yaml")
    parser.add_argument("--images", type=int, default=4000, help="default: 4000")
    given = parser.parse_args()
    torch.set_num_threads(1)  # faster than more, on matrices this small

    splits: DatasetDict = DATASETS["digits_dashes"](train=1, test=USED + given.images)
    test = splits["test"].select(range(USED, USED + given.images))
    runs = []
    for run in json.loads((given.folder / "compare.json").read_text("utf-8"))["runs"]:
        name = f"{run['variant']}-seed{run['seed']}"
        model, processor = load_trained(str(given.folder / name), ModelConfig(), vision=True)
        found = exact_match(answers(model, processor, test, max_new_tokens=10), test, processor)
        runs.append({"variant": run["variant"], "seed": run["seed"], "exact_match": found})
        print(f"{name}: {100 * found:.2f} %", flush=True)
    path = given.folder / "more_images.json"
    path.write_text(json.dumps({"images": given.images, "runs": runs}, indent=2) + "\n", "utf-8")
    print(path)


if __name__ == "__main__":
    main()
