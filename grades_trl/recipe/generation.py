"""Greedy answers to a prompt-completion dataset, and how many of them are exactly right."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from grades_trl.distributed import gathered_objects, is_main, is_sharded, rank, world_size
from grades_trl.recipe.bad_input import printable
from grades_trl.wording import counted, shortened

logger = logging.getLogger(__name__)

# Without temperature, top_p and top_k there are no warnings about sampling defaults.
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "use_cache": True}


def generate_greedily(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    batches: Iterable[BatchEncoding],
    max_new_tokens: int,
) -> list[str]:
    """
    Returns what the model says after each prompt, without special tokens and outer spaces.

    `batches` are on its device, padded on the left. Afterwards, also after an error, every module is back in the train
    or eval mode it was in.
    """
    texts = []
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for inputs in batches:
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                **GREEDY,
                pad_token_id=getattr(processor, "tokenizer", processor).pad_token_id,
            )
            texts += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    finally:
        for module, training in modes.items():
            module.training = training
    return [text.strip() for text in texts]


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    batch_size: int = 16,
    max_new_tokens: int = 64,
) -> list[str]:
    """
    Lets the model answer every prompt, greedily.

    The model may be in the middle of its training: every module's train or eval mode is put back afterwards, and the
    key-value cache is used even where gradient checkpointing is on. Prompts of similar length share a batch. Several
    processes share the prompts out, and all of them get all answers.

    Args:
        model ([`~transformers.PreTrainedModel`]): or a PEFT model; the inputs move to its device.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): with a chat template and a padding token. Not changed.
        dataset ([`~datasets.Dataset`]): with a column `prompt`, conversations or plain text; `completion` is not read.
        batch_size (`int`, *optional*, defaults to `16`): prompts per batch.
        max_new_tokens (`int`, *optional*, defaults to `64`): longest answer, in tokens.

    Returns:
        `list[str]`: one answer per example, in the order of the dataset, without special tokens and outer spaces.

    Raises:
        `ValueError`: if the tokenizer has no padding token.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "answers() pads prompts to one length, and this tokenizer has no padding token. Set tokenizer.pad_token, "
            "to a token that never occurs in text."
        )
    prompts = [prompt_text(tokenizer, row) for row in _texts(dataset)]
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    starts = own_share(model, range(0, len(prompts), batch_size))
    is_plain = len(dataset) > 0 and isinstance(dataset[0]["prompt"], str)
    batches = (
        encoded(tokenizer, [prompts[i] for i in longest_first[start : start + batch_size]], is_plain).to(model.device)
        for start in tqdm(starts, desc="answers", unit="batch", disable=None if is_main() else True)
    )
    own = [i for start in starts for i in longest_first[start : start + batch_size]]
    found = merged(dict(zip(own, generate_greedily(model, tokenizer, batches, max_new_tokens), strict=True)))
    return [found[i] for i in range(len(prompts))]


def encoded(tokenizer: PreTrainedTokenizerBase, prompts: list[str], is_plain: bool) -> BatchEncoding:
    """
    Prompts as the tensors that a text model is asked with.

    TRL trains plain text with the special tokens that the tokenizer puts before it (BOS). A chat template has written
    them already.
    """
    # Padding on the left, in this call alone: an answer has to follow its prompt directly.
    inputs = tokenizer(
        prompts,
        add_special_tokens=is_plain,
        padding=len(prompts) > 1,  # one alone may have no padding token
        padding_side="left",
        return_token_type_ids=False,
        return_tensors="pt",
    )
    with_special, without = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    if is_plain and with_special[-1] != without[-1]:  # an EOS: in training it comes after the answer
        inputs = BatchEncoding({name: tensor[:, :-1] for name, tensor in inputs.items()})
    return inputs


def own_share(model: PreTrainedModel, starts: range) -> range:
    """The batches that this process answers. Each pass of a sharded model takes all processes: all of them, then."""
    return starts if is_sharded(model.parameters()) else starts[rank() :: world_size()]


