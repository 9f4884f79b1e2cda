"""On Unsloth's fused kernels themselves, with Triton's interpreter in place of a GPU, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from grades_trl.freezing.unsloth_lora import skip_frozen_pairs

TRITON = Path(sys.prefix) / "triton"  # not in site-packages, where it makes other libraries look for a GPU

# A tiny Qwen3 with LoRA on all projections, bound to the kernels as FastLanguageModel does it (which itself insists on
# a GPU, and on 16-bit weights). Transformers' attention does not know `apply_qkv`, so it is written out.
MODEL = """
import itertools, types
import torch
import unsloth
from unsloth.kernels import fast_lora as kernels
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb
from grades_trl.freezing.unsloth_lora import skip_frozen_pairs

UNSLOTH = kernels.LoRA_MLP, kernels.LoRA_QKV, kernels.LoRA_W
ROLES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MLP = ROLES[4:]

def build(dropout=0.0):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attn_implementation="eager",
    )
    model = Qwen3Model(config)
    lora = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, target_modules=ROLES)
    model = get_peft_model(model, lora).base_model.model
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()

from torch import nn

def attention(self, hidden_states, position_embeddings, **kwargs):
    shape = (*hidden_states.shape[:2], -1, self.head_dim)
    q, k, v = (x.view(shape) for x in self.apply_qkv(self, hidden_states))
    q, k, v = (x.transpose(1, 2) for x in (self.q_norm(q), self.k_norm(k), v))
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return self.apply_o(self, out.transpose(1, 2).reshape(*hidden_states.shape[:2], -1)), None

def bind(model):
    for layer in model.layers:
        layer.self_attn.apply_qkv, layer.self_attn.apply_o = kernels.apply_lora_qkv, kernels.apply_lora_o
        layer.self_attn.forward = types.MethodType(attention, layer.self_attn)
        layer.mlp.forward = types.MethodType(kernels.apply_lora_mlp_swiglu, layer.mlp)
    return model

def pairs(model, frozen):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            layer, role = int(name.split(".")[1]), name.split(".")[3]
            parameter.requires_grad_(not frozen(layer, role))

torch.manual_seed(1)
INPUT, DIRECTION = torch.randn(2, 2, 5, 32)

def gradients(model, input_gradient=True, around=None):
    model.zero_grad(set_to_none=True)
    x = INPUT.clone().requires_grad_(input_gradient)
    torch.manual_seed(2)  # dropout
    loss = (model(inputs_embeds=x * 1, use_cache=False).last_hidden_state * DIRECTION).mean()
    with around or torch.enable_grad():
        loss.backward()
    return {"x": x.grad} | {name: p.grad for name, p in model.named_parameters() if "lora_" in name}

def close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        if gradient is None:
            assert theirs[name] is None, name
        else:
            size = theirs[name].abs().max()
            assert size > 1e-4, (name, size)
            assert (gradient - theirs[name]).abs().max() < 3e-6 * size, name

FREEZES = {
    "none": lambda layer, role: False,
    "one": lambda layer, role: (layer, role) == (1, "k_proj"),
    "down": lambda layer, role: role == "down_proj",
    "q and v": lambda layer, role: role in ("q_proj", "v_proj"),
    "the MLP": lambda layer, role: role in MLP,
    "attention": lambda layer, role: role not in MLP,
    "all but one": lambda layer, role: (layer, role) != (0, "up_proj"),
    "the lower layer": lambda layer, role: layer == 0,
    "all": lambda layer, role: True,
}

from torch.utils._python_dispatch import TorchDispatchMode

class Matmuls(TorchDispatchMode):
    count = 0
    supports_higher_order_operators = True
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # Compiled graphs hold Unsloth's own operator `addmm_` as `auto_functionalized(addmm_, ...)`.
        operator = function if isinstance(function, torch._ops.OpOverload) else args[0]
        self.count += operator.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return function(*args, **(kwargs or {}))

def count(model, **how):
    gradients(model, around=(counter := Matmuls()), **how)
    return counter.count

# A projection's backward: dX takes dY W, dY B and (dY B) A; dA one more; dB takes X A' and one more.
# Unsloth, whose own backward runs where all pairs of a call train, computes dY B of down_proj twice.
FULL = 2 * (7 * 6 + 1)

def expected(freeze):
    total = 0
    for layer in range(2):
        live = {role for role in ROLES if not freeze(layer, role)}
        total += 3 * 7 + 3 * len(live) + (live >= set(MLP))
    return total

def use(functions):
    kernels.LoRA_MLP, kernels.LoRA_QKV, kernels.LoRA_W = functions
"""

GRADIENTS = """
plain, fused = build(), bind(build())
assert skip_frozen_pairs(plain) == 0 and (kernels.LoRA_MLP, kernels.LoRA_QKV, kernels.LoRA_W) == UNSLOTH
pairs(fused, FREEZES["all but one"])
assert count(fused) == FULL  # Unsloth's own: frozen or not

