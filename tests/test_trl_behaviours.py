"""What people rely on in SFTTrainer holds for GradESTrainer: while GradES measures, and without it.

The list follows what TRL tests of its own trainer; each case is run beside SFTTrainer, and must train the same.
"""

import json

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from grades_trl import GradESTrainer
from grades_trl.recipe import builtin
from helpers import arguments, losses, model_for, never, same, weights

pytestmark = pytest.mark.usefixtures("no_figures")

GRADES = pytest.mark.parametrize("grades", [None, never()], ids=["off", "measuring"])


@pytest.fixture(scope="module")
def tokenizer():
    return builtin.tiny_qwen3()[1]


def chat(i):
    return [{"role": "user", "content": f"{i} May 1998"}, {"role": "assistant", "content": f"1998-05-{i:02}"}]


def rows(kind, count=12):
    """Rows in one of TRL's formats."""
    makers = {
        "text": lambda i: {"text": f"{i} May 1998 is 1998-05-{i:02}"},
        "prompt and completion": lambda i: {"prompt": f"{i} May 1998 ", "completion": f"1998-05-{i:02}"},
        "messages": lambda i: {"messages": chat(i)},
        "prompt and completion of messages": lambda i: {"prompt": chat(i)[:1], "completion": chat(i)[1:]},
        "pretokenized": lambda i: {"input_ids": [3 + (i + k) % 40 for k in range(6 + i % 5)]},
        "pretokenized with masks": lambda i: {
            "input_ids": [3 + (i + k) % 40 for k in range(8)],
            "completion_mask": [0] * 4 + [1] * 4,
        },
        "other columns": lambda i: {"question": f"{i} May", "answer": f"05-{i:02}"},
        "messages and tools": lambda i: {"messages": chat(i), "tools": json.dumps([{"name": "f"}])},
        "messages and kwargs": lambda i: {"messages": chat(i), "chat_template_kwargs": {"thinking": i % 2 == 0}},
    }
    return Dataset.from_list([makers[kind](i) for i in range(1, count + 1)])


def trained(folder, tokenizer, grades, cls=GradESTrainer, model=None, settings=None, **changes):
    """A trainer after 3 steps."""
    of_run = {"max_steps": 3, "per_device_train_batch_size": 4, "max_length": 128} | (settings or {})
    given = {"train_dataset": rows("text"), "processing_class": tokenizer} | changes
    given |= {"grades": grades} if cls is GradESTrainer else {}
    torch.manual_seed(0)
    trainer = cls(model=model_for(tokenizer) if model is None else model(), args=arguments(folder, **of_run), **given)
    trainer.train()
    return trainer


STOCK = {}  # test without its grades -> losses and weights of SFTTrainer


@pytest.fixture
def beside(request, tmp_path, tokenizer):
    """Trains with SFTTrainer and with ours; returns ours when both are the same to the last bit."""

    def beside(grades, **changes):
        case = request.node.name.replace("measuring", "off")
        if case not in STOCK:
            stock = trained(tmp_path / "stock", tokenizer, None, SFTTrainer, **changes)
            STOCK[case] = losses(stock), weights(stock.model)
        ours = trained(tmp_path / "ours", tokenizer, grades, **changes)
        assert losses(ours) == STOCK[case][0] and len(losses(ours)) == ours.state.global_step > 0
        assert same(weights(ours.model), STOCK[case][1])
        return ours

    return beside


def formatted(row):
    return f"Q: {row['question']}\nA: {row['answer']}"


DATA = {
    "text": {"train_dataset": rows("text")},
    "prompt and completion": {"train_dataset": rows("prompt and completion")},
    "messages": {"train_dataset": rows("messages")},
    "prompt and completion of messages": {"train_dataset": rows("prompt and completion of messages")},
    "pretokenized": {"train_dataset": rows("pretokenized")},
    "pretokenized with masks": {"train_dataset": rows("pretokenized with masks")},
    "tools": {"train_dataset": rows("messages and tools")},
    "chat_template_kwargs": {"train_dataset": rows("messages and kwargs")},
    "formatting_func": {"train_dataset": rows("other columns"), "formatting_func": formatted},
    "streamed": {"train_dataset": rows("text").to_iterable_dataset()},
    "streamed messages": {"train_dataset": rows("messages").to_iterable_dataset()},
    "another text column": {
        "train_dataset": rows("text").rename_column("text", "body"),
        "settings": {"dataset_text_field": "body"},
    },
}


