"""Batched greedy answers against the plainest loop there is, and what answers() leaves behind."""

import unicodedata
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset, Features, Json
from tokenizers import AddedToken, normalizers, processors
from trl import SFTTrainer

from grades_trl.recipe.builtin import dates, tiny_qwen3
from grades_trl.recipe.export import prompt_inputs
from grades_trl.recipe.generation import (
    answers,
    character_error_rate,
    edit_distance,
    exact_match,
    format_samples,
    prompt_text,
    warn_long_replies,
)
from helpers import PLAIN, arguments, chat_tokenizer, llava_processor, qwen3, warnings_in
from vlm.builtin import digit_images, tiny_llava
from vlm.generation import answers as vlm_answers


@pytest.fixture(scope="module")
def data():
    return dates(train=1, test=21)["test"]


@pytest.fixture
def tiny():
    model, tokenizer = tiny_qwen3()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:  # as initialized, it repeats its last token whatever came before
                weight.mul_(8)
    return model, tokenizer


def one_by_one(model, tokenizer, data, max_new_tokens):
    """Whole forward passes without padding, mask or cache."""
    texts = []
    for conversation in data["prompt"]:
        ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
        new = []
        while len(new) < max_new_tokens and tokenizer.eos_token_id not in new:
            with torch.no_grad():
                new.append(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax().item())
        texts.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return texts


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_batches_equal_one_by_one(tiny, data, batch_size):
    model, tokenizer = tiny
    expected = one_by_one(model.eval(), tokenizer, data, max_new_tokens=8)
    assert len(set(expected)) > 15  # the answers do depend on the prompts
    assert answers(model, tokenizer, data, batch_size=batch_size, max_new_tokens=8) == expected
    tokenizer.padding_side = "right"
    assert answers(model, tokenizer, data, batch_size=batch_size, max_new_tokens=8) == expected
    assert tokenizer.padding_side == "right"


def test_an_answer_ends_at_eos(tiny, data):
    model, tokenizer = tiny
    expected = one_by_one(model.eval(), tokenizer, data, max_new_tokens=8)
    # Let one token that some answers contain be the end: those stop there, the others go on.
    first = [tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in expected if text]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first[0])
    model.generation_config.eos_token_id = first[0]
    # The template writes eos into the prompts too, so both sides see the same new prompts.
    expected = one_by_one(model, tokenizer, data, max_new_tokens=8)
    assert answers(model, tokenizer, data, batch_size=8, max_new_tokens=8) == expected


@pytest.mark.parametrize("vision", [False, True])
def test_modes_are_restored_module_by_module(tiny, data, vision):
    (model, processor), ask = tiny, answers
    if vision:
        (model, processor), ask, data = tiny_llava(), vlm_answers, digit_images(train=1, test=4)["test"]
    layers = (model.model.language_model if vision else model.model).layers
    model.train()
    layers[1].eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    seen = []
    handle = layers[0].register_forward_hook(lambda module, *_: seen.append(module.training))
    first = ask(model, processor, data, max_new_tokens=2)
    assert seen and not any(seen)
    assert [module.training for module in model.modules()] == before
    assert ask(model, processor, data, max_new_tokens=2) == first

    handle.remove()
    handle = layers[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(model, processor, data, max_new_tokens=2)
    assert [module.training for module in model.modules()] == before


def test_cache_is_used_under_gradient_checkpointing(tiny, data):
    model, tokenizer = tiny
    plain = answers(model, tokenizer, data, max_new_tokens=4)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    lengths = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    assert answers(model, tokenizer, data, batch_size=64, max_new_tokens=4) == plain
    assert lengths[0] > 1 and lengths[1:] == [1, 1, 1]
    assert model.training and model.is_gradient_checkpointing and model.config.use_cache is False


def test_no_gradient_and_no_change(tiny, data):
    model, tokenizer = tiny
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    answers(model, tokenizer, data, max_new_tokens=2)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_answers_refuses_what_it_cannot_do(tiny, data):
    model, tokenizer = tiny
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="padding token"):
        answers(model, tokenizer, data)


def completions(*contents):
    return Dataset.from_dict({"completion": [[{"role": "assistant", "content": content}] for content in contents]})


