"""Tries architectures and writes their rows into docs/models.md.

python tests/families/table.py                      all of them (half an hour on two cores)
python tests/families/table.py qwen3_moe llava      some
"""

import logging
import sys
import traceback
from pathlib import Path

import transformers
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parent))

from check import Row, check
from zoo import TEXT, WITH_IMAGES_OR_SOUND

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# Models

`make families` writes this page, and `make test` checks some of its rows. Each architecture of the installed
Transformers ({version}) is made tiny from its config and trained for three steps on the CPU. After the second step the
lower half of its layers is frozen. In every row, the frozen weights keep their bits, all other gradients are those of
a run without the frozen prefix (checkpointing off, non-reentrant, reentrant), and the saved model and adapter are read
back as they were.

- **matrices**: how many weight matrices GradES tracks in each tower in full fine-tuning.
- **full**, **LoRA**, **QLoRA**: it trains. LoRA is what `--use_peft --lora_dropout 0` adapts.
- **frozen prefix**: backward skips the frozen layers.

**Mixtures of experts.** With LoRA, `--lora_dropout 0` (the default is 0.05) adapts the dense layers and the shared
experts, and `--lora_target_parameters` the experts. Routers are never adapted. "LoRA leaves out" counts what has no
adapter.

**Losses.** The recipes' default, `--loss_type chunked_nll`, needs `--loss_type nll` in its place for Llama 4, BLIP-2,
InstructBLIP, Kosmos 2 and 2.5, Qwen Omni, and encoder-decoders such as T5 and Florence 2. TRL's SFTTrainer cannot
train GIT, whose own loss does. The first pass of a run says so, before a weight has changed.

A model that is not here may work as well: the table at the start of a run says what was found in it.
"""
COLUMNS = "| architecture | matrices | full | LoRA | QLoRA | frozen prefix | notes |\n|---|---|---|---|---|---|---|"


def rows_of_page() -> dict[str, str]:
    """Architecture -> its row on the page."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| architecture")]
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows}


def try_architecture(name: str) -> Row:
    return check(name, vision=name in WITH_IMAGES_OR_SOUND)


def main(names: list[str]) -> int:
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    failed = []
    for name in names or [*TEXT, *WITH_IMAGES_OR_SOUND]:
        try:
            row = str(try_architecture(name))
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        print(row, flush=True)
        rows = rows_of_page() | {name: row}
        parts = [HEAD.format(version=transformers.__version__)]
        for title, of_part in (("Text", TEXT), ("Images and sound", WITH_IMAGES_OR_SOUND)):
            parts.append("\n".join([f"## {title}\n", COLUMNS, *(rows[n] for n in of_part if n in rows)]) + "\n")
        PAGE.write_text("\n".join(parts))
    if failed:
        print(f"failed: {' '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
