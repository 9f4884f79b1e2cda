"""The frozen prefix under Unsloth's own gradient checkpointing. In a fresh process: importing it changes libraries."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TRITON = Path(sys.prefix) / "triton"  # not in site-packages, where it makes other libraries look for a GPU
TESTS = Path(__file__).parent

# `use_gradient_checkpointing="unsloth"` puts Unsloth's functions in the place of torch's; the Trainer then hands them
# to each layer. They run on a CPU as they are, but for one branch: inputs above 2 MiB are copied to the host on a
# stream of their own. With `offload()` all inputs take that branch, with streams that do nothing.
SETUP = """
import contextlib, functools, types
import pytest, torch
import unsloth
import transformers.modeling_utils
import unsloth_zoo.gradient_checkpointing as zoo
from unsloth.models._utils import apply_unsloth_gradient_checkpointing
from unsloth.models.llama import FastLlamaModel

TORCH = torch.utils.checkpoint.checkpoint
assert apply_unsloth_gradient_checkpointing("unsloth", 2048, torch.float32) == "unsloth"
assert torch.utils.checkpoint.CheckpointFunction is zoo.UnslothCheckpointFunction
assert torch.utils.checkpoint.checkpoint is transformers.modeling_utils.checkpoint is zoo.unsloth_checkpoint

from grades_trl import GradESTrainer
from grades_trl.recipe import builtin
from grades_trl.freezing.frozen_prefix import FrozenPrefix
from helpers import backward, bottom_up, config_for, layers, lora, qwen3, trajectory
from peft import LoraConfig

class Stream:
    def wait_stream(self, other): pass
    def record_event(self): pass

def offload():
    zoo._ensure_device_buffers = lambda index: None
    zoo._compute_stream = lambda index: Stream()
    zoo.torch_gpu_stream = lambda stream: contextlib.nullcontext()
    zoo.MINIMUM_SIZE = 0
    zoo.GPU_BUFFERS = {None: torch.empty(1024)}  # the index of the CPU is None
    zoo.EXTRA_STREAMS, zoo.NEXT_BUFFER_SLOT = {None: Stream()}, {None: 0}

calls = {"forward": 0, "offloaded": 0}
forward = zoo.UnslothCheckpointFunction.forward

@staticmethod
def counting(ctx, *args):
    calls["forward"] += 1
    output = forward(ctx, *args)
    calls["offloaded"] += ctx._saved_metadata[2] is not None
    return output

zoo.UnslothCheckpointFunction.forward = counting

def checkpointed(count, enable):
    model = lora(count)
    enable(model)
    model.enable_input_require_grads()
    return model.train()

def counted(model):
    calls.update(forward=0, offloaded=0)
    return (*backward(model), calls["forward"])

# How the layers get their function: what Unsloth's configuration makes the Trainer say, what it says by default and
# Unsloth's passes over, and what Unsloth does when it adds adapters, which is torch's function over Unsloth's inside.
ENABLE = {
    "the trainer": lambda m: m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True}),
    "by default": lambda m: m.gradient_checkpointing_enable(),
    "get_peft_model": lambda m: m.base_model.model._set_gradient_checkpointing(),
    "offloaded": lambda m: m.gradient_checkpointing_enable(),
}
"""

BACKWARD = """
for name, enable in ENABLE.items():
    if name == "offloaded":
        offload()
    for frozen in (1, 3, 5):
        model = checkpointed(6, enable)
        function = layers(model)[0]._gradient_checkpointing_func
        assert getattr(function, "func", function) is (TORCH if name == "get_peft_model" else zoo.unsloth_checkpoint)
        full, _, checkpoints = counted(model)
        assert checkpoints == 6
        layers(model)[:frozen].requires_grad_(False)
        without, expected, _ = counted(model)
        assert (calls["offloaded"] > 0) == (name == "offloaded")
        prefix = FrozenPrefix(model)
        backward(model)
        assert prefix.update() and prefix.skipped_layers == {"model.layers": frozen}
        count, gradients, checkpoints = counted(model)
        assert checkpoints == 6 - frozen, (name, checkpoints)
        assert gradients.keys() == expected.keys(), name
        assert all(torch.equal(gradients[key], expected[key]) for key in expected), name
        assert count == counted(checkpointed(6 - frozen, enable))[0] < without < full, (name, count)

        # What each train() of Unsloth's trainer begins with: it turns checkpointing on again in all layers.
        FastLlamaModel.for_training(model, use_gradient_checkpointing="unsloth")
        assert all(layer.gradient_checkpointing for layer in layers(model))
        again, gradients, checkpoints = counted(model)
        assert (again, checkpoints) == (count, 6 - frozen), name
        assert all(torch.equal(gradients[key], expected[key]) for key in expected), name
print("GRADIENTS EQUAL")
"""

RUNS = """
offload()
tokenizer = builtin.tiny_qwen3()[1]
dataset = builtin.dates(train=128, test=8)
for full in (False, True):
    runs = []
    for with_prefix in (True, False):
        model = qwen3(num_hidden_layers=4, vocab_size=len(tokenizer), bos_token_id=None, tie_word_embeddings=True)
        calls.update(forward=0, offloaded=0)
        runs.append(
            trajectory(
                GradESTrainer,
                pytest.MonkeyPatch(),
                with_prefix,
                model=model,
                args=config_for(f"out/{full}/{with_prefix}", False, max_steps=15, save_strategy="no"),
                train_dataset=dataset["train"],
                eval_dataset=dataset["test"],
                processing_class=tokenizer,
                grades=bottom_up(4, freeze_norms=True, freeze_embeddings=True),
                peft_config=None if full else LoraConfig(r=4, target_modules="all-linear"),
            )
            + (dict(calls),)
        )
    (trainer, losses, weights, few), (_, expected, expected_weights, all_) = runs
    assert trainer.grades_summary.skipped_layers[-1].layers == {"model.layers": 3}
    # Of 15 steps, 4 run with one layer less, 4 with two and 3 with three (TRL's loss is checkpointed as well).
    assert all_["forward"] - few["forward"] == 4 * 1 + 4 * 2 + 3 * 3
    assert few["offloaded"] > 0
    assert len(losses) > 15 and losses == expected
    assert all(torch.equal(weights[key], expected_weights[key]) for key in expected_weights)
print("RUNS EQUAL")
"""


@pytest.mark.skipif(not TRITON.exists(), reason="make venv installs Triton beside the environment")
def test_the_frozen_prefix_under_unsloth_s_checkpointing(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": f"{TRITON}:{TESTS}:{TESTS.parent}",
        "UNSLOTH_ALLOW_CPU": "1",
        "TRITON_INTERPRET": "1",
        "UNSLOTH_DISABLE_PINNED_MEMORY": "1",
        "UNSLOTH_DISABLE_DOUBLE_BUFFER": "1",
        # Not rounded to bf16 on the host: Unsloth does that to float32 alone, and not to the last layer, whose number
        # it counts once; with fewer layers checkpointed it takes none for the last.
        "UNSLOTH_OFFLOAD_FP32": "exact",
    }
    command = [sys.executable, "-c", SETUP + BACKWARD + RUNS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "GRADIENTS EQUAL" in done.stdout
    assert "RUNS EQUAL" in done.stdout
