"""One architecture, tried as people would train it: full, LoRA, QLoRA, with a freeze in the middle of the run."""

import copy
import tempfile
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig
from trl import ModelConfig

from grades_trl import GradES, GradESConfig
from grades_trl.freezing.checkpointing import let_embeddings_be_changed, refuse_lost_gradients
from grades_trl.model import find_layers, find_matrices, towers_of_modules
from grades_trl.model.structure import find_heads, find_routers, is_linear, locate
from grades_trl.recipe.models import make_trainable
from zoo import build, inputs_of

CHECKPOINTING = (None, False, True)  # off, non-reentrant, reentrant
STEPS, FREEZE_AT = 3, 2
YES, NO = "yes", "no"


@dataclass
class Row:
    """What came of an architecture: a row of the table."""

    name: str
    towers: str = ""
    full: str = ""
    lora: str = ""
    qlora: str = ""
    prefix: str = ""
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        notes = "; ".join(dict.fromkeys(self.notes))
        return f"| {self.name} | {self.towers} | {self.full} | {self.lora} | {self.qlora} | {self.prefix} | {notes} |"


def check(name: str, vision: bool = False) -> Row:
    """Tries an architecture.

    Raises:
        AssertionError: GradES changed what it must not change, or did not find what it has to find.
    """
    model = build(name, vision)
    row = Row(name)
    row.towers = _check_matrices(model)
    row.full, prefix = _check_run(model, "full", row, vision)
    adapted = _adapted(name, vision)
    left_out = len(find_matrices(model)) - len(find_matrices(adapted))
    if left_out > 0:
        row.notes.append(f"LoRA leaves out {left_out} of {len(find_matrices(model))} matrices")
    row.lora, prefix_of_lora = _check_run(adapted, "LoRA", row, vision)
    row.prefix = prefix if prefix_of_lora in ("", prefix) else f"full {prefix}, LoRA {prefix_of_lora}"
    row.qlora = _check_saved(model, adapted, row, vision)
    return row


def _adapted(name: str, vision: bool) -> nn.Module:
    model = make_trainable(build(name, vision), ModelConfig(use_peft=True, lora_r=2, lora_dropout=0.0))
    torch.manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)  # zeros would leave lora_A without a gradient
    return model


def _check_matrices(model: nn.Module) -> str:
    """Every linear weight in the layers once, and nothing else. Returns how many each tower has."""
    matrices, layers = find_matrices(model), find_layers(model)
    ids = [id(p) for matrix in matrices.values() for p in matrix.parameters]
    assert len(ids) == len(set(ids))
    assert all(min(m.shape[-2:]) > 1 for m in matrices.values())
    not_expected = {*find_routers(model, layers), *find_heads(model)}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and locate(path, layers) and module.weight.requires_grad:
            assert (id(module.weight) in ids) != (path in not_expected), path
        if not is_linear(module):
            words = ("norm", "router", "time_mix", "A_log", "embed")
            assert not [
                n for n, p in module.named_parameters(recurse=False) if id(p) in ids and any(w in n for w in words)
            ]
    towers = towers_of_modules(model)
    assert all(matrix.tower == towers[path] for path, matrix in matrices.items() if path in towers)
    counts: dict[str, int] = {}
    for matrix in matrices.values():
        counts[matrix.tower] = counts.get(matrix.tower, 0) + 1
    return ", ".join(f"{tower} {count}" for tower, count in counts.items())


def _check_run(model: nn.Module, kind: str, row: Row, vision: bool) -> tuple[str, str]:
    """Whether it trains with a freeze in the middle, and whether backward skipped the frozen layers."""
    try:
        gradients, weights, _ = _run(copy.deepcopy(model), None, vision, prefix=False)
    except Exception as error:
        row.notes.append(f"{kind}: {type(error).__name__} without GradES")
        return NO, ""
    skipped: list[bool] = []
    for reentrant in CHECKPOINTING:
        how = {None: "", False: "with checkpointing", True: "with reentrant checkpointing"}[reentrant]
        try:
            own, own_weights, did_skip = _run(copy.deepcopy(model), reentrant, vision, prefix=True)
        except AssertionError:
            raise
        except Exception as error:
            is_refused = isinstance(error, ValueError) and "loses gradients of this model" in str(error)
            _fails_without_grades(model, reentrant, vision, gradients if is_refused else None)
            if is_refused:
                row.notes.append(f"{kind} {how} is refused: it loses gradients")
                continue
            not_supported = "does not support gradient checkpointing" in str(error)
            row.notes.append("no checkpointing" if not_supported else f"{kind} {how} fails without GradES, too")
            continue
        skipped.append(did_skip)
        wrong = _different(own, gradients)
        if wrong:  # two steps of AdamW can make as much of a rounding error as of a gradient that is lost
            own, _, _ = _run(copy.deepcopy(model).double(), reentrant, vision, prefix=True)
            others, _, _ = _run(copy.deepcopy(model).double(), None, vision, prefix=False)
            wrong = _different(own, others)
        assert not wrong, (kind, how, wrong[:9])
        assert own_weights.keys() == weights.keys(), (kind, how)
    return YES, YES if all(skipped) else NO


