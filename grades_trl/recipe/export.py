"""A trained model as other tools load it: merged 16-bit weights, a GGUF file with an Ollama modelfile, or the adapter.

What was written is loaded again, and must answer as the trained model does.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerBase
from trl import ModelConfig
from trl.data_utils import prepare_multimodal_messages

from grades_trl.extras import require
from grades_trl.recipe.arguments import RecipeArguments
from grades_trl.recipe.bad_input import printable
from grades_trl.recipe.data import first
from grades_trl.recipe.generation import GREEDY, encoded, prompt_text
from grades_trl.recipe.gguf_tokenizer import vocabulary_of
from grades_trl.recipe.modelfile import modelfile
from grades_trl.recipe.models import find_gguf, load_gguf, read_config
from grades_trl.recipe.trained import base_of, load_trained, release

logger = logging.getLogger(__name__)

EXPORTS = ("merged", "gguf", "adapter")
CONVERTER = "convert_hf_to_gguf.py"
# The converter of llama.cpp writes these by itself.
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")
# Largest difference of the logits, relative to their size (L2 norms, each position without its mean). Rounding weights
# and activations to 8 bits of mantissa gives up to two percent in deep models; a lost or twice added adapter, more.
TOLERANCE = 0.05
PROMPTS = ("What is the capital of France?", "Count from one to ten.", "1998-03-03", "Write one sentence about rain.")


@dataclass(frozen=True)
class Answer:
    """
    What a model says to one prompt, greedily.

    Attributes:
        tokens (`torch.Tensor`): int64 of shape (answer,).
        logits (`torch.Tensor`): float32 of shape (answer, vocabulary): what each token was chosen by.
    """

    tokens: torch.Tensor
    logits: torch.Tensor


def check_request(
    exports: Sequence[str],
    *,
    is_adapter: bool,
    base: str | None,
    backend: str,
    gguf_type: str = "q8_0",
    converter: str | None = None,
    config: Any = None,
) -> None:
    """Refuses before training, or before a model is loaded, what cannot be exported.

    Args:
        exports (`Sequence[str]`): of `EXPORTS`.
        is_adapter (`bool`): LoRA, not all weights.
        base (`str` or `None`): folder or hub id of the model that is trained; `None` if it is made in memory.
        backend (`str`): `"unsloth"` or `"transformers"`.
        gguf_type (`str`, *optional*, defaults to `"q8_0"`), converter (`str`, *optional*): as in [`export`].
        config (`~transformers.PreTrainedConfig`, *optional*): of the model, whose architecture is then checked.

    Raises:
        ValueError: with what is missing.
    """
    if "adapter" in exports and not is_adapter:
        raise ValueError("--export adapter: all weights are trained, there is no adapter. Use --export merged.")
    if exports and is_adapter and base is None:
        raise ValueError(
            f"--export {' '.join(exports)}: the built-in model is not on disk, so that its adapter has nothing to be "
            "put on. Train all its weights, or give --model_name_or_path."
        )
    if "gguf" in exports and base is None:
        raise ValueError("--export gguf: llama.cpp does not know the tokenizers of the built-in models. Use merged.")
    if "gguf" in exports and backend == "transformers":
        require("gguf", "--export gguf")
        script = find_converter(converter)
        if gguf_type not in GGUF_TYPES:
            raise ValueError(
                f"--gguf_type {gguf_type}: llama.cpp's converter writes {', '.join(GGUF_TYPES)}. For others, run its "
                "llama-quantize on a file of one of these, or use --backend unsloth."
            )
        if config is not None:
            check_architecture(config, script)


def check_architecture(config: Any, converter: Path) -> None:
    """Refuses a model that this version of the converter does not know, by its own list.

    Args:
        config (`~transformers.PreTrainedConfig`): of the model. One that was read from a GGUF file is known.
        converter (`Path`): llama.cpp's script.

    Raises:
        ValueError: the converter does not run, or does not know the model.
    """
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    # As the converter reads the config: the language model may have an architecture of its own
    text = getattr(getattr(config, "text_config", None), "architectures", None) or config.architectures
    if not text:
        return
    done = subprocess.run([sys.executable, str(converter), "--print-supported-models"], capture_output=True, text=True)
    of_text, _, of_images = (done.stdout + done.stderr).partition("MMPROJ models:")
    if done.returncode != 0 or "TEXT models:" not in of_text:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-5:])
        raise ValueError(f"{converter} does not run, or does not list the models that it knows:\n{last}")
    known = {"language model": of_text, "part that reads images": of_images}
    needed = {"language model": text[0]} | ({"part that reads images": config.architectures[0]} if tower else {})
    for part, architecture in needed.items():
        # Its LLaVA is Pixtral; it would take another tower's language model for a Llama
        other_tower = architecture.startswith("Llava") and tower != "pixtral"
        if other_tower or not re.search(rf"- {re.escape(architecture)}$", known[part], re.MULTILINE):
            of_type = f" with a tower of the type {tower}" if other_tower else ""
            raise ValueError(
                f"--export gguf: {converter} does not know the {part} of this model ({architecture}{of_type}). Update "
                "llama.cpp, or use --export merged: the weights in 16 bits, which Transformers and vLLM load."
            )


def find_converter(given: str | None) -> Path:
    """llama.cpp's script that writes GGUF files.

    Args:
        given (`str`, *optional*): its path, or the folder of llama.cpp; by default it is looked up on the PATH.

    Raises:
        ValueError: it is not there.
    """
    if given is None:
        found = shutil.which(CONVERTER)
        if found is not None:
            return Path(found)
        raise ValueError(
            f"GGUF files are written by llama.cpp's {CONVERTER}, which is not on the PATH: git clone "
            "https://github.com/ggml-org/llama.cpp, and give --gguf_converter llama.cpp to recipes/export.py, or add "
            "that folder to the PATH and make the script executable. It needs sentencepiece, which the extra [gguf] "
            "has; its own requirements.txt would bring other versions of torch and transformers. --export merged "
            "works without."
        )
    path = Path(given) / CONVERTER if Path(given).is_dir() else Path(given)
    if not path.is_file():
        raise ValueError(f"--gguf_converter {given}: expected the path of llama.cpp's {CONVERTER}, or of its folder.")
    return path


def export(
    exports: Sequence[str],
    source: str,
    folder: Path,
    args: ModelConfig,
    rows: Dataset | None,
    *,
    vision: bool,
    backend: str = "transformers",
    trained: tuple[Any, Any] | None = None,
    trust_remote_code: bool = False,
    max_new_tokens: int = 16,
    gguf_type: str = "q8_0",
    converter: str | None = None,
) -> dict[str, Path]:
    """
    Writes a trained model as `folder/merged`, `folder/gguf` and `folder/adapter`, each with tokenizer, processor and
    chat template, loads it again, and compares its answers with those of the trained model.

    A base in 4 or 8 bits is de-quantized, not loaded in 16 bits: the adapter was trained on the de-quantized values,
    so that the exported model is the one that was scored. The merge takes place on the CPU, where 16-bit weights fit
    that do not fit beside a trainer. With Unsloth, its own `save_pretrained_merged` and `save_pretrained_gguf` write.

    Args:
        exports (`Sequence[str]`): of `EXPORTS`.
        source (`str`): folder of a run or of an adapter, or hub id.
        folder (`Path`): where to write.
        args (`ModelConfig`): dtype and quantization of the base.
        rows ([`~datasets.Dataset`], *optional*): prompts to compare answers to: columns `prompt` and, for vision,
            `images`. By default four of our own, for text.
        vision (`bool`): a vision-language model.
        backend (`str`, *optional*, defaults to `"transformers"`): or `"unsloth"`.
        trained (`tuple`, *optional*): the model and processor that Unsloth has in memory, for Unsloth; else they are
            loaded.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that the model's repository brings.
        max_new_tokens (`int`, *optional*, defaults to `16`): of the compared answers.
        gguf_type (`str`, *optional*, defaults to `"q8_0"`): of `GGUF_TYPES`; with Unsloth, any of its own.
        converter (`str`, *optional*): see [`find_converter`].

    Returns:
        `dict[str, Path]`: export -> its folder.

    Raises:
        ValueError: what cannot be exported, see [`check_request`].
        SystemExit: what does not answer as the trained model does.
    """
    base = base_of(source)
    check_request(
        exports,
        is_adapter=base != source,
        base=base,
        backend=backend,
        gguf_type=gguf_type,
        converter=converter,
        config=_config(base, trust_remote_code),
    )

    def load(dequantized: bool = False) -> tuple[Any, Any]:
        model, processor = load_trained(
            source, args, vision=vision, trust_remote_code=trust_remote_code, dequantized=dequantized
        )
        return model.eval(), processor

    model, processor = trained if trained is not None else load()
    prompts = prompt_inputs(processor, own_prompts(processor) if rows is None else rows, vision)
    dtype, expected = model.dtype, answer_all(model.eval(), prompts, max_new_tokens)
    ends = model.generation_config.eos_token_id
    written: dict[str, Path] = {}

    def compare(name: str, reload: Callable[[], Any]) -> None:
        again = reload().to(dtype).eval()
        problem = difference(expected, answer_all(again, prompts, max_new_tokens))
        if problem is not None:
            raise SystemExit(f"{written[name]} does not answer as {source} does: {problem}. Do not use it.")
        count = "one prompt" if len(prompts) == 1 else f"{len(prompts)} prompts"
        logger.info(f"{written[name]}: loaded again, the same answers to {count}")

    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    merged = folder / "merged" if "merged" in exports else folder / "gguf" / "merged"  # the latter is deleted again
    if backend == "unsloth" and {"merged", "gguf"} & set(exports):
        model, processor = trained if trained is not None else _load_with_unsloth(source, args, vision)
    else:
        del model
        release()
    if {"merged", "gguf"} & set(exports):  # the converter reads the merged weights
        if backend == "unsloth":
            model.save_pretrained_merged(str(merged), processor, save_method="merged_16bit")
        else:
            _merge(load(dequantized=True)[0], merged)
        processor.save_pretrained(merged)
        release()
        written["merged"] = merged
        compare("merged", lambda: auto.from_pretrained(merged, dtype=dtype, trust_remote_code=trust_remote_code))
    if "gguf" in exports:
        written["gguf"] = folder / "gguf"
        if backend == "unsloth":
            model.save_pretrained_gguf(str(written["gguf"]), processor, quantization_method=gguf_type)
            produced = folder / "gguf_gguf"  # Unsloth puts the file beside the folder that it is given
            if produced.is_dir():
                shutil.copytree(produced, written["gguf"], dirs_exist_ok=True)
                shutil.rmtree(produced)
            files = sorted(written["gguf"].glob("*.gguf"))
        else:
            files = _convert(merged, written["gguf"], find_converter(converter), gguf_type, vision)
        if "merged" not in exports:
            shutil.rmtree(merged)
        processor.save_pretrained(written["gguf"])
        tokenizer = getattr(processor, "tokenizer", processor)
        check_vocabulary(files[0], tokenizer)
        text = modelfile([file.name for file in files], tokenizer, ends if isinstance(ends, list) else [])
        (written["gguf"] / "Modelfile").write_text(text, encoding="utf-8")
        if vision:
            logger.warning(
                "GGUF files of vision-language models cannot be loaded here. Try them in llama.cpp: llama-mtmd-cli -m "
                f"{files[0]} --mmproj {files[-1]} --image IMAGE -p PROMPT"
            )
        else:
            compare("gguf", lambda: load_gguf(files[0], dtype)[0])
    if "adapter" in exports:
        written["adapter"] = folder / "adapter"
        written["adapter"].mkdir(parents=True, exist_ok=True)
        for file in sorted(Path(source).glob("adapter_*")):
            shutil.copy(file, written["adapter"])
        processor.save_pretrained(written["adapter"])
        release()

        def reload() -> Any:
            return load_trained(str(written["adapter"]), args, vision=vision, trust_remote_code=trust_remote_code)[0]

        compare("adapter", reload)
    return {name: written[name] for name in exports}


def check_exports(recipe: RecipeArguments, args: ModelConfig, backend: str) -> None:
    """Refuses, before a recipe trains, what `--export` could not do at its end. Raises as [`check_request`]."""
    in_memory = args.model_name_or_path in (None, "tiny_llava")
    base = None if in_memory else args.model_name_or_path
    exports = recipe.export or ()
    config = _config(base, False) if "gguf" in exports else None
    check_request(exports, is_adapter=bool(args.use_peft), base=base, backend=backend, config=config)


def _config(base: str | None, trust_remote_code: bool) -> Any:
    in_file = base is None or find_gguf(base) is not None  # the built-in model, which is Qwen3, or a GGUF file
    return None if in_file else read_config(ModelConfig(model_name_or_path=base), trust_remote_code)


def export_run(trainer: Any, recipe: RecipeArguments, args: ModelConfig, test: Dataset, backend: str) -> None:
    """What `--export` asks for, at the end of a run, into its folder. The answers that are compared are those to the
    first `num_samples` held-out prompts. Arguments and errors as in [`export`]."""
    if not recipe.export:
        return
    folder = trainer.args.output_dir
    if backend == "transformers":  # Unsloth writes from the model in memory; else it makes room for one from the disk
        trainer.model.to("cpu")
        release()
    rows = first(test, max(1, recipe.num_samples)) if "prompt" in test.column_names else None
    written = export(
        recipe.export,
        folder,
        Path(folder),
        args,
        rows,
        vision="images" in test.column_names,
        backend=backend,
        trained=(trainer.model, trainer.processing_class) if backend == "unsloth" else None,
        trust_remote_code=trainer.args.trust_remote_code,
        max_new_tokens=recipe.max_new_tokens,
    )
    for kind, path in written.items():
        print(printable(f"{kind}: {path}"))


# ---- writing ----


def _merge(model: Any, folder: Path) -> None:
    """Saves all weights in bfloat16, with the adapters, if there are any, in the weights that they are on."""
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    model.to(torch.bfloat16).save_pretrained(folder)


def _load_with_unsloth(source: str, args: ModelConfig, vision: bool) -> tuple[Any, Any]:
    from unsloth import FastLanguageModel, FastVisionModel

    loader = FastVisionModel if vision else FastLanguageModel
    return loader.from_pretrained(source, load_in_4bit=args.load_in_4bit, load_in_8bit=args.load_in_8bit)


def _convert(merged: Path, folder: Path, converter: Path, gguf_type: str, vision: bool) -> list[Path]:
    """Runs llama.cpp's converter: the language model first, then the part that reads images."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for prefix, flags in (("model", []), ("mmproj", ["--mmproj"])) if vision else (("model", []),):
        files.append(folder / f"{prefix}-{gguf_type}.gguf")
        command = [sys.executable, converter, merged, "--outfile", files[-1], "--outtype", gguf_type, *flags]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode != 0 or not files[-1].exists():
            last = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise SystemExit(
                f"{converter} failed with exit code {done.returncode}. The merged model: {merged}\n{last}"
            )
    return files


