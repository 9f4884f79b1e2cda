"""Which replies are learned, and in how many rows: one per conversation where the chat template can mark its replies,
else one per reply."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import transformers
from datasets import Dataset, Features, List
from jinja2 import TemplateError
from packaging.version import Version
from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from trl import SFTConfig
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from .errors import DataError
from .formats import count_placeholders, text_of_content
from .images import RGB, image_column, images_in_lists
from .marks import learned_replies, without_marks

MAX_RENDERED = 2000  # conversations that the chat template has to write before training

logger = logging.getLogger(__name__)


def training_rows(
    dataset: Dataset,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    training: SFTConfig,
    train_on: str = "all",
    vision: bool = False,
) -> Dataset:
    """
    The rows to train on, of which only replies are learned: one row per conversation where that is possible.

    `completion_only_loss=False` asks for more: conversations stay as they are, and all of their tokens are learned.

    A conversation of several replies is one row under TRL's training version of its chat template
    (`assistant_only_loss`, which is switched on in `training`). Where there is no such version, each reply becomes a
    row of its own, with all that goes before it, and a warning says what that costs. A reply that is marked not to be
    learned (`marks.py`) is read by the model, as what goes before the next one, and not learned.

    Args:
        dataset ([`~datasets.Dataset`]): training split as [`load_data`] returns it.
        processor ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]): of the model. It
            gets the template of `training.chat_template_path`, if there is one.
        training (`SFTConfig`): gets `assistant_only_loss` and `completion_only_loss`.
        train_on (`str`, *optional*, defaults to `"all"`): `"all"` replies of a conversation, or the `"last"` one; of
            those that are not marked.
        vision (`bool`, *optional*, defaults to `False`): rows have images.

    Returns:
        [`~datasets.Dataset`]: with `messages`, or with `prompt` and `completion`, or with `text`.

    Raises:
        [`DataError`]: the rows are conversations, and there is no chat template, or it refuses one of them, or leaves
            its reply out; or settings that contradict each other, or need a template that marks replies.
    """
    _take_chat_template(processor, training)
    texts = dataset.select_columns([c for c in ("messages", "prompt", "completion") if c in dataset.column_names])
    if texts.column_names and not isinstance(texts[0].get("prompt"), str):
        _try_chat_template(texts, processor)
        _refuse_without_marks_of_replies(processor, training)
    if "messages" not in dataset.column_names:
        return dataset
    conversations = dataset.select_columns(["messages"])
    turns = [learned_replies(row["messages"]) for row in conversations]
    replies = sum(map(len, turns))
    if learns_prompts(training):
        if train_on == "last" or replies < sum(len(_replies(row["messages"])) for row in conversations):
            raise DataError(
                "completion_only_loss is false, so that all of a conversation is learned, and some replies are not to "
                "be (--train_on last, or marks in the rows): remove one of the two"
            )
        return images_in_lists(dataset)
    if train_on == "last" or replies == len(dataset):
        return to_prompt_completion(dataset, train_on)

    problem = whole_conversations_problem(processor, vision)
    # Of those after the last one that is learned, nothing is read
    all_learned = all(
        learned == _replies(row["messages"][: learned[-1] + 1])
        for learned, row in zip(turns, conversations, strict=True)
    )
    if vision and not all_learned:  # TRL learns all of a completion with images, the turns of the user too
        problem = problem or "with images, a conversation of which some replies are not learned cannot be one row"
    if problem is None:
        training.assistant_only_loss = True
        if not vision:  # the rows to validate and test on are prompts with one reply each
            training.completion_only_loss = True
        rows = _without_the_rest(dataset) if all_learned else to_prompt_completion(dataset, runs=True)
        logger.info(f"{len(dataset):,} conversations, {len(rows):,} rows: {replies:,} replies are learned.")
        return rows
    rows = to_prompt_completion(dataset)
    logger.warning(
        f"{len(dataset):,} conversations become {replies:,} rows, one per reply, with {_cost(conversations):.1f} "
        f"times the text: {problem}. --train_on last learns the last reply of each alone."
    )
    return rows


def learns_prompts(training: SFTConfig) -> bool:
    """Whether the user asks for a loss of all tokens (`--completion_only_loss false`), and not of replies alone."""
    return training.completion_only_loss is False and not training.assistant_only_loss


def _refuse_without_marks_of_replies(processor: PreTrainedTokenizerBase | ProcessorMixin, training: SFTConfig) -> None:
    """
    Raises:
        [`DataError`]: `assistant_only_loss`, and a chat template that cannot tell replies.
    """
    if training.assistant_only_loss and not has_generation_markers(processor.chat_template):
        try:
            get_training_chat_template(processor)
        except ValueError as error:
            raise DataError(
                "assistant_only_loss is true, and this model's chat template does not mark replies "
                "({% generation %}), nor has TRL a version of it that does: remove assistant_only_loss, replies alone "
                "are learned without it too; or give --chat_template_path"
            ) from error


def whole_conversations_problem(
    processor: PreTrainedTokenizerBase | ProcessorMixin, vision: bool = False
) -> str | None:
    """Why a conversation cannot be one row of which all replies are learned; `None` if it can.

    Args:
        processor ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]): of the model.
        vision (`bool`, *optional*, defaults to `False`): rows have images.
    """
    is_new = "assistant_only_loss" in inspect.signature(DataCollatorForVisionLanguageModeling).parameters
    if vision and not (is_new and Version(transformers.__version__) >= Version("5.18")):
        return "with images, one row per conversation needs TRL 1.16 and Transformers 5.18"
    tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    if not tokenizer.is_fast:
        return "this model's tokenizer (a slow one) cannot tell which tokens are replies"
    template = None
    if not has_generation_markers(processor.chat_template):
        try:
            template = get_training_chat_template(processor)
        except ValueError:
            return "TRL has no training version of this chat template"
    if not is_chat_template_stop_token_trained(processor, template):
        return "the chat template does not mark the end of a reply as part of it"
    return None


def _take_chat_template(processor: PreTrainedTokenizerBase | ProcessorMixin, training: SFTConfig) -> None:
    """The trainer takes that template too, after all that is decided by it here."""
    path = training.chat_template_path
    if path is None:
        return
    is_file = Path(path).is_file()
    processor.chat_template = (
        Path(path).read_text("utf-8") if is_file else AutoTokenizer.from_pretrained(path).get_chat_template()
    )


def _try_chat_template(texts: Dataset, processor: PreTrainedTokenizerBase | ProcessorMixin) -> None:
    """Lets the chat template write up to `MAX_RENDERED` conversations, spread evenly."""
    if processor.chat_template is None:
        raise DataError(
            "the rows are conversations, and this model has no chat template: take its instruct version, or give "
            "--chat_template_path (a .jinja file, or a model whose template is taken), or write the data as text in "
            '"prompt" and "completion"'
        )
    count = min(len(texts), MAX_RENDERED)
    for row in (k * len(texts) // count for k in range(count)):
        example = texts[row]
        messages = example["messages"] if "messages" in example else [*example["prompt"], *example["completion"]]
        here = f"train: row {row} of the rows to train on (roles: {', '.join(m['role'] for m in messages)})"
        if isinstance(processor, ProcessorMixin):  # their templates expect lists of parts
            messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
                for m in messages
            ]
        try:
            written = processor.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            raise DataError(f"{here}: the chat template refuses it: {error}") from error
        reply = text_of_content(messages[_replies(messages)[-1]].get("content"))
        if squeezed(reply)[-20:] not in squeezed(written):
            raise DataError(
                f"{here}: the chat template leaves its reply out (it ends in {reply[-60:]!r}): --chat_template_path "
                "takes another one"
            )
        calls = [call.get("function", call)["name"] for m in messages for call in m.get("tool_calls") or []]
        if any(name not in written for name in calls):
            raise DataError(
                f"{here}: the chat template leaves its calls of tools out ({', '.join(calls)[:60]}): "
                "--chat_template_path takes another one"
            )


def squeezed(text: str) -> str:
    """A text without its spaces, which templates strip and tokenizers move."""
    return "".join(text.split())


def _replies(messages: list[dict]) -> list[int]:
    return [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]


def _cost(conversations: Dataset) -> float:
    """Characters of one row per reply, in those of the conversations up to their last reply."""
    whole = split = 0
    for row in conversations:
        lengths = [len(text_of_content(message.get("content"))) for message in row["messages"]]
        ends = [sum(lengths[: turn + 1]) for turn in learned_replies(row["messages"])]
        whole, split = whole + ends[-1], split + sum(ends)
    return split / max(whole, 1)


def _without_the_rest(dataset: Dataset) -> Dataset:
    """Nothing that is learned sees what comes after the last reply that is learned; its images go too."""
    conversations = (row["messages"] for row in dataset.select_columns(["messages"]))
    if all(learned_replies(messages)[-1] == len(messages) - 1 for messages in conversations):
        return dataset
    stored = Features({"messages": dataset.features["messages"]})
    has_images = "images" in dataset.column_names

    def end(table: pa.Table) -> dict[str, list]:
        columns: dict[str, list] = {"messages": [], **({"images": []} if has_images else {})}
        conversations = stored.decode_batch({"messages": table["messages"].to_pylist()})["messages"]
        for i, messages in enumerate(conversations):
            kept = messages[: learned_replies(messages)[-1] + 1]
            columns["messages"].append(kept)
            if has_images:
                images = table["images"][i].as_py() or []
                explicit = count_placeholders(messages) > 0
                columns["images"].append(images[: count_placeholders(kept)] if explicit else images)
        return columns

    return (
        dataset.with_format("arrow")
        .map(end, batched=True, batch_size=100, features=dataset.features, desc="Ending at the last reply")
        .with_format(None)
    )


def _runs(messages: list[dict]) -> list[tuple[int, int]]:
    """First and last turn of each run of replies that are learned, with no other reply between them."""
    learned = learned_replies(messages)
    groups = itertools.groupby(_replies(messages), lambda turn: turn in learned)
    runs = [list(run) for is_learned, run in groups if is_learned]
    return [(run[0], run[-1]) for run in runs]


def to_prompt_completion(
    dataset: Dataset, train_on: str = "all", keep: Collection[str] = (), runs: bool = False
) -> Dataset:
    """
    Turns conversations into rows of which only the reply is learned, under any chat template.

    A row of `messages` becomes one row of `prompt` and `completion` per assistant message: everything before it (the
    system message too), and this message alone. So every reply is learned once, each as the model will have to write
    it, except those that are marked not to be learned (`marks.py`). A row of an earlier turn keeps the images whose
    placeholders are in its prompt. Without explicit placeholders, TRL puts all images into the first user message, and
    every row keeps all. Messages after the last assistant message are not learned.

    `prompt` and `completion` stay as they are (TRL learns the completion only), and so does `text` (all of it is
    learned). `image` becomes `images`, a list of one. Images are not decoded; those stored in the data itself, not as
    files, are copied into the cache of `datasets` once per turn.

    Args:
        dataset ([`~datasets.Dataset`]): one split as [`load`] returns it.
        train_on (`str`, *optional*, defaults to `"all"`): a row for `"all"` replies that are learned, or for the
            `"last"` of them alone.
        keep (`Collection[str]`, *optional*): columns to keep beside those that TRL reads.
        runs (`bool`, *optional*, defaults to `False`): one row for replies that follow each other, from the first to
            the last of them, if no reply that is not learned is between them. The turns of the user are in such a
            completion, and only `assistant_only_loss` leaves them out.

    Returns:
        [`~datasets.Dataset`]: with `prompt` and `completion`, `images` if there were images, `tools` and
            `chat_template_kwargs` if they were there, and `keep`.
    """
    dataset = images_in_lists(dataset)
    if "messages" not in dataset.column_names:
        return dataset
    messages = dataset.features["messages"]
    others = {c: dataset.features[c] for c in ("tools", "chat_template_kwargs", *keep) if c in dataset.column_names}
    images = {"images": List(RGB)} if image_column(dataset.column_names) else {}
    stored = Features({"messages": messages, **others})

    def expand(table: pa.Table) -> dict[str, list]:
        # The table is raw storage, in which images are paths or compressed bytes: only the text is decoded
        columns = stored.decode_batch({c: table[c].to_pylist() for c in stored})
        if images:
            columns["images"] = table["images"].to_pylist()
        rows: dict[str, list] = {c: [] for c in ("prompt", "completion", *others, *images)}
        for i, conversation in enumerate(columns["messages"]):
            explicit = count_placeholders(conversation) > 0
            turns = learned_replies(conversation)[-1 if train_on == "last" else 0 :]
            for first, last in _runs(conversation) if runs else zip(turns, turns, strict=True):
                prompt = conversation[:first]
                rows["prompt"].append(without_marks(prompt))
                rows["completion"].append(conversation[first : last + 1])
                for column in others:
                    rows[column].append(columns[column][i])
                if images:
                    of_row = columns["images"][i] or []
                    rows["images"].append(of_row[: count_placeholders(prompt)] if explicit else of_row)
        return rows

    return (
        dataset.with_format("arrow")
        .map(
            expand,
            batched=True,
            batch_size=100,  # images stored in the data are in memory for one batch
            remove_columns=dataset.column_names,
            features=Features({"prompt": messages, "completion": messages, **others, **images}),
            desc="One row per reply",
        )
        .with_format(None)
    )