def merged(answers: dict[int, str]) -> dict[int, str]:
    """Row -> answer, of all processes."""
    return {row: answer for of_process in gathered_objects(answers) for row, answer in of_process.items()}


def prompt_text(processor: PreTrainedTokenizerBase | ProcessorMixin, row: dict[str, Any]) -> str:
    """The prompt of a row as the model sees it in training: text as it is, messages through the chat template, with
    the row's own `tools` and `chat_template_kwargs`."""
    if isinstance(row["prompt"], str):
        return row["prompt"]
    return _rendered(processor, row, row["prompt"], add_generation_prompt=True)


def _rendered(
    processor: PreTrainedTokenizerBase | ProcessorMixin, row: dict[str, Any], messages: list[dict], **options: Any
) -> str:
    """Messages through the chat template, with the row's own `tools` and `chat_template_kwargs`."""
    tools = row.get("tools")  # TRL takes them as JSON too
    options |= {"tools": json.loads(tools) if isinstance(tools, str) else tools} if tools else {}
    options |= row.get("chat_template_kwargs") or {}
    return processor.apply_chat_template(messages, tokenize=False, **options)


def expected_ids(processor: PreTrainedTokenizerBase | ProcessorMixin, row: dict[str, Any]) -> list[int]:
    """
    The tokens of a row's reply up to its end, as the model learns to write them.

    Chat templates add to a reply: an empty `<think>` block, or the calls of tools. So a reply is what the template
    writes after the prompt. Where the prompt as it is asked is not the beginning of the whole, it is the text alone.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    text = text_of(row["completion"])
    if not isinstance(row["completion"], str):
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(processor, ProcessorMixin):  # their templates expect lists of parts
            prompt, completion = _in_parts(prompt), _in_parts(completion)
        asked = _rendered(processor, row, prompt, add_generation_prompt=True)
        whole = _rendered(processor, row, prompt + completion)
        if whole.startswith(asked):
            text = whole.removeprefix(asked)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids


def warn_long_replies(
    processor: PreTrainedTokenizerBase | ProcessorMixin, max_new_tokens: int, *datasets: Dataset
) -> None:
    """Warns, with counts, if answers of `max_new_tokens` are too short for what is expected in these rows."""
    tokenizer = getattr(processor, "tokenizer", processor)
    replies = [expected_ids(processor, row) for dataset in datasets for row in _texts(dataset, "completion")]
    too_long = [
        len(ids)
        for ids in replies
        if len(ids) > max_new_tokens  # its end may be white space and special tokens, which do not count
        and tokenizer.decode(ids, skip_special_tokens=True).strip()
        != tokenizer.decode(ids[:max_new_tokens], skip_special_tokens=True).strip()
    ]
    if too_long:
        logger.warning(
            f"{len(too_long):,} of {counted(len(replies), 'expected answer')} {'is' if len(too_long) == 1 else 'are'} "
            f"longer than --max_new_tokens {max_new_tokens}. Generated answers end there, and exact match counts them "
            f"as wrong. The longest has {max(too_long):,} tokens: --max_new_tokens {max(too_long)} is enough for all."
        )


def _in_parts(messages: list[dict]) -> list[dict]:
    """The messages with each text as a list of one part, as TRL gives them to the chat template of a processor."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def final_answer(text: str) -> str:
    """What comes after the reasoning of a reply (`<think> ... </think>`), if there is any."""
    before, end, after = text.partition("</think>")
    return (after if end else before).strip()


def text_of(turns: str | list[dict]) -> str:
    """The text of a prompt or completion: of its last message, and of that the text parts (images stand beside it) and
    the calls of tools."""
    if isinstance(turns, str):
        return turns
    content = turns[-1].get("content") or ""  # there may be none beside a call
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in turns[-1].get("tool_calls") or []]
    return "\n".join([text, *calls] if text else calls)


