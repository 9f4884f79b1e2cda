"""TRL's ways to batch and mask rows, each with layers that freeze in the middle of a run; and what cannot work."""

import importlib.util

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from grades_trl import GradESConfig, GradESTrainer
from grades_trl.recipe import builtin
from helpers import arguments, bottom_up, model_for, same, trajectory, weights
from vlm import GradESVLMTrainer
from vlm import builtin as vlm_builtin

pytestmark = pytest.mark.usefixtures("no_figures")

MARKED = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}\n{% endfor %}"
)
SCHEDULE = bottom_up(2, freeze_norms=True, freeze_embeddings=True)  # layer 0 in step 4, layer 1 in step 8


@pytest.fixture(scope="module")
def text():
    return builtin.dates(train=128, test=8, seed=0)["train"], builtin.tiny_qwen3()[1]


def as_messages(rows):
    return Dataset.from_list([{"messages": row["prompt"] + row["completion"]} for row in rows])


def combination(name, text, tmp_path):
    """Arguments of a trainer for it, its model apart."""
    rows, tokenizer = text
    settings, dataset = {}, rows
    if name == "packing":
        settings = {"packing": True, "max_length": 64, "per_device_train_batch_size": 2, "num_train_epochs": 10}
    elif name == "padding-free":
        settings = {"padding_free": True, "max_length": None}
    elif name == "assistant-only loss":
        settings, dataset = {"assistant_only_loss": True}, as_messages(rows)
        tokenizer = builtin.tiny_qwen3()[1]
        tokenizer.chat_template = MARKED
    elif name == "chat template":
        (tmp_path / "template.jinja").write_text(MARKED)
        settings, dataset = {"chat_template_path": str(tmp_path / "template.jinja")}, as_messages(rows)
        tokenizer = builtin.tiny_qwen3()[1]
    elif name == "streaming":
        dataset = rows.to_iterable_dataset(num_shards=2)
    elif name == "liger":
        settings = {"use_liger_kernel": True, "bf16": False, "use_cpu": False}
    return {
        "args": arguments(tmp_path / "out", **settings),
        "train_dataset": dataset,
        "processing_class": tokenizer,
    }


class WeightsAtFreeze(TrainerCallback):
    """Copies each matrix in the step that freezes it."""

    def __init__(self):
        self.frozen = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name in self.trainer.grades.frozen:
            if name not in self.frozen:
                parameters = self.trainer.grades.matrices[name].parameters
                self.frozen[name] = [p.detach().clone() for p in parameters]


ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
liger = pytest.param("liger", marks=[pytest.mark.gpu, ON_A_GPU])
WORK = ["packing", "padding-free", "assistant-only loss", "chat template", "streaming", liger]


def lora_config():
    """A new one for every model: PEFT writes the names that it finds in the first one into it."""
    return LoraConfig(r=4, target_modules="all-linear")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", WORK)
def test_a_run_in_which_layers_freeze(name, lora, text, tmp_path, monkeypatch):
    if name == "liger":
        pytest.importorskip("liger_kernel")
    given = combination(name, text, tmp_path)
    callback = WeightsAtFreeze()

    class Observed(GradESTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            callback.trainer = self
            self.add_callback(callback)

    def run(prefix, trainer_class):
        model = model_for(given["processing_class"], num_hidden_layers=3)
        of_lora = {"peft_config": lora_config()} if lora else {}
        return trajectory(trainer_class, monkeypatch, prefix, model=model, grades=SCHEDULE, **given, **of_lora)

    trainer, losses, ended = run(True, Observed)
    assert [trainer.grades.frozen[f"model.layers.{layer}.self_attn.q_proj"] for layer in (0, 1)] == [4, 8]
    assert trainer.state.global_step == 12
    assert trainer.grades.prefix.called  # it has seen the passes of this collator

    # What is frozen has not moved by a bit since, and what trains has
    assert len(callback.frozen) == 2 * 7
    for matrix, at_freeze in callback.frozen.items():
        assert all(map(torch.equal, trainer.grades.matrices[matrix].parameters, at_freeze))

    # Losses, norms of the gradients and weights of a run whose frozen layers are not skipped
    _, losses_without, ended_without = run(False, GradESTrainer)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(losses_without), rtol=1e-5, atol=1e-6)
    assert len(losses) == 12
    for parameter, value in ended_without.items():
        torch.testing.assert_close(ended[parameter], value, rtol=1e-4, atol=1e-6)
    moved = {p for p in ended if "layers.2" in p and not torch.equal(ended[p], _start(given, lora)[p])}
    assert moved


