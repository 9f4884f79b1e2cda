"""Whole runs of the trainer, next to the stock SFTTrainer and to plain PyTorch."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from trl import SFTTrainer

from grades_trl import GradESConfig, GradESMixin, GradESTrainer
from grades_trl.recipe import builtin
from helpers import LORA, arguments, llava, losses, model_for, never, same, weights
from vlm import GradESVLMTrainer
from vlm import builtin as vlm_builtin


@pytest.fixture(scope="module")
def text():
    dataset = builtin.dates(train=256, test=8, seed=0)
    return dataset, builtin.tiny_qwen3()[1]


@pytest.fixture(scope="module")
def pictures():
    return vlm_builtin.digit_images(train=64, test=8, seed=0)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("grades", [None, never()], ids=["off", "measuring"])
def test_text_run_equals_sft_trainer_bit_for_bit(tmp_path, text, lora, grades):
    dataset, tokenizer = text
    runs = []
    for cls, extra in ((SFTTrainer, {}), (GradESTrainer, {"grades": grades})):
        trainer = cls(
            model=model_for(tokenizer),
            args=arguments(tmp_path, gradient_accumulation_steps=2),
            train_dataset=dataset["train"],
            processing_class=tokenizer,
            peft_config=LORA if lora else None,
            **extra,
        )
        trainer.train()
        runs.append((losses(trainer), weights(trainer.model)))
    assert len(runs[0][0]) == 12
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("grades", [None, never()], ids=["off", "measuring"])
def test_vlm_run_equals_sft_trainer_bit_for_bit(tmp_path, pictures, grades):
    runs = []
    for cls, extra in ((SFTTrainer, {}), (GradESVLMTrainer, {"grades": grades})):
        model, processor = vlm_builtin.tiny_llava()
        trainer = cls(
            model=model,
            args=arguments(tmp_path, max_steps=4, max_length=None),
            train_dataset=pictures["train"],
            processing_class=processor,
            **extra,
        )
        trainer.train()
        runs.append((losses(trainer), weights(trainer.model)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


def measurements(tmp_path, text, scaler=None, **changes):
    """The values of every step of a short run, by matrix."""
    dataset, tokenizer = text
    seen = []

    class Recording(GradESMixin, SFTTrainer):
        def _grades_step(self, loss):
            super()._grades_step(loss)
            seen.append(dict(self.grades.criterion.values))

    trainer = Recording(
        model=model_for(tokenizer),
        args=arguments(tmp_path, **({"max_steps": 3} | changes)),
        train_dataset=dataset["train"],
        processing_class=tokenizer,
        grades=never(metric="grad_norm"),
    )
    trainer.accelerator.scaler = scaler
    trainer.train()
    return seen


def assert_close(one, other, tolerance):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name] == pytest.approx(other[name], rel=tolerance), name


def test_values_are_the_gradient_of_the_batch_loss(tmp_path, text):
    """Against autograd on the same batch, without a trainer."""
    dataset, tokenizer = text
    model = model_for(tokenizer)
    reference = SFTTrainer(
        model=model, args=arguments(tmp_path), train_dataset=dataset["train"], processing_class=tokenizer
    )
    batch = next(iter(reference.get_train_dataloader()))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    name = "model.layers.1.mlp.down_proj"
    (gradient,) = torch.autograd.grad(loss, model.get_submodule(name).weight)
    assert measurements(tmp_path, text)[0][name] == pytest.approx(gradient.abs().sum().item(), rel=1e-4)


def test_accumulated_micro_batches_measure_like_one_batch(tmp_path, text):
    whole = measurements(tmp_path, text, per_device_train_batch_size=8)
    parts = measurements(tmp_path, text, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert len(whole) == len(parts) == 3
    assert_close(parts[0], whole[0], 1e-4)


def test_gradients_are_measured_before_clipping(tmp_path, text):
    loose, tight = (measurements(tmp_path, text, max_grad_norm=norm)[0] for norm in (1e9, 1e-6))
    assert loose == tight


def test_loss_scaling_is_divided_out_and_overflow_is_no_measurement(tmp_path, text):
    """fp16's gradient scaler on a CPU: the scale is a power of 2, so values agree but for rounding."""
    plain = measurements(tmp_path, text)
    scaled = measurements(tmp_path, text, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert_close(scaled[0], plain[0], 1e-5)
    for one, other in zip(scaled, plain, strict=True):
        assert_close(one, other, 0.05)  # Adam's first updates turn rounding into whole steps
    overflowing = measurements(tmp_path, text, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**127))
    assert overflowing[0] == {}