@GRADES
@pytest.mark.parametrize("kind", DATA)
def test_every_format_of_rows_trains(beside, kind, grades):
    beside(grades, **DATA[kind])


SETTINGS = {
    "packing bfd": {"packing": True, "packing_strategy": "bfd", "max_length": 64},
    "packing bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 64},
    "packing wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 32},
    "padding-free": {"padding_free": True, "max_length": None},
    "truncation": {"max_length": 10},
    "truncation of the start": {"max_length": 10, "truncation_mode": "keep_end"},
    "no max_length": {"max_length": None},
    "padding to a multiple": {"pad_to_multiple_of": 16},
    "dft loss": {"loss_type": "dft"},
    "neftune": {"neftune_noise_alpha": 5.0},
    "gradient accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "eos_token": {"eos_token": "<|end|>"},
    "pad_token": {"pad_token": "<|end|>"},
    "activation offloading": {"activation_offloading": False},
    "skip_prepare_dataset": {"dataset_kwargs": {"add_special_tokens": False}},
    "workers": {"dataloader_num_workers": 1},
    "epochs": {"max_steps": -1, "num_train_epochs": 1},
    "length-grouped": {"train_sampling_strategy": "group_by_length"},
}


@GRADES
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_trains_the_same(beside, name, grades):
    beside(grades, settings=SETTINGS[name])


@GRADES
@pytest.mark.parametrize("only", [None, True, False])
def test_completion_only_loss(beside, only, grades):
    ours = beside(grades, train_dataset=rows("prompt and completion"), settings={"completion_only_loss": only})
    batch = next(iter(ours.get_train_dataloader()))
    assert (batch["labels"][:, :4] == -100).all() == (only is not False)


@GRADES
def test_assistant_only_loss(beside, grades, tokenizer, monkeypatch):
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    ours = beside(grades, train_dataset=rows("messages"), settings={"assistant_only_loss": True})
    batch = next(iter(ours.get_train_dataloader()))
    learned = tokenizer.decode(batch["input_ids"][0][batch["labels"][0] != -100])
    assert learned.startswith("1998-05-") and learned.endswith("<|end|>")


@GRADES
def test_a_chat_template_of_a_file(beside, grades, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template)  # put back afterwards
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    ours = beside(grades, train_dataset=rows("messages"), settings={"chat_template_path": str(path)})
    assert ours.processing_class.chat_template == path.read_text()


