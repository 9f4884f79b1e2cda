"""What does not work in several processes says so before training, with the command to start instead."""

import pytest
import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import DistributedType

from grades_trl import GradESTrainer
from grades_trl.distributed import refuse_devices_that_send_nothing, refuse_several_processes
from grades_trl.recipe import builtin
from helpers import arguments, model_for


@pytest.fixture(scope="module")
def text():
    return builtin.dates(train=16, test=8)["train"], builtin.tiny_qwen3()[1]


def build(text, args, grades=True):
    rows, tokenizer = text
    return GradESTrainer(
        model=model_for(tokenizer),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        **({} if grades else {"grades": None}),
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (DistributedType.DEEPSPEED, r"DeepSpeed: .* by momentum.*Use DDP.*_per_node 2 .*use FSDP2.*LoRA or QLoRA"),
        (DistributedType.FSDP, r"first version of FSDP\. Use DDP.*_per_node 2 .*use FSDP2"),
        (DistributedType.MEGATRON_LM, r"does not run with MEGATRON_LM\. Use DDP"),
    ],
    ids=str,
)
def test_a_model_that_is_cut_in_pieces(tmp_path, text, monkeypatch, kind, message):
    """ZeRO 1 to 3 are all DEEPSPEED. Without GradES, the trainer is left alone."""
    args = arguments(tmp_path)
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: kind))
    monkeypatch.setattr(Accelerator, "is_fsdp2", property(lambda self: False))
    with pytest.raises(ValueError, match=message):
        build(text, args)
    build(text, args, grades=False)


def test_tensor_parallelism(tmp_path, text):
    args = arguments(tmp_path)
    trainer = build(text, args, grades=False)
    args.parallelism_config = ParallelismConfig()
    from grades_trl.distributed import refuse_unsupported

    with pytest.raises(ValueError, match=r"does not run with a parallelism_config.*Use DDP"):
        refuse_unsupported(trainer.accelerator, args)


def test_several_gpus_in_one_process(tmp_path, text):
    """The Trainer would wrap the model in DataParallel, whose copies would all run the layers of the first GPU."""
    args = arguments(tmp_path)
    args._n_gpu = 4
    with pytest.raises(ValueError, match=r"4 GPUs are visible.*torchrun --nproc_per_node 4 .*CUDA_VISIBLE_DEVICES=0"):
        build(text, args)


def test_torch_compile_in_several_processes(tmp_path, text, monkeypatch):
    args = arguments(tmp_path)
    args.torch_compile = True
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.MULTI_GPU))
    with pytest.raises(ValueError, match="leave out --torch_compile"):
        build(text, args)


def test_weights_that_no_backend_can_send(monkeypatch):
    """FSDP with CPU offload, whose processes have NCCL alone."""
    monkeypatch.setattr("grades_trl.distributed.world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(ValueError, match=r"memory of the cpu.*Add --ddp_backend cuda:nccl,cpu:gloo"):
        refuse_devices_that_send_nothing(torch.nn.Linear(2, 2))
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cuda:nccl,cpu:gloo")
    refuse_devices_that_send_nothing(torch.nn.Linear(2, 2))


def test_scripts_of_one_process(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["recipes/compare.py"])
    with pytest.raises(ValueError, match=r"recipes/compare\.py runs in one process, and 2 were started"):
        refuse_several_processes()


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("recipes/sft_text.py", "torchrun --nproc_per_node 2 recipes/sft_text.py ..."),
        ("/usr/bin/pytest", "torchrun --nproc_per_node 2 your_script.py ..."),
    ],
)
def test_the_command_to_start_instead(monkeypatch, script, command):
    from grades_trl.distributed import launch_line

    monkeypatch.setattr("sys.argv", [script])
    assert launch_line(2) == command