def test_exact_match_closed_form():
    data = completions("1998-03-03", " 2001-01-01\n", "1850-12-31", "2020-02-29")
    assert exact_match(["1998-03-03", "2001-01-01", "1850-12-3", ""], data) == 0.5
    assert exact_match(["  1998-03-03 ", "2001-01-01", "1850-12-31", "2020-02-29\n"], data) == 1.0
    assert exact_match(["a", "b", "c", "d"], data) == 0.0
    assert exact_match(["2001-01-01", "1998-03-03", "1850-12-31", "2020-02-29"], data) == 0.5  # order counts


def test_exact_match_reads_lists_of_parts():
    data = completions(
        [{"type": "text", "text": "12"}, {"type": "text", "text": "34"}], [{"type": "text", "text": "5"}]
    )
    assert exact_match(["1234", "6"], data) == 0.5


@pytest.mark.parametrize(
    ("ours", "theirs", "distance"),
    [("", "", 0), ("abc", "", 3), ("", "abc", 3), ("kitten", "sitting", 3), ("abcd", "acbd", 2), ("1998", "199", 1)],
)
def test_edit_distance(ours, theirs, distance):
    assert edit_distance(ours, theirs) == edit_distance(theirs, ours) == distance


def test_character_error_rate_closed_form():
    data = completions("1234", "abcdef")
    assert character_error_rate(["1234", " abcdef\n"], data) == 0
    assert character_error_rate(["1235", "abc"], data) == (1 + 3) / 10  # of all characters, not a mean over rows
    assert character_error_rate(["1" * 40, "abcdef"], data) == 3.9
    with pytest.raises(ValueError, match="1 answer to 2 examples"):
        character_error_rate(["1"], data)


def test_exact_match_refuses_other_lengths():
    with pytest.raises(ValueError, match="2 answers to 1 example"):
        exact_match(["1", "2"], completions("1"))
    with pytest.raises(ValueError, match="at least one"):
        exact_match([], Dataset.from_dict({"completion": []}))


def test_tools_and_template_options_of_a_row_reach_its_prompt(tiny):
    _, tokenizer = tiny
    tokenizer.chat_template = "{{ messages[0].content }} {{ tools[0].name if tools else '-' }} {{ style }}"
    row = {"prompt": [{"role": "user", "content": "hi"}]}
    assert prompt_text(tokenizer, row) == "hi - "
    row |= {"tools": '[{"name": "clock"}]', "chat_template_kwargs": {"style": "short"}}
    assert prompt_text(tokenizer, row) == "hi clock short"


@pytest.mark.parametrize("single", ["<bos> $A", "<bos> $A <|end|>"], ids=["bos", "bos and eos"])
def test_plain_text_is_asked_as_trl_trains_it(tmp_path, single):
    """With the special tokens that the tokenizer puts before it, and not with those that it puts after it."""
    tokenizer = chat_tokenizer(PLAIN, "<bos>", bos_token="<bos>")
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<|end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    data = Dataset.from_dict({"prompt": ["q1", "q: 2"], "completion": ["a", "b"]})
    model, asked = qwen3(vocab_size=len(tokenizer)), []
    trainer = SFTTrainer(model, arguments(tmp_path), train_dataset=data, processing_class=tokenizer)
    trained = [tokenizer.decode(ids) for ids in trainer.train_dataset["input_ids"]]
    assert [text.partition("<|end|>")[0] for text in trained] == ["<bos>q1a", "<bos>q: 2b"]
    model.register_forward_pre_hook(lambda _, args, inputs: asked.append(inputs["input_ids"]), with_kwargs=True)
    answers(model, tokenizer, data, max_new_tokens=1)
    assert [tokenizer.decode(row) for row in asked[0]] == ["<bos>q: 2", "<pad><pad><bos>q1"]
    alone = [row["input_ids"] for row in prompt_inputs(tokenizer, data, vision=False)]
    assert [tokenizer.decode(row[0]) for row in alone] == ["<bos>q1", "<bos>q: 2"]