LORA = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
PEFT = {
    "lora": LORA,
    "dora": LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "rslora": LoraConfig(r=4, target_modules="all-linear", use_rslora=True, task_type="CAUSAL_LM"),
    "with a saved module": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@GRADES
@pytest.mark.parametrize("name", PEFT)
def test_adapters(beside, name, grades):
    ours = beside(grades, peft_config=PEFT[name])
    moved = {n for n, p in ours.model.named_parameters() if p.requires_grad}
    assert moved and all("lora" in n or "modules_to_save" in n for n in moved)


@GRADES
def test_a_model_that_has_adapters_already(beside, grades, tokenizer):
    def model():
        torch.manual_seed(0)
        return get_peft_model(model_for(tokenizer), LORA)

    beside(grades, model=model)


def test_prompt_tuning_trains_without_grades_and_has_nothing_to_track(beside, tmp_path, tokenizer):
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    beside(None, peft_config=config)
    with pytest.raises(ValueError, match="trains adapters of another kind"):
        trained(tmp_path, tokenizer, never(), peft_config=config)


@GRADES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_a_model_by_its_name(beside, grades, folder, dtype):
    """With `model_init_kwargs` as text, as they come from a command line or a YAML file."""
    kwargs = {"dtype": dtype, "attn_implementation": "eager"}
    ours = beside(grades, model=lambda: folder, processing_class=None, settings={"model_init_kwargs": kwargs})
    assert ours.model.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    assert ours.model.config._attn_implementation == "eager"


@GRADES
def test_a_loss_of_one_s_own(beside, grades):
    def own(outputs, labels, num_items_in_batch=None):
        logits, labels = outputs.logits[:, :-1], labels[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
        return 2 * loss / num_items_in_batch

    beside(grades, compute_loss_func=own, settings={"loss_type": "nll"})


@GRADES
def test_metrics_of_one_s_own(beside, grades, tokenizer):
    def metrics(predictions):
        return {"rows": float(len(predictions.label_ids))}

    ours = beside(grades, eval_dataset=rows("text", 5), compute_metrics=metrics)
    assert ours.evaluate()["eval_rows"] == 5


@GRADES
@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_several_validation_sets(beside, grades, kind):
    sets = kind({"a": rows("text", 4), "b": rows("text", 6)})
    ours = beside(grades, eval_dataset=sets, settings={"eval_strategy": "steps", "eval_steps": 2})
    logged = {key for row in ours.state.log_history for key in row}
    assert {"eval_a_loss", "eval_b_loss"} <= logged


@GRADES
@pytest.mark.parametrize("eval_packing", [None, True, False])
def test_packed_training_and_validation(beside, grades, eval_packing):
    settings = {"packing": True, "eval_packing": eval_packing, "max_length": 64}
    ours = beside(grades, eval_dataset=rows("text", 6), settings=settings)
    assert (len(ours.eval_dataset) < 6) == (eval_packing is not False)


@GRADES
def test_a_streamed_validation_set(beside, grades):
    ours = beside(grades, eval_dataset=rows("text", 6).to_iterable_dataset())
    assert isinstance(ours.eval_dataset, IterableDataset) and ours.evaluate()["eval_loss"] > 0


@GRADES
def test_callbacks_see_every_moment(beside, grades):
    class Seen(TrainerCallback):
        moments = []  # noqa: RUF012

        def on_train_begin(self, *args, **kwargs):
            self.moments.append("begin")

        def on_pre_optimizer_step(self, *args, **kwargs):
            self.moments.append("optimizer")

        def on_step_end(self, *args, **kwargs):
            self.moments.append("step")

        def on_train_end(self, *args, **kwargs):
            self.moments.append("end")

    beside(grades, callbacks=[Seen()])
    one = ["begin", *["optimizer", "step"] * 3, "end"]
    assert Seen.moments in (one, one + one)  # SFTTrainer's come first, once for both cases


@GRADES
def test_what_is_logged_and_tagged_and_saved(beside, grades, tmp_path):
    ours = beside(grades, settings={"save_strategy": "steps", "save_steps": 3})
    row = next(row for row in ours.state.log_history if "loss" in row)
    assert {"loss", "grad_norm", "learning_rate", "entropy", "num_tokens", "mean_token_accuracy", "epoch"} <= set(row)
    assert any(key.startswith("grades/") for key in row) == (grades is not None)
    assert {"trl", "sft"} <= set(ours.model.model_tags)
    assert ("grades" in ours.model.model_tags) == (grades is not None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours" / "checkpoint-3", dtype=torch.float32)
    own = weights(ours.model)
    assert all(tensor.equal(own[name]) for name, tensor in weights(again).items())
    ours.create_model_card(model_name="m")
    assert "sft" in (tmp_path / "ours" / "README.md").read_text()


@GRADES
def test_without_arguments_and_with_their_defaults(tokenizer, grades, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = GradESTrainer(
        model=model_for(tokenizer),
        args=SFTConfig(use_cpu=True, bf16=False, report_to=[]),
        train_dataset=rows("text", 2),
        processing_class=tokenizer,
        grades=grades,
    )
    assert trainer.args.gradient_checkpointing and trainer.args.learning_rate == 2e-5


@GRADES
@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"settings": {"assistant_only_loss": True}, "train_dataset": rows("text")}, "conversational"),
        ({"settings": {"packing": True, "max_length": None}}, "max_length"),
        ({"settings": {"eos_token": "<not there>"}}, "eos_token"),
        ({"train_dataset": None}, "train_dataset"),
    ],
    ids=["assistant_only_loss", "packing", "eos_token", "no rows"],
)
def test_errors_are_those_of_trl(tmp_path, tokenizer, grades, changes, error):
    messages = []
    for cls in (SFTTrainer, GradESTrainer):
        with pytest.raises((ValueError, TypeError, AttributeError)) as raised:
            trained(tmp_path, tokenizer, grades, cls, **changes)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert error in messages[0]
