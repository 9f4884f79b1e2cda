"""Does a setting carry over? One default of each metric, unchanged, while the model, the method and the units change.

  python benchmarks/transfer.py

A Qwen3 learns to write dates as ISO 8601, and is then fine-tuned on few examples of the reverse, until it overfits.
Nothing freezes: the two criteria only watch the same run. The table tells at which step each would have ended it and
the validation loss that it would have kept, beside the lowest one of the weights and of their average. The paper's tau
is the number that fits best in the first row: the best that tuning on one run can do. Takes about 25 minutes on a CPU,
and writes benchmarks/results/transfer_<device>.json.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

from grades_trl import GradES, GradESConfig
from grades_trl.criteria.criterion import Criterion
from grades_trl.recipe import builtin
from grades_trl.report import timing as accounting

RESULTS = Path(__file__).parent / "results"
STEPS, READINGS, HELD_OUT = 240, 20, 32
FIRST_STEPS = 300
NEVER = 10**9
# What a row changes of the base: width 64, all parameters, float32, AdamW, batch 16, cosine.
BASE = {
    "width": 64,
    "rank": 0,
    "dtype": torch.float32,
    "optim": "adamw",
    "batch": 16,
    "schedule": "cosine",
    "lr": 1e-3,
}
ROWS = {
    "base": {},
    "width x 4": {"width": 256},
    "LoRA, rank 4": {"rank": 4, "lr": 4e-3},
    "LoRA, rank 64": {"rank": 64, "lr": 4e-3},
    "bf16": {"dtype": torch.bfloat16},
    "8-bit AdamW": {"optim": "adamw_8bit"},
    "batch 4": {"batch": 4},
    "batch 32": {"batch": 32},
    "constant": {"schedule": "constant"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--examples", type=int, default=64, help="to fine-tune on")
    args = parser.parse_args()
    torch.set_num_threads(1)  # faster than more, on matrices this small
    data = Data(args.examples)
    records = []
    for seed in args.seeds:
        for row, changes in tqdm(ROWS.items(), desc=f"seed {seed}"):
            records.append({"row": row, "seed": seed, **watch(data, seed, **(BASE | changes))})
    tau = best_tau([r for r in records if r["row"] == "base"])
    for record in records:
        record["paper_stop"] = paper_stop(record.pop("changes"), tau)
        record["paper_loss"] = loss_at(record, record["paper_stop"])
    summary = {
        "device": accounting.device_name(),
        "versions": accounting.versions(),
        "steps": STEPS,
        "paper_tau": tau,
        "records": records,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"transfer_{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    print(table(records))
    print(path)


class Data:
    """Tokenized examples of the reverse task, and of the first one."""

    def __init__(self, examples: int):
        self.tokenizer = builtin.tiny_qwen3()[1]
        rows = builtin.dates(train=4000, test=300)
        self.first = self._encode(rows["train"], reverse=False)
        self.train = self._encode(rows["train"].select(range(examples)), reverse=True)
        held = self._encode(rows["test"], reverse=True)
        self.held_out, self.validation = held[:HELD_OUT], held[HELD_OUT:]

    def _encode(self, rows, reverse: bool) -> list[tuple[list[int], int]]:
        """Token ids of prompt and response, and how many of them are the prompt."""
        encoded = []
        for row in rows:
            ask, answer = (row[key][0]["content"] for key in ("prompt", "completion"))
            ask, answer = (answer, ask) if reverse else (ask, answer)
            prompt = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": ask}], add_generation_prompt=True, return_dict=False
            )
            both = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
            encoded.append((self.tokenizer.apply_chat_template(both, return_dict=False), len(prompt)))
        return encoded

    def batch(self, rows: list[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
        longest = max(len(ids) for ids, _ in rows)
        ids, labels = torch.full((2, len(rows), longest), self.tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        for i, (row, prompt) in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            labels[i, prompt : len(row)] = ids[i, prompt : len(row)]
        return {"input_ids": ids, "attention_mask": (ids != self.tokenizer.pad_token_id).long(), "labels": labels}


def first_model(data: Data, width: int, seed: int) -> Qwen3ForCausalLM:
    """A model that has learned the first task."""
    config = builtin.tiny_qwen3()[0].config.to_dict()
    config |= {"hidden_size": width, "intermediate_size": 2 * width, "head_dim": width // 4}
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(FIRST_STEPS):
        optimizer.param_groups[0]["lr"] = 2e-3 * min((step + 1) / 30, 1, 2 * (1 - step / FIRST_STEPS))
        rows = [data.first[i] for i in torch.randint(len(data.first), (32,)).tolist()]
        model(**data.batch(rows)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def watch(data, seed, width, rank, dtype, optim, batch, schedule, lr) -> dict:
    """One plain fine-tuning run, watched by both criteria."""
    model = first_model(data, width, seed).to(dtype)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    if optim == "adamw_8bit":
        optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=lr, weight_decay=0.0, min_8bit_size=1024)
    else:
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    held_out, validation = data.batch(data.held_out), data.batch(data.validation)

    def heldout() -> torch.Tensor:
        loss = model(**held_out).loss
        loss.backward()
        return loss

    every = STEPS // READINGS
    ours = GradESConfig(metric="heldout_gain", interval=every, patience=NEVER)
    paper = GradESConfig(metric="grad_change", tau=0.0, sample=1.0)
    gains, changes = GradES(model, ours, STEPS, optimizer, heldout), GradES(model, paper, STEPS, optimizer)
    default = Criterion(
        GradESConfig(metric="heldout_gain"), {name: m.tower for name, m in gains.matrices.items()}, STEPS
    )
    stop, live, readings = None, set(gains.matrices), []
    curve, averages = {}, {}  # validation loss of the weights, and of their average
    kept = None  # what heldout_gain would have kept
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(1, STEPS + 1):
        scale = (
            min(step / 12, 0.5 + 0.5 * math.cos(math.pi * step / STEPS)) if schedule == "cosine" else min(step / 12, 1)
        )
        optimizer.param_groups[0]["lr"] = lr * scale
        if len(order) < batch:
            order += torch.randperm(len(data.train), generator=generator).tolist()
        rows, order = [data.train[i] for i in order[:batch]], order[batch:]
        model(**data.batch(rows)).loss.backward()
        for grades in (gains, changes):
            grades.step(step)
        readings.append(changes.readings)
        own = {n: x for n, x in gains.readings.items() if n in live}
        live -= set(default.update(step, own, gains.heldout.idle, gains.heldout.since_best))
        if step % every == 0:
            curve[step], averages[step] = (
                loss_of(model, {}, validation),
                loss_of(model, gains.heldout.average, validation),
            )
        if gains.heldout.best_step == step and stop is None:
            kept = averages[step]
        if stop is None and not live:
            stop = step
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    lowest, last = min(curve.values()), loss_of(model, {}, validation)
    for grades in (gains, changes):
        grades.finish()
    if stop is None:  # the better of the last weights and the best average
        kept = loss_of(model, {}, validation)
    return {
        "lowest_loss": lowest,
        "lowest_step": next(s for s in curve if curve[s] == lowest),
        "lowest_average": min(averages.values()),
        "average_step": next((s for s in averages if averages[s] <= lowest), None),  # as low as the weights ever were
        "last_loss": last,
        "stop": stop,
        "loss": kept,
        "curve": curve,
        "averages": averages,
        "changes": readings,
    }


@torch.no_grad()
def loss_of(model, weights: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> float:
    """The loss with these weights in place of its own."""
    kept = {name: p.clone() for name, p in model.named_parameters() if name in weights}
    for name in kept:
        model.get_parameter(name).copy_(weights[name])
    loss = model(**batch).loss.item()
    for name, weight in kept.items():
        model.get_parameter(name).copy_(weight)
    return loss


def paper_stop(readings: list[dict[str, float]], tau: float) -> int | None:
    """Step at which the paper's metric would have frozen the last matrix, with our grace period; `None` for never."""
    live = set().union(*readings)
    config = GradESConfig(metric="grad_change", tau=tau, alpha=0.1)
    criterion = Criterion(config, dict.fromkeys(live, "language"), STEPS)
    for step, values in enumerate(readings, start=1):
        live -= set(criterion.update(step, {name: x for name, x in values.items() if name in live}))
        if not live:
            return step
    return None