def test_bf16_autocast_measures_nearly_the_same(tmp_path, text):
    plain, bf16 = measurements(tmp_path, text)[0], measurements(tmp_path, text, bf16=True)[0]
    assert_close(bf16, plain, 0.1)
    assert bf16 != plain


def trained(tmp_path, text, config, peft=None, **changes):
    """A run, with every matrix's values at the moment it froze."""
    dataset, tokenizer = text
    at_freeze = {}

    class Recording(GradESMixin, SFTTrainer):
        def _grades_step(self, loss):
            super()._grades_step(loss)
            for name in self.grades.frozen.keys() - at_freeze.keys():
                at_freeze[name] = [p.detach().clone() for p in self.grades.matrices[name].parameters]

    trainer = Recording(
        model=model_for(tokenizer),
        args=arguments(tmp_path, **({"max_steps": 30} | changes)),
        train_dataset=dataset["train"],
        processing_class=tokenizer,
        grades=config,
        peft_config=peft,
    )
    trainer.train()
    return trainer, at_freeze


# With these, matrices freeze one after the other within 30 steps.
STAGGERED_FULL = GradESConfig(metric="grad_change", alpha=0.4, auto_ratio=0.5)
STAGGERED_LORA = GradESConfig(metric="grad_change", alpha=0.2, auto_ratio=1.0)
STAGGERED = pytest.mark.parametrize(
    ("peft", "config"),
    [(None, STAGGERED_FULL), (LORA, STAGGERED_LORA)],
    ids=["full", "lora"],
)


@STAGGERED
def test_frozen_matrices_stay_bit_identical_and_the_rest_trains(tmp_path, text, peft, config):
    trainer, at_freeze = trained(tmp_path, text, config, peft)
    steps = trainer.grades.frozen
    assert len(at_freeze) > 3
    assert min(steps.values()) < trainer.state.global_step  # trained on after the first one
    for name, values in at_freeze.items():
        for old, parameter in zip(values, trainer.grades.matrices[name].parameters, strict=True):
            assert torch.equal(old, parameter), name
            assert parameter not in trainer.optimizer.state
    events = [json.loads(line) for line in (tmp_path / "grades" / "events.jsonl").read_text().splitlines()]
    assert {event["matrix"]: event["step"] for event in events} == steps


def test_the_run_ends_in_the_step_in_which_the_last_matrix_freezes(tmp_path, text):
    config = GradESConfig(metric="grad_norm", tau=1e9, alpha=0.5)
    trainer, _ = trained(tmp_path, text, config, LORA)
    assert trainer.grades.done
    assert trainer.state.global_step == 16  # ceil(.5 * 30) + 1
    summary = json.loads((tmp_path / "grades" / "summary.json").read_text())
    assert (summary["steps"], summary["total_steps"]) == (16, 30)
    assert summary["stop_reason"] == "all matrices frozen"
    assert summary["speedup"]["steps_not_run"]["ratio"] == pytest.approx(30 / 16)
    for file in ("history.parquet", "timeline.png", "report.html"):
        assert (tmp_path / "grades" / file).stat().st_size > 0


def test_the_contract_s_keys_are_logged(tmp_path, text):
    trainer, _ = trained(tmp_path, text, STAGGERED_FULL)
    row = [row for row in trainer.state.log_history if "loss" in row][-1]
    expected = {"frozen_fraction", "frozen_params_fraction", "step_time"}
    expected |= {"step_speedup_predicted", "overhead_ms", "language/frozen_fraction"}
    assert {f"grades/{key}" for key in expected} <= row.keys()
    assert any(key == "grades/language/metric" for key in row)
    assert row["grades/frozen_fraction"] == len(trainer.grades.frozen) / 14