def test_a_vision_prompt_of_plain_text_is_taken_as_it_is():
    model, processor = tiny_llava()
    messages = digit_images(train=1, test=4)["test"]
    turns = [
        [{**m, "content": [{"type": "image"}, {"type": "text", "text": m["content"]}]} for m in p]
        for p in messages["prompt"]
    ]
    texts = [processor.apply_chat_template(t, add_generation_prompt=True, tokenize=False) for t in turns]
    plain = messages.remove_columns("prompt").add_column("prompt", texts)
    assert vlm_answers(model, processor, plain, max_new_tokens=4) == vlm_answers(
        model, processor, messages, max_new_tokens=4
    )


def qwen_tokenizer(name="qwen3"):
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    marks = ("<|im_start|>", "<|im_end|>", "<|box_start|>", "<|box_end|>")
    tokenizer = chat_tokenizer(template, *marks, eos_token="<|im_end|>")
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")])
    return tokenizer


def conversations(*replies, **columns):
    """Rows with one reply each: its text, or a whole message."""
    messages = [{"role": "assistant", "content": r} if isinstance(r, str) else r for r in replies]
    rows = {"prompt": [[{"role": "user", "content": "?"}]] * len(replies), "completion": [[m] for m in messages]}
    return Dataset.from_dict(rows | columns, features=Features(dict.fromkeys(rows | columns, Json())))


def learned(tokenizer, data):
    """What a perfectly trained model answers: the tokens that TRL learns of each row, up to the end, decoded."""
    texts = []
    for row in data:
        options = row.get("chat_template_kwargs") or {}
        asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **options)["input_ids"]
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], **options)["input_ids"]
        assert whole[: len(asked)] == asked
        answer = whole[len(asked) : whole.index(tokenizer.eos_token_id, len(asked))]
        texts.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
    return texts


def test_an_empty_think_block_of_the_template_is_expected():
    tokenizer, data = qwen_tokenizer(), conversations("a1", "a2")
    perfect = learned(tokenizer, data)
    assert perfect[0] == "<think>\n\n</think>\n\na1"
    assert exact_match(perfect, data, tokenizer) == 1.0
    assert exact_match([perfect[0], perfect[0]], data, tokenizer) == 0.5
    assert character_error_rate(perfect, data, tokenizer) == 0.0
    assert character_error_rate([perfect[0], perfect[0]], data, tokenizer) == 0.25  # of the letters of the answers
    data = data.add_column("chat_template_kwargs", [{"enable_thinking": False}] * 2)  # then it is in the prompt
    assert learned(tokenizer, data) == ["a1", "a2"]
    assert exact_match(["a1", "a2"], data, tokenizer) == 1.0
    assert format_samples(data.select([0]), {"after": perfect[:1]}).splitlines()[2:] == [
        "  expected  a1",
        "  after     a1",
    ]


def test_a_long_sample_is_cut_where_there_are_no_spaces_too():
    long = "\u4f60\u597d" * 80
    shown = format_samples(Dataset.from_list([{"prompt": long, "completion": f"a\nb {long}"}]), {})
    prompt, expected = shown.splitlines()[1:]
    assert prompt.split() == ["prompt", long[:96], "..."]
    assert expected.split() == ["expected", "a", "b", long[:92], "..."]


def test_of_a_reply_with_reasoning_the_final_answer_is_compared():
    tokenizer = qwen_tokenizer()
    data = conversations(
        {"role": "assistant", "content": "a1", "reasoning_content": "1 is one."}, "<think>\n2.\n</think>\n\na2"
    )
    assert learned(tokenizer, data)[0] == "<think>\n1 is one.\n</think>\n\na1"
    assert exact_match(learned(tokenizer, data), data, tokenizer) == 1.0
    thought_of_otherwise = [f"<think>\nHm.\n</think>\n\n{answer}" for answer in ("a1", "a2")]
    assert exact_match(thought_of_otherwise, data, tokenizer) == 1.0
    assert exact_match(["<think>\na1", "<think>\nHm.\n</think>\n\na1"], data, tokenizer) == 0.0
    assert exact_match([thought_of_otherwise[1]], data.select([1])) == 1.0  # also without a tokenizer


def test_a_prompt_that_does_not_begin_the_whole_leaves_the_text_as_expected():
    template = PLAIN.replace("<|assistant|>{% endif %}", "<|assistant|>Well: {% endif %}")
    tokenizer, data = chat_tokenizer(template), conversations("a1")
    assert prompt_text(tokenizer, data[0]) == "<|user|>?<|end|><|assistant|>Well: "
    assert exact_match(["a1"], data, tokenizer) == 1.0


