"""Every YAML file in configs/ parses, says how it is launched and what it needs, and the paper's carry the published
settings."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers as T

from grades_trl.model.matrices import find_matrices
from grades_trl.recipe.arguments import parse
from grades_trl.recipe.models import make_trainable
from grades_trl.recipe.plan import plan_run
from helpers import SMALL

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name != "accelerate"  # for `accelerate launch`
)

# Model -> tau full, tau LoRA; arXiv 2509.01842, its tables of hyperparameters.
PUBLISHED = {
    "qwen3_14b": (6.387926, 0.025181),
    "phi4": (3.512882, 0.025181),
    "qwen3_0.6b": (1.804456, 0.001183),
    "llama3.1_8b": (2.404167, 0.021637),
    "mistral_7b": (2.726866, 0.029591),
    "qwen2.5_vl_7b": ({"vision": 0.13, "language": 0.09}, {"vision": 3.3, "language": 33.0}),
}
TINY = SMALL | {"num_hidden_layers": 1}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
MODELS = {
    "qwen3_14b": T.Qwen3Config(**TINY),
    "phi4": T.Phi3Config(**TINY, pad_token_id=0),
    "qwen3_0.6b": T.Qwen3Config(**TINY),
    "llama3.1_8b": T.LlamaConfig(**TINY),
    "mistral_7b": T.MistralConfig(**TINY),
    "qwen2.5_vl_7b": T.Qwen2_5_VLConfig(
        text_config=TINY | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        vision_config=VISION,
    ),
}

# The figures that the models' published configs give, and the parameters that their pages state, in billions.
ARCHITECTURES = {path.stem: json.loads(path.read_text()) for path in (ROOT / "tests/architectures").glob("*.json")}
SOURCES = {name: figures.pop("source") for name, figures in ARCHITECTURES.items()}  # where they were compared
BILLIONS = {
    "gemma3_4b": 4.30,
    "llama3.2_3b": 3.21,
    "qwen2.5_vl_3b": 3.75,
    "qwen2.5_vl_7b": 8.29,
    "qwen3_0.6b": 0.596,
    "qwen3_4b": 4.02,
    "qwen3_8b": 8.19,
    "qwen3_vl_4b": 4.44,
    "smolvlm2_2.2b": 2.25,
}
PLANNED = [config for config in CONFIGS if "by recipes/plan.py" in (ROOT / config).read_text()]


def architecture(config):
    """Name of the model of a config: `configs/qwen2_5_vl_3b_qlora.yaml` is one of qwen2.5_vl_3b."""
    return Path(config).stem.rpartition("_")[0].replace("qwen2_5", "qwen2.5")


def parsed(config, *flags):
    cpu = ["--report_to", "none", "--use_cpu", "true"]
    return parse("", ROOT / "unused", ["--config", str(ROOT / config), *cpu, *(flags or ("--bf16", "false"))])


@pytest.mark.parametrize("config", CONFIGS)
def test_parses_and_says_how_it_is_launched(config):
    recipe, training, _, _ = parsed(config)
    header = [line for line in (ROOT / config).read_text().splitlines() if line.startswith("#")]
    launches = re.findall(r"python (recipes/\w+\.py)(.*)", "\n".join(header))
    assert launches and all((ROOT / script).exists() for script, _ in launches)
    script, flags = launches[0]
    if config.startswith("configs/demo_"):  # what a recipe runs without arguments
        assert Path(config).name in (ROOT / script).read_text()
    else:
        assert f"--config {config}" in flags
    assert any(line.startswith("# Needs") for line in header)
    assert recipe.dataset_name or "--dataset_name" in flags
    assert training.output_dir == "outputs/" + config.removeprefix("configs/").removesuffix(".yaml")


@pytest.mark.parametrize("document", ["README.md", *CONFIGS])
def test_every_path_that_is_named_exists(document):
    text = (ROOT / document).read_text("utf-8")
    if document in CONFIGS:
        text = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    named = re.findall(r"(?<![\w/.])(?:configs|recipes|docs|benchmarks|dev|tests)/[\w./-]*\w", text)
    assert named
    missing = {path for path in named if not (ROOT / path).exists()}
    assert not missing


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name, lora):
    recipe, training, model, grades = parsed(f"configs/paper/{name}_{'lora' if lora else 'full'}.yaml")
    vision = name == "qwen2.5_vl_7b"
    assert grades.tau == PUBLISHED[name][lora]
    assert (grades.metric, grades.patience, grades.measure_every) == ("weight_change", 1, 1)
    assert grades.sample_fraction == 1
    assert (grades.stopping, grades.may_measure_heldout) == ("all_frozen", False)
    assert not (grades.track_projector or grades.freeze_norms or grades.freeze_embeddings)
    assert grades.alpha == (0.3 if vision else 0.55)
    assert training.learning_rate == (2e-5 if not lora else 1e-4 if vision else 2e-4)
    assert training.per_device_train_batch_size == (16 if lora and not vision else 1)
    assert training.gradient_accumulation_steps == 4
    assert training.max_length == (None if vision else 4096)
    assert (training.lr_scheduler_type, training.warmup_steps, training.weight_decay) == ("cosine", 0.05, 0.01)
    assert (training.optim, training.seed, model.dtype) == ("adamw_torch_fused", 3407, "bfloat16")
    assert model.use_peft == lora
    if lora:
        assert (model.lora_r, model.lora_alpha, model.lora_dropout) == ((128, 256, 0) if vision else (32, 32, 0))
    assert recipe.dataset_name is None  # the paper does not state its training data


@pytest.mark.parametrize("name", PUBLISHED)
def test_lora_targets_are_all_matrices_of_the_model(name):
    auto = T.AutoModelForImageTextToText if name == "qwen2.5_vl_7b" else T.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(MODELS[name])
    recipe, _, arguments, grades = parsed(f"configs/paper/{name}_lora.yaml")
    weights = find_matrices(model)
    adapted = find_matrices(make_trainable(model, arguments, recipe.train_towers), projector=True)
    assert set(adapted) == set(weights)
    if isinstance(grades.tau, dict):
        assert set(grades.tau) == {matrix.tower for matrix in adapted.values()}
    if arguments.lora_target_modules is not None:
        assert {matrix.role for matrix in adapted.values()} == set(arguments.lora_target_modules)


# ---- what they need ----


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_figures_of_a_model_give_its_parameters(name):
    config = T.AutoConfig.for_model(**ARCHITECTURES[name])
    auto = T.AutoModelForImageTextToText if hasattr(config, "vision_config") else T.AutoModelForCausalLM
    with torch.device("meta"):
        assert auto.from_config(config).num_parameters() == pytest.approx(BILLIONS[name] * 1e9, rel=0.002)


def test_small_cards_have_configs_for_text_and_images():
    cards = {
        (re.search(r"python recipes/(\w+)", text)[1], int(re.search(r"a GPU with (\d+) GB", text)[1]))
        for text in ((ROOT / config).read_text() for config in PLANNED)
    }
    assert cards >= {(recipe, card) for recipe in ("sft_text", "sft_vlm") for card in (8, 12, 16, 24)}


@pytest.mark.parametrize("config", PLANNED)
def test_the_memory_in_the_header_is_that_of_the_plan(config, monkeypatch):
    monkeypatch.setattr(
        "grades_trl.recipe.plan.freeze_limits", lambda *_: {}
    )  # they take time and say nothing of memory
    figures = T.AutoConfig.for_model(**ARCHITECTURES[architecture(config)])
    vision = hasattr(figures, "vision_config")
    planned = plan_run(*parsed(config, "--bf16", "true"), vision=vision, config=figures)
    header = (ROOT / config).read_text()
    needs, card = re.search(
        r"# Needs: ([\d.]+) GB by recipes/plan.py .*: a GPU with (\d+) GB. Not run by us.", header
    ).groups()
    assert float(needs) == pytest.approx(planned.gib, abs=0.06)
    assert planned.gib <= int(card)
