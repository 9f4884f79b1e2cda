"""Where answers end, and a warning where a chat template ends replies otherwise."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
from datasets import Dataset

from grades_trl.recipe import builtin
from grades_trl.recipe.stop_tokens import set_stop_tokens, warn_if_answers_do_not_end
from helpers import PLAIN, chat_tokenizer, llava_processor, warnings_in
from vlm.builtin import pretrained_llava

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATML = (TEMPLATES / "qwen2_5.jinja").read_text()

# How the names of TRL's templates begin -> the token at which the published models stop at the end of a turn.
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "diffusion_gemma": "<turn|>",
    "gemma4": "<turn|>",
    "gemma": "<end_of_turn>",
    "glm4moe": "<|user|>",
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llava_next": "</s>",
    "muse_glimmer": "<|eot|>",
    "nemotron": "<|im_end|>",
    "phi3": "<|end|>",
    "qwen": "<|im_end|>",
}
BY_TEMPLATE = {
    path.stem: next((ENDS[name] for name in ENDS if path.stem.startswith(name)), None)
    for path in sorted(TEMPLATES.glob("*.jinja"))
}


def row_of(*texts):
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return Dataset.from_list([{"prompt": messages[:-1], "completion": messages[-1:]}])


def trainer_of(processor, stops):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=stops))
    return SimpleNamespace(model=model, processing_class=processor)


@pytest.mark.parametrize(("name", "end"), BY_TEMPLATE.items(), ids=BY_TEMPLATE)
def test_templates_that_end_where_their_models_stop_are_no_fault(name, end, caplog):
    """Of Gemma's kind too: its generation config has the end of a turn, and its tokenizer that of a text."""
    if end is None:
        pytest.skip("its models are not known here")
    others = {"<|END_OF_TURN_TOKEN|>", "<|im_end|>", "<|eot_id|>"} - {end}
    template = (TEMPLATES / f"{name}.jinja").read_text()
    tokenizer = chat_tokenizer(template, end, *others, "<|text|>", eos_token="<|text|>", bos_token="<pad>")
    processor, rows, end_id = tokenizer, row_of("what is m?", "e"), tokenizer.convert_tokens_to_ids(end)
    if name.startswith(("idefics3", "llava_next")):  # they expect lists of parts
        processor = llava_processor(tokenizer, 16)
        processor.chat_template = template
    warn_if_answers_do_not_end(trainer_of(processor, [tokenizer.eos_token_id, end_id]), rows)
    warn_if_answers_do_not_end(trainer_of(processor, end_id), rows)
    assert warnings_in(caplog) == []

    # The same where only the end of a text is known
    warn_if_answers_do_not_end(trainer_of(processor, [tokenizer.eos_token_id]), rows)
    if name == "glm4moe" or name.startswith("phi3"):  # no end; and that of a text, too, which is learned as well
        assert warnings_in(caplog) == []
    else:
        (warning,) = warnings_in(caplog)
        assert warning == (
            f"The chat template ends a reply with {end}. Answers stop at <|text|>, so that they will not end: add "
            f"--eos_token '{end}'."
        )


@pytest.mark.parametrize("make", [builtin.tiny_qwen3, pretrained_llava])
def test_the_built_in_models_end_their_replies(make, caplog):
    model, processor = make()
    trainer = SimpleNamespace(model=model, processing_class=processor)
    set_stop_tokens(trainer)
    warn_if_answers_do_not_end(trainer, row_of("1 May", "e"))
    assert warnings_in(caplog) == []


def test_of_conversations_the_last_reply_and_of_texts_nothing(caplog):
    tokenizer = chat_tokenizer(CHATML, "<|im_start|>", "<|im_end|>", "<|text|>", eos_token="<|text|>")
    trainer = trainer_of(tokenizer, tokenizer.eos_token_id)
    for texts in ({"text": ["a"]}, {"prompt": ["a"], "completion": ["b"]}):
        warn_if_answers_do_not_end(trainer, Dataset.from_dict(texts))
    assert warnings_in(caplog) == []
    talk = row_of("a", "b", "c", "d")
    whole = Dataset.from_list([{"messages": talk[0]["prompt"] + talk[0]["completion"]}])
    warn_if_answers_do_not_end(trainer, whole)
    assert "ends a reply with <|im_end|>." in warnings_in(caplog)[0]


def test_an_end_that_is_no_token_of_the_model(caplog):
    tokenizer = chat_tokenizer(CHATML)
    warn_if_answers_do_not_end(trainer_of(tokenizer, tokenizer.eos_token_id), row_of("a", "b"))
    assert warnings_in(caplog) == [
        "The chat template ends a reply with '<|im_end|>', which is not a token of this model. Answers stop at "
        "<|end|>, so that they will not end: --chat_template_path takes a template that ends a reply with <|end|>."
    ]


def test_a_processor(caplog):
    tokenizer = chat_tokenizer(PLAIN, "<|text|>", eos_token="<|text|>")
    warn_if_answers_do_not_end(trainer_of(llava_processor(tokenizer, 16), tokenizer.eos_token_id), row_of("a", "b"))
    assert "ends a reply with <|end|>." in warnings_in(caplog)[0]
