"""Other front doors: the callback in trainers that are not subclassed, and the mixin where axolotl looks for it."""

import importlib
import subprocess
import sys
from pathlib import Path
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

pytestmark = pytest.mark.usefixtures("no_figures")

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


class CtrlC(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["close", "new trainer"])
def test_after_ctrl_c_the_model_and_the_arguments_are_as_they_were(tmp_path, how):
    """As in a notebook: the cell that trains is interrupted and run again, that of the model is not."""
    callback = GradESCallback(CONFIGS["lower"])
    trainer = plain(tmp_path, callbacks=[callback, CtrlC()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.args.max_grad_norm == 0
    assert not all(p.requires_grad for p in trainer.model.parameters())
    if how == "close":
        callback.close()
    else:
        Trainer(trainer.model, trainer.args, collate, callbacks=[GradESCallback(CONFIGS["lower"])])
    assert trainer.args.max_grad_norm == 0.5
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert not any("forward" in vars(module) for module in trainer.model.modules())


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
    with pytest.raises(ValueError, match=r"checkpoint-6/grades_state\.json is missing: .* written without GradESCall"):
        other.train(resume_from_checkpoint=str(tmp_path / "stock" / "checkpoint-6"))


SAVING = {"args": {"save_strategy": "steps", "save_steps": 6}}


def resume(folder, checkpoint=6):
    trainer = plain(folder, callbacks=[GradESCallback(CONFIGS["lower"])], **SAVING)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{checkpoint}"))
    return weights(trainer.model)


KILL = """
import gc, os, sys
gc.disable()  # imports are most of what this costs
import grades_trl.trainers.callback as callback, grades_trl.trainers.checkpoint as checkpoint
from pathlib import Path
from test_callback import CONFIGS, SAVING, GradESCallback, plain

def kill(*args, **kwargs):
    os.kill(os.getpid(), 9)

setattr(*{"before": (callback, "save_state"), "between": (checkpoint, "put_in_place")}[sys.argv[2]], kill)
plain(Path(sys.argv[1]), callbacks=[GradESCallback(CONFIGS["lower"])], **SAVING).train(
    resume_from_checkpoint=sys.argv[3] if len(sys.argv) > 3 else None
)
"""


def killed(folder, when, *resumed):
    """A run that is killed when the Trainer has written its next checkpoint, and GradES has not."""
    words = [sys.executable, "-c", KILL, str(folder), when, *map(str, resumed)]
    done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_kill_after_the_trainer_has_written_its_checkpoint_is_an_error_on_resume(tmp_path, when):
    killed(tmp_path, when)
    assert (tmp_path / "checkpoint-6" / "trainer_state.json").exists()
    with pytest.raises(ValueError, match=r"checkpoint-6/grades_state\.json is missing: the run was killed while it"):
        resume(tmp_path)


def test_a_kill_while_a_checkpoint_is_overwritten_is_an_error_on_resume(tmp_path):
    straight = plain(tmp_path, callbacks=[GradESCallback(CONFIGS["lower"])], **SAVING)
    straight.train()
    assert same(resume(tmp_path, 12), weights(straight.model))
    killed(tmp_path, "before", tmp_path / "checkpoint-6")  # in the checkpoint of step 12
    with pytest.raises(ValueError, match=r"checkpoint-12/grades_state\.json is of another run than trainer_state"):
        resume(tmp_path, 12)
    assert same(resume(tmp_path), weights(straight.model))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("grades_state.json", b"", r"grades_state\.json is damaged: it is no JSON"),
        ("grades_state.json", b'{"version": 9}', r"grades_state\.json was written by a newer version"),
        ("grades_state.safetensors", b"", r"grades_state\.safetensors is damaged, or of another checkpoint"),
        ("grades_state.safetensors", None, r"grades_state\.safetensors is missing"),
    ],
    ids=["empty", "newer", "torn", "missing"],
)
def test_a_damaged_state_is_an_error_that_names_its_file(tmp_path, name, content, message):
    plain(tmp_path, callbacks=[GradESCallback(CONFIGS["lower"])], **SAVING).train()
    file = tmp_path / "checkpoint-6" / name
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        resume(tmp_path)


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
    """axolotl gets the class by its dotted name, and makes it with arguments of its own beside the Trainer's. The
    stand-in has the `__init__` of axolotl 0.19.0, with which `axolotl train` has run."""

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
