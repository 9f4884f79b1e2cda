"""What trains by --train_layers and --train_towers, what that costs by hand, and the table at the start of a run."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from trl import ModelConfig

from grades_trl.model.matrices import find_matrices
from grades_trl.recipe.choice import ChoiceFlops, choice_flops, flops_of, format_choice
from grades_trl.recipe.models import load_model, make_trainable
from helpers import IDS, gradients, llava, qwen3, qwen3_moe

ROOT = Path(__file__).parents[1]
FULL, LORA = ModelConfig(), ModelConfig(use_peft=True, lora_r=2)


def choose(model, layers=None, towers=None, args=FULL):
    return make_trainable(model, args, towers, layers)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_layers(model):
    """tower.index of the layers with something that trains."""
    return sorted({f"{m.tower}.{m.layer}" for m in find_matrices(model).values()})


def language(*indices):
    return [f"language.{i}" for i in indices]


# ---- what trains ----

CHOICES = [
    ("2-3", language(2, 3)),
    ("1", language(1)),
    ("0,2-3", language(0, 2, 3)),
    ("0.5-1.0", language(2, 3)),
    ("0-.5", language(0, 1)),
    ("0.3-0.7", language(1, 2)),  # layers whose middle is inside: 3/8 and 5/8
    ("*.layers.[13]", language(1, 3)),
    ("*.layers.?", language(0, 1, 2, 3)),
    ("0, *.layers.3.mlp", language(0, 3)),
]


@pytest.mark.parametrize("args", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(("layers", "expected"), CHOICES)
def test_layers_of_a_text_model(layers, expected, args):
    assert trained_layers(choose(qwen3(num_hidden_layers=4), layers, args=args)) == expected


def test_a_question_mark_is_no_dot():
    model = choose(qwen3(num_hidden_layers=11), "*.layers.1?*")  # not all that is inside of layer 1
    assert trained_layers(model) == language(10)


def test_a_pattern_takes_modules_inside_of_layers():
    model = choose(qwen3(), "*.mlp.*_proj,*.q_proj")
    assert {matrix.role for matrix in find_matrices(model).values()} == {"q_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any("norm" in name or "embed" in name for name in trained(model))  # no layer is chosen as a whole


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("layers", "embeddings", "head"), [("0-3", True, True), ("0-1", True, False), ("2-3", False, True)]
)
def test_embeddings_train_with_the_first_layer_and_an_untied_head_with_the_last(tied, layers, embeddings, head):
    model = choose(qwen3(num_hidden_layers=4, tie_word_embeddings=tied), layers)
    assert model.model.embed_tokens.weight.requires_grad == embeddings
    assert model.model.norm.weight.requires_grad == embeddings
    assert model.lm_head.weight.requires_grad == (embeddings if tied else head)


@pytest.mark.parametrize("args", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("layers", "towers", "expected"),
    [
        ("1", None, language(1)),
        ("*vision_tower*layers.1,0-1", None, [*language(0, 1), "vision.1"]),
        ("*vision_tower*layers.1,0-1", ["language"], language(0, 1)),
        (None, ["vision", "projector"], ["vision.0", "vision.1"]),
    ],
)
def test_layers_and_towers_of_a_vision_language_model(layers, towers, expected, args):
    model = choose(llava(), layers, towers, args)
    assert trained_layers(model) == expected
    assert any("projector" in name for name in trained(model)) == (towers is not None and "projector" in towers)
    if layers is None and not args.use_peft:
        assert "model.vision_tower.embeddings.patch_embedding.weight" in trained(model)
    if "vision.1" in expected and "vision.0" not in expected:
        assert not any("patch_embedding" in name for name in trained(model))


def test_leading_layers_get_no_gradient_and_their_backward_does_not_run():
    model = choose(qwen3(num_hidden_layers=4, tie_word_embeddings=True), "2-3").train()
    reached = []
    model.model.layers[1].register_full_backward_hook(lambda *_: reached.append(1))
    model.model.layers[2].mlp.down_proj.register_full_backward_hook(lambda *_: reached.append(2))
    found = gradients(model, input_ids=IDS, labels=IDS)
    assert found.keys() == trained(model)
    assert reached == [2]


def test_given_targets_of_lora_are_adapted_in_the_chosen_layers_alone():
    for given, roles in ((["q_proj", "v_proj"], {"q_proj", "v_proj"}), (r".*\.[kq]_proj", {"k_proj", "q_proj"})):
        args = ModelConfig(use_peft=True, lora_r=2, lora_target_modules=given)
        adapted = find_matrices(choose(llava(), "1", args=args)).values()
        assert {(m.tower, m.layer, m.role) for m in adapted} == {("language", 1, role) for role in roles}
        in_tower = find_matrices(choose(llava(), None, ["language"], args)).values()
        assert {m.tower for m in in_tower} == {"language"}
    args = ModelConfig(use_peft=True, lora_r=2, lora_target_modules=["all-linear"])
    assert len(find_matrices(choose(qwen3(), "1", args=args))) == 7


def test_experts_in_one_tensor_are_adapted_in_the_chosen_layers_alone():
    targets = {"lora_target_modules": ["q_proj"], "lora_target_parameters": ["mlp.experts.down_proj"]}
    model = choose(qwen3_moe(), "1", args=ModelConfig(use_peft=True, lora_r=2, lora_dropout=0.0, **targets))
    names = [f"model.layers.1.{name}" for name in ("self_attn.q_proj", "mlp.experts.down_proj")]
    assert list(find_matrices(model)) == names


def test_a_quantized_folder(folder):
    args = ModelConfig(model_name_or_path=folder, use_peft=True, lora_r=2, load_in_4bit=True)
    model, _ = load_model(args, "transformers", layers="0.5-1.0")
    assert trained_layers(model) == language(2, 3)
    unpacked, _ = load_model(ModelConfig(model_name_or_path=folder), "transformers")
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f" {unpacked.num_parameters() + adapters:,} " in format_choice(model, ChoiceFlops())


@pytest.mark.parametrize(
    ("layers", "towers", "message"),
    [
        (
            "1-2",
            None,
            r"train_layers 1-2: the language tower of Llava\w+ has 2 layers, 0 to 1; expected ",
        ),
        ("1-0", None, "has 2 layers, 0 to 1.*from low to high"),
        ("0.9-1.0", None, "train_layers 0.9-1.0: the language tower"),
        ("0.5-1.5", None, "train_layers 0.5-1.5: the language tower"),
        ("", None, "train_layers has an empty item; expected"),
        ("0,", None, "train_layers has an empty item; expected"),
        ("*.h.1", None, r"\*\.h\.1 matches nothing in Llava\w+; .*language_model.layers.0 to .*layers.1 \(language\)"),
        ("1:2", None, "train_layers 1:2 matches nothing"),
        ("0-1", ["vision"], r"chooses nothing of the towers that train \(vision\)"),
        (None, ["audio"], r"train_towers is audio; Llava\w+ has language, vision, projector"),
        (None, [], r"train_towers is empty; Llava\w+ has language"),
    ],
)
def test_choices_that_are_none(layers, towers, message):
    with pytest.raises(ValueError, match=message):
        choose(llava(), layers, towers)


def test_other_errors():
    with pytest.raises(ValueError, match=r"Nothing to adapt: train_towers .all. and train_layers .*norm. choose none"):
        choose(qwen3(), "*norm", args=LORA)
    size = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 2, "vocab_size": 32}
    with pytest.raises(ValueError, match=r"2 lists of language layers.*encoder.block.0 to encoder.block.1"):
        choose(T5ForConditionalGeneration(T5Config(**size)), "0-1")


@pytest.mark.parametrize(
    ("towers", "layers", "passed"),
    [
        (None, "1", {"layers_to_transform": [1], "finetune_vision_layers": False}),
        (["language"], "0.5-1.0", {"layers_to_transform": [1], "finetune_vision_layers": False}),
        (["vision", "language"], None, {"finetune_vision_layers": True, "finetune_language_layers": True}),
        (["language"], None, {"finetune_vision_layers": False, "finetune_language_layers": True}),
        (
            None,
            "*vision_tower*.layers.0.*.q_proj",
            {"target_modules": ["model.vision_tower.encoder.layers.0.self_attn.q_proj"]},
        ),
    ],
)
def test_unsloth_gets_its_own_arguments(monkeypatch, towers, layers, passed):
    given = {}
    fast = SimpleNamespace(
        from_pretrained=lambda *_, **__: (llava(), "processor"),
        get_peft_model=lambda model, **arguments: (
            given.update(arguments)
            or get_peft_model(model, LoraConfig(target_modules=arguments.get("target_modules", "all-linear")))
        ),
    )
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastVisionModel=fast, FastLanguageModel=fast))
    args = ModelConfig(model_name_or_path="some/model", use_peft=True)
    load_model(args, "unsloth", vision=True, towers=towers, layers=layers)
    assert given.items() >= passed.items()
    assert ("target_modules" in given) == ("target_modules" in passed)


def test_full_fine_tuning_of_some_layers_through_unsloth(monkeypatch):
    fast = SimpleNamespace(from_pretrained=lambda *_, **__: (qwen3(num_hidden_layers=4), "tokenizer"))
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastVisionModel=fast, FastLanguageModel=fast))
    model, _ = load_model(ModelConfig(model_name_or_path="some/model"), "unsloth", layers="2-3")
    assert trained_layers(model) == language(2, 3)


def test_towers_of_a_text_model_are_an_error(monkeypatch):
    spec = importlib.util.spec_from_file_location("sft_text", ROOT / "recipes" / "sft_text.py")
    sft_text = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sft_text)
    monkeypatch.setattr(sft_text, "set_up_console", lambda: None)
    monkeypatch.setattr(sys, "argv", ["sft_text.py", "--train_towers", "language", "--report_to", "none"])
    with pytest.raises(ValueError, match="--train_towers chooses among the towers of a vision-language model"):
        sft_text.main()


# ---- what it costs, and the table ----


class Stack(nn.Module):
    """Four layers of one 6 x 6 matrix each, behind an embedding."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 6)
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(6, 6, bias=False)}) for _ in range(4))

    def get_input_embeddings(self):
        return self.embed_tokens


