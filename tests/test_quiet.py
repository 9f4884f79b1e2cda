"""What recipes hide of other libraries' messages: only what these really print, and nothing outside the recipes."""

import importlib
import logging
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
import transformers as T
from bitsandbytes import _ops, functional
from bitsandbytes.backends.cpu import ops
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers.trainer_utils import sort_checkpoints
from trl import SFTTrainer

from grades_trl.recipe import builtin, packed, quiet
from grades_trl.recipe.packed import packed_examples_mix, warn_if_packed_examples_mix
from helpers import arguments, model_for, qwen3


class Collect(logging.Handler):
    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        self.found.append((record.name, record.getMessage()))


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the libraries log where nothing is hidden, as `(logger, message)`."""
    collect = Collect()
    dataset, tokenizer = builtin.dates(train=16, test=2, seed=0), builtin.tiny_qwen3()[1]
    args = arguments(tmp_path_factory.mktemp("run"), packing=True, max_length=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quiet, "HIDDEN", ())
        for name in ("trl", "bitsandbytes", "transformers"):
            patch.setattr(logging.getLogger(name), "handlers", [collect])
        model = model_for(tokenizer)
        trainer = SFTTrainer(model, args, train_dataset=dataset["train"], processing_class=tokenizer)
        without_head = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        trainer._issue_warnings_after_load(model.load_state_dict(without_head, strict=False))
        T.utils.logging.warning_once.cache_clear()
        saved = tmp_path_factory.mktemp("saved")
        for step in (1, 2):
            (saved / f"checkpoint-{step}").mkdir()
            os.utime(saved / f"checkpoint-{step}", (0, 0))
        sort_checkpoints(str(saved), use_mtime=True)
        # It looks for its kernel when it is imported, on processors that could use it
        patch.setattr(functional, "has_avx512bf16", lambda: True)
        patch.setattr(_ops, "register_kernel", lambda *args: lambda kernel: kernel)
        importlib.reload(ops)
        bpe = T.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), clean_up_tokenization_spaces=True)
        bpe.decode([])
    return collect.found


@pytest.mark.parametrize("message", quiet.HIDDEN, ids=lambda message: message.pattern[:40])
def test_every_hidden_message_is_one_that_the_library_prints(message, printed):
    fitting = [text for name, text in printed if name == message.logger and re.fullmatch(message.pattern, text)]
    assert len(fitting) == 1, printed
    assert message.reason


def test_recipes_hide_them_and_nothing_else_of_the_same_logger(printed, monkeypatch):
    collect = Collect()
    for name in {message.logger for message in quiet.HIDDEN}:
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "handlers", [collect])
        for text in [text for of, text in printed if of == name] + ["something new"]:
            logger.warning("%s", text)
    assert {text for _, text in collect.found} == {"something new"}


def test_debug_shows_them(monkeypatch):
    loggers = [logging.getLogger(message.logger) for message in quiet.HIDDEN]
    for words, hides in ((["sft_text.py", "--debug"], False), (["sft_text.py"], True)):
        for logger in loggers:
            monkeypatch.setattr(logger, "filters", [])
        monkeypatch.setattr(sys, "argv", words)
        importlib.reload(quiet)
        assert [bool(logger.filters) for logger in loggers] == [hides] * len(loggers)


def test_hidden_warnings_are_printed_by_their_library(tmp_path):
    """An adapter that is saved offline, of a model that is only known by its name on the hub."""
    (message,) = quiet.HIDDEN_WARNINGS
    adapted = get_peft_model(qwen3(), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = "some/model"
    found = []
    for hide in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if hide:
                importlib.reload(quiet)
            adapted.save_pretrained(tmp_path)
            warnings.warn("something new", stacklevel=1)
        found.append([str(w.message) for w in caught])
    (text,) = set(found[0]) - set(found[1])
    assert re.fullmatch(message.pattern, text)
    assert message.reason and "something new" in found[1]


def test_no_bar_in_a_pipe_though_tqdm_was_imported_before():
    """torch imports tqdm, which reads TQDM_DISABLE only then; Transformers' loader of GGUF files sets nothing."""
    code = "import torch, tqdm.auto, grades_trl.recipe.quiet; print(len(list(tqdm.auto.tqdm(range(3)))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("3\n", "")


def mamba():
    """A state-space model: it goes through a row from left to right, whatever the positions say."""
    torch.manual_seed(0)
    return T.MambaForCausalLM(T.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_keeps_packed_examples_apart(attention):
    model = qwen3(attn_implementation=attention).train()
    assert packed_examples_mix(model) == 0
    assert packed_examples_mix(model.bfloat16()) == 0
    assert model.training


def test_a_model_that_mixes_packed_examples_is_named(tmp_path, caplog):
    for flag in ("packing", "padding_free"):
        caplog.clear()
        warn_if_packed_examples_mix(mamba(), arguments(tmp_path, **{flag: True}), "transformers")
        (record,) = (record for record in caplog.records if record.name == packed.__name__)
        assert (
            record.message.startswith(f"{flag}: this model mixes the examples") and f"--{flag} false" in record.message
        )
    caplog.clear()
    warn_if_packed_examples_mix(mamba(), arguments(tmp_path), "transformers")
    warn_if_packed_examples_mix(qwen3(), arguments(tmp_path, packing=True), "transformers")
    assert all(record.name != packed.__name__ for record in caplog.records)