def exact_match(
    answers: list[str], dataset: Dataset, processor: PreTrainedTokenizerBase | ProcessorMixin | None = None
) -> float:
    """
    Fraction of the answers that are the expected reply, outer spaces aside. Of replies with reasoning
    (`<think> ... </think>`), what comes after it is compared.

    Args:
        answers (`list[str]`): one per example, in the order of the dataset.
        dataset ([`~datasets.Dataset`]): with a column `completion`, and `prompt` where a processor is given.
        processor ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*): of the
            model. What is expected is then the reply as its chat template writes it, encoded and decoded as an answer
            is. Without it, the completion's text.

    Returns:
        `float`: between 0 and 1.

    Raises:
        `ValueError`: if there are no answers, or not one per example.
    """
    right = [answer == expected for answer, expected in _pairs("exact_match", answers, dataset, processor)]
    return sum(right) / len(right)


def character_error_rate(
    answers: list[str], dataset: Dataset, processor: PreTrainedTokenizerBase | ProcessorMixin | None = None
) -> float:
    """
    Characters to insert, delete or replace to turn the answers into the expected replies, outer spaces aside, per
    character of those replies: the usual score of text recognition.

    Args:
        answers (`list[str]`), dataset ([`~datasets.Dataset`]), processor (*optional*): as in [`exact_match`].

    Returns:
        `float`: 0 if all is right; above 1 where answers are much longer than what was expected.

    Raises:
        `ValueError`: if there are no answers, or not one per example.
    """
    pairs = _pairs("character_error_rate", answers, dataset, processor)
    return sum(edit_distance(*pair) for pair in pairs) / max(1, sum(len(expected) for _, expected in pairs))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: characters to insert, delete or replace to turn `a` into `b`."""
    distances = list(range(len(b) + 1))  # of what has been seen of `a` to each beginning of `b`
    for i, of_a in enumerate(a, 1):
        diagonal, distances[0] = distances[0], i
        for j, of_b in enumerate(b, 1):
            replaced = diagonal + (of_a != of_b)
            diagonal = distances[j]
            distances[j] = min(replaced, distances[j] + 1, distances[j - 1] + 1)
    return distances[-1]


def _pairs(
    score: str, answers: list[str], dataset: Dataset, processor: PreTrainedTokenizerBase | ProcessorMixin | None
) -> list[tuple[str, str]]:
    """Each answer beside what was expected, without reasoning and outer spaces."""
    if not answers or len(answers) != len(dataset):
        raise ValueError(
            f"{score}() got {counted(len(answers), 'answer')} to {counted(len(dataset), 'example')}. It needs one "
            "answer per example, in the order of the dataset, and at least one."
        )
    if processor is None:
        expected = [text_of(completion) for completion in dataset["completion"]]
    else:
        tokenizer = getattr(processor, "tokenizer", processor)
        ids = [expected_ids(processor, row) for row in _texts(dataset, "completion")]
        expected = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [(final_answer(ours), final_answer(theirs)) for ours, theirs in zip(answers, expected, strict=True)]


def _texts(dataset: Dataset, *columns: str) -> Dataset:
    """What a prompt is made of, and those columns. Images stay on the disk."""
    read = ("prompt", "tools", "chat_template_kwargs", *columns)
    return dataset.select_columns([name for name in read if name in dataset.column_names])


def format_samples(dataset: Dataset, answers: dict[str, list[str]]) -> str:
    """Prompts with what was expected and what was answered, by each of those named in `answers`, without reasoning."""
    answers = {printable(name): given for name, given in answers.items()}
    width = max(map(len, ["expected", *answers]))
    lines = []
    for i, (prompt, completion) in enumerate(zip(dataset["prompt"], dataset["completion"], strict=True)):
        lines += ["", f"  {'prompt':<{width}}  {_one_line(text_of(prompt))}"]
        lines.append(f"  {'expected':<{width}}  {_one_line(final_answer(text_of(completion)))}")
        lines += [f"  {name:<{width}}  {_one_line(final_answer(given[i]))}" for name, given in answers.items()]
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return shortened(printable(text), 100)
