"""The built-in model and datasets for text: nothing is downloaded.

`dates` and `tiny_qwen3` belong together: written dates in six languages to ISO 8601, and a model that learns it from
nothing on a laptop's CPU in about a minute. `docstrings` is real text for real models: functions of Python's own
standard library, to be described in one line.

Every dataset has TRL's conversational prompt-completion columns, so that `SFTTrainer` computes the loss on the
completions alone.
"""

from __future__ import annotations

import ast
import os
import random
import sysconfig
import tokenize
import warnings
from collections.abc import Callable
from datetime import date
from functools import cache
from itertools import product
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

FIRST_DAY, LAST_DAY = date(1800, 1, 1), date(2099, 12, 31)

MONTHS = {
    "en": "January February March April May June July August September October November December",
    "de": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    "fr": "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
    "es": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
    "it": "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre",
    "nl": "januari februari maart april mei juni juli augustus september oktober november december",
}
SHORT_MONTHS = {
    "en": "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec",
    "de": "Jan Feb Mär Apr Mai Jun Jul Aug Sep Okt Nov Dez",
    "fr": "janv févr mars avr mai juin juil août sept oct nov déc",
    "es": "ene feb mar abr may jun jul ago sept oct nov dic",
    "it": "gen feb mar apr mag giu lug ago set ott nov dic",
    "nl": "jan feb mrt apr mei jun jul aug sep okt nov dec",
}
WEEKDAYS = {
    "en": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "de": "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag",
    "fr": "lundi mardi mercredi jeudi vendredi samedi dimanche",
    "es": "lunes martes miércoles jueves viernes sábado domingo",
    "it": "lunedì martedì mercoledì giovedì venerdì sabato domenica",
    "nl": "maandag dinsdag woensdag donderdag vrijdag zaterdag zondag",
}
# Per language and order: the everyday form, and the long one. {o} is the ordinal day.
PHRASES = {
    ("en", "dmy"): ("{d} {m} {y}", "the {o} of {m}, {y}"),
    ("en", "mdy"): ("{m} {d}, {y}", "{m} the {o}, {y}"),
    ("en", "ymd"): ("{y} {m} {d}", "{y}, {m} the {o}"),
    ("de", "dmy"): ("{d}. {m} {y}", "der {d}. {m} des Jahres {y}"),
    ("de", "mdy"): ("{m} {d}, {y}", "{m}, der {d}. des Jahres {y}"),
    ("de", "ymd"): ("{y} {m} {d}", "im Jahr {y}, {m}, der {d}."),
    ("fr", "dmy"): ("{d} {m} {y}", "le {o} {m} de l'an {y}"),
    ("fr", "mdy"): ("{m} {d}, {y}", "{m}, le {o}, de l'an {y}"),
    ("fr", "ymd"): ("{y} {m} {d}", "en l'an {y}, {m}, le {o}"),
    ("es", "dmy"): ("{d} de {m} de {y}", "el {d} de {m} del año {y}"),
    ("es", "mdy"): ("{m} {d}, {y}", "{m}, el {d}, del año {y}"),
    ("es", "ymd"): ("{y} {m} {d}", "en el año {y}, {m}, el {d}"),
    ("it", "dmy"): ("{d} {m} {y}", "il {o} {m} dell'anno {y}"),
    ("it", "mdy"): ("{m} {d}, {y}", "{m}, il {o}, dell'anno {y}"),
    ("it", "ymd"): ("{y} {m} {d}", "nell'anno {y}, {m}, il {o}"),
    ("nl", "dmy"): ("{d} {m} {y}", "de {o} {m} van het jaar {y}"),
    ("nl", "mdy"): ("{m} {d}, {y}", "{m}, de {o}, van het jaar {y}"),
    ("nl", "ymd"): ("{y} {m} {d}", "in het jaar {y}, {m}, de {o}"),
}
DIGIT_FORMS = {
    ("digits", "dmy", "dots"): "{d:02}.{n:02}.{y}",
    ("digits", "dmy", "short dots"): "{d}.{n}.{y}",
    ("digits", "ymd", "slashes"): "{y}/{n:02}/{d:02}",
    ("digits", "ymd", "joined"): "{y}{n:02}{d:02}",
    ("digits", "ymd", "dots"): "{y}.{n:02}.{d:02}",
}
LANGUAGES, ORDERS, STYLES = tuple(MONTHS), ("dmy", "mdy", "ymd"), ("full", "short", "weekday", "long")