def loss_at(record: dict, step: int | None) -> float:
    """Validation loss of the weights at the reading before a step; at the end for `None`."""
    if step is None:
        return record["last_loss"]
    curve = record["curve"]
    return curve[max(s for s in curve if s <= step or s == min(curve))]


def best_tau(records: list[dict]) -> float:
    """The tau with which the paper's criterion ends the base runs at the lowest validation loss."""
    levels = [x for record in records for values in record["changes"] for x in values.values()]
    candidates = [math.exp(q) for q in statistics.quantiles([math.log(x) for x in levels], n=40)]

    def loss(tau: float) -> float:
        return statistics.fmean(loss_at(record, paper_stop(record["changes"], tau)) for record in records)

    return min(candidates, key=loss)


def table(records: list[dict]) -> str:
    """Markdown, means over seeds; a criterion that never ends a run is counted with all its steps."""
    lines = [
        "| row | lowest loss of the weights | their average is there at | lowest | at the end | heldout_gain: ends "
        "| keeps | tuned grad_change: ends | keeps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in dict.fromkeys(record["row"] for record in records):
        own = [record for record in records if record["row"] == row]

        def mean(key: str, own: list[dict] = own) -> float:
            return statistics.fmean(STEPS if record[key] is None else record[key] for record in own)

        lowest, average, last, ours, paper = (
            f"{mean(key):.3f}" for key in ("lowest_loss", "lowest_average", "last_loss", "loss", "paper_loss")
        )
        at, there, ends, paper_ends = (
            f"{mean(key):.0f}" for key in ("lowest_step", "average_step", "stop", "paper_stop")
        )
        lines.append(
            f"| {row} | {lowest} @ {at} | {there} | {average} | {last} | {ends} | {ours} | {paper_ends} | {paper} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