N, FACTORS = 6 * 6, 2 * (6 + 6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("layers", "products"),
    [
        (None, 12),
        ("0-3", 12),  # forward, gradient of the input, gradient of the weight, in four layers
        ("2-3", 2 + 6),  # the first two: forward
        ("0-1", 2 * 3 + 2 * 2),  # the last two pass the gradient on
        ("1", 1 + 3 + 2 * 2),
        ("0,3", 3 + 2 * 2 + 3),
    ],
)
def test_flops_of_full_fine_tuning_by_hand(layers, products, checkpointing):
    model = choose(Stack(), layers)
    recomputed = {None: 4, "0-3": 4, "2-3": 2, "0-1": 4, "1": 3, "0,3": 4}[layers] if checkpointing else 0
    found = flops_of(model, checkpointing)
    assert found.step == pytest.approx((products + recomputed) / (16 if checkpointing else 12))


def test_embeddings_that_train_keep_the_backward_pass_going_down():
    model = choose(Stack(), "2-3")
    model.embed_tokens.requires_grad_(True)
    assert flops_of(model).step == pytest.approx((2 * 2 + 2 * 3) / 12)


def test_flops_of_lora_by_hand():
    model = choose(qwen3(num_hidden_layers=4), "2-3", args=LORA)
    q, kv, mlp = (32, 32), (16, 32), (48, 32)  # out x in
    shapes = [q, q, kv, kv, mlp, mlp, mlp]
    weights, factors = sum(a * b for a, b in shapes), sum(2 * (a + b) for a, b in shapes)
    everything = 4 * (2 * (weights + factors) + factors)
    of_choice = 2 * weights + 2 * (2 * (weights + factors) + factors)
    assert flops_of(model).step == pytest.approx(of_choice / everything)
    assert flops_of(choose(qwen3(num_hidden_layers=4), args=LORA)) == ChoiceFlops(1.0)