assert skip_frozen_pairs(fused) == 4  # attention and MLP of two layers
OURS = kernels.LoRA_MLP, kernels.LoRA_QKV, kernels.LoRA_W
assert all(a is not b and issubclass(a, b) for a, b in zip(OURS, UNSLOTH))
assert skip_frozen_pairs(fused) == 4 and (kernels.LoRA_MLP, kernels.LoRA_QKV, kernels.LoRA_W) == OURS

for (name, freeze), input_gradient in itertools.product(FREEZES.items(), (True, False)):
    if name == "all" and not input_gradient:
        continue
    for model in (plain, fused):
        pairs(model, freeze)
    use(OURS)
    ours = gradients(fused, input_gradient)
    assert (ours["x"] is not None) == input_gradient
    for parameter, gradient in ours.items():
        if parameter != "x":
            layer, role = int(parameter.split(".")[1]), parameter.split(".")[3]
            assert (gradient is None) == freeze(layer, role), (name, parameter)
    use(UNSLOTH)
    theirs = gradients(fused, input_gradient)
    close(ours, theirs)
    close(ours, gradients(plain, input_gradient))
    if name == "none" and input_gradient:  # bit for bit
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
print("GRADIENTS EQUAL")
"""

MATMULS = """
use(OURS)
model = fused
for name, freeze in FREEZES.items():  # the same model, from one pattern to the next
    pairs(model, freeze)
    assert count(model) == expected(freeze), name
pairs(model, FREEZES["none"])
assert count(model) == FULL
# Nothing below wants a gradient: the lowest q, k, v need 4 matmuls for each live pair, and none otherwise.
assert count(model, input_gradient=False) == FULL - 3 * 2
pairs(model, FREEZES["q and v"])
assert count(model, input_gradient=False) == (4 + 6 * 4 + 1) + (2 * 3 + 6 * 5 + 1)
# Nothing below the upper layer trains: autograd itself stays out of the lower one.
pairs(model, FREEZES["the lower layer"])
assert count(model, input_gradient=False) == FULL // 2 - 3 * 2
print("MATMULS GONE")
"""

EXTRAS = """
for dropout, bias in ((0.3, False), (0.0, True)):
    model = bind(build(dropout))
    if bias:
        for name, module in model.named_modules():
            if name.endswith("lora_B.default"):
                module.bias = nn.Parameter(torch.randn(module.out_features) * 0.1)
    for (name, freeze), input_gradient in itertools.product(FREEZES.items(), (True, False)):
        if name == "all" and not input_gradient:
            continue
        pairs(model, freeze)
        use(UNSLOTH)
        theirs = gradients(model, input_gradient)
        use(OURS)
        close(gradients(model, input_gradient), theirs)
        # With dropout as without; a bias is left to Unsloth's own backward.
        assert not input_gradient or count(model) == (FULL if bias else expected(freeze)), name
print("EXTRAS EQUAL")
"""


COMPILED = """
from torch._dynamo.testing import CompileCounterWithBackend

kernels.swiglu_fg_kernel = lambda e, g: nn.functional.silu(e) * g
model = bind(build())
assert skip_frozen_pairs(model) == 4
eager = {}
for name, freeze in FREEZES.items():
    pairs(model, freeze)
    eager[name] = gradients(model)

counter = CompileCounterWithBackend("aot_eager")
layer_class = type(model.layers[0])
layer_class.forward = torch.compile(layer_class.forward, backend=counter, fullgraph=True)
frames = {}
for name, freeze in FREEZES.items():
    pairs(model, freeze)
    before = counter.frame_count
    close(gradients(model), eager[name])
    frames[name] = counter.frame_count - before
    assert count(model) <= expected(freeze), name  # equal subexpressions are computed once
    close(gradients(model), eager[name])
    assert counter.frame_count - before == frames[name]  # not again while nothing changes
# Both layers have the same pattern in the first: one graph. Later, one for each pattern that is new to both.
assert frames == {
    "none": 1, "one": 1, "down": 1, "q and v": 1, "the MLP": 1, "attention": 1, "all but one": 2,
    "the lower layer": 0, "all": 0,
}, frames
print("COMPILED")
"""


def run(body, folder):
    environment = os.environ | {"PYTHONPATH": str(TRITON), "UNSLOTH_ALLOW_CPU": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", MODEL + body]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


needs_triton = pytest.mark.skipif(not TRITON.exists(), reason="make venv installs Triton beside the environment")


def test_nothing_to_do():
    assert "unsloth" not in sys.modules
    assert skip_frozen_pairs(nn.Linear(2, 2)) == 0
    assert "unsloth" not in sys.modules


@needs_triton
def test_same_gradients_with_fewer_matmuls(tmp_path):
    output = run(GRADIENTS + MATMULS + EXTRAS, tmp_path)
    assert "GRADIENTS EQUAL" in output
    assert "MATMULS GONE" in output
    assert "EXTRAS EQUAL" in output


@needs_triton
def test_under_torch_compile_a_new_pattern_costs_one_compilation(tmp_path):
    # A decoder block, as Unsloth compiles it. Dynamo cannot trace Triton's interpreter, so silu is plain torch here.
    output = run(COMPILED, tmp_path)
    assert "COMPILED" in output