@STAGGERED
def test_a_resumed_run_ends_like_the_straight_one(tmp_path, text, peft, config):
    straight, _ = trained(tmp_path / "a", text, config, peft, save_strategy="steps", save_steps=14)
    checkpoint = tmp_path / "a" / "checkpoint-14"
    steps = straight.grades.frozen.values()
    assert min(steps) <= 14 < max(steps)

    dataset, tokenizer = text
    resumed = GradESTrainer(
        model=model_for(tokenizer),
        args=arguments(tmp_path / "a", max_steps=30),
        train_dataset=dataset["train"],
        processing_class=tokenizer,
        grades=config,
        peft_config=peft,
    )
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.grades.frozen == straight.grades.frozen
    assert same(weights(resumed.model), weights(straight.model))
    events = [json.loads(line) for line in (tmp_path / "a" / "grades" / "events.jsonl").read_text().splitlines()]
    assert {event["matrix"]: event["step"] for event in events} == straight.grades.frozen


@pytest.mark.parametrize("lora", [False, True])
def test_a_vision_language_run_resumes_and_finds_its_best_checkpoint(tmp_path, pictures, lora):
    """Transformers saves LLaVA under other names than its modules have, and its Trainer loads nothing of that."""

    def trainer(name, **changes):
        model, processor = vlm_builtin.tiny_llava()
        settings = {
            "max_length": None,
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 2,
            "eval_strategy": "steps",
        }
        return GradESVLMTrainer(
            model=model,
            args=arguments(tmp_path / name, **(settings | {"eval_steps": 2} | changes)),
            train_dataset=pictures["train"],
            eval_dataset=pictures["test"],
            processing_class=processor,
            peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
            grades=never(),
        )

    straight = trainer("straight")
    straight.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    assert same(weights(resumed.model), weights(straight.model))

    # What is best is a matter of definition: here the first checkpoint, whose loss is the highest.
    worst = trainer("worst", load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True)
    worst.train()
    losses = [row["eval_loss"] for row in worst.state.log_history if "eval_loss" in row]
    assert losses[0] == max(losses)
    assert worst.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-5)


def test_a_checkpoint_of_a_plain_run_is_refused(tmp_path, text):
    dataset, tokenizer = text
    common = {"train_dataset": dataset["train"], "processing_class": tokenizer}
    plain = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    GradESTrainer(model=model_for(tokenizer), args=plain, grades=None, **common).train()
    trainer = GradESTrainer(model=model_for(tokenizer), args=arguments(tmp_path), **common)
    with pytest.raises(ValueError, match=r"has no grades_state\.json"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_second_train_starts_anew(tmp_path, text):
    trainer, _ = trained(tmp_path, text, GradESConfig(metric="grad_norm", tau=1e9, alpha=0.5), max_steps=6)
    assert trainer.grades.done
    trainer.train()
    assert trainer.state.global_step == 4
    assert set(trainer.grades.frozen.values()) == {4}


def test_qlora_on_the_cpu_freezes_pairs(tmp_path, text):
    dataset, tokenizer = text
    model_for(tokenizer).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization)
    model = get_peft_model(model, LORA)
    trainer = GradESTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=10),
        train_dataset=dataset["train"],
        processing_class=tokenizer,
        grades=GradESConfig(metric="grad_change", alpha=0.3, auto_ratio=1.0),
    )
    q = trainer.tracked["model.layers.0.self_attn.q_proj"]
    assert (len(trainer.tracked), q.shape, q.params) == (14, (32, 32), 2 * 4 * 32)
    trainer.train()
    assert 0 < len(trainer.grades.frozen) < 14
    assert all(p.requires_grad for matrix in trainer.grades.matrices.values() for p in matrix.parameters)  # afterwards


def test_vlm_freezes_in_both_towers_at_their_own_tau(tmp_path, pictures):
    model, processor = vlm_builtin.tiny_llava()
    trainer = GradESVLMTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=6, max_length=None),
        train_dataset=pictures["train"],
        processing_class=processor,
        grades=GradESConfig(metric="grad_change", tau={"vision": 1e9, "language": 0.0}, alpha=0.5),
    )
    trainer.train()
    frozen = {trainer.grades.matrices[name].tower for name in trainer.grades.frozen}
    assert frozen == {"vision"}
    assert trainer.state.log_history[-2]["grades/vision/frozen_fraction"] == 1.0
    assert trainer.state.log_history[-2]["grades/language/frozen_fraction"] == 0.0


