"""Runs that are made in two processes, and again in one at the same global batch. Each leaves facts and weights.

`main` makes all of them, in processes that are forked after the imports, which cost as much as ten runs.
"""

import contextlib
import functools
import gc
import itertools
import json
import logging
import math
import multiprocessing
import os
import socket
import time

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from trl import SFTTrainer

import helpers
from grades_trl import GradESConfig, GradESTrainer
from grades_trl import distributed as processes
from grades_trl.criteria import measurement
from grades_trl.extras import installed
from grades_trl.recipe import builtin
from grades_trl.recipe.generation import answers
from grades_trl.report import run_report
from grades_trl.trainers.heldout import HeldoutAnswers
from helpers import LORA, qwen3
from vlm import GradESVLMTrainer
from vlm import builtin as vlm_builtin

# The Trainer loads optimizer state to "cpu:0" in several processes without a GPU, which torch does not know.
torch.serialization.register_package(0, lambda x: None, lambda x, place: x if place.startswith("cpu:") else None)

TOKENIZER = builtin.tiny_qwen3()[1]
LAYERS = 4


def text_rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 17, (count,), generator=generator).tolist()
    rows = [torch.randint(10, 60, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": rows})


def image_rows(count):
    """Every fourth row has no image: text alone."""
    return vlm_builtin.digit_images(train=count, test=8, seed=0)["train"]


SHARDED = False  # FSDP2 in all runs of this process


def make_fsdp_take_the_cpu():
    """accelerate takes FSDP for GPUs only, and goes on with DDP on a CPU, without a word. To be called when there are
    training arguments, which set this."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


scattered = []  # bytes of the gradients that FSDP2 has reduced since the last step


sent = []  # bytes that GradES has broadcast or gathered since the last step


class Counted:
    """torch.distributed for GradES alone: TRL gathers its metrics, too."""

    def __getattr__(self, name):
        own = getattr(torch.distributed, name)
        if name not in ("broadcast", "all_gather"):
            return own

        def counted(*args, **kwargs):
            sent.append(args[-1].numel() * args[-1].element_size())
            return own(*args, **kwargs)

        return counted


def count_what_is_scattered():
    own = torch.distributed.reduce_scatter_single

    def counted(*args, **kwargs):
        tensor = kwargs["input"] if "input" in kwargs else args[1]
        scattered.append(tensor.numel() * tensor.element_size())
        return own(*args, **kwargs)

    torch.distributed.reduce_scatter_single = counted


def arguments(folder, **changes):
    if SHARDED and processes.launched_processes() > 1:
        changes = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}} | changes
    of_run = {"per_device_train_batch_size": 8 // processes.launched_processes()}
    if changes.get("gradient_accumulation_steps") == 2:
        of_run["per_device_train_batch_size"] //= 2
    defaults = {"per_device_eval_batch_size": 4, "lr_scheduler_type": "constant", "max_length": None}
    return helpers.arguments(folder, **(defaults | of_run | changes))


class Bytes(TrainerCallback):
    """What DDP reduces in each optimizer step, in bytes, counted by a communication hook; and what trains after the
    last one."""

    def __init__(self):
        self.of_steps, self.own, self.now, self.trained, self.trainer = [], [], 0, [], None

    def on_train_begin(self, args, state, control, **kwargs):
        wrapped = self.trainer.model_wrapped
        if not SHARDED and processes.world_size() > 1 and not wrapped._comm_hooks:
            wrapped.register_comm_hook(None, self._reduce)

    def _reduce(self, _, bucket):
        self.now += bucket.buffer().numel() * bucket.buffer().element_size()
        return allreduce_hook(None, bucket)

    def on_step_end(self, args, state, control, **kwargs):
        self.of_steps.append(self.now + sum(scattered))
        self.own.append(sum(sent))
        self.now = 0
        scattered.clear()
        sent.clear()
        self.trained = sorted(name for name, p in self.trainer.model.named_parameters() if p.requires_grad)


def build(folder, config, *, vision=False, peft=None, rows=96, changes=None, callbacks=(), model=None, **others):
    counter = Bytes()
    args = arguments(folder, **(changes or {}))
    if SHARDED and "RANK" in os.environ:
        make_fsdp_take_the_cpu()
    common = {"args": args, "callbacks": [counter, *callbacks], "peft_config": peft, **others}
    if vision:
        model, processor = vlm_builtin.tiny_llava()
        dataset = image_rows(rows + 8)
        trainer = GradESVLMTrainer(
            model=model,
            train_dataset=dataset.select(range(rows)),
            eval_dataset=dataset.select(range(rows, rows + 8)),
            processing_class=processor,
            grades=config,
            **common,
        )
    else:
        model = model or qwen3(vocab_size=len(TOKENIZER), bos_token_id=None, num_hidden_layers=LAYERS)
        kind = {} if config is None else {"grades": config}
        trainer = (SFTTrainer if config is None else GradESTrainer)(
            model=model,
            train_dataset=text_rows(rows, seed=1),
            eval_dataset=text_rows(13, seed=2),
            processing_class=TOKENIZER,
            **kind,
            **common,
        )
    counter.trainer = trainer
    return trainer, counter


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def finish(name, folder, trainer, counter, **facts):
    """Writes what a run has come to."""
    rank = processes.rank()
    processes.reshard(trainer.model)
    weights = {key: whole(p.detach()).clone().contiguous() for key, p in trainer.model.named_parameters()}
    save_file(weights, folder / f"{name}-{rank}.safetensors")
    grades = getattr(trainer, "grades", None)
    facts |= {
        "steps": trainer.state.global_step,
        "bytes": counter.of_steps,
        "own_bytes": counter.own,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "trained": counter.trained,
        "trains": sorted(key for key, p in trainer.model.named_parameters() if p.requires_grad),
    }
    if grades is not None:
        facts |= {
            "frozen": grades.frozen,
            "stop": grades.stop_reason,
            "matrices": {key: matrix.params for key, matrix in grades.matrices.items()},
            "gain": {str(step): sorted(of.items()) for step, of in grades.gain.steps.items()},
            "heldout": None if grades.heldout is None else grades.heldout.state_dict(),
            "every": None if grades.heldout is None else grades.heldout.every,
            "restored": grades.restored_best,
            "diverged": trainer.diverged_at,
            "flops": trainer.grades_summary and trainer.grades_summary.flops.run,
            "rows_per_step": trainer._rows_per_step,
        }
    (folder / f"{name}-{rank}.json").write_text(json.dumps(facts))


def bottom_up(**changes):
    """One more layer from below freezes every third step, the last one never."""
    schedule = {f"*layers.{layer}.*": 3 * (layer + 1) for layer in range(LAYERS - 1)}
    whole = {"freeze_norms": True, "freeze_embeddings": True, "stopping": "end_of_schedule"}
    return GradESConfig(metric="schedule", schedule=schedule, **(whole | changes))


def checkpointing(reentrant):
    if reentrant is None:
        return {}
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}


def simple(config, asks=False, **settings):
    def run(name, folder):
        trainer, counter = build(folder / name, config, **settings)
        trainer.train()
        found = []
        if asks:
            rows = builtin.dates(train=8, test=5)["test"]
            found = answers(trainer.model, TOKENIZER, rows, batch_size=2, max_new_tokens=6)
        trainer.save_model()
        finish(name, folder, trainer, counter, answers=found)

    return run


def quantized(name, folder):
    """QLoRA: adapters on weights of 4 bits, which bitsandbytes also has on a CPU. FSDP2 cuts them in pieces only if
    they are stored as numbers of a floating type."""
    saved = folder / "base"
    size = {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": LAYERS}
    base = qwen3(vocab_size=len(TOKENIZER), bos_token_id=None, **size)
    processes.decided_by_main(lambda: base.save_pretrained(saved))
    storage = "float32" if SHARDED else "uint8"
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=storage)
    model = AutoModelForCausalLM.from_pretrained(saved, quantization_config=bits)
    trainer, counter = build(folder / name, bottom_up(), peft=LORA, model=model, changes=checkpointing(False))
    trainer.train()
    whole = [key for key, p in trainer.model.named_parameters() if not isinstance(p, DTensor)]
    finish(name, folder, trainer, counter, whole=whole)


def offloaded(name, folder):
    """FSDP2 that keeps its pieces in the memory of the host, which cannot be pinned without a GPU."""
    pin = torch.Tensor.pin_memory
    torch.Tensor.pin_memory = lambda tensor: tensor
    simple(bottom_up(**HELDOUT), changes={"fsdp_config": {"version": 2, "cpu_offload": True}})(name, folder)
    torch.Tensor.pin_memory = pin


class Still(TrainerCallback):
    """Which frozen weights have moved since they froze."""

    def __init__(self):
        self.frozen, self.moved = {}, []

    def on_step_end(self, args, state, control, model, **kwargs):
        pieces = {key: processes.local(p.detach()) for key, p in model.named_parameters() if not p.requires_grad}
        self.moved += [key for key, piece in self.frozen.items() if not torch.equal(piece, pieces[key])]
        self.frozen |= {key: piece.clone() for key, piece in pieces.items() if key not in self.frozen}


def in_bf16(name, folder):
    """FSDP2 that computes and reduces in bf16."""
    still = Still()
    trainer, counter = build(folder / name, bottom_up(**HELDOUT), callbacks=[still], changes={"bf16": True})
    trainer.train()
    stored = sorted({str(processes.local(p).dtype) for p in trainer.model.parameters()})
    finish(name, folder, trainer, counter, still=len(still.frozen), moved=still.moved, stored=stored)


def answered(name, folder):
    """Held-out answers, of which each process gives some."""
    asked = []

    def score(count):
        asked.append(count)
        own = dict.fromkeys(range(count)[processes.rank() :: processes.world_size()], "yes")
        found = [answer for of in processes.gathered_objects(own) for answer in of.values()]
        return (len(found) - len(asked)) / count

    settings = {"heldout_metric": "exact_match", "heldout_every": 3, "heldout_cost": 1.0, "stopping": "heldout"}
    config = GradESConfig(metric="none", heldout_grace=0.0, heldout_samples=8, **settings)
    trainer, counter = build(folder / name, config, heldout_answers=HeldoutAnswers(score, 8, 4))
    trainer.train()
    finish(name, folder, trainer, counter, asked=asked)


def resumed(name, folder):
    """Straight, then from the checkpoint of step 6: what was frozen then is not reduced in the first step either."""
    config = GradESConfig(metric="grad_change", tau="auto", alpha=0.25, auto_ratio=1.0, **HELDOUT)
    saving = {"save_strategy": "steps", "save_steps": 6}
    straight, counter = build(folder / name, config, changes=saving)
    straight.train()
    finish(f"{name}_straight", folder, straight, counter)
    trainer, counter = build(folder / name, config, changes=saving)
    trainer.train(resume_from_checkpoint=str(folder / name / "checkpoint-6"))
    finish(name, folder, trainer, counter)


def twice(name, folder):
    """A second `train()` on the same trainer: everything trains again, and is reduced again."""
    trainer, counter = build(folder / name, bottom_up())
    trainer.train()
    trainer.train()
    finish(name, folder, trainer, counter)


class Interrupted(Exception):
    pass


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise Interrupted


def after_an_error(name, folder):
    """A run that an error has ended leaves a model that DDP reduces as a whole."""
    trainer, counter = build(folder / name, bottom_up(), callbacks=[Interrupt()])
    with contextlib.suppress(Interrupted):
        trainer.train()
    ids = torch.arange(10, 26).view(2, 8)
    trainer.model_wrapped(input_ids=ids, labels=ids)["loss"].backward()
    counter.on_step_end(None, None, None)
    finish(name, folder, trainer, counter)


def other_bits(name, folder):
    """The second process measures values that only rise, so that nothing would freeze, and gains of the other sign."""
    own = measurement.metrics.l1_sums
    if processes.rank() == 1:
        calls = itertools.count(1)
        measurement.metrics.l1_sums = lambda *args: own(*args) * next(calls)
        torch_dot, torch.dot = torch.dot, lambda x, y: -torch_dot(x, y)
    config = GradESConfig(metric="grad_change", tau="auto", alpha=0.25, auto_ratio=1.0, **HELDOUT)
    trainer, counter = build(folder / name, config)
    trainer.train()
    measurement.metrics.l1_sums = own
    if processes.rank() == 1:
        torch.dot = torch_dot
    finish(name, folder, trainer, counter)


def text_in_one_process_alone(name, folder):
    """The second process sees no image: its vision tower is not called, and freezes all the same."""
    config = GradESConfig(metric="gain", alpha=0.25, margin=0.01, stopping="end_of_schedule", keep="last")
    trainer, counter = build(
        folder / name, config, vision=True, changes={"ddp_find_unused_parameters": True, "max_steps": 15}
    )
    collate = trainer.data_collator

    def without_images(rows):
        batch = collate(rows)
        if processes.rank() == 1:
            token = trainer.model.config.image_token_id
            batch.pop("pixel_values")
            batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == token, 5)
        return batch

    trainer.data_collator = without_images
    trainer.train()
    finish(name, folder, trainer, counter)


def diverging(name, folder):
    """The loss of one process alone is no number."""
    trainer, counter = build(folder / name, GradESConfig(metric="none", stopping="end_of_schedule", keep="last"))
    own = trainer.compute_loss

    def broken(*args, **kwargs):
        return own(*args, **kwargs) * (math.nan if processes.rank() == 1 else 1.0)

    trainer.compute_loss = broken
    trainer.args.max_steps = 20
    trainer.train()
    finish(name, folder, trainer, counter)


def bad_row(name, folder):
    """A held-out row whose loss is no number ends all processes with the same error."""
    trainer, counter = build(folder / name, GradESConfig(metric="none", heldout_every=2, heldout_cost=1.0))
    forward = trainer.model.forward
    bad = trainer.eval_dataset[4]["input_ids"]

    def broken(*args, **kwargs):
        output = forward(*args, **kwargs)
        found = any(row[: len(bad)].tolist() == bad for row in kwargs["input_ids"])
        output["loss"] = output["loss"] * (math.nan if found and not trainer.model.training else 1.0)
        return output

    trainer.model.forward = broken
    said = ""
    try:
        trainer.train()
    except ValueError as error:
        said = str(error)
    finish(name, folder, trainer, counter, said=said)


def refused(name, folder):
    """Reentrant checkpointing while DDP looks for unused parameters."""
    said = []
    for config in (GradESConfig(metric="none", stopping="end_of_schedule", keep="last"), None):
        changes = {**checkpointing(True), "ddp_find_unused_parameters": True}
        trainer, counter = build(folder / name, config, changes=changes)
        try:
            trainer.train()
        except (ValueError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    finish(name, folder, trainer, counter, said=said)


def _add_nothing(weight, module, args, output):
    return output + 0 * weight.sum()


def unused(name, folder):
    """Some parameters get no gradient: in both processes, in one of them alone, or in neither, with checkpointing
    reentrant in the end. What DDP looks for after the first step, and what is said."""
    looks, said = [], []
    for where, reentrant in (((0, 1), False), ((1,), False), ((), False), ((0, 1), True)):
        changes = {**checkpointing(reentrant), "ddp_find_unused_parameters": False, "max_steps": 3}
        model = qwen3(vocab_size=len(TOKENIZER), bos_token_id=None, num_hidden_layers=LAYERS)
        model.model.unused = torch.nn.Linear(4, 4, bias=False)
        trainer, counter = build(folder / name, bottom_up(), model=model, changes=changes)
        if processes.rank() not in where:
            use = functools.partial(_add_nothing, model.model.unused.weight)
            model.model.norm.register_forward_hook(use)
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        try:
            trainer.train()
            looks.append(trainer.model_wrapped.find_unused_parameters)
        except ValueError as error:
            said.append(str(error))
            assert all(torch.equal(before[key], p) for key, p in model.named_parameters())
    finish(name, folder, trainer, counter, looks=looks, said=said)


def plain_loop(name, folder):
    """Without a trainer: the engine is given the DDP."""
    from torch.nn.parallel import DistributedDataParallel

    from grades_trl import GradES

    model = qwen3(num_hidden_layers=2)
    wrapped = DistributedDataParallel(model) if processes.world_size() > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ddp = wrapped if wrapped is not model else None
    config = GradESConfig(metric="schedule", schedule={"*layers.0.*": 2}, stopping="end_of_schedule", keep="last")
    grades = GradES(model, config, 6, optimizer, ddp=ddp)
    ids = torch.randint(0, 60, (8, 12), generator=torch.Generator().manual_seed(3))
    own = ids[processes.rank() :: processes.world_size()]
    for step in range(1, 7):
        wrapped(input_ids=own, labels=own).loss.backward()
        grades.step(step)
        optimizer.step()
        optimizer.zero_grad()
    frozen = dict(grades.frozen)
    grades.finish()
    wrapped(input_ids=own, labels=own).loss.backward()  # everything is reduced again
    weights = {f"gradient of {key}": p.grad.clone() for key, p in model.named_parameters()}
    save_file(weights, folder / f"{name}-{processes.rank()}.safetensors")
    (folder / f"{name}-{processes.rank()}.json").write_text(json.dumps({"frozen": frozen}))


HELDOUT = {
    "stopping": "heldout",
    "keep": "best_average",
    "heldout_every": 3,
    "heldout_cost": 1.0,
    "heldout_grace": 0.0,
    "heldout_patience": 9,
}
LOSS_AND_GAIN = GradESConfig(metric="gain", alpha=0.25, margin=0.01, **HELDOUT)
PAPER = GradESConfig(metric="grad_change", tau="auto", auto_ratio=1.0, alpha=0.25, stopping="train_accuracy")
VISION_FREEZES = GradESConfig(metric="schedule", schedule={"vision": 4}, **HELDOUT)
# Keys have biases without a true gradient there: AdamW would make steps of their rounding.
VISION = {"max_steps": 8, "optim": "sgd", "learning_rate": 0.05}
LLAVA_LAYERS = {"version": 2, "transformer_layer_cls_to_wrap": ["CLIPEncoderLayer", "Qwen2DecoderLayer"]}
RUNS = {
    "sharded_full": simple(bottom_up(**HELDOUT), asks=True),
    "sharded_lora": simple(bottom_up(), peft=LORA, changes=checkpointing(False)),
    "sharded_gain": simple(LOSS_AND_GAIN, changes={"max_steps": 24}),
    "sharded_paper": simple(PAPER),
    "sharded_resumed": resumed,
    "sharded_bf16": in_bf16,
    "sharded_quantized": quantized,
    "sharded_offloaded": offloaded,
    "sharded_vision": simple(VISION_FREEZES, vision=True, changes=VISION | {"fsdp_config": LLAVA_LAYERS}),
    "plain": simple(None),
    "plain_lora": simple(None, peft=LORA, changes=checkpointing(False)),
    "full": simple(bottom_up(**HELDOUT), asks=True),
    "accumulated": simple(bottom_up(), changes={"gradient_accumulation_steps": 2, "max_steps": 12}),
    "all_used": simple(bottom_up(), changes={"ddp_find_unused_parameters": False}),
    "non_reentrant": simple(bottom_up(), changes=checkpointing(False)),
    "non_reentrant_unused": simple(bottom_up(), changes={**checkpointing(False), "ddp_find_unused_parameters": True}),
    "reentrant": simple(bottom_up(), changes={**checkpointing(True), "ddp_find_unused_parameters": False}),
    "lora": simple(bottom_up(), peft=LORA, changes=checkpointing(False)),
    "lora_reentrant": simple(
        bottom_up(), peft=LORA, changes={**checkpointing(True), "ddp_find_unused_parameters": False}
    ),
    "all_frozen": simple(
        GradESConfig(
            metric="schedule", schedule={"*": 5}, stopping="all_frozen", freeze_norms=True, freeze_embeddings=True
        ),
        peft=LoraConfig(r=4, target_modules="all-linear"),
    ),
    "vision": simple(VISION_FREEZES, vision=True, changes=VISION),
    "vision_lora": simple(VISION_FREEZES, vision=True, peft=LORA, changes={"max_steps": 8}),
    "gain": simple(LOSS_AND_GAIN, changes={"max_steps": 24}),
    "paper": simple(PAPER),
    "weight_change": simple(
        GradESConfig(metric="weight_change", tau="auto", auto_ratio=1.0, alpha=0.25, stopping="all_frozen")
    ),
    "token_accuracy": simple(
        GradESConfig(metric="none", **(HELDOUT | {"heldout_metric": "token_accuracy", "heldout_patience": 2}))
    ),
    "quantized": quantized,
    "answered": answered,
    "resumed": resumed,
    "twice": twice,
    "after_an_error": after_an_error,
    "other_bits": other_bits,
    "text_in_one_process_alone": text_in_one_process_alone,
    "diverging": diverging,
    "bad_row": bad_row,
    "refused": refused,
    "unused": unused,
    "plain_loop": plain_loop,
}


ONE = ["plain", "plain_lora", "full", "accumulated", "non_reentrant", "lora", "vision", "gain", "paper"]
ONE += ["token_accuracy", "plain_loop"]
SHARDED_RUNS = [name for name in RUNS if name.startswith("sharded")]
COPIES = [name for name in RUNS if name not in SHARDED_RUNS]


def make(folder, names, rank, environment):
    """Makes runs in this process, which is one of two where the environment says so, as torchrun does."""
    global SHARDED
    os.environ.update(environment)
    with open(folder / f"log-{names[0]}-{rank}.txt", "wb", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    logging.basicConfig(level=logging.INFO, format=f"[{processes.rank()}] %(message)s")
    logging.getLogger("grades_trl").setLevel(logging.INFO)
    processes.dist = Counted()
    SHARDED = names is SHARDED_RUNS
    if SHARDED:
        count_what_is_scattered()
    for name in names:
        run_report.installed = installed if name == "full" else lambda module: False  # figures take as long as a run
        start = time.process_time()
        RUNS[name](name, folder)
        print(f"{os.environ.get('RANK', '-')} {name} {time.process_time() - start:.1f} s of CPU time", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start(folder, names, count):
    """Starts runs in one process or two."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    started = []
    for rank in range(count):
        environment = {}
        if count > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **address}
            environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        started.append(multiprocessing.Process(target=make, args=(folder, names, rank, environment), daemon=True))
        started[-1].start()
    return started


def main(folder):
    """Makes them in `one/` and `two/` of a folder. No thread may have been started in this process."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork")
    gc.freeze()  # the Trainer collects after each run
    gc.enable()
    alone = start(folder / "one", ONE, 1)
    for names in (COPIES, SHARDED_RUNS):
        _wait(folder / "two", names, start(folder / "two", names, 2))
    _wait(folder / "one", ONE, alone)


def _wait(folder, names, started):
    for rank, process in enumerate(started):
        process.join()
        if process.exitcode:
            raise SystemExit((folder / f"log-{names[0]}-{rank}.txt").read_text(errors="replace")[-3000:])