# A format is (language, order, style). The held-out ones are two of each language's twelve, laid out so that every
# (language, order), (language, style) and (order, style) pair is still trained; and one of the forms in digits.
FORMATS = (*product(LANGUAGES, ORDERS, STYLES), *DIGIT_FORMS)
HELD_OUT_FORMATS = (
    *((language, ORDERS[i % 3], STYLES[i % 4]) for i, language in enumerate(LANGUAGES)),
    *((language, ORDERS[(i + 1) % 3], STYLES[(i + 2) % 4]) for i, language in enumerate(LANGUAGES)),
    ("digits", "ymd", "dots"),
)


def _ordinal(day: int, language: str) -> str:
    if language == "en":
        return f"{day}{'th' if 10 < day < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"
    if language == "nl":
        return f"{day}e"
    if day == 1:  # French and Italian count only the first of a month
        return {"fr": "1er", "it": "1º"}.get(language, "1")
    return str(day)


def write_date(day: date, form: tuple[str, str, str]) -> str:
    """
    Writes a date in one of `FORMATS`.

    Args:
        day (`datetime.date`): the date.
        form (`tuple[str, str, str]`): language, order and style, e.g. `("en", "dmy", "long")`.

    Returns:
        `str`: e.g. `"the 3rd of March, 1998"`.
    """
    language, order, style = form
    if form in DIGIT_FORMS:
        return DIGIT_FORMS[form].format(d=day.day, n=day.month, y=day.year)
    names = SHORT_MONTHS if style == "short" else MONTHS
    phrase = PHRASES[language, order][style == "long"].format(
        d=day.day, o=_ordinal(day.day, language), m=names[language].split()[day.month - 1], y=day.year
    )
    return f"{WEEKDAYS[language].split()[day.weekday()]}, {phrase}" if style == "weekday" else phrase


def _prompt_completion(pairs: list[tuple[str, str]]) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": question}] for question, _ in pairs],
            "completion": [[{"role": "assistant", "content": answer}] for _, answer in pairs],
        }
    )


def dates(train: int = 8_000, test: int = 300, seed: int = 0) -> DatasetDict:
    """
    Written dates to ISO 8601: `"the 3rd of March, 1998"` to `"1998-03-03"`.

    Six languages, three orders and four styles, and a few forms in digits, for days of the years 1800 to 2099. No
    form is ambiguous: the year has four digits; the month is a word, no spelling of which means another month in any
    of the languages; and where it is a number instead, either the year comes first and the day last, or the separator
    is a dot and the day comes first. (`03/04/1998` never appears.) Some orders are not what people would write in
    that language; they are there so that a model has to read and cannot guess.

    Args:
        train (`int`, *optional*, defaults to `8_000`): examples to train on.
        test (`int`, *optional*, defaults to `300`): examples in each of the two test splits.
        seed (`int`, *optional*, defaults to `0`): of the draw. The test splits do not depend on `train`.

    Returns:
        [`~datasets.DatasetDict`] with the conversational columns `prompt` and `completion`, and no day in two splits:

        - `train`;
        - `test`: days never seen, in formats that were;
        - `test_formats`: days never seen, in the `HELD_OUT_FORMATS`: combinations of language, order and style that
          were never seen, although each of their parts was.

    Raises:
        `ValueError`: if there are fewer days than examples asked for.
    """
    first, last = FIRST_DAY.toordinal(), LAST_DAY.toordinal()
    if train + 2 * test > last - first + 1:
        raise ValueError(
            f"dates() has {last - first + 1} days, and every example takes one of its own; train={train} and two test "
            f"splits of {test} need {train + 2 * test}. Ask for fewer."
        )
    rng = random.Random(seed)
    days = list(range(first, last + 1))
    rng.shuffle(days)
    trained = [form for form in FORMATS if form not in HELD_OUT_FORMATS]

    def trained_text(day: date) -> str:
        return write_date(day, rng.choice(trained))

    def unseen_text(day: date) -> str:
        # Short and long names coincide in some months, and some languages do: such a text would not be new.
        known = {write_date(day, form) for form in trained}
        return rng.choice([text for form in HELD_OUT_FORMATS if (text := write_date(day, form)) not in known])

    def draw(count: int, write: Callable[[date], str]) -> Dataset:
        drawn = [date.fromordinal(days.pop()) for _ in range(count)]
        return _prompt_completion([(write(day), day.isoformat()) for day in drawn])

    # The test splits come first, so that they stay the same whatever the size of the training split.
    splits = {
        "test": draw(test, trained_text),
        "test_formats": draw(test, unseen_text),
        "train": draw(train, trained_text),
    }
    return DatasetDict({name: splits[name] for name in ("train", "test", "test_formats")})