# ---- comparing ----


def check_vocabulary(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Transformers reads the weights of a GGUF file, but llama.cpp its own tokenizer.

    Raises:
        SystemExit: a byte-level tokenizer became a SentencePiece one, with which llama.cpp aborts.
    """
    if vocabulary_of(file)[0] == "llama" and "ByteLevel" in str(tokenizer.backend_tokenizer.pre_tokenizer):
        raise SystemExit(
            f"{file}: the converter has taken the tokenizer for SentencePiece's, so that llama.cpp cannot read a text "
            "with it. Do not use it. The tokenizer was saved from a GGUF file by Transformers itself: put the "
            "tokenizer.json of the original model into the folder of the run."
        )


def own_prompts(processor: Any) -> Dataset:
    """Prompts for a model of which no data are known: messages where there is a chat template, else text."""
    if getattr(processor, "chat_template", None) is None:
        return Dataset.from_dict({"prompt": list(PROMPTS)})
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": prompt}] for prompt in PROMPTS]})


def prompt_inputs(processor: Any, rows: Dataset, vision: bool) -> list[Any]:
    """The tensors of each prompt, one at a time: nothing is padded."""
    inputs = []
    for row in rows:
        is_plain = isinstance(row["prompt"], str)
        if not vision:
            inputs.append(encoded(processor, [prompt_text(processor, row)], is_plain))
            continue
        if not is_plain:
            row["prompt"] = prepare_multimodal_messages(row["prompt"], images=row["images"])
        text = prompt_text(processor, row)
        # TRL's collator adds no special tokens to plain text with images either
        images = row["images"] or None  # processors refuse an empty list
        inputs.append(processor(images=images, text=text, add_special_tokens=False, return_tensors="pt"))
    return inputs


@torch.no_grad()
def answer_all(model: Any, prompts: Sequence[Any], max_new_tokens: int) -> list[Answer]:
    """Greedy answers with the logits behind them."""
    answers = []
    for inputs in prompts:
        tensors = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        images = {name: tensor.to(model.dtype) for name, tensor in tensors.items() if tensor.is_floating_point()}
        output = model.generate(
            **(tensors | images),
            max_new_tokens=max_new_tokens,
            **GREEDY,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :].cpu()
        answers.append(Answer(tokens, torch.cat(output.logits).float().cpu()))
    return answers


def difference(expected: Sequence[Answer], found: Sequence[Answer]) -> str | None:
    """
    What is different in the answers of an exported model; `None` if they are the same within 16 bits.

    Logits are compared up to the first token that differs. Such a token is no difference if the trained model had the
    two at a tie: closer to each other than the logits moved.
    """
    for number, (ours, theirs) in enumerate(zip(expected, found, strict=True), 1):
        same = min(len(ours.tokens), len(theirs.tokens))
        differs = (ours.tokens[:same] != theirs.tokens[:same]).nonzero()
        seen = int(differs[0]) + 1 if len(differs) else same  # positions with the same tokens before them
        vocabulary = min(ours.logits.shape[1], theirs.logits.shape[1])  # some tools pad it, or take padding off
        a, b = ours.logits[:seen, :vocabulary], theirs.logits[:seen, :vocabulary]
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        moved = ((a - b).norm() / a.norm()).item()
        if not moved <= TOLERANCE:
            limit = f"expected at most {100 * TOLERANCE:.0f} %"
            return f"the logits of prompt {number} differ by {100 * moved:.1f} %; {limit}"
        if len(differs):
            chosen, other = ours.tokens[seen - 1], theirs.tokens[seen - 1]
            if a[-1, chosen] - a[-1, other] > 2 * (a[-1] - b[-1]).abs().max():
                return f"prompt {number} gets another answer, from token {seen} on"
    return None
