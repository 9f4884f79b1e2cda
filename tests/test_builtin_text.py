"""The embedded data and model: every answer checked independently, every split checked for leaks."""

import ast
import inspect
import re
import shlex
import statistics
import sysconfig
import textwrap
from datetime import date, datetime, timedelta
from itertools import combinations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grades_trl.recipe import builtin

STDLIB = sysconfig.get_paths()["stdlib"]


@pytest.fixture(scope="module")
def splits():
    return builtin.dates(train=2_000, test=300)


@pytest.fixture(scope="module")
def tiny():
    return builtin.tiny_qwen3()


@pytest.fixture(scope="module")
def described():
    return builtin.docstrings()


def question(example):
    return example["prompt"][0]["content"]


def answer(example):
    return example["completion"][0]["content"]


def days_of(split):
    return {answer(example) for example in split}


# Dates


@pytest.mark.parametrize("form", builtin.FORMATS, ids=" ".join)
def test_every_form_carries_its_day_and_year(form):
    day = date(1999, 12, 31)
    for _ in range(400):
        day += timedelta(days=11)
        text = builtin.write_date(day, form)
        numbers = re.findall(r"\d+", text)
        if form[2] == "joined":
            assert numbers == [day.strftime("%Y%m%d")]
        elif form[0] == "digits":
            order = [day.year, day.month, day.day] if form[1] == "ymd" else [day.day, day.month, day.year]
            assert [int(number) for number in numbers] == order
        else:
            order = [day.year, day.day] if form[1] == "ymd" else [day.day, day.year]
            assert [int(number) for number in numbers] == order


@pytest.mark.parametrize(
    "form, pattern",
    [
        (("en", "dmy", "full"), "%d %B %Y"),
        (("en", "mdy", "full"), "%B %d, %Y"),
        (("en", "ymd", "short"), "%Y %b %d"),
        (("en", "dmy", "weekday"), "%A, %d %B %Y"),
        (("en", "mdy", "weekday"), "%A, %B %d, %Y"),
        (("digits", "dmy", "dots"), "%d.%m.%Y"),
        (("digits", "dmy", "short dots"), "%d.%m.%Y"),
        (("digits", "ymd", "slashes"), "%Y/%m/%d"),
        (("digits", "ymd", "joined"), "%Y%m%d"),
        (("digits", "ymd", "dots"), "%Y.%m.%d"),
    ],
)
def test_english_and_digits_agree_with_strptime(form, pattern):
    day = date(1800, 1, 1)
    for _ in range(300):
        day += timedelta(days=367)
        if day > builtin.LAST_DAY:
            break
        text = builtin.write_date(day, form)
        assert datetime.strptime(text, pattern).date() == day
        if "%A" in pattern:
            assert text.startswith(day.strftime("%A") + ", ")


@pytest.mark.parametrize(
    "iso, form, text",
    [
        ("1998-03-03", ("en", "dmy", "long"), "the 3rd of March, 1998"),
        ("1998-03-01", ("en", "mdy", "long"), "March the 1st, 1998"),
        ("1998-03-22", ("en", "ymd", "long"), "1998, March the 22nd"),
        ("1998-03-11", ("en", "dmy", "long"), "the 11th of March, 1998"),
        ("1998-03-03", ("de", "dmy", "full"), "3. März 1998"),
        ("1998-03-03", ("de", "dmy", "weekday"), "Dienstag, 3. März 1998"),
        ("1998-12-03", ("de", "dmy", "short"), "3. Dez 1998"),
        ("1998-03-03", ("fr", "dmy", "full"), "3 mars 1998"),
        ("1998-02-01", ("fr", "dmy", "long"), "le 1er février de l'an 1998"),
        ("1998-08-15", ("fr", "dmy", "weekday"), "samedi, 15 août 1998"),
        ("1998-03-03", ("es", "dmy", "full"), "3 de marzo de 1998"),
        ("1998-03-04", ("es", "dmy", "weekday"), "miércoles, 4 de marzo de 1998"),
        ("1998-01-09", ("es", "ymd", "short"), "1998 ene 9"),
        ("1998-05-01", ("it", "dmy", "long"), "il 1º maggio dell'anno 1998"),
        ("1998-10-05", ("it", "mdy", "weekday"), "lunedì, ottobre 5, 1998"),
        ("1998-03-03", ("nl", "dmy", "long"), "de 3e maart van het jaar 1998"),
        ("1998-03-08", ("nl", "ymd", "weekday"), "zondag, 1998 maart 8"),
        ("1998-03-03", ("digits", "dmy", "short dots"), "3.3.1998"),
    ],
)
def test_known_dates(iso, form, text):
    assert builtin.write_date(date.fromisoformat(iso), form) == text


