"""GradES in a plain PyTorch loop, without a Trainer: a tiny LLaVA learns to read handwritten numbers on a CPU.

Few pictures, many times over, so it overfits. When the updates no longer make the loss of held-out pictures smaller,
the model gets the average of its weights for which that loss was lowest, all is frozen, and the loop ends. What
belongs to GradES is marked; the rest is a training loop as you know it. Takes about a minute.

  python recipes/plain_loop.py
  python recipes/plain_loop.py --steps 300 --seed 1
"""

import argparse
import math

import torch
from torch.optim.lr_scheduler import LambdaLR
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from grades_trl import GradES, GradESConfig
from grades_trl.recipe.generation import exact_match
from vlm.builtin import digit_pictures, tiny_llava
from vlm.generation import answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="length of the schedule (default: 800)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the data (default: 0)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # faster than more, on matrices this small

    # 1. Model and data. No scan of a held-out or test picture is in a training picture.
    model, processor = tiny_llava(seed=args.seed)
    pictures = digit_pictures(train=400, test=264)
    train, test = pictures["train"], pictures["test"].select(range(64, 264))
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)  # the loss is on the answer
    held_out, validation = (collate(list(rows)) for rows in (pictures["test"].select(range(64)), test))

    # 2. AdamW; the learning rate rises for a while and falls to zero like a cosine.
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    cosine = LambdaLR(optimizer, lambda t: min((t + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * t / args.steps)))

    def backward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = model(**batch).loss
        loss.backward()
        return loss

    # GradES: 64 held-out pictures every 40 steps of 32 cost 5 % more examples. A reading is the loss in nats that the
    # updates of a matrix have bought since the last one; below zero they only fit the training pictures.
    config = GradESConfig(metric="heldout_gain", interval=max(1, args.steps // 20))
    grades = GradES(model, config, args.steps, optimizer, heldout=lambda: backward(held_out))
    print(f"{len(grades.matrices)} matrices; none freezes before step {config.grace_steps(args.steps) + 1}")

    # 3. Train.
    model.train()
    for step in range(1, args.steps + 1):
        loss = backward(collate([train[i] for i in torch.randint(len(train), (32,)).tolist()]))
        events = grades.step(step)  # GradES: before clipping and the update
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        optimizer.zero_grad()
        if events:
            names = ", ".join(f"{e.tower} {e.layer} {e.role}" for e in events)
            print(f"step {step}: froze {names}; {events[-1].frozen} of {events[-1].total} frozen")
        if step % 50 == 0 or grades.done:
            with torch.no_grad():
                print(f"step {step}: loss {loss:.3f}, validation {model(**validation).loss:.3f}", flush=True)
        if grades.done:  # GradES: nothing is left to learn
            break
    grades.finish()  # GradES: if the schedule ended first, the better of the last weights and the best average

    # 4. Test: read whole numbers.
    right = exact_match(answers(model, processor, test, batch_size=100, max_new_tokens=8), test)
    print(f"{step} of {args.steps} steps, {len(grades.frozen)} matrices frozen, exact match {right:.1%}")


if __name__ == "__main__":
    main()
