"""Through Unsloth's CPU backend. In processes of their own: importing Unsloth changes transformers, peft and trl."""

import json
import subprocess
import sys
from pathlib import Path

from grades_trl.recipe import builtin

ROOT = Path(__file__).parents[1]

SCRIPT = """
import sys
from grades_trl.recipe.backend import BACKEND
assert BACKEND == "unsloth"
import trl
from unsloth import FastLanguageModel
from grades_trl import GradESConfig, GradESTrainer
from grades_trl.recipe import builtin

model, tokenizer = FastLanguageModel.from_pretrained(sys.argv[1], max_seq_length=128, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=4, target_modules=["q_proj", "v_proj", "up_proj"])
assert GradESTrainer.__mro__[3] is trl.SFTTrainer and trl.SFTTrainer._unsloth_cpu
trainer = GradESTrainer(
    model=model,
    args=trl.SFTConfig(sys.argv[2], max_steps=20, per_device_train_batch_size=8, learning_rate=2e-3, report_to=[]),
    train_dataset=builtin.dates(train=256, test=2)["train"],
    processing_class=tokenizer,
    grades=GradESConfig(metric="grad_change", alpha=0.3, auto_ratio=1.0),
)
before = {n: [p.detach().clone() for p in m.parameters] for n, m in trainer.tracked.items()}
trainer.train()
frozen = trainer.grades.frozen
assert len(trainer.tracked) == 12 and 0 < len(frozen), frozen
for name, matrix in trainer.grades.matrices.items():
    assert any(bool((p != q).any()) for p, q in zip(matrix.parameters, before[name])), name
print("FROZEN", len(frozen))
"""


def run(*command, cwd):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_text_lora_freezes_on_unsloth_s_own_trainer(folder, tmp_path):
    done = run("-c", SCRIPT, folder, tmp_path / "out", "--backend", "unsloth", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "FROZEN" in done.stdout
    assert len((tmp_path / "out" / "grades" / "events.jsonl").read_text().splitlines()) > 0


def test_the_recipe_with_backend_unsloth(folder, tmp_path):
    rows = [{"messages": p + c} for p, c in (r.values() for r in builtin.dates(train=64, test=2)["train"])]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    flags = "--use_peft --lora_r 4 --max_steps 12 --metric grad_norm --tau 1e9 --alpha 0.5 --heldout_every 2"
    flags += " --heldout_cost 1 --report_to none --num_eval_generations 4 --num_samples 1 --max_new_tokens 8"
    flags += " --output_dir out --backend unsloth --dataset_name chats.jsonl --export merged"
    done = run(ROOT / "recipes" / "sft_text.py", "--model_name_or_path", folder, *flags.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "training on CPU" in done.stdout  # Unsloth's own word
    assert "out/merged: loaded again, the same answers to one prompt" in done.stderr
    assert (tmp_path / "out" / "merged" / "tokenizer_config.json").exists()
    summary = json.loads((tmp_path / "out" / "grades" / "summary.json").read_text())
    assert summary["tracked_matrices"] == 28
    assert summary["frozen"] == 28
    assert summary["heldout"]["measurements"] > 0


def test_a_trainer_made_before_unsloth_was_imported_is_refused(tmp_path):
    script = """
from grades_trl import GradESTrainer as early
import unsloth
from grades_trl import GradESTrainer as late
assert early is not late
try:
    early(model=None)
except ImportError as error:
    print("REFUSED", error)
"""
    done = run("-c", script, cwd=tmp_path)
    assert "REFUSED GradESTrainer was made before unsloth was imported" in done.stdout, done.stderr[-2000:]


def test_importing_the_package_leaves_the_first_word_to_unsloth(tmp_path):
    done = run(
        "-c", "import sys, grades_trl; print(sorted({'transformers', 'trl', 'peft'} & set(sys.modules)))", cwd=tmp_path
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_backend_errors(tmp_path):
    done = run("-c", "import trl\nfrom grades_trl.recipe.backend import choose\nchoose('unsloth')", cwd=tmp_path)
    assert "trl was imported before Unsloth" in done.stderr
    done = run(ROOT / "recipes" / "sft_text.py", "--backend", "fast", cwd=tmp_path)
    assert "backend is 'fast'; expected one of auto, unsloth, transformers" in done.stderr
