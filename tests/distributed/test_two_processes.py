"""Runs in two gloo processes, with DDP or FSDP2, beside the same in one process at the same global batch."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from runs import RUNS

# Compared with one process, and with whose rounding: a plain SFTTrainer's in one process and in two.
COMPARED = {
    "full": "plain",
    "accumulated": "plain",
    "non_reentrant": "plain",
    "lora": "plain_lora",
    "vision": "plain",
    "gain": "plain",
    "paper": "plain",
    "token_accuracy": "plain",
    "sharded_full": "plain",
    "sharded_lora": "plain_lora",
    "sharded_gain": "plain",
    "sharded_paper": "plain",
    "sharded_vision": "plain",
}


def facts(runs, name, rank=0, where="two"):
    return json.loads((runs / where / f"{name}-{rank}.json").read_text())


def weights(runs, name, rank=0, where="two"):
    return load_file(runs / where / f"{name}-{rank}.safetensors")


def distance(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)


@pytest.mark.parametrize("name", [*RUNS, "resumed_straight", "sharded_resumed_straight"])
def test_both_processes_decide_the_same_and_hold_the_same_weights(runs, name):
    first, second = facts(runs, name, 0), facts(runs, name, 1)
    assert json.dumps(first) == json.dumps(second)  # NaN is NaN
    ours, theirs = weights(runs, name, 0), weights(runs, name, 1)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key].nan_to_num(7), theirs[key].nan_to_num(7)) for key in ours)


@pytest.mark.parametrize("name", COMPARED)
def test_two_processes_end_where_one_does_at_the_same_global_batch(runs, name):
    plain = COMPARED[name]
    rounding = distance(weights(runs, plain), weights(runs, plain, where="one"))
    alone = name.removeprefix("sharded_")
    assert distance(weights(runs, name), weights(runs, alone, where="one")) <= 4 * rounding < 1e-4
    ours, theirs = facts(runs, name), facts(runs, alone, where="one")
    same = ("steps", "frozen", "stop", "trained", "trains", "every", "restored", "rows_per_step", "answers")
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
    if ours["heldout"] is not None:
        assert ours["heldout"]["best_step"] == theirs["heldout"]["best_step"]
        assert ours["heldout"]["score"] == pytest.approx(theirs["heldout"]["score"], abs=1e-5)
    for (step, own), (other_step, other) in zip(ours["gain"].items(), theirs["gain"].items(), strict=True):
        assert step == other_step
        assert [gain for _, gain in own] == pytest.approx([gain for _, gain in other], rel=1e-3, abs=1e-6)


def test_a_run_without_ddp_sees_the_same_gradients_in_a_plain_loop(runs):
    """The last of them are those after `finish()`: what was frozen is reduced again."""
    ours, theirs = weights(runs, "plain_loop"), weights(runs, "plain_loop", where="one")
    assert distance(ours, theirs) < 1e-6
    assert facts(runs, "plain_loop")["frozen"] != {}


@pytest.mark.parametrize(
    "name",
    ["full", "all_used", "non_reentrant", "reentrant", "lora", "lora_reentrant", "sharded_full", "sharded_lora"],
)
def test_what_is_frozen_is_not_reduced(runs, name):
    """From the step after the freeze on: 4 bytes less for each of its parameters."""
    run = facts(runs, name)
    matrices, reduced = run["matrices"], run["bytes"]
    for layer, step in enumerate((3, 6, 9)):
        frozen = sum(size for matrix, size in matrices.items() if f".layers.{layer}." in matrix)
        assert reduced[step - 1] - reduced[step] >= 4 * frozen > 0  # with the norms, and first the embeddings
    assert len(set(reduced)) == 4
    plain = max(facts(runs, "plain_lora" if "lora" in name else "plain")["bytes"])
    assert plain <= reduced[0] < 1.01 * plain  # FSDP2 pads what it cuts in pieces


@pytest.mark.parametrize(("name", "tensors"), [("gain", 28), ("quantized", 56), ("sharded_gain", 28)])
def test_what_grades_sends_is_a_number_for_each_tensor_and_the_loss(runs, name, tensors):
    """4 bytes each; FSDP2 also asks whether some process has called a new module. (Held-out scores apart.)"""
    own = facts(runs, name)["own_bytes"]
    assert own[1] == 4 * tensors + 4 + 4 * name.startswith("sharded")
    assert max(own) < 10 * own[1] < facts(runs, name)["bytes"][0]


def test_with_nothing_left_to_train_the_run_ends(runs):
    run = facts(runs, "all_frozen")
    assert (run["steps"], run["stop"]) == (5, "all matrices frozen")


def test_rank_0_decides_where_bits_differ(runs):
    """By the numbers of the second process nothing would freeze."""
    assert facts(runs, "other_bits")["frozen"] == facts(runs, "resumed_straight")["frozen"] != {}
    assert facts(runs, "other_bits", 1)["gain"] == facts(runs, "resumed_straight")["gain"]


def test_the_default_rule_freezes_and_the_run_is_probed(runs):
    assert facts(runs, "gain")["frozen"]


def test_a_sharded_model_is_saved_whole(runs):
    saved, there = load_file(runs / "two/sharded_full/model.safetensors"), weights(runs, "sharded_full")
    assert saved and all(torch.equal(tensor, there[name]) for name, tensor in saved.items())


def test_heldout_answers_are_counted_over_both(runs):
    run = facts(runs, "answered")
    assert run["asked"] == [8] * len(run["asked"])
    assert run["heldout"]["measurements"] == len(run["asked"]) > 1
    assert run["stop"] == "held-out exact match stopped improving"


@pytest.mark.parametrize("name", ["resumed", "sharded_resumed"])
def test_a_resumed_run_equals_the_straight_one_bit_for_bit(runs, name):
    assert distance(weights(runs, name), weights(runs, f"{name}_straight")) == 0.0
    resumed, straight = facts(runs, name), facts(runs, f"{name}_straight")
    assert resumed["bytes"] == straight["bytes"][6:]
    assert resumed["bytes"][0] < straight["bytes"][0]
    same = ("frozen", "steps", "heldout", "gain", "losses", "flops")
    assert {key: resumed[key] for key in same} == {key: straight[key] for key in same}


def test_a_second_run_reduces_everything_again(runs):
    reduced = facts(runs, "twice")["bytes"]
    assert reduced[12:] == reduced[:12]
    assert reduced[0] > reduced[11]


def test_an_error_leaves_a_model_that_is_reduced_as_a_whole(runs):
    reduced = facts(runs, "after_an_error")["bytes"]
    assert len(reduced) == 8
    assert reduced[6] < reduced[0] == reduced[7]


def test_a_tower_that_only_one_process_has_called(runs):
    """What freezes with the tower (its norms and embeddings) is known in both."""
    run = facts(runs, "text_in_one_process_alone")
    assert run["frozen"].keys() >= {name for name in run["matrices"] if "vision_tower" in name}
    assert not [name for name in run["trained"] if "vision_tower" in name]


def test_a_loss_that_is_no_number_in_one_process_is_a_divergence_of_all(runs):
    assert facts(runs, "diverging")["diverged"] == 1


def test_a_bad_heldout_row_is_named_in_all_processes(runs):
    assert "The loss of row 4 of eval_dataset is nan" in facts(runs, "bad_row", 1)["said"]


def test_reentrant_checkpointing_while_ddp_looks_for_unused_parameters(runs):
    """The stock trainer fails in its first backward pass; ours says it before."""
    ours, stock = facts(runs, "refused")["said"]
    assert ours.startswith("ValueError: DDP cannot look for unused parameters")
    assert stock.startswith("RuntimeError: Expected to mark a variable ready only once")


def test_ddp_looks_for_unused_parameters_after_the_first_step_if_there_are_any(runs):
    """In both processes, in one of them, in none. It cannot with reentrant checkpointing, which is said."""
    run = facts(runs, "unused")
    assert run["looks"] == [True, True, False]
    (said,) = run["said"]
    assert said.startswith("1 parameter gets no gradient (model.unused.weight)")
    assert 'set gradient_checkpointing_kwargs={"use_reentrant": False}' in said


def test_weights_in_the_memory_of_the_host_train_the_same(runs):
    assert distance(weights(runs, "sharded_offloaded"), weights(runs, "sharded_full")) == 0.0
    ours, theirs = facts(runs, "sharded_offloaded"), facts(runs, "sharded_full")
    same = ("frozen", "bytes", "losses", "heldout", "stop", "trained", "trains", "flops")
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}


def test_what_is_frozen_stands_still_in_bf16(runs):
    """Half of the bytes are reduced, and the pieces that train are kept in float32."""
    run, full = facts(runs, "sharded_bf16"), facts(runs, "sharded_full")
    assert run["moved"] == [] and run["still"] > len(run["frozen"]) == len(full["frozen"])
    assert [2 * sent for sent in run["bytes"]] == full["bytes"]
    assert run["stored"] == ["torch.float32"]
    assert run["losses"] == pytest.approx(full["losses"], rel=0.02)


def test_weights_of_4_bits_are_cut_in_pieces_and_train_the_same(runs):
    assert facts(runs, "sharded_quantized")["whole"] == []
    ours, theirs = (weights(runs, name) for name in ("sharded_quantized", "quantized"))
    adapters = [name for name in theirs if "lora_" in name]
    rounding = distance(weights(runs, "plain_lora"), weights(runs, "plain_lora", where="one"))
    assert adapters and distance(*({name: of[name] for name in adapters} for of in (ours, theirs))) <= 4 * rounding
    assert facts(runs, "sharded_quantized")["frozen"] == facts(runs, "quantized")["frozen"]


def test_flops_are_those_of_all_processes(runs):
    """Rows are padded to the longest of a batch, so that a batch of one process is a little shorter."""
    ours, theirs = facts(runs, "full")["flops"], facts(runs, "full", where="one")["flops"]
    assert 0.8 * theirs < ours <= theirs


def test_only_the_main_process_writes_and_talks(runs):
    events = (runs / "two" / "full" / "grades" / "events.jsonl").read_text().splitlines()
    assert len(events) == len({json.loads(line)["matrix"] for line in events}) == 21
    measured = [json.loads(line) for line in (runs / "two/full/grades/heldout.jsonl").read_text().splitlines()]
    assert [row["step"] for row in measured] == [3, 6, 9, 12]
    first, second = ((runs / "two" / f"log-plain-{rank}.txt").read_text(errors="replace") for rank in (0, 1))
    assert "froze language layer" in first
    assert "froze language layer" not in second
    assert math.isfinite(json.loads((runs / "two/full/grades/summary.json").read_text())["flops"]["run"])
