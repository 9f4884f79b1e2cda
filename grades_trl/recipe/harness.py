"""Published benchmarks by the name of their task: lm-eval for text, lmms-eval for images, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from trl import ModelConfig

from grades_trl.recipe.models import find_gguf

logger = logging.getLogger(__name__)

# What lmms-eval (0.7.3) calls a family where that is not its `model_type`.
LMMS_NAMES = {
    "internvl": "internvl_hf",
    "lfm2_vl": "lfm2_5_vl",
    "llama4": "llama4_scout",
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
    "mistral3": "mistral3_vl",
    "mllama": "llama_vision",
}
ONE_BY_ONE = ("internvl_hf", "llava_hf")  # they refuse batches
LAST_LINES = 20  # of a harness that failed


def check_harness(bases: dict[str, str], args: ModelConfig, vision: bool) -> None:
    """
    Refuses what [`run_tasks`] cannot run, before anything is loaded.

    Args:
        bases (`dict[str, str]`): model -> the model that its adapter is on, or itself.
        args (`ModelConfig`): quantization of the bases.
        vision (`bool`): vision-language models.

    Raises:
        ValueError: the harness is not installed, or cannot load one of the models; with what to do.
    """
    module, package = ("lmms_eval", "lmms-eval") if vision else ("lm_eval", "lm-eval")
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"--tasks are run by {package}, which is not installed: pip install {package}")
    # lm-eval (0.4.13) asks for 4 and 8 bits in a way that Transformers 5 does not know
    if vision or args.load_in_4bit or args.load_in_8bit:
        for name, base in bases.items():
            if name != base:
                kind = "adapters" if vision else "adapters on a base in 4 or 8 bits"
                raise ValueError(
                    f"{package} loads no {kind}: run python recipes/export.py {name}, and score {name}/merged beside "
                    f"{base}."
                )


def run_tasks(
    tasks: list[str],
    name: str,
    base: str,
    folder: Path,
    args: ModelConfig,
    *,
    vision: bool,
    batch_size: int,
    limit: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[dict[str, float], dict[str, Any]]:
    """
    Scores a model on tasks of lm-eval, or lmms-eval if it sees, with the number of examples in the prompt that each
    task sets.

    Args:
        tasks (`list[str]`): names, or paths of YAML files of the harness.
        name (`str`): folder of a run or of an adapter, or hub id.
        base (`str`): the model that the adapter is on; otherwise `name`.
        folder (`Path`): what the harness writes.
        args (`ModelConfig`): dtype of the base. lmms-eval chooses its own: that of the files, or bfloat16.
        vision (`bool`): a vision-language model.
        batch_size (`int`): examples in a batch, where lmms-eval does not insist on 1.
        limit (`int`, *optional*): examples of each task, at most.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that the model's repository brings.

    Returns:
        `tuple`: `task/metric` -> score, without standard errors; and what the harness says of its tasks: results with
            standard errors, versions, number of examples.

    Raises:
        SystemExit: the harness failed; with the end of its log.
        ValueError: YAML files for lmms-eval that it cannot find.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: dict[str, Any] = {"pretrained": base}
    if vision:
        family = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code).model_type
        lmms_name = LMMS_NAMES.get(family, family)
        if lmms_name != "lfm2_5_vl":  # which has no device_map; the "" of the others is an error in Transformers 5
            model["device_map"] = "auto" if device == "cuda" else device
        model_args = ",".join(f"{key}={value}" for key, value in model.items())
        command = ["lmms_eval", "--model", lmms_name]
        if lmms_name in ONE_BY_ONE:
            batch_size = 1
        tasks, folder_of_tasks = find_lmms_tasks(tasks)
        if folder_of_tasks is not None:
            command += ["--include_path", str(folder_of_tasks)]
    else:
        gguf = find_gguf(base)
        if gguf is not None:
            model |= {"pretrained": str(gguf.parent), "gguf_file": gguf.name}
        if name != base:
            model |= {"peft": name} | ({"tokenizer": name} if (Path(name) / "tokenizer_config.json").exists() else {})
        model["dtype"] = args.dtype or "auto"
        if trust_remote_code:
            model["trust_remote_code"] = True
        model_args = json.dumps(model)
        command = ["lm_eval", "run", "--model", "hf"]
    command += ["--model_args", model_args, "--tasks", ",".join(tasks), "--batch_size", str(batch_size)]
    command += ["--device", device, "--output_path", str(folder)]
    if limit is not None:
        command += ["--limit", str(limit)]
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.rglob("*results*.json"))
    log = folder / "log.txt"
    logger.info(f"{name}: {command[0]} runs {' '.join(tasks)}; its log: {log}")
    # -P: `import evaluate` is Hugging Face's package to them, also where a script of that name is beside the caller
    with open(log, "wb") as output:
        done = subprocess.run([sys.executable, "-P", "-m", *command], stdout=output, stderr=subprocess.STDOUT)
    found = sorted(set(folder.rglob("*results*.json")) - before, key=os.path.getmtime)
    if done.returncode != 0 or not found:
        last = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-LAST_LINES:])
        raise SystemExit(f"{command[0]} failed with exit code {done.returncode}. The end of {log}:\n\n{last}")
    record = json.loads(found[-1].read_text("utf-8"))
    kept = ("results", "versions", "n-shot", "n-samples", "lm_eval_version")
    return task_scores(record["results"]), {key: record[key] for key in kept if key in record}


def find_lmms_tasks(tasks: list[str]) -> tuple[list[str], Path | None]:
    """Names of the tasks, and the folder of those that are YAML files: lmms-eval takes one folder, and then names."""
    files = [Path(task) for task in tasks if task.endswith(".yaml")]
    if len({file.parent for file in files}) > 1:
        raise ValueError(f"lmms-eval reads tasks from one folder: put {', '.join(map(str, files))} into the same one.")
    names = [task for task in tasks if not task.endswith(".yaml")]
    for file in files:
        found = re.search(r"^task:\s*[\"']?([^\s\"'#]+)", file.read_text("utf-8"), re.MULTILINE)
        if found is None:
            raise ValueError(f'{file} is no task of lmms-eval: it has no line "task: NAME".')
        names.append(found[1])
    return names, files[0].parent if files else None


def task_scores(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """`task/metric` -> score, from the `results` of a harness, where the keys are `metric,filter`. The filter `none`,
    standard errors and what is no number are left out."""
    scores = {}
    for task, entries in results.items():
        for key, value in entries.items():
            metric, _, answers = key.partition(",")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and answers and "_stderr" not in metric:  # lmms-eval has metric_stderr_clt and others too
                scores[f"{task}/{metric}" if answers == "none" else f"{task}/{metric} ({answers})"] = float(value)
    return scores