def _start(given, lora):
    from peft import get_peft_model

    model = model_for(given["processing_class"], num_hidden_layers=3)
    return weights(get_peft_model(model, lora_config()) if lora else model)


def test_rows_that_share_a_sequence_do_not_see_each_other(text, tmp_path):
    """Padding-free: rows lie one after the other in one sequence. Their loss is that of the padded rows."""
    rows, tokenizer = text
    found = []
    for settings in ({"max_length": None}, {"padding_free": True, "max_length": None}):
        trainer = GradESTrainer(
            model=model_for(tokenizer, num_hidden_layers=3),
            args=arguments(tmp_path, max_steps=8, **settings),
            train_dataset=rows,
            processing_class=tokenizer,
            grades=bottom_up(1, freeze_norms=True, freeze_embeddings=True),
        )
        trainer.train()
        found.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


# ---- what cannot work is refused before training, with the reason ----


def text_trainer(tmp_path, text, dataset=None, **settings):
    rows, tokenizer = text
    grades = settings.pop("grades", GradESConfig())
    others = {name: settings.pop(name) for name in ("eval_dataset",) if name in settings}
    return GradESTrainer(
        model=model_for(tokenizer),
        args=arguments(tmp_path, **settings),
        train_dataset=rows if dataset is None else dataset,
        processing_class=tokenizer,
        grades=grades,
        **others,
    )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"padding_free": True, "max_length": 64}, "max_length` is not enforced"),
        ({"packing": True, "max_length": None}, "`max_length` can't be `None`"),
        ({"assistant_only_loss": True}, "chat template is not training-compatible"),
        ({"use_liger_kernel": True, "loss_type": "chunked_nll"}, r"not compatible with|[Ll]iger"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_settings_that_contradict_each_other(settings, reason, text, tmp_path):
    with pytest.raises((ValueError, ImportError), match=reason):
        text_trainer(tmp_path, text, **settings)


def test_assistant_only_loss_needs_a_template_that_marks_the_replies(text, tmp_path):
    rows, _ = text
    tokenizer = builtin.tiny_qwen3()[1]
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="template"):
        text_trainer(tmp_path, (rows, tokenizer), as_messages(rows), assistant_only_loss=True)


def test_assistant_only_loss_needs_messages(text, tmp_path):
    plain = Dataset.from_dict({"text": ["1 May 1998", "2 June 2001"]})
    with pytest.raises(ValueError, match="dataset is not conversational"):
        text_trainer(tmp_path, text, plain, assistant_only_loss=True)


def test_streamed_rows_need_a_number_of_steps(text, tmp_path):
    stream = text[0].to_iterable_dataset()
    with pytest.raises(ValueError, match="max_steps"):
        text_trainer(tmp_path, text, stream, max_steps=-1).train()


def test_a_held_out_score_needs_rows_that_are_not_streamed(text, tmp_path):
    stream = text[0].to_iterable_dataset()
    with pytest.raises(ValueError, match="eval_dataset is streamed"):
        text_trainer(tmp_path, text, stream, eval_dataset=stream, grades=GradESConfig(stopping="heldout"))


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="Liger is installed")
def test_liger_that_is_not_installed(text, tmp_path):
    with pytest.raises(ImportError, match=r"[Ll]iger"):
        text_trainer(tmp_path, text, use_liger_kernel=True).train()


@pytest.mark.parametrize("setting", ["packing", "padding_free", "assistant_only_loss"])
def test_images_with_what_trl_does_for_text_alone(setting, tmp_path):
    rows = vlm_builtin.digit_images(train=8, test=8, seed=0)["train"]
    model, processor = vlm_builtin.tiny_llava()
    with pytest.raises(ValueError, match=r"vision datasets"):
        GradESVLMTrainer(
            model=model,
            args=arguments(tmp_path, max_length=None, **{setting: True}),
            train_dataset=rows,
            processing_class=processor,
        )


def test_two_runs_of_a_combination_are_the_same(text, tmp_path):
    """Streaming has no order of its own: the same seed gives the same run."""

    def run():
        trainer = text_trainer(tmp_path, text, text[0].to_iterable_dataset(num_shards=2), grades=SCHEDULE)
        trainer.train()
        return weights(trainer.model)

    assert same(run(), run())