def test_a_text_never_means_two_days():
    means = {}
    for number in range(date(1999, 1, 1).toordinal(), date(2001, 1, 1).toordinal()):
        day = date.fromordinal(number)
        for form in builtin.FORMATS:
            assert means.setdefault(builtin.write_date(day, form), day) == day


def test_names_are_complete_and_mean_one_month_in_all_languages():
    for table, count in ((builtin.MONTHS, 12), (builtin.SHORT_MONTHS, 12), (builtin.WEEKDAYS, 7)):
        assert set(table) == set(builtin.LANGUAGES)
        for names in table.values():
            assert len(names.split()) == len(set(names.split())) == count
    month_of = {}
    for table in (builtin.MONTHS, builtin.SHORT_MONTHS):
        for names in table.values():
            for month, name in enumerate(names.split(), 1):
                assert month_of.setdefault(name.lower(), month) == month


def test_answers_are_the_iso_form_of_the_text(splits):
    assert {name: len(split) for name, split in splits.items()} == {"train": 2_000, "test": 300, "test_formats": 300}
    for split in splits.values():
        for example in split:
            assert [message["role"] for message in example["prompt"] + example["completion"]] == ["user", "assistant"]
            day = date.fromisoformat(answer(example))
            assert answer(example) == f"{day.year:04}-{day.month:02}-{day.day:02}"
            assert any(builtin.write_date(day, form) == question(example) for form in builtin.FORMATS)


def test_no_day_is_in_two_splits_or_twice(splits):
    seen = {name: days_of(split) for name, split in splits.items()}
    assert all(len(seen[name]) == len(splits[name]) for name in splits)
    assert all(not seen[one] & seen[other] for one, other in combinations(seen, 2))


def test_held_out_formats_are_new_but_their_parts_are_not(splits):
    trained = [form for form in builtin.FORMATS if form not in builtin.HELD_OUT_FORMATS]
    assert len(builtin.FORMATS) == 77 and len(set(builtin.HELD_OUT_FORMATS)) == 13 and len(trained) == 64
    for held_out in builtin.HELD_OUT_FORMATS:
        for one, other in combinations(range(3), 2):
            if held_out[0] == "digits" and 2 in (one, other) and 0 not in (one, other):
                continue  # only digits have dots; their order and their separator are trained, not together
            assert any(form[one] == held_out[one] and form[other] == held_out[other] for form in trained), held_out

    def forms(split):
        return [
            {
                form
                for form in builtin.FORMATS
                if builtin.write_date(date.fromisoformat(answer(e)), form) == question(e)
            }
            for e in split
        ]

    for name in ("train", "test"):
        assert all(found & set(trained) for found in forms(splits[name]))
    unseen = forms(splits["test_formats"])
    assert all(found and not found & set(trained) for found in unseen)
    assert set().union(*unseen) == set(builtin.HELD_OUT_FORMATS)
    # Every trained format does occur in training (27 times or so each; none by chance has odds under 1e-11).
    assert set(trained) <= set().union(*forms(splits["train"]))


