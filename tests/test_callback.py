"""Other front doors: the callback in trainers that are not subclassed, and the mixin where axolotl looks for it."""

import importlib
import sys
from types import ModuleType

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTTrainer

from grades_trl import GradESConfig, GradESMixin, GradESTrainer
from grades_trl.recipe import builtin
from grades_trl.trainers.callback import GradESCallback
from grades_trl.trainers.whole_checkpoint import WholeCheckpoints
from helpers import LORA, arguments, model_for, qwen3, same, weights

PAPER = {"metric": "grad_change", "tau": "auto", "auto_ratio": 1.0, "alpha": 0.3, "stopping": "all_frozen"}
CONFIGS = {
    "paper": GradESConfig(**PAPER, keep="last", sample_fraction=1.0),
    "gain": GradESConfig(stopping="all_frozen", keep="last"),
    "all": GradESConfig(metric="schedule", schedule={"*": 5}, stopping="all_frozen", keep="last"),
    "lower": GradESConfig(metric="schedule", schedule={"*.layers.0.*": 3}, stopping="all_frozen", keep="last"),
}


def collate(rows):
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


def plain(folder, trainer_class=Trainer, lora=False, callbacks=(), **extra):
    torch.manual_seed(0)
    rows = Dataset.from_dict({"input_ids": torch.randint(3, 60, (64, 8)).tolist()})
    settings = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 2e-3, "weight_decay": 0.1}
    settings |= {"bf16": False, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    settings |= {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2} | extra.pop("args", {})
    model = get_peft_model(qwen3(), LORA) if lora else qwen3()
    args = TrainingArguments(str(folder), **settings)
    return trainer_class(
        model=model, args=args, train_dataset=rows, data_collator=collate, callbacks=list(callbacks), **extra
    )


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_plain_trainer_with_the_callback_freezes_and_ends_as_with_the_mixin(tmp_path, name, lora):
    config, callback = CONFIGS[name], GradESCallback(CONFIGS[name])
    mixed = plain(tmp_path / "mixed", type("Mixed", (GradESMixin, Trainer), {}), lora, grades=config)
    mixed.train()
    trainer = plain(tmp_path / "plain", lora=lora, callbacks=[callback])
    trainer.train()
    assert callback.grades.frozen == mixed.grades.frozen
    assert trainer.state.global_step == mixed.state.global_step
    assert name != "all" or trainer.state.global_step == 5
    assert bool(callback.grades.frozen) == (name != "gain")  # whose earliest freeze comes later
    assert same(weights(trainer.model), weights(mixed.model))
    assert trainer.args.max_grad_norm == 0.5
    assert all(p.requires_grad for name, p in trainer.model.named_parameters() if not lora or "lora_" in name)


def test_an_sft_trainer_with_the_callback_freezes_as_grades_trainer(tmp_path):
    rows, (_, tokenizer) = builtin.dates(train=64, test=8)["train"], builtin.tiny_qwen3()
    callback, config = GradESCallback(CONFIGS["paper"]), CONFIGS["paper"]
    common = {"train_dataset": rows, "processing_class": tokenizer}
    ours = GradESTrainer(model=model_for(tokenizer), args=arguments(tmp_path / "a"), grades=config, **common)
    theirs = SFTTrainer(model=model_for(tokenizer), args=arguments(tmp_path / "b"), callbacks=[callback], **common)
    ours.train()
    theirs.train()
    assert callback.grades.frozen == ours.grades.frozen != {}
    assert same(weights(theirs.model), weights(ours.model))


def test_without_a_freeze_it_is_the_plain_trainer_bit_for_bit(tmp_path):
    stock = plain(tmp_path / "stock")
    trainer = plain(tmp_path / "ours", callbacks=[GradESCallback(GradESConfig(metric="none", keep="last"))])
    stock.train()
    trainer.train()
    assert same(weights(trainer.model), weights(stock.model))
    norms = [[row["grad_norm"] for row in t.state.log_history if "grad_norm" in row] for t in (stock, trainer)]
    assert norms[0] == norms[1]


def test_it_measures_gradients_before_they_are_clipped(tmp_path):
    seen = []

    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())

    tiny = {"args": {"max_grad_norm": 1e-3}}
    plain(tmp_path, callbacks=[Norm(), GradESCallback(CONFIGS["gain"]), Norm()], **tiny).train()
    before, after = seen[::2], seen[1::2]
    assert min(before) > 0.01 and max(after) < 1.1e-3


def test_a_resumed_run_equals_the_straight_one(tmp_path):
    saving = {"args": {"save_strategy": "steps", "save_steps": 6}}
    straight = GradESCallback(CONFIGS["paper"])
    trainer = plain(tmp_path, callbacks=[straight], **saving)
    trainer.train()
    callback = GradESCallback(CONFIGS["paper"])
    resumed = plain(tmp_path, callbacks=[callback], **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert callback.grades.frozen == straight.grades.frozen != {}
    assert same(weights(resumed.model), weights(trainer.model))

    plain(tmp_path / "stock", **saving).train()
    other = plain(tmp_path / "stock", callbacks=[GradESCallback(CONFIGS["paper"])], **saving)
    with pytest.raises(ValueError, match=r"has no grades_state\.json: it was written without GradES"):
        other.train(resume_from_checkpoint=str(tmp_path / "stock" / "checkpoint-6"))


@pytest.mark.parametrize(
    "settings", [{"stopping": "heldout"}, {"keep": "best_average"}, {"stopping": "train_accuracy"}]
)
def test_what_a_callback_cannot_measure_is_refused(settings):
    with pytest.raises(ValueError, match='need scores that a callback cannot compute: set stopping="all_frozen"'):
        GradESCallback(GradESConfig(**settings))


@pytest.mark.parametrize("what", ["MULTI_CPU", "deepspeed", "torch_compile"])
def test_several_processes_deepspeed_and_compiled_models_are_refused(tmp_path, monkeypatch, what):
    trainer = plain(tmp_path, callbacks=[GradESCallback()])
    if what == "MULTI_CPU":
        monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.MULTI_CPU)
    else:
        setattr(trainer.args, what, True)
    with pytest.raises(ValueError, match=what):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_axolotl_finds_a_trainer_with_the_mixin(tmp_path, monkeypatch):
    """axolotl gets the class by its dotted name, and makes it with arguments of its own beside the Trainer's."""

    class AxolotlTrainer(Trainer):
        def __init__(self, *args, bench_data_collator=None, eval_data_collator=None, dataset_tags=None, **kwargs):
            self.dataset_tags = dataset_tags
            super().__init__(*args, **kwargs)

    for name in ("axolotl", "axolotl.core", "axolotl.core.trainers", "axolotl.core.trainers.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["axolotl.core.trainers.base"].AxolotlTrainer = AxolotlTrainer
    module = importlib.import_module("grades_trl.trainers.axolotl")
    module._trainer.cache_clear()
    found = module.GradESAxolotlTrainer
    assert found.__mro__[1:4] == (GradESMixin, WholeCheckpoints, AxolotlTrainer)
    trainer = plain(tmp_path, found, bench_data_collator=None, eval_data_collator=None, dataset_tags=["a"])
    trainer.train()
    assert trainer.dataset_tags == ["a"]
    assert (trainer.grades_config, trainer.state.global_step) == (GradESConfig(), 12)
    module._trainer.cache_clear()
