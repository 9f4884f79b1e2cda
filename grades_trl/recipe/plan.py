"""What a run will take, before it is started: memory by part, which cards it fits on, steps, tokens and FLOPs.

No weights are loaded: the model is built from its config on the meta device. Weights, gradients, optimizer and
averages are counted tensor by tensor; activations are those of a forward pass on fake tensors
(`activation_memory.py`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.quantizers import AutoHfQuantizer
from trl import ModelConfig, SFTConfig, get_quantization_config
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from grades_trl.config import GradESConfig
from grades_trl.criteria import CRITERIA, GainMeter
from grades_trl.model import TOWERS, find_layers, find_matrices, towers_of_modules, towers_of_parameters
from grades_trl.model.structure import base_path
from grades_trl.recipe.activation_memory import StepMemory, step_memory
from grades_trl.recipe.arguments import RecipeArguments
from grades_trl.recipe.choice import ChoiceFlops, absolute_flops, format_choice
from grades_trl.recipe.data import first, load_data, training_rows
from grades_trl.recipe.models import find_gguf, make_trainable, read_config
from grades_trl.stopping.heldout import plan as plan_heldout
from grades_trl.weight_average import WeightAverage
from grades_trl.wording import counted

GIB = 2**30
CARDS = (8, 12, 16, 24, 48, 80)  # GiB of memory of a GPU
# What a process takes of a GPU beside its tensors: the CUDA context, workspaces of cuBLAS, what the allocator cannot
# use of its blocks. An estimate; nothing here has run on a GPU yet.
RESERVE = 1.0
SHORTEST = 512  # tokens per row that are still proposed


@dataclass(frozen=True)
class Data:
    """
    What is known of the rows.

    Attributes:
        rows (`int`): to train on.
        heldout_rows (`int`): to measure a held-out score on.
        tokens_per_row (`float` or `None`): their mean; `None` where it is not known.
        batch_of (`Callable[[int], dict]` or `None`): a micro-batch of that many of them; `None` for rows as long as
            `max_length`.
    """

    rows: int
    heldout_rows: int = 0
    tokens_per_row: float | None = None
    batch_of: Callable[[int], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Plan:
    """
    What a run will take.

    Attributes:
        device (`dict[str, int]`): part -> bytes on the device, of what is there in every step.
        step (`StepMemory`): what a micro-batch takes beside them.
        host (`dict[str, int]`): part -> bytes in CPU memory.
        peak (`int`): most bytes on the device at a time.
        choice (`str`): the table of what trains.
        limits (`dict[str, float]`): part of the model -> how many times shorter a step can become once it is frozen.
        step_flops (`float`): of an optimizer step, in the layers.
        steps (`int` or `None`): optimizer steps of the run; `None` without data and `max_steps`.
        tokens (`float` or `None`): of the run, padding apart; `None` where steps are.
        notes (`list[str]`): assumptions.
    """

    device: dict[str, int]
    step: StepMemory
    host: dict[str, int]
    peak: int
    choice: str
    limits: dict[str, float]
    step_flops: float
    steps: int | None
    tokens: float | None
    notes: list[str] = field(default_factory=list)

    @property
    def gib(self) -> float:
        """GiB that a card needs to have."""
        return self.peak / GIB + RESERVE


def plan_run(
    recipe: RecipeArguments,
    training: SFTConfig,
    model_args: ModelConfig,
    grades: GradESConfig,
    *,
    vision: bool,
    config: Any = None,
    data: Data | None = None,
) -> Plan:
    """Plans a run.

    Args:
        recipe (`RecipeArguments`), training (`SFTConfig`), model_args (`ModelConfig`), grades (`GradESConfig`): of the
            run, as `parse` gives them.
        vision (`bool`): rows have images.
        config (`PretrainedConfig`, *optional*): the model's; by default that of `model_args.model_name_or_path`.
        data (`Data`, *optional*): what is known of the rows.

    Raises:
        ValueError: an optimizer whose memory is not known, quantization without adapters, or a choice of what trains
            that the model does not have.
    """
    if config is None:
        config = read_config(model_args, training.trust_remote_code)
    model, quantized = _build(model_args, recipe, training, config, vision)
    matrices = find_matrices(model, projector=grades.track_projector)
    device = {
        "weights": _weight_bytes(model, quantized, model_args),
        "adapters": _trained_bytes(model) if model_args.use_peft else 0,
        "gradients": _trained_bytes(model),
        f"optimizer ({training.optim.value})": optimizer_bytes(model, training.optim.value),
    }
    host = {}
    steps = _steps(training, data)
    if recipe.grades:
        criterion = CRITERIA[grades.metric](matrices, steps or 1000, **grades.criterion_settings())
        device["previous values of the metric"] = criterion.memory + GainMeter(matrices, steps or 1000).memory
        if _averages(grades, training, steps, data):
            host["averages of the weights"] = WeightAverage(model).host_bytes
    checkpointing = bool(training.gradient_checkpointing)
    step = step_memory(
        model,
        training.per_device_train_batch_size,
        training.max_length,
        checkpointing=checkpointing,
        reentrant=bool((training.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)),
        autocast=torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None,
        loss="liger" if training.use_liger_kernel else training.loss_type,
        vision=vision,
        batch=data.batch_of(training.per_device_train_batch_size) if data is not None and data.batch_of else None,
    )
    tokens = dict(step.tokens)
    notes = []
    if data is not None and data.tokens_per_row is not None and not training.packing:
        tokens["language"] = step.rows * min(data.tokens_per_row, step.length)
    elif data is not None and data.batch_of is not None:
        notes.append("all rows are like the first ones")
    else:
        notes.append(f"rows of {step.length:,} tokens")
    if step.image_tokens:
        notes.append(f"one image per row, of {step.image_tokens:,} tokens")
    of_choice, everything = absolute_flops(model, checkpointing, tokens)
    accumulation = training.gradient_accumulation_steps
    return Plan(
        device=device,
        step=step,
        host=host,
        peak=_peak(device, step, accumulation) + (_largest_16_bit(model, quantized)),
        choice=format_choice(model, ChoiceFlops(of_choice / everything)),
        limits=freeze_limits(model, grades, checkpointing, tokens),
        step_flops=of_choice * accumulation,
        steps=steps,
        tokens=None if steps is None else tokens["language"] * accumulation * steps,
        notes=notes,
    )


def _peak(device: dict[str, int], step: StepMemory, accumulation: int) -> int:
    gradients = device["gradients"]
    rest = sum(device.values()) - gradients
    if accumulation > 1:  # gradients of the micro-batch before are there while activations are kept
        return rest + gradients + step.peak
    # They take each other's place during the backward pass.
    return rest + max(step.saved + max(step.layer, step.logits), gradients + step.layer)


def _build(
    args: ModelConfig, recipe: RecipeArguments, training: SFTConfig, config: Any, vision: bool
) -> tuple[nn.Module, set[str]]:
    """The model on the meta device as it trains, and the paths of its layers that are quantized."""
    if (args.load_in_4bit or args.load_in_8bit) and not args.use_peft:
        raise ValueError("load_in_4bit and load_in_8bit train adapters only: add --use_peft.")
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    dtype = getattr(config, "dtype", None) or torch.float32 if args.dtype in (None, "auto") else args.dtype
    # Attention kernels that are not installed here keep what torch's own keeps.
    attention = args.attn_implementation if args.attn_implementation == "eager" else "sdpa"

    def build() -> Any:
        with torch.device("meta"):
            return auto.from_config(
                copy.deepcopy(config),
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=training.trust_remote_code,
            )

    model, quantized = build(), set()
    quantization = get_quantization_config(args)
    if quantization is not None:
        replaced = build()
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer._process_model_before_weight_loading(replaced, device_map=None)
        linear = {path for path, module in replaced.named_modules() if "bitsandbytes" in type(module).__module__}
        quantized = linear
    model = make_trainable(model, args, recipe.train_towers, recipe.train_layers, training.seed)
    if quantized:  # as TRL does, after the QLoRA paper
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model, quantized


# ---- parts of the memory ----


def _weight_bytes(model: nn.Module, quantized: set[str], args: ModelConfig) -> int:
    total = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and args.use_peft:
            continue
        if base_path(name).removesuffix(".weight") in quantized:
            total += quantized_bytes(parameter, args)
        else:
            total += parameter.numel() * parameter.element_size()
    return total


def quantized_bytes(weight: torch.Tensor, args: ModelConfig) -> int:
    """Bytes of a weight in bitsandbytes' 8 or 4 bits, with the scales of its rows or blocks."""
    if args.load_in_8bit:
        return weight.numel() + 4 * weight.shape[0]
    blocks = math.ceil(weight.numel() / 64)
    total = math.ceil(weight.numel() / 2) + 16 * 4  # two weights in a byte; the values that four bits stand for
    if not args.use_bnb_nested_quant:
        return total + 4 * blocks
    return total + blocks + 4 * math.ceil(blocks / 256) + 4 + 256 * 4  # scales of 8 bits, with scales of their own


