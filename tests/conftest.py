import os

# Tiny models are slower with more threads, and nothing here may reach a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")

import datasets
import torch

torch.set_num_threads(1)
datasets.disable_progress_bars()
