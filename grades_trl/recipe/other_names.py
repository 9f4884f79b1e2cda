"""Arguments that are not known here, and what to write instead: other tools, and older versions of TRL and
Transformers, have names of their own."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

# Name elsewhere -> what to write here. Sources: the arguments of Transformers 4 and TRL 0.x, LLaMA-Factory, axolotl,
# ms-swift, and Unsloth's notebooks.
HERE = {
    "warmup_ratio": "warmup_steps 0.1 (below 1, it is a fraction of all steps)",
    "group_by_length": "train_sampling_strategy group_by_length",
    "evaluation_strategy": "eval_strategy steps",
    "overwrite_output_dir": "nothing: a run writes over the model of the one before, unless that has left checkpoints",
    "torch_dtype": "dtype",
    "use_flash_attention_2": "attn_implementation flash_attention_2",
    "flash_attn": "attn_implementation flash_attention_2",
    "flash_attention": "attn_implementation flash_attention_2",
    "attn_impl": "attn_implementation",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "base_model": "model_name_or_path",
    "dataset": "dataset_name",
    "datasets": "dataset_name",
    "streaming": "nothing: the rows are checked before training, so they are loaded as a whole",
    "dataset_streaming": "nothing: the rows are checked before training, so they are loaded as a whole",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "max_samples": "max_train_samples",
    "val_size": "test_size",
    "val_set_size": "test_size",
    "split_dataset_ratio": "test_size",
    "preprocessing_num_workers": "dataset_num_proc",
    "template": "chat_template_path (a .jinja file, or a model whose template is taken)",
    "chat_template": "chat_template_path (a .jinja file, or a model whose template is taken)",
    "micro_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "sample_packing": "packing",
    "neat_packing": "packing",
    "train_on_inputs": "completion_only_loss false (to learn prompts too)",
    "train_on_prompt": "completion_only_loss false (to learn prompts too)",
    "mask_history": "train_on last",
    "adapter": "use_peft",
    "use_lora": "use_peft",
    "finetuning_type": "use_peft (for LoRA; without it, all weights train)",
    "train_type": "use_peft (for LoRA; without it, all weights train)",
    "tuner_type": "use_peft (for LoRA; without it, all weights train)",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "lora_target_linear": "nothing: without lora_target_modules, all linear layers are adapted",
    "modules_to_save": "lora_modules_to_save",
    "additional_target": "lora_modules_to_save",
    "peft_use_dora": "use_dora",
    "quantization_bit": "load_in_4bit",
    "quant_bits": "load_in_4bit",
    "freeze_vit": "train_towers projector language",
    "freeze_vision_tower": "train_towers projector language",
    "use_unsloth": "backend unsloth",
}


def refuse_unknown(of_file: Iterable[str], of_flags: Iterable[str], known: Collection[str]) -> None:
    """
    Args:
        of_file (`Iterable[str]`), of_flags (`Iterable[str]`): what is left of a YAML file, and of the command line,
            after all arguments that are known.
        known (`Collection[str]`): names of arguments.

    Raises:
        ValueError: something is left; with what to write instead, where that can be told.
    """
    for words, where, mark in ((of_file, " in the config file", ""), (of_flags, "", "--")):
        words = [str(word) for word in words]
        names = [word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")]
        if names:
            said = (f"{mark}{name} is not known{where}. {_instead(name, known, mark)}" for name in names)
            raise ValueError(" ".join(said))
        if words:
            raise ValueError(f"{' '.join(words)}: not understood{where}; expected --name value.")


def _instead(name: str, known: Collection[str], mark: str) -> str:
    name = name.replace("-", "_")
    if name in HERE:
        return f"Write {'' if HERE[name].startswith('nothing') else mark}{HERE[name]}."
    alike = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if alike:
        return f"Is it {mark}{alike[0]}?"
    return "--help_all lists all arguments."