def test_what_the_template_of_a_vision_model_adds_is_expected():
    processor = llava_processor(chat_tokenizer(""), size=16)
    processor.chat_template = PLAIN.replace("<|{{ m.role }}|>", "<|{{ m.role }}|>{{ 'A: ' if m.role == 'assistant' }}")
    data = digit_images(train=1, test=4)["test"]
    texts = [completion[0]["content"] for completion in data["completion"]]
    assert exact_match([f"A: {text}" for text in texts], data, processor) == 1.0
    assert exact_match(texts, data, processor) == 0.0


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}], ids=["missing", "null", "empty"])
def test_a_reply_that_calls_a_tool_is_expected_as_the_template_writes_it(content):
    tokenizer = qwen_tokenizer("qwen2_5")
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Orléans"}}}
    data = conversations(content | {"role": "assistant", "tool_calls": [call]})
    shown = '{"name": "weather", "arguments": {"city": "Orléans"}}'
    assert learned(tokenizer, data) == [f"<tool_call>\n{shown}\n</tool_call>"]
    assert exact_match(learned(tokenizer, data), data, tokenizer) == 1.0
    assert character_error_rate(learned(tokenizer, data), data, tokenizer) == 0.0
    assert exact_match([""], data, tokenizer) == exact_match([""], data) == 0.0
    assert f"expected  {shown}\n" in format_samples(data, {"after": [""]})


def test_special_tokens_in_a_reply_do_not_count():
    tokenizer, reply = qwen_tokenizer("qwen2_5"), "<|box_start|>(1,2)<|box_end|>"
    data = conversations(reply)
    assert learned(tokenizer, data) == ["(1,2)"]
    assert exact_match(["(1,2)"], data, tokenizer) == 1.0
    assert exact_match(["(1,2)"], Dataset.from_dict({"prompt": ["?"], "completion": [reply]}), tokenizer) == 1.0
    assert exact_match(["(2,1)"], data, tokenizer) == 0.0


def test_a_reply_in_another_unicode_form_than_the_tokenizer_writes():
    tokenizer, data = chat_tokenizer(PLAIN), conversations(unicodedata.normalize("NFD", "Việt Nam, café"))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert learned(tokenizer, data) == [unicodedata.normalize("NFC", "Việt Nam, café")]
    assert exact_match(learned(tokenizer, data), data, tokenizer) == 1.0
    assert character_error_rate(learned(tokenizer, data), data, tokenizer) == 0.0
    assert exact_match(learned(tokenizer, data), data) == 0.0  # the letters are others


def test_rows_without_images_among_those_with_one():
    model, processor = tiny_llava()
    data = digit_images(train=1, test=4)["test"]
    columns = data[:] | {"images": [images if i in (0, 3) else [] for i, images in enumerate(data["images"])]}
    rows = Dataset.from_dict(columns, features=data.features)
    together = vlm_answers(model, processor, rows, max_new_tokens=4)
    assert vlm_answers(model, processor, rows, batch_size=1, max_new_tokens=4) == together
    assert vlm_answers(model, processor, rows.select([1, 2]), max_new_tokens=4) == together[1:3]
    alone = prompt_inputs(processor, rows, vision=True)
    assert ["pixel_values" in inputs for inputs in alone] == [True, False, False, True]


def test_replies_longer_than_the_longest_answer_are_counted(caplog):
    tokenizer = chat_tokenizer(PLAIN.replace("<|end|>", "  <|end|>"))  # a token per letter, and two that do not count
    rows, more = conversations("1234", "12345", "1234567"), conversations("123456789")
    warn_long_replies(tokenizer, 9, rows, more)
    warn_long_replies(tokenizer, 4, rows.select([0]))
    assert not warnings_in(caplog)
    warn_long_replies(tokenizer, 4, rows, more)
    (warning,) = warnings_in(caplog)
    assert warning.startswith("3 of 4 expected answers are longer than --max_new_tokens 4.")
    assert "The longest has 11 tokens" in warning
