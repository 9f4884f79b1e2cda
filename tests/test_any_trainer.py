"""The mixin on trainers other than SFTTrainer, and what grades=None leaves of a trainer."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    Qwen3ForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers import trainer as trainer_module
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTTrainer,
)

from grades_trl import GradESConfig, GradESMixin, GradESTrainer
from grades_trl.recipe import builtin
from grades_trl.trainers.heldout import HeldoutRows
from helpers import LORA, QUIETLY_ON_CPU, arguments, llava, model_for, qwen3, same, weights

COMMON = {"max_steps": 6, "per_device_train_batch_size": 4} | QUIETLY_ON_CPU
PAIRS = {"prompt": ["1 May 1998 "] * 16, "chosen": ["1998-05-01"] * 16, "rejected": ["1998-05-02"] * 16}
LABELLED = {"prompt": ["1 May 1998 "] * 16, "completion": ["1998-05-01"] * 16, "label": [True, False] * 8}


class Collator:
    """Rows of token ids and labels for a plain Trainer."""

    def __call__(self, rows):
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids.clone()}


@pytest.fixture(scope="module")
def tokenizer():
    return builtin.tiny_qwen3()[1]


def reward_model(tokenizer):
    config = model_for(tokenizer).config
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    torch.manual_seed(0)
    return Qwen3ForSequenceClassification(config)


def build(kind, tokenizer, folder, grades, lora):
    """A trainer of that kind with the mixin, on rows of its own format."""
    if kind == "plain":
        model = qwen3()
        rows = Dataset.from_dict({"input_ids": torch.randint(3, 60, (16, 8)).tolist()})
        base, args, own = Trainer, TrainingArguments(str(folder), **COMMON), {"data_collator": Collator()}
    else:
        base, config, data = {
            "dpo": (DPOTrainer, DPOConfig, PAIRS),
            "kto": (KTOTrainer, KTOConfig, LABELLED),
            "reward": (RewardTrainer, RewardConfig, PAIRS),
        }[kind]
        model = reward_model(tokenizer) if kind == "reward" else model_for(tokenizer)
        rows = Dataset.from_dict(data)
        args, own = config(str(folder), **COMMON), {"processing_class": tokenizer}
        if kind != "reward" and not lora:
            own["ref_model"] = model_for(tokenizer)
    mixed = type("Mixed", (GradESMixin, base), {})
    model = get_peft_model(model, LORA) if lora else model
    return mixed(model=model, args=args, train_dataset=rows, eval_dataset=rows, grades=grades, **own)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["plain", "dpo", "kto", "reward"])
def test_a_trainer_freezes_in_the_middle_and_measures_its_heldout_loss(tmp_path, tokenizer, kind, lora):
    schedule = {"*.layers.0.*": 3}
    heldout = {"heldout_every": 2, "heldout_cost": 1.0, "heldout_patience": 2}
    grades = GradESConfig(metric="schedule", schedule=schedule, keep="last", **heldout)
    trainer = build(kind, tokenizer, tmp_path, grades, lora)
    frozen_at = {}

    def note(step):
        for name, matrix in trainer.tracked.items():
            if matrix.layer == 0:
                frozen_at.setdefault(step, {})[name] = [p.detach().clone() for p in matrix.parameters]

    class Notes(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            note(state.global_step + 1)

    trainer.add_callback(Notes())
    trainer.train()
    assert trainer.state.global_step == 6
    assert set(trainer.grades.frozen.values()) == {3}
    assert len(trainer.grades.frozen) == 7
    for name, values in frozen_at[3].items():
        now = trainer.tracked[name].parameters
        assert all(torch.equal(old, new) for old, new in zip(values, now, strict=True))
    first = next(iter(frozen_at[1]))
    assert any(not torch.equal(a, b) for a, b in zip(frozen_at[1][first], frozen_at[3][first], strict=True))
    assert trainer.grades.heldout.measurements == 3
    assert trainer.grades.heldout.score > 0


def test_labels_of_several_classes_at_once_are_no_tokens(tmp_path, tokenizer):
    config = qwen3().config
    config.num_labels, config.problem_type, config.pad_token_id = 3, "multi_label_classification", 0
    torch.manual_seed(0)
    labels = (torch.rand(16, 3) < 0.5).float()
    rows = Dataset.from_dict({"input_ids": torch.randint(3, 60, (16, 8)).tolist(), "labels": labels.tolist()})
    trainer = type("Mixed", (GradESMixin, Trainer), {})(
        model=Qwen3ForSequenceClassification(config),
        args=TrainingArguments(str(tmp_path), **COMMON),
        train_dataset=rows,
        eval_dataset=rows,
    )
    scored = HeldoutRows(trainer, 16)
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=torch.tensor(rows["input_ids"])[scored.rows]).logits
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[scored.rows]).item()
    assert scored() == pytest.approx(expected, rel=1e-5)


SMALL_T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
SMALL_BERT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_labels": 3}


def not_causal(kind):
    """A model that predicts labels in their own places. All take `**kwargs`, and ignore `num_items_in_batch`."""
    torch.manual_seed(0)
    if kind == "t5":
        config = T5Config(**SMALL_T5, decoder_start_token_id=0)
        return T5ForConditionalGeneration(config)
    config = BertConfig(**SMALL_BERT, num_attention_heads=4, max_position_embeddings=64)
    return (BertForMaskedLM if kind == "masked" else BertForTokenClassification)(config)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["t5", "masked", "token classification"])
def test_the_score_of_a_model_that_is_not_causal_is_per_token(tmp_path, kind, lora):
    """Also of the first token of a row, and although rows have different numbers of labels."""
    labels = [[i % 3] * (1 + i) + [-100] * (15 - i) for i in range(16)]
    rows = Dataset.from_dict({"input_ids": torch.randint(3, 60, (16, 16)).tolist(), "labels": labels})
    model, adapters = not_causal(kind), LoraConfig(r=4, target_modules="all-linear")
    trainer = type("Mixed", (GradESMixin, Trainer), {})(
        model=get_peft_model(model, adapters) if lora else model,
        args=TrainingArguments(str(tmp_path), **COMMON),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in rows[0]},
    )
    trainer.train()  # for tokens that are right
    batch, labels = {name: torch.tensor(rows[name]) for name in rows.column_names}, torch.tensor(labels)
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    right = (logits.argmax(-1) == labels)[labels != -100].float().mean().item()
    assert right > 0
    assert trainer.model_accepts_loss_kwargs
    for size in (1, 3, 16):
        trainer._train_batch_size = size
        assert HeldoutRows(trainer, 16)() == pytest.approx(loss, rel=1e-5)
        assert HeldoutRows(trainer, 16, "token_accuracy")() == pytest.approx((right, loss), rel=1e-5)


def test_a_trainer_that_is_no_sft_trainer_has_no_training_accuracy(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="reads the mean_token_accuracy"):
        build("plain", tokenizer, tmp_path, GradESConfig(stopping="train_accuracy"), lora=False)
    trainer = build("dpo", tokenizer, tmp_path, GradESConfig(metric="none"), lora=False)
    trainer.train()
    assert (trainer.grades.stopping_name, trainer.grades.heldout) == ("all_frozen", None)


def test_a_trainer_that_generates_has_no_heldout_loss(tmp_path, tokenizer):
    mixed = type("Mixed", (GradESMixin, GRPOTrainer), {})
    args = GRPOConfig(str(tmp_path), **(COMMON | {"num_generations": 2, "max_completion_length": 4}))
    rows = Dataset.from_dict({"prompt": ["1 May 1998 "] * 16})
    trainer = mixed(
        model=model_for(tokenizer),
        reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        grades=GradESConfig(heldout_cost=1.0, heldout_every=2, stopping="heldout"),
    )
    with pytest.raises(ValueError, match=r'computes no loss of its eval_dataset .* set stopping="all_frozen"'):
        trainer.train()


@pytest.fixture
def text(tokenizer):
    return builtin.dates(train=32, test=8)["train"], tokenizer


def sft(cls, text, folder, **extra):
    rows, tokenizer = text
    return cls(
        model=model_for(tokenizer), args=arguments(folder), train_dataset=rows, processing_class=tokenizer, **extra
    )


def test_without_grades_the_trainer_is_tagged_and_described_like_its_base(tmp_path, text):
    stock, off = sft(SFTTrainer, text, tmp_path), sft(GradESTrainer, text, tmp_path, grades=None)
    assert off.model.model_tags == stock.model.model_tags
    assert (off._name, off._tag_names, off._paper) == (stock._name, stock._tag_names, stock._paper)
    assert len(off.callback_handler.callbacks) == len(stock.callback_handler.callbacks)


def test_with_grades_tags_and_name_extend_those_of_the_base_and_the_card_cites_the_paper(tmp_path, text):
    class Mine(GradESMixin, SFTTrainer):
        _tag_names = ["trl", "mine"]  # noqa: RUF012
        _name = "Mine"

    trainer = sft(Mine, text, tmp_path)
    assert {"trl", "mine", "grades"} <= set(trainer.model.model_tags)
    trainer.create_model_card(model_name="x")
    card = (tmp_path / "README.md").read_text()
    assert "Mine with GradES" in card
    assert "2509.01842" in card


@pytest.mark.parametrize("grades", [{"tau": 1}, True])
def test_what_is_no_config_is_refused_before_the_data_is_touched(tmp_path, grades):
    with pytest.raises(TypeError, match="expected a GradESConfig, or None"):
        GradESTrainer("no such model", arguments(tmp_path), grades=grades)


@pytest.mark.parametrize("load", ["_load_best_model", "_load_from_checkpoint"])
def test_weights_saved_under_other_names_are_loaded_without_a_list_of_missing_keys(tmp_path, monkeypatch, load):
    """A LLaVA is saved under older names, which the Trainer says are unexpected, and all of its own missing. Where
    weights really are missing, it still says so."""
    said = []
    monkeypatch.setattr(trainer_module.logger, "warning", said.append)
    trainer_class = type("T", (GradESMixin, Trainer), {})
    trainer = trainer_class(llava(), TrainingArguments(str(tmp_path), **COMMON), grades=None)
    trainer.model.save_pretrained(tmp_path / "saved")
    right = weights(trainer.model)
    trainer.state.best_model_checkpoint = str(tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    saved = load_file(path)
    assert set(saved) != set(right)

    def load_saved():
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.zero_()
        getattr(trainer, load)(*([str(path.parent)] if load == "_load_from_checkpoint" else []))

    load_saved()
    assert said == []
    assert same(weights(trainer.model), right)

    del saved["multi_modal_projector.linear_1.weight"]
    save_file(saved, path, {"format": "pt"})
    load_saved()
    missing, unexpected = said
    assert "missing keys" in missing and "'model.multi_modal_projector.linear_1.weight'" in missing
    assert "unexpected keys" in unexpected


def test_weights_saved_under_other_names_keep_their_precision_beside_a_tower_of_16_bits(tmp_path):
    """`dtype` of a model is that of its first parameter, here of the frozen tower."""
    model = llava()
    model.model.vision_tower.to(torch.bfloat16).requires_grad_(False)
    assert model.dtype == torch.bfloat16
    trainer = type("T", (GradESMixin, Trainer), {})(model, TrainingArguments(str(tmp_path), **COMMON), grades=None)
    model.save_pretrained(tmp_path)
    right = weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    trainer._load_from_checkpoint(str(tmp_path))
    assert same(weights(model), right)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
