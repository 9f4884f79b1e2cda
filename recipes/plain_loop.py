"""GradES in a plain PyTorch loop, without a Trainer: a tiny LLaVA that reads handwritten numbers learns a new task.

It sees few images many times, so it overfits. GradES freezes leading layers that could gain far less than they cost,
ends the loop when the held-out loss of the averaged weights has stopped improving, and keeps their best average. What
belongs to GradES is marked; the rest is a training loop as you know it. Takes about a minute.

  python recipes/plain_loop.py --steps 300 --seed 1
"""

import argparse
import math

import grades_trl.recipe.quiet  # noqa: F401  # isort: skip  hides an offer of bitsandbytes, which trl imports
import torch
from torch.optim.lr_scheduler import LambdaLR
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from grades_trl import GradES, GradESConfig
from grades_trl.recipe.generation import exact_match
from vlm.builtin import DATASETS, pretrained_llava
from vlm.generation import answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="length of the schedule (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the data (default: 0)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # faster than more, on matrices this small

    # 1. A model that reads numbers, and a new task: "3-7-2" for 372. No test scan is in a training image.
    model, processor = pretrained_llava()
    images = DATASETS["digits_dashes"](train=400, test=264)
    train, test = images["train"], images["test"].select(range(64, 264))
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)  # the loss is on the answer
    held_out, validation = (collate(list(rows)) for rows in (images["test"].select(range(64)), test))

    # 2. AdamW; the learning rate rises for a while and falls to zero like a cosine.
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    cosine = LambdaLR(optimizer, lambda t: min((t + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * t / args.steps)))

    @torch.no_grad()
    def loss_of(batch: dict[str, torch.Tensor]) -> float:
        model.eval()
        loss = model(**batch).loss.item()
        model.train()
        return loss

    # GradES: measuring the loss of 64 held-out images at 20 points of the schedule costs 2 % of the training.
    grades = GradES(model, GradESConfig(), args.steps, optimizer, heldout_score=lambda: loss_of(held_out))
    print(f"{len(grades.matrices)} matrices; none freezes before step {grades.criterion.grace_steps + 1}")

    # 3. Train.
    model.train()
    for step in range(1, args.steps + 1):
        batch = collate([train[i] for i in torch.randint(len(train), (32,)).tolist()])
        loss = model(**batch).loss
        loss.backward()
        events = grades.step(step)  # GradES: before clipping and the update
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        optimizer.zero_grad()
        if events:
            print(f"step {step}: {events[-1].frozen} of {events[-1].total} matrices frozen")
        if step % 50 == 0 or grades.done:
            print(f"step {step}: loss {loss:.3f}, validation {loss_of(validation):.3f}", flush=True)
        if grades.done:  # GradES: nothing is left to learn
            break
    grades.finish()  # GradES: the better of the last weights and their best average

    # 4. Test: read whole numbers.
    right = 100 * exact_match(answers(model, processor, test, batch_size=100, max_new_tokens=8), test, processor)
    print(f"{step} of {args.steps} steps ({grades.stop_reason or 'schedule finished'}), exact match {right:.1f} %")


if __name__ == "__main__":
    main()