def test_vlm_errors_come_before_training(tmp_path, pictures):
    model, processor = vlm_builtin.tiny_llava()
    common = {"model": model, "args": arguments(tmp_path, max_length=None), "train_dataset": pictures["train"]}
    grades = GradESConfig(metric="grad_change", tau={"language": 1.0})
    with pytest.raises(ValueError, match="the model trains a vision tower"):
        GradESVLMTrainer(**common, processing_class=processor, grades=grades)
    text = builtin.dates(train=8, test=2)["train"]
    with pytest.raises(ValueError, match="trained with its processor"):
        GradESVLMTrainer(
            model=llava(), args=arguments(tmp_path), train_dataset=text, processing_class=processor.tokenizer
        )
    with pytest.raises(ValueError, match="no column `image` or `images`"):
        GradESVLMTrainer(model=model, args=arguments(tmp_path), train_dataset=text, processing_class=processor)


def test_a_model_with_nothing_to_track_is_refused_before_training(tmp_path, text):
    dataset, tokenizer = text
    model = model_for(tokenizer)
    model.model.layers.requires_grad_(False)
    with pytest.raises(ValueError, match="no weight matrix to track"):
        GradESTrainer(
            model=model, args=arguments(tmp_path), train_dataset=dataset["train"], processing_class=tokenizer
        )


def test_with_a_loss_scaler_a_run_ends_although_no_gradient_is_left(tmp_path, text):
    """fp16's scaler refuses to step an optimizer when no tensor has a gradient."""
    dataset, tokenizer = text
    trainer = GradESTrainer(
        model=model_for(tokenizer),
        args=arguments(tmp_path),
        train_dataset=dataset["train"],
        processing_class=tokenizer,
        grades=GradESConfig(metric="grad_norm", tau=1e9, alpha=0.0),
        peft_config=LORA,
    )
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.train()
    assert trainer.grades.done
    assert 1 < trainer.state.global_step < 12


def test_resuming_into_another_folder_takes_what_has_frozen_along(tmp_path, text):
    dataset, tokenizer = text

    def train(name, checkpoint=None):
        trainer = GradESTrainer(
            model=model_for(tokenizer),
            args=arguments(tmp_path / name, save_strategy="steps", save_steps=6),
            train_dataset=dataset["train"],
            processing_class=tokenizer,
            grades=GradESConfig(metric="schedule", schedule={"model.layers.0.self_attn.q_proj": 4}),
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return (tmp_path / name / "grades" / "events.jsonl").read_text()

    straight = train("straight")
    assert len(straight.splitlines()) == 1
    assert train("elsewhere", str(tmp_path / "straight" / "checkpoint-6")) == straight


def test_resuming_a_finished_run_returns_its_model(tmp_path, text):
    trainer, _ = trained(tmp_path, text, never(), max_steps=4, save_strategy="steps", save_steps=4)
    expected = weights(trainer.model)
    dataset, tokenizer = text
    again = GradESTrainer(
        model=model_for(tokenizer),
        args=arguments(tmp_path, max_steps=4),
        train_dataset=dataset["train"],
        processing_class=tokenizer,
        grades=never(),
    )
    assert again.train(resume_from_checkpoint=True).global_step == 4
    assert same(weights(again.model), expected)


def test_a_run_that_was_killed_is_resumed_with_its_history(tmp_path, text):
    class Killed(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise KeyboardInterrupt

    dataset, tokenizer = text

    def build(*callbacks):
        return GradESTrainer(
            model=model_for(tokenizer),
            args=arguments(tmp_path, save_strategy="steps", save_steps=4),
            train_dataset=dataset["train"],
            processing_class=tokenizer,
            grades=GradESConfig(metric="grad_norm", tau=0.0, alpha=0.0),
            callbacks=list(callbacks),
        )

    with pytest.raises(KeyboardInterrupt):
        build(Killed()).train()
    build().train(resume_from_checkpoint=True)
    steps = pq.read_table(tmp_path / "grades" / "history.parquet")["step"].to_pylist()
    assert sorted(set(steps)) == list(range(1, 13))
    gains = pq.read_table(tmp_path / "grades" / "gain.parquet").to_pylist()
    assert [(row["step"], row["layer"][-2:]) for row in gains] == [(s, f"/{i}") for s in range(2, 13) for i in (0, 1)]