def _largest_16_bit(model: nn.Module, quantized: set[str]) -> int:
    """Bytes of the largest quantized weight while it is multiplied, which happens in 16 bits."""
    named = {base_path(name).removesuffix(".weight"): p for name, p in model.named_parameters()}
    return max((2 * named[path].numel() for path in quantized), default=0)


def _trained_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


# Tensors of the size of the weight that an optimizer keeps.
STATES_OF_TORCH = {"adamw_torch": 2, "adamw_torch_fused": 2, "rmsprop": 1, "adagrad": 1, "sgd": 0}
STATES_OF_BITSANDBYTES = {"adamw": 2, "lion": 1, "rmsprop_bnb": 1}


def optimizer_bytes(model: nn.Module, optim: str) -> int:
    """Bytes of the optimizer's state of all that trains.

    Args:
        model (`nn.Module`): as it trains.
        optim (`str`): as in the training arguments.

    Raises:
        ValueError: an optimizer whose state is not known here.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if optim in STATES_OF_TORCH:
        return sum(STATES_OF_TORCH[optim] * p.numel() * p.element_size() for p in trained)
    if optim == "adafactor":
        return sum(
            4 * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.ndim > 1 else p.numel()) for p in trained
        )
    name = optim.removeprefix("paged_").replace("adamw_bnb_8bit", "adamw_8bit")
    kind, _, bits = name.rpartition("_")
    if kind not in STATES_OF_BITSANDBYTES or bits not in ("8bit", "32bit"):
        known = [*STATES_OF_TORCH, "adafactor", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"]
        raise ValueError(f"--plan does not know the memory of optim {optim}: expected one of {', '.join(known)}.")
    # Transformers keeps the state of embeddings in 32 bits, and bitsandbytes that of small tensors.
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    total = 0
    for p in trained:
        in_8_bits = bits == "8bit" and p.numel() >= 4096 and id(p) not in embeddings
        own = p.numel() + 4 * math.ceil(p.numel() / 256) if in_8_bits else 4 * p.numel()
        total += STATES_OF_BITSANDBYTES[kind] * own
    return total


def _averages(grades: GradESConfig, training: SFTConfig, steps: int | None, data: Data | None) -> bool:
    """Whether the weights will be averaged; if nothing says that they will not, they may."""
    if not grades.may_measure_heldout:
        return False
    if steps is None or data is None:
        return True
    if data.heldout_rows == 0:
        return False
    rows_per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    planned = plan_heldout(grades.heldout_settings(), steps, rows_per_step, data.heldout_rows)
    return grades.needs_heldout_rows or planned.every <= steps


def _steps(training: SFTConfig, data: Data | None) -> int | None:
    """Optimizer steps of the run."""
    if training.max_steps > 0:
        return training.max_steps
    if data is None:
        return None
    rows = data.rows
    if training.packing:
        if data.tokens_per_row is None or training.max_length is None:
            return None
        rows = math.ceil(rows * data.tokens_per_row / training.max_length)
    batches = math.ceil(rows / training.per_device_train_batch_size)
    return math.ceil(training.num_train_epochs * math.ceil(batches / training.gradient_accumulation_steps))


# ---- what freezing can save ----


def freeze_limits(
    model: nn.Module, grades: GradESConfig, checkpointing: bool, tokens: dict[str, float]
) -> dict[str, float]:
    """How many times shorter a step can become, by its FLOPs, as parts freeze in the order of the layers: an encoder,
    its outputs read from the cache, a projector, and a quarter, half and three quarters of the language layers."""
    before = absolute_flops(model, checkpointing, tokens)[0]
    layers, tower_of_module, tower_of = find_layers(model), towers_of_modules(model), towers_of_parameters(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    language = [path for path in layers if tower_of_module[path] == "language"]
    whole_layers = CRITERIA[grades.metric].freezes_whole_layers or grades.freeze_norms
    limits: dict[str, float] = {}

    def freeze(names: list[str]) -> None:
        for name in names:
            trained[name].requires_grad_(False)

    def limit(label: str, tokens: dict[str, float]) -> None:
        if any(p.requires_grad for p in trained.values()):
            limits[label] = before / absolute_flops(model, checkpointing, tokens)[0]

    try:
        for tower in (t for t in TOWERS if t in ("vision", "audio", "projector")):
            own = [name for name in trained if tower_of[name] == tower]
            freeze(own)
            if own:
                limit(tower, tokens)
                if tower != "projector":
                    tokens = {name: count for name, count in tokens.items() if name != tower}
                    limit(f"{tower}, outputs cached", tokens)
        if grades.freeze_embeddings and whole_layers:
            freeze([name for name in trained if tower_of[name] == "language" and not _inside(name, language)])
        for share in (0.25, 0.5, 0.75):
            lower = language[: min(round(share * len(language)), len(language) - 1)]  # the last one trains
            freeze([n for n in trained if _inside(n, lower) and (whole_layers or trained[n].ndim > 1)])
            limit(f"{'with ' if limits and share == 0.25 else ''}{100 * share:.0f} % of the language layers", tokens)
    finally:
        for parameter in trained.values():
            parameter.requires_grad_(True)
    return limits


def _inside(name: str, layers: list[str]) -> bool:
    return name.startswith(tuple(f"{layer}." for layer in layers)) if layers else False


# ---- which cards ----


def smaller_runs(training: SFTConfig, model_args: ModelConfig) -> Iterator[tuple[str, SFTConfig, ModelConfig]]:
    """Flags that need less memory, each added to those before: first those that change no result."""
    training, model_args = copy.copy(training), copy.copy(model_args)
    flags: dict[str, str] = {}

    def changed(owner: Any, **settings: Any) -> tuple[str, SFTConfig, ModelConfig]:
        for name, value in settings.items():
            setattr(owner, name, value)
            flags[name] = str(value).lower() if isinstance(value, bool) else str(getattr(value, "value", value))
        return " ".join(f"--{name} {value}" for name, value in flags.items()), training, model_args

    if not training.gradient_checkpointing:
        yield changed(training, gradient_checkpointing=True)
    while training.per_device_train_batch_size > 1:
        halves = training.per_device_train_batch_size // 2
        accumulation = training.gradient_accumulation_steps * training.per_device_train_batch_size // halves
        yield changed(training, per_device_train_batch_size=halves, gradient_accumulation_steps=accumulation)
    if "8bit" not in training.optim.value:
        yield changed(training, optim=type(training.optim)("adamw_8bit"))
    if not model_args.use_peft:
        yield changed(model_args, use_peft=True, dtype="bfloat16")
    if not model_args.load_in_4bit:
        model_args.load_in_8bit = False
        yield changed(model_args, load_in_4bit=True, dtype="bfloat16")
    while training.max_length is not None and training.max_length // 2 >= SHORTEST:
        yield changed(training, max_length=training.max_length // 2)


def flags_by_card(
    recipe: RecipeArguments,
    training: SFTConfig,
    model_args: ModelConfig,
    grades: GradESConfig,
    planned: Plan,
    **given: Any,
) -> dict[int, str | None]:
    """GiB of a card -> the flags that make the run fit on it: `""` if it does as it is, `None` if nothing does.
    Arguments as in [`plan_run`]."""
    found: dict[int, str | None] = {card: "" if planned.gib <= card else None for card in CARDS}
    for flags, its_training, its_model in smaller_runs(training, model_args):
        missing = [card for card, its_flags in found.items() if its_flags is None]
        if not missing:
            break
        smaller = plan_run(recipe, its_training, its_model, grades, **given)
        found |= {card: flags for card in missing if smaller.gib <= card}
    return found


# ---- in words ----


def format_plan(planned: Plan, cards: dict[int, str | None], checkpointing: bool) -> str:
    """The plan as text, in lines of 119 characters at most where flags are short."""
    step = planned.step
    how = "with" if checkpointing else "without"
    working = {
        f"activations, {step.rows} x {step.length:,} tokens, {how} checkpointing": step.saved,
        "the largest layer, for a moment": step.layer,
        "logits and their loss, for a moment": step.logits,
    }
    lines = [planned.choice, "", "memory on the device (GiB)"]
    lines += [f"  {part:<60} {size / GIB:>8.2f}" for part, size in (planned.device | working).items()]
    lines.append(f"  {'at most at a time':<60} {planned.peak / GIB:>8.2f}")
    lines.append(f"  {'with 1 GiB for CUDA and fragmentation':<60} {planned.gib:>8.2f}")
    if planned.host:
        lines.append("memory of the host (GiB), beside the process itself")
        lines += [f"  {part:<60} {size / GIB:>8.2f}" for part, size in planned.host.items()]
    lines.append("cards")
    for card, flags in cards.items():
        fits = "fits" if flags == "" else "does not fit" if flags is None else f"fits with {flags}"
        lines.append(f"  {card:>3} GB  {fits}")
    lines.append("limit of the step time once a part is frozen, in the order in which parts freeze")
    lines += [f"  {part:<60} {limit:>7.2f}x" for part, limit in planned.limits.items()]
    lines.append(f"FLOPs of an optimizer step, in the layers: {planned.step_flops:.3g}")
    if planned.steps is None or planned.tokens is None:
        lines.append("Steps and tokens of the run: not known; give --dataset_name or --max_steps.")
    else:
        lines.append(
            f"The run: {counted(planned.steps, 'step')}, {planned.tokens:,.0f} tokens, "
            f"{planned.step_flops * planned.steps:.3g} FLOPs."
        )
    if planned.notes:
        lines.append(f"Assumed: {'; '.join(planned.notes)}.")
    return "\n".join(lines)


def print_plan(
    recipe: RecipeArguments,
    training: SFTConfig,
    model_args: ModelConfig,
    grades: GradESConfig,
    datasets: dict[str, Callable[..., Any]],
    built_in_model: Callable[[], tuple[Any, Any]],
    *,
    vision: bool = False,
) -> None:
    """Prints the plan of a run: `--plan` of the recipes.

    Args:
        recipe, training, model_args, grades: as in [`plan_run`].
        datasets (`dict[str, Callable]`): the built-in datasets of the recipe.
        built_in_model (`Callable`): makes the built-in model, and its tokenizer or processor.
        vision (`bool`, *optional*, defaults to `False`): rows have images.
    """
    given: dict[str, Any] = {"vision": vision}
    tokenizer, name = None, model_args.model_name_or_path
    if name in (None, "tiny_llava"):
        model, tokenizer = built_in_model()
        given["config"] = model.config
    if recipe.dataset_name is not None:
        rows = load_data(recipe, training, datasets, vision=vision)
        if tokenizer is None and vision:
            tokenizer = AutoProcessor.from_pretrained(name, trust_remote_code=training.trust_remote_code)
        elif tokenizer is None:
            tokenizer = _read_tokenizer(name, training.trust_remote_code)
        train = training_rows(rows["train"], tokenizer, training, recipe.train_on, vision)  # maybe one per reply
        counts = len(train), len(rows["validation"])
        if vision:
            collate = DataCollatorForVisionLanguageModeling(tokenizer, max_length=training.max_length)
            given["data"] = Data(
                *counts, batch_of=lambda size: collate([train[i] for i in range(min(size, len(train)))])
            )
        else:
            given["data"] = Data(*counts, mean_tokens(train, tokenizer))
    planned = plan_run(recipe, training, model_args, grades, **given)
    cards = flags_by_card(recipe, training, model_args, grades, planned, **given)
    print(format_plan(planned, cards, bool(training.gradient_checkpointing)))


def _read_tokenizer(name: str, trust_remote_code: bool) -> Any:
    gguf = find_gguf(name)
    if gguf is not None:
        return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def mean_tokens(rows: Dataset, tokenizer: Any) -> float:
    """Mean tokens of the first 200 rows: of `messages`, of `prompt` and `completion`, or of `text`."""
    total, sample = 0, first(rows, 200)
    for row in sample:
        parts = [row[column] for column in ("messages", "prompt", "completion", "text") if column in row]
        if isinstance(parts[0], str):
            total += sum(len(tokenizer(part)["input_ids"]) for part in parts)
        else:
            messages = [message for part in parts for message in part]
            total += len(
                tokenizer.apply_chat_template(messages, tools=row.get("tools"), return_dict=True)["input_ids"]
            )
    return total / len(sample)