def _different(own: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> list[str]:
    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        return torch.allclose(a, b, rtol=1e-3, atol=1e-6 + 1e-4 * float(b.abs().max()))

    return sorted(own.keys() ^ others.keys()) or [name for name in own if not same(own[name], others[name])]


def _fails_without_grades(
    model: nn.Module, reentrant: bool | None, vision: bool, gradients: dict[str, torch.Tensor] | None
) -> None:
    """Asserts that it does, or that its gradients are not the given ones."""
    try:
        own, _, _ = _run(copy.deepcopy(model), reentrant, vision, prefix=False)
    except Exception:
        return
    assert gradients is not None and _different(own, gradients), "it trains without GradES, and fails with it"


def _run(model: nn.Module, reentrant: bool | None, vision: bool, prefix: bool):
    """A few steps, in the middle of which the lower half of each list of layers freezes.

    Returns:
        Gradients of the last step; what is frozen, whose values the run must not have changed; whether layers were
        skipped.
    """
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    model.train()
    lengths: dict[str, int] = {}
    matrices = find_matrices(model)
    for matrix in matrices.values():
        lengths[matrix.stack] = max(lengths.get(matrix.stack, 0), matrix.layer + 1)
    lower = {m.name: FREEZE_AT for m in matrices.values() if m.layer < max(1, lengths[m.stack] // 2)}
    config = GradESConfig(
        metric="schedule",
        schedule=lower,
        stopping="end_of_schedule",
        keep="last",
        freeze_norms=True,
        freeze_embeddings=True,
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    grades = GradES(model, config, STEPS + 1, optimizer)
    handles = []
    if prefix:  # with what a trainer does in the first step
        let_embeddings_be_changed(model)
        handles = refuse_lost_gradients(model)
    else:
        grades.prefix.update = lambda *_, **__: False
    before: dict[str, torch.Tensor] = {}
    dtype = next(model.parameters()).dtype
    inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs_of(model, vision).items()}
    for step in range(1, STEPS + 1):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        for handle in handles:
            handle.remove()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.requires_grad}
        grades.step(step)
        if step == FREEZE_AT:
            frozen = {id(p) for p in grades._freezer.frozen}
            before = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) in frozen}
        if step < STEPS:
            optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    skipped = bool(grades.prefix.skipped_layers)
    grades.close()
    return gradients, before, skipped


def _check_saved(model: nn.Module, adapted: nn.Module, row: Row, vision: bool) -> str:
    """Saved and loaded again, both are what they were. Returns whether QLoRA trains."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        adapted.save_pretrained(f"{folder}/adapter")
        loaded = type(model).from_pretrained(f"{folder}/model", attn_implementation="eager")
        for name, weight in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight), f"{name} of the saved model"
        base = PeftModel.from_pretrained(loaded, f"{folder}/adapter")
        there = dict(base.named_parameters())
        lost = [n for n, w in adapted.named_parameters() if "lora_" in n and not torch.equal(there[n], w)]
        if lost and not adapted.peft_config["default"].target_parameters:  # an ordinary adapter of PEFT
            names = sorted({name.partition(".lora_")[0].split(".")[-2] for name in lost})
            row.notes.append(f"PEFT reads the saved adapter without {', '.join(names)}")
            row.lora = NO
        else:
            assert not lost, f"{lost[0]} of the saved adapter"
        try:
            four_bits = BitsAndBytesConfig(load_in_4bit=True)
            small = type(model).from_pretrained(
                f"{folder}/model", quantization_config=four_bits, attn_implementation="eager"
            )
            small = make_trainable(small, ModelConfig(use_peft=True, lora_r=2, lora_dropout=0.0))
            small.train()
            small(**inputs_of(small, vision)).loss.backward()
            return YES if find_matrices(small) else NO
        except Exception as error:
            row.notes.append(f"QLoRA: {type(error).__name__}")
            return NO
