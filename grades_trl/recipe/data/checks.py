"""Whether rows can be trained on, found before the model is loaded, so that a bad row costs seconds and not an hour.

The formats are TRL's own, which [`formats.to_trl_format`] has made: `messages`, `prompt` and `completion` (both text
or both messages), or plain `text`, and `image` or `images` beside them for vision.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from datasets import Dataset, Value
from tqdm.auto import tqdm

from grades_trl.recipe.bad_input import printable
from grades_trl.recipe.scored import RowsLeft
from grades_trl.wording import counted

from .errors import DataError
from .formats import ROLES, SYSTEM_ROLES, count_placeholders, text_columns, text_of_content
from .images import count_images, image_column, open_images
from .marks import asks, marks_of, problem_in_marks

# Image tokens of models that do not write "<image>", in plain text prompts
OTHER_IMAGE_TOKEN = re.compile(r"<[^<>]*(image|img)[^<>]*>|\[IMG\]", re.IGNORECASE)
NO_VIDEO_OR_AUDIO = "video and audio are not supported, expected text and images"
# Columns of data for other kinds of training, as TRL, LLaMA-Factory and ms-swift name them
PAIRS = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"))
FEEDBACK = ("label", "kto_tag")
# What stands for an entry of ms-swift's column "objects", which fills it in
OBJECT_MARKS = ("<bbox>", "<ref-object>")

logger = logging.getLogger(__name__)


def check(dataset: Dataset, vision: bool, name: str = "train", text_column: str = "text") -> None:
    """
    Looks at every row for what would stop or spoil the training. [`load`] calls it.

    The images of up to 2,000 rows are opened and decoded (with more rows: of 2,000 spread evenly). An image that is
    broken in another row raises the error of PIL or the file system in the data loader during training, which does not
    tell the row.

    Args:
        dataset ([`~datasets.Dataset`]): rows in one of TRL's formats.
        vision (`bool`): whether rows must have images (`image` or `images`). A row may have an empty list.
        name (`str`, *optional*, defaults to `"train"`): what the split is called in messages.
        text_column (`str`, *optional*, defaults to `"text"`): column that holds plain text.

    Raises:
        [`DataError`]: with the split, the number of the row (counted from 0), what was found and what was expected.
    """
    if len(dataset) == 0:
        raise DataError(f"{name}: the split is empty, expected at least one row")
    columns = dataset.column_names
    _refuse_video_and_audio(dataset, name)
    of_text = text_columns(columns, text_column)
    _refuse_preferences(dataset, of_text, name)
    if not of_text and "segments" in columns:
        raise DataError(
            f'{name}: the column "segments" is axolotl\'s input_output, texts of which some are learned: expected '
            '"messages", with the replies that are learned, or "prompt" and "completion"'
        )
    if not of_text and "input_ids" in columns:
        raise DataError(f"{name}: the rows are tokenized already (input_ids), expected text: TRL tokenizes it")
    if not of_text:
        raise DataError(
            f'{name}: expected a column "messages", or "prompt" and "completion", or "{text_column}"; '
            f"found: {', '.join(columns)}. Say which columns they are, for example "
            "--columns prompt=NAME completion=NAME, or text=NAME to learn the whole text"
        )
    of_images = image_column(columns)
    if of_images and not vision:
        raise DataError(f'{name}: the rows have images (column "{of_images}"): use recipes/sft_vlm.py')
    if vision and not of_images:
        raise DataError(
            f'{name}: expected a column "image" or "images"; found: {", ".join(columns)}. '
            "For data without images use recipes/sft_text.py"
        )
    if vision and of_text == [text_column]:
        raise DataError(
            f'{name}: TRL does not train on "{text_column}" with images, expected a column "messages", or "prompt" '
            'and "completion", or a text without "<image>", which is then learned as the caption of its image'
        )

    counts = count_images(dataset, of_images) if of_images else [0] * len(dataset)
    conversational, rows_asking = None, []
    beside = [column for column in BESIDE_MESSAGES if column in columns]
    read = dataset.select_columns([*of_text, *beside])
    rows = tqdm(read, desc=f"Checking {printable(name)}", delay=2, leave=False, disable=None)
    for row, (example, count) in enumerate(zip(rows, counts, strict=True)):
        problem = _problem(example, of_text, vision, count)
        for column in beside if isinstance(example[of_text[0]], list) else ():
            problem = problem or BESIDE_MESSAGES[column](example[column])
            if vision and not problem and _is_given(example[column]):
                problem = f"has {column}, which TRL does not show to the chat template with images: "
                problem += BESIDE_IMAGES[column]
        if "objects" in columns and any(mark in str([example[c] for c in of_text]) for mark in OBJECT_MARKS):
            problem = problem or (
                f'has {" or ".join(OBJECT_MARKS)}, which ms-swift fills in from the column "objects", with boxes in '
                "the way of each model: write the names and boxes into the messages"
            )
        # TRL asks the first row only
        this = isinstance(example[of_text[0]], list)
        if conversational is None:
            conversational = this
        elif not problem and this != conversational:
            kinds = ("text", "messages")
            problem = f"is {kinds[this]}, but row 0 is {kinds[conversational]}, expected the same in every row"
        if problem:
            raise DataError(f"{name}: row {row} (the first is 0): {problem}")
        if this and any(asks(message) for message in _not_learned(example, of_text)):
            rows_asking.append(row)
    if rows_asking:
        logger.warning(
            f"{name}: {counted(len(rows_asking), 'row')} (the first is row {rows_asking[0]}) "
            f"mark{'s' * (len(rows_asking) == 1)} other messages than replies to be learned: only replies are."
        )
    if of_images:
        open_images(dataset, of_images, name)


def _problem(example: dict[str, Any], columns: list[str], vision: bool, count: int) -> str | None:
    values = [example[column] for column in columns]
    # Conversational or not is for TRL what the first column is
    if columns == ["messages"] or (len(columns) == 2 and isinstance(values[0], list)):
        for column, messages in zip(columns, values, strict=True):
            problem = _problem_in_messages(column, messages, vision)
            if problem:
                return problem
        problem = _problem_in_turns(*values)
        return problem or (_problem_in_placeholders(values, count) if vision else None)
    for column, text in zip(columns, values, strict=True):
        if not isinstance(text, str) or not text.strip():
            return f"{column} is {_short(text)}, expected {'text' if column == columns[0] else 'text, as in prompt'}"
    # Other models than LLaVA have other tokens, which only their processors know
    found = values[0].count("<image>")
    if vision and found != count and (found or not OTHER_IMAGE_TOKEN.search(values[0])):
        return f'prompt has {found} "<image>" and the row has {counted(count, "image")}, expected as many'
    return None


def _not_learned(example: dict[str, Any], columns: list[str]) -> list[dict]:
    """The messages that are no replies: all of a prompt, which may have earlier replies."""
    return [m for m in example[columns[0]] if m["role"] != "assistant" or columns != ["messages"]]


def _refuse_video_and_audio(dataset: Dataset, name: str) -> None:
    for column in ("video", "videos", "audio", "audios"):
        if column not in dataset.column_names:
            continue
        tables = dataset.select_columns([column]).with_format("arrow").iter(1000)
        rows = (value for table in tables for value in table[column])
        row = next((row for row, value in enumerate(rows) if value.is_valid and value.as_py()), None)
        if row is not None:
            raise DataError(
                f'{name}: row {row} (the first is 0): the column "{column}" is not empty: {NO_VIDEO_OR_AUDIO}. Remove '
                "the column, or these rows"
            )


def _refuse_preferences(dataset: Dataset, of_text: list[str], name: str) -> None:
    """Data for DPO and KTO. A better and a worse answer beside a whole conversation are left out, as in UltraFeedback:
    the conversation is the better one."""
    columns = dataset.column_names
    pair = next((pair for pair in PAIRS if all(column in columns for column in pair)), None)
    messages = dataset.select_columns(of_text)[0][of_text[0]] if of_text == ["messages"] else None
    last = messages[-1] if isinstance(messages, list) and messages else None
    is_prompt = isinstance(last, dict) and last.get("role") == "user"
    if pair and (not of_text or is_prompt):
        raise DataError(
            f"{name}: the columns {' and '.join(pair)} are a better and a worse answer, for DPO; these recipes learn "
            "one answer. To learn the better one, make it the last message of the conversation, or name it, as in "
            f"--columns messages={pair[0]} (where it is a whole conversation) or prompt=NAME completion={pair[0]}. "
            "TRL's DPOTrainer learns from both, with GradESMixin too"
        )
    feedback = next((c for c in FEEDBACK if c in columns and _is_feedback(dataset, c, of_text)), None)
    if feedback and of_text:
        raise DataError(
            f'{name}: the column "{feedback}" says of each answer whether it is good, for KTO; these recipes would '
            "learn the bad ones too. Remove their rows, and then the column. TRL's KTOTrainer learns from both, with "
            "GradESMixin too"
        )


def _is_feedback(dataset: Dataset, column: str, of_text: list[str]) -> bool:
    """Whether a column is true or false; beside prompts and replies, whether it is 1 in some rows and 0 in the others.
    Beside texts that is a class, for a classifier."""
    feature = dataset.features[column]
    if feature == Value("bool"):
        return True
    is_number = isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "float"))
    are_replies = of_text in (["messages"], ["prompt", "completion"])
    return is_number and are_replies and {*dataset.unique(column)} - {None} == {0, 1}


def _problem_in_messages(column: str, messages: Any, vision: bool) -> str | None:
    if not isinstance(messages, list) or not messages:
        return f'{column} is {_short(messages)}, expected a list of {{"role": ..., "content": ...}}'
    for i, message in enumerate(messages):
        here = f"{column}[{i}]"
        if not isinstance(message, dict) or "role" not in message:
            return f'{here} is {_short(message)}, expected {{"role": ..., "content": ...}}'
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            return f"{here} has the role {_short(role)}, expected one of {', '.join(ROLES)}"
        problem = problem_in_marks(message)
        if problem:
            return f"{here} {problem}"
        reasoning = message.get("reasoning_content")
        if isinstance(reasoning, list) and not all(
            isinstance(p, dict) and isinstance(p.get("text"), str) for p in reasoning
        ):
            return f"{here} has the reasoning_content {_short(reasoning)}, expected text or a list of parts of text"
        if role == "assistant" and message.get("tool_calls") and not content:
            continue
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind.removeprefix("input_").removesuffix("_url") in ("video", "audio"):
                return f"{here} has a part of the type {kind}: {NO_VIDEO_OR_AUDIO}"
            if kind == "image" and not vision:
                return f"{here} has an image: use recipes/sft_vlm.py"
            if kind == "image" and "problem" in part:
                return f"{here} {part['problem']}"
            if kind == "image" and role in ("assistant", "tool"):
                return f"{here} has an image, but its role is {role}: expected images in system or user messages"
            if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
                return (
                    f"{here} has the part {_short(part)}, "
                    'expected {"type": "text", "text": ...} or {"type": "image"}'
                )
        if not isinstance(content, (str, list)):
            return f"{here} has the content {_short(content)}, expected text or a list of parts"
        if (
            role in ("user", "assistant")
            and not text_of_content(content).strip()
            and not count_placeholders([message])
        ):
            return f"{here} has the content {_short(content)}, expected some text"
    return None


def _problem_in_turns(prompt: list[dict], completion: list[dict] | None = None) -> str | None:
    if completion is not None:
        left_out = next((i for i, m in enumerate(completion) if any(not mark for mark in marks_of(m).values())), None)
        if left_out is not None and completion[left_out]["role"] == "assistant":
            return (
                f"completion[{left_out}] is marked not to be learned, but a completion is what is learned. Remove the "
                'row, or put prompt and completion into one list, "messages"'
            )
        if completion[-1]["role"] != "assistant":
            return f"completion ends with the role {completion[-1]['role']}, expected an assistant message"
        if prompt[-1]["role"] in SYSTEM_ROLES:
            return f"prompt ends with the role {prompt[-1]['role']}, expected a user or tool message"
        return None
    roles = [message["role"] for message in prompt]
    if "assistant" not in roles:
        return f"messages has no assistant message, expected at least one; its roles are {', '.join(roles)}"
    turn = roles.index("assistant")
    if turn == 0 or roles[turn - 1] in SYSTEM_ROLES:
        return f"messages[{turn}] is an assistant message without a prompt, expected a user message before it"
    return None


def _problem_in_placeholders(columns: list[list[dict]], count: int) -> str | None:
    messages = [message for column in columns for message in column]
    if any("<image>" in text_of_content(message.get("content")) for message in messages):
        return 'a reply has "<image>" in its text, expected images in system or user messages'
    if len(columns) == 2 and count_placeholders(columns[1]):
        return "completion has image placeholders, expected them in prompt only"
    found = count_placeholders(messages)
    # Without any, TRL puts all images into the first user message, if that is a string
    implicit = not found and all(isinstance(m.get("content"), str) for m in messages if m["role"] == "user")
    if found != count and not implicit:
        return (
            f'the messages have {counted(found, "image")} ("<image>" in a text, or {{"type": "image"}}) and the row '
            f"has {counted(count, 'image')}, expected as many"
        )
    return None


def _problem_in_tools(tools: Any) -> str | None:
    given = tools
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    except json.JSONDecodeError:
        return f"tools is {_short(given)}, which is no JSON"
    are_tools = isinstance(tools, list) and all(
        isinstance(tool, dict) and "name" in (tool.get("function") or tool) for tool in tools
    )
    if tools and not are_tools:
        expected = '{"type": "function", "function": {"name": ..., "parameters": ...}}'
        return f"tools is {_short(given)}, expected a list of {expected}"
    return None


def _problem_in_kwargs(kwargs: Any) -> str | None:
    if kwargs is None or isinstance(kwargs, dict):
        return None
    return f"chat_template_kwargs is {_short(kwargs)}, expected an object of arguments"


# What chat templates read beside messages
BESIDE_MESSAGES = {"tools": _problem_in_tools, "chat_template_kwargs": _problem_in_kwargs}
# What to do with it where there are images: TRL's collator of images drops it, while answers would be asked with it
BESIDE_IMAGES = {
    "tools": "remove the column, or write the tools into the system message, as this model's template does",
    "chat_template_kwargs": "remove the column, or give --chat_template_path a template that has them as its defaults",
}


def _is_given(beside: Any) -> bool:
    """Whether tools or arguments are more than an empty list or object, perhaps in JSON, with null of Arrow in it."""
    value = json.loads(beside) if isinstance(beside, str) and beside else beside
    return any(item is not None for item in value.values()) if isinstance(value, dict) else bool(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def warn_truncated_examples(rows: dict[str, RowsLeft], max_length: int | None) -> None:
    """Warns of examples that `max_length` truncates. TRL drops those that lose their whole reply without a word; with
    images, it learns nothing from them.

    Args:
        rows (`dict[str, RowsLeft]`): split -> what is left of it, see [`scored.rows_left`].
        max_length (`int` or `None`): as in the training arguments.

    Raises:
        [`DataError`]: nothing is left to train on, to validate on, or to test on.
    """
    for split, of in rows.items():
        looked_at = of.given if of.measured is None else of.measured
        found = f"{split}: of {counted(looked_at, 'example')}"
        found += f" (a sample of the {of.given:,})" if looked_at < of.given else ""
        found += f", {counted(looked_at - of.left, 'has', 'have')} no reply left within --max_length {max_length}"
        if of.left == 0:
            raise DataError(f"{found}: raise it.")
        if of.left < looked_at or of.full:
            used = "dropped" if of.measured is None else "nothing is learned there"
            used = used if split == "train" else "dropped, and not scored" if of.measured is None else "not scored"
            warning = f"{found}: {used}. {counted(of.full, 'more reaches', 'more reach')} it"
            if of.cut:
                warning += f", of which {counted(of.cut, 'is', 'are')} cut off"
                warning += ", without the end-of-sequence token that ends a reply"
            logger.warning(f"{warning}.")