def test_dates_depend_on_the_seed_alone(splits):
    again = builtin.dates(train=50, test=300)
    assert again["test"][:] == splits["test"][:] and again["test_formats"][:] == splits["test_formats"][:]
    assert again["train"][:] == splits["train"][:50]
    other = builtin.dates(train=50, test=300, seed=1)
    assert len(days_of(other["test"]) & days_of(again["test"])) < 30


def test_dates_refuses_more_than_there_are():
    with pytest.raises(ValueError, match="109573 days"):
        builtin.dates(train=109_573, test=1)


# Model and tokenizer


def test_digits_and_words_are_single_tokens(tiny):
    _, tokenizer = tiny
    for text in ("1998-03-03", "19980303", "2031"):
        assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == list(text)
    for table in (builtin.MONTHS, builtin.SHORT_MONTHS, builtin.WEEKDAYS):
        for word in " ".join(table.values()).split():
            assert len(tokenizer(word)["input_ids"]) == 1, word


def test_every_text_survives_the_tokenizer(splits, tiny, described):
    _, tokenizer = tiny
    texts = ["  tabs\tand\n\nlines ", "日本 🙂 <b>", "snake_case(1.5e-3)"]
    texts += [text for split in splits.values() for e in split for text in (question(e), answer(e))]
    texts += [text for e in described["test"] for text in (question(e), answer(e))]
    ids = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(ids) == texts
    assert not {token for row in ids for token in row} & set(tokenizer.all_special_ids)


def test_chat_template_opens_and_ends_each_turn(splits, tiny):
    _, tokenizer = tiny
    for example in splits["test"].select(range(20)):
        prompt = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(example["prompt"] + example["completion"])["input_ids"]
        assert whole[: len(prompt)] == prompt
        completion = whole[len(prompt) :]
        assert completion[-1] == tokenizer.eos_token_id and completion.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(completion, skip_special_tokens=True) == answer(example)
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": role} for role in ("system", "user", "assistant")], tokenize=False
    )
    assert text == "<|system|>system<|end|><|user|>user<|end|><|assistant|>assistant<|end|>"
    assert len(tokenizer(text)["input_ids"]) - len(tokenizer("systemuserassistant")["input_ids"]) >= 5


def test_tiny_qwen3_size_tokens_and_seed(tiny):
    model, tokenizer = tiny
    assert 500_000 <= model.num_parameters() <= 1_000_000
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for holder in (model.config, model.generation_config):
        assert holder.eos_token_id == tokenizer.eos_token_id and holder.pad_token_id == tokenizer.pad_token_id

    state = torch.get_rng_state()
    again, other = builtin.tiny_qwen3()[0].state_dict(), builtin.tiny_qwen3(seed=1)[0].state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    assert not torch.equal(other["model.layers.0.mlp.up_proj.weight"], again["model.layers.0.mlp.up_proj.weight"])


def test_tokenizer_is_trained_the_same_every_time(tiny):
    assert builtin.tiny_qwen3(seed=1)[1].get_vocab() == tiny[1].get_vocab()


def test_saved_and_loaded_again(tiny, tmp_path):
    model, tokenizer = tiny
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "le 1er août de l'an 1998, 3. März 2031"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert loaded_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ids
    assert loaded_tokenizer.eos_token_id == tokenizer.eos_token_id
    assert loaded_tokenizer.pad_token_id == tokenizer.pad_token_id
    with torch.no_grad():
        assert torch.equal(loaded(torch.tensor([ids])).logits, model(torch.tensor([ids])).logits)


# Docstrings


def source(example):
    return re.fullmatch(
        r"Describe this Python function in one line\.\n\n```python\n(.*)\n```", question(example), re.DOTALL
    ).group(1)


