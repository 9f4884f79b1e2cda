"""`weight_change` is what the authors' package measures: the same values on the same run, `grades==1.0.6`."""

import pytest
from grades import GradEarlyStoppingCallback, GradEarlyStoppingConfig
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from grades_trl import GradES, GradESConfig
from grades_trl.recipe import builtin
from helpers import qwen3


@pytest.mark.parametrize("peft", [None, LoraConfig(r=4, target_modules="all-linear")], ids=["full", "lora"])
def test_weight_change_equals_the_authors_values(tmp_path, peft):
    tokenizer = builtin.tiny_qwen3()[1]
    dataset = builtin.dates(train=64, test=2)["train"]
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    common = {"args": arguments, "train_dataset": dataset, "processing_class": tokenizer, "peft_config": peft}

    theirs = []

    class Recording(GradEarlyStoppingCallback):
        def _calculate_component_change(self, component, stats):
            value = super()._calculate_component_change(component, stats)
            theirs.append((self.current_training_step, stats.name, value))
            return value

    callback = Recording(GradEarlyStoppingConfig(tau=1e-30, alpha=0.5, enable_wandb_logging=False))
    SFTTrainer(model=build(tokenizer), callbacks=[callback], **common).train()

    ours = {}

    class Ours(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            self.grades = GradES(model, GradESConfig(metric="weight_change", tau=0.0, alpha=0.0), state.max_steps)

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            step = state.global_step + 1
            self.grades.step(step)
            for name, value in self.grades.criterion.values.items():
                _, _, layer, part, role = name.split(".")
                part = {"self_attn": "attn"}.get(part, part)
                ours[step, f"layer_{int(layer):02d}_{part}_{role}"] = value

    SFTTrainer(model=build(tokenizer), callbacks=[Ours()], **common).train()

    # They measure after update s what we measure before update s + 1. They miss the first update, and say 0 for it;
    # with the warm-up's learning rate of 0 it changes nothing, which for us is no measurement.
    expected = {(step + 1, name): value for step, name, value in theirs if 1 < step < 8}
    assert len(expected) == 6 * 14
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        assert ours[key] == pytest.approx(value, rel=1e-5), key


def build(tokenizer):
    return qwen3(vocab_size=len(tokenizer), bos_token_id=None)