# One special token opens each turn and one ends it: few tokens per example, and each turn ends with eos.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the words of the date formats: any text survives, each digit is one token."""
    tokenizer = Tokenizer(models.BPE())
    # Words without their leading space: a month is the same token wherever it stands in the date.
    pieces = Regex(r"\p{L}+|\p{N}|\s|[^\p{L}\p{N}\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,  # room for every word; the words ask for fewer
        min_frequency=1,
        special_tokens=["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    month_ends = [date(2000, month, day) for month in range(1, 13) for day in (1, 2, 3, 4, 11, 22, 28)]
    tokenizer.train_from_iterator((write_date(day, form) for day in month_ends for form in FORMATS), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def tiny_qwen3(seed: int = 0) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """
    A Qwen3 of under a million parameters with random weights, and its tokenizer, trained on the spot for `dates`.

    Args:
        seed (`int`, *optional*, defaults to `0`): of the weights. The global random state is left as it was.

    Returns:
        `tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]`: the model in float32 on the CPU, and the tokenizer with a
        chat template; the end and padding tokens are set in both and in the generation config.
    """
    tokenizer = _tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


SKIPPED_FOLDERS = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}


def _without_docstring(lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    """The function's source, dedented, with no docstring in it; None where that takes more than dropping lines."""
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept = dict(enumerate(lines[start - 1 : node.end_lineno], start))
    for inner in ast.walk(node):
        if not isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if ast.get_docstring(inner, clean=False) is None:
            continue
        docstring = inner.body[0]
        if len(inner.body) == 1 or docstring.lineno == inner.lineno or docstring.end_lineno == inner.body[1].lineno:
            return None
        for number in range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1):
            del kept[number]
    indent = node.col_offset
    if any(line[:indent].strip() for line in kept.values()):  # a string's own lines stand further left
        return None
    return "\n".join(line[indent:].rstrip() for line in kept.values()).strip()


@cache  # it takes seconds, and neither seed nor size changes it
def _described_functions(root: str) -> dict[str, list[tuple[str, str]]]:
    """File under the root, relative to it, to its (source without docstring, first docstring line) pairs."""
    found, seen = {}, set()
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        for path in sorted(Path(folder) / name for name in files if name.endswith(".py")):
            with tokenize.open(path) as file:
                text = file.read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old strings
                tree = ast.parse(text)
            # Not splitlines(), which also splits at form feeds and would lose the line numbers.
            lines, pairs = text.split("\n"), []
            for node in ast.walk(tree):
                if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    continue
                summary, *more = (ast.get_docstring(node) or "").strip().split("\n")
                # A first line that runs on into the next is half a sentence.
                if not 20 <= len(summary) <= 120 or (more and more[0].strip()):
                    continue
                source = _without_docstring(lines, node)
                # Some files repeat functions of others: keep the first, or the split by file would leak.
                if source is None or not 40 <= len(source) <= 2_000 or source in seen:
                    continue
                seen.add(source)
                pairs.append((source, summary))
            if pairs:
                found[path.relative_to(root).as_posix()] = pairs
    return found


def docstrings(seed: int = 0, test: int = 300) -> DatasetDict:
    """
    Python functions to one-line descriptions, from the standard library of the Python that runs this.

    The completion is the first line of the function's docstring, where that is a paragraph of its own; the prompt
    shows the source without any docstring. The count depends on the Python version: about 4,200 pairs in 3.11.

    Args:
        seed (`int`, *optional*, defaults to `0`): of the split and of the order.
        test (`int`, *optional*, defaults to `300`): examples in the test split.

    Returns:
        [`~datasets.DatasetDict`] with the splits `train` and `test` and the conversational columns `prompt` and
        `completion`. No file gives to both splits, and no file gives more than a tenth of the test split.

    Raises:
        `RuntimeError`: if the standard library's source holds too few described functions.
    """
    stdlib = sysconfig.get_paths()["stdlib"]
    by_file = _described_functions(stdlib)
    rng = random.Random(seed)
    files = list(by_file)
    rng.shuffle(files)
    held_out: list[tuple[str, str]] = []
    rest: list[tuple[str, str]] = []
    for file in files:
        small = len(by_file[file]) <= max(test // 10, 1)
        (held_out if small and len(held_out) < test else rest).extend(by_file[file])
    if len(held_out) < test or not rest:
        raise RuntimeError(
            f"docstrings(test={test}) found {len(held_out) + len(rest)} described functions under {stdlib}, too few "
            "for the split. It needs a Python installed with the source of its standard library; or ask for a smaller "
            "test split."
        )
    rng.shuffle(held_out)
    rng.shuffle(rest)

    def ask(pairs: list[tuple[str, str]]) -> Dataset:
        question = "Describe this Python function in one line.\n\n```python\n{}\n```"
        return _prompt_completion([(question.format(source), summary) for source, summary in pairs])

    return DatasetDict({"train": ask(rest), "test": ask(held_out[:test])})


# The built-in datasets by name
DATASETS: dict[str, Callable[..., DatasetDict]] = {"dates": dates, "docstrings": docstrings}