def test_docstrings_count_and_columns(described):
    assert len(described["train"]) > 3_000 and len(described["test"]) == 300
    for split in described.values():
        assert split.column_names == ["prompt", "completion"]
        for example in split:
            assert [message["role"] for message in example["prompt"] + example["completion"]] == ["user", "assistant"]
            assert answer(example) == answer(example).strip() and "\n" not in answer(example)


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_no_docstring_is_left_in_the_source(described):
    for split in described.values():
        for example in split:
            (function,) = ast.parse(source(example)).body  # one whole function, and it parses
            for node in ast.walk(function):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    assert ast.get_docstring(node) is None


def test_docstrings_are_split_by_file(described):
    file_of = {text: file for file, pairs in builtin._described_functions(STDLIB).items() for text, _ in pairs}
    train = {file_of[source(example)] for example in described["train"]}
    test = [file_of[source(example)] for example in described["test"]]
    assert not train & set(test)
    assert max(test.count(file) for file in set(test)) <= 30
    assert not any(folder in file.split("/") for file in file_of.values() for folder in builtin.SKIPPED_FOLDERS)
    assert len({question(example) for split in described.values() for example in split}) == sum(
        len(split) for split in described.values()
    )


def test_summaries_are_the_ones_python_sees(described):
    for module in (textwrap, shlex, statistics):
        documented = [inspect.getdoc(value) for _, value in inspect.getmembers(module, inspect.isfunction)]
        for _, cls in inspect.getmembers(module, inspect.isclass):
            documented += [inspect.getdoc(value) for _, value in inspect.getmembers(cls)]
        summaries = [summary for _, summary in builtin._described_functions(STDLIB)[f"{module.__name__}.py"]]
        first_lines = {text.split("\n")[0] for text in documented if text}
        assert len(summaries) >= 2 and len(set(summaries) & first_lines) >= len(summaries) / 2


def test_docstrings_depend_on_the_seed_alone(monkeypatch, tmp_path):
    for i in range(30):
        code = [
            f'def f{j}(x):\n    """Return x plus {i} and {j}."""\n    return x + {i} + {j}  # plus nothing\n'
            for j in range(3)
        ]
        (tmp_path / f"module{i}.py").write_text("\n".join(code))
    monkeypatch.setattr(builtin.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    first = builtin.docstrings(test=30)
    builtin._described_functions.cache_clear()
    again, other = builtin.docstrings(test=30), builtin.docstrings(seed=1, test=30)
    assert again["train"][:] == first["train"][:] and again["test"][:] == first["test"][:]
    assert other["test"][:] != first["test"][:]


def test_docstrings_say_when_there_are_too_few(monkeypatch, tmp_path):
    code = 'def double(number):\n    """Return twice the number given."""\n    return number + number\n'
    (tmp_path / "one.py").write_text(code)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "two.py").write_text(code.replace("double", "twice"))  # a skipped folder
    monkeypatch.setattr(builtin.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(RuntimeError, match="found 1 described functions"):
        builtin.docstrings(test=1)


@pytest.mark.parametrize(
    "code, expected",
    [
        (
            '    @cached\n    def f(self):\n        """Doc."""\n\n        # why\n        return 1\n',
            "@cached\ndef f(self):\n\n    # why\n    return 1",
        ),
        (
            'def f():\n    """Doc."""\n    def g():\n        """Inner."""\n        return 1\n    return g\n',
            "def f():\n    def g():\n        return 1\n    return g",
        ),
        ('def f(): "Doc."; return 1\n', None),
        ('def f():\n    "Doc."; return 1\n', None),
        ('def f():\n    """Doc."""\n', None),
        ('    def f():\n        """Doc."""\n        return """\nflush left"""\n', None),
    ],
)
def test_without_docstring(code, expected):
    wrapped = f"class A:\n{code}" if code.startswith(" ") else code
    node = next(n for n in ast.walk(ast.parse(wrapped)) if isinstance(n, ast.FunctionDef))
    assert builtin._without_docstring(wrapped.split("\n"), node) == expected