def test_a_frozen_vision_tower_costs_its_forward_pass():
    model = choose(llava(), None, ["projector", "language"])
    vision, text = 2 * (4 * 32 * 32 + 2 * 32 * 48), 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    tokens = {"vision": 17.0, "language": 40.0}
    expected = (17 * vision + 3 * 40 * text) / (3 * 17 * vision + 3 * 40 * text)
    assert flops_of(model, tokens=tokens).step == pytest.approx(expected)
    only_vision = flops_of(choose(llava(), None, ["vision"]), tokens=tokens).step  # the language tower passes it on
    assert only_vision == pytest.approx((3 * 17 * vision + 2 * 40 * text) / (3 * 17 * vision + 3 * 40 * text))


def test_tokens_are_those_of_the_first_rows():
    """Four images of 16 patches and a class token, and four rows of 20 tokens, 16 of them placeholders."""
    model = choose(llava(image_token_index=60), None, ["projector", "language"])
    ids = torch.tensor([[60] * 16 + [3, 4, 5, 6]] * 4)
    batch = {"input_ids": ids, "pixel_values": torch.zeros(4, 3, 32, 32)}
    drawn = []
    trainer = SimpleNamespace(
        model=model,
        train_dataset=range(100),
        data_collator=lambda rows: drawn.append(rows) or batch,
        args=SimpleNamespace(per_device_train_batch_size=4, gradient_checkpointing=True),
    )
    assert choice_flops(trainer) == flops_of(model, True, {"vision": 4 * 17.0, "projector": 64.0, "language": 80.0})
    assert drawn == [[0, 1, 2, 3]]


def test_the_table():
    model = choose(llava(), None, ["projector", "language"])
    *lines, limit = format_choice(model, ChoiceFlops(step=1 / 1.35)).splitlines()
    counted = {"vision": 0, "projector": 0, "language": 0}
    for name, p in model.named_parameters():
        counted[next((t for t in ("vision", "projector") if t in name), "language")] += p.numel()
    assert [line.split() for line in lines] == [
        ["tower", "layers", "matrices", "tracked", "parameters", "trainable"],
        ["language", "2", "14", f"{counted['language']:,}", f"{counted['language']:,}"],
        ["vision", "2", "0", f"{counted['vision']:,}", "0"],
        ["projector", "-", "0", f"{counted['projector']:,}", f"{counted['projector']:,}"],
    ]
    assert limit == "limit of this choice: 1.35x less time for a step than training everything"
    assert all(len(line) <= 80 for line in format_choice(model, ChoiceFlops()).splitlines())


def test_a_projector_alone_has_a_table_too():
    model = choose(llava(), None, ["projector"])
    assert "projector        -                 0" in format_choice(model, flops_of(model))
