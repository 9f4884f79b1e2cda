"""Which replies are learned: all of a conversation in one row, where the chat template can tell them; and what the
model will read, shown and checked before training."""

import json
import logging
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset, Features, List, concatenate_datasets
from PIL import Image as PILImage
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

from grades_trl.recipe.data import DataError, load, show_example, to_prompt_completion, training_rows
from grades_trl.recipe.data.images import RGB
from grades_trl.recipe.data.preview import marked
from grades_trl.recipe.data.replies import whole_conversations_problem
from grades_trl.recipe.scored import rows_left
from helpers import PLAIN, chat_tokenizer, gradients, llava, llava_processor, warnings_in
from vlm import GradESVLMTrainer

LLAMA = (Path(trl.__file__).parent / "chat_templates" / "llama3.jinja").read_text()
WRITTEN = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
)
MARKED = PLAIN.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% generation %}"
    + WRITTEN
    + "<|end|>{% endgeneration %}{% else %}",
).replace("<|end|>{% endfor %}{% if add", "<|end|>{% endif %}{% endfor %}{% if add")
NO_END = MARKED.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / ".cache")


def turn(role, content):
    return {"role": role, "content": content}


def talk(*texts, system=None):
    messages = [turn(role, text) for role, text in zip(["user", "assistant"] * len(texts), texts, strict=False)]
    return [turn("system", system), *messages] if system else messages


TALKS = [
    talk("one?", "first reply", "two?", "second reply", "three?", "third reply", system="be brief"),
    talk("four?", "fourth reply", "bye"),
    talk("five?", "fifth", "six?", "sixth reply"),
]
REPLIES = ["first reply", "second reply", "third reply", "fourth reply", "fifth", "sixth reply"]


def rows_of(*talks):
    return Dataset.from_list([{"messages": messages} for messages in talks])


@pytest.fixture
def tokenizer():
    llama = ("<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>", "<|eot_id|>")
    return chat_tokenizer(MARKED, *llama, bos_token="<|begin_of_text|>")


def training(tmp_path, **changes):
    defaults = {"max_length": None, "report_to": [], "use_cpu": True, "bf16": False, "max_steps": 1}
    return SFTConfig(str(tmp_path / "out"), **(defaults | changes))


def text_model(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes))


def text_trainer(tokenizer, args, rows, held_out=None, model=None):
    model = model or text_model(tokenizer)
    return SFTTrainer(model, args, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer)


def learned(dataset, tokenizer):
    return [tokenizer.decode([token for token in row if token != -100]) for row in dataset["labels"]]


def batch_of(trainer):
    rows = trainer._remove_unused_columns(trainer.train_dataset, "training")
    return trainer.data_collator([dict(row) for row in rows])


@pytest.mark.parametrize(("template", "end"), [(MARKED, "<|end|>"), (LLAMA, "<|eot_id|>")])
def test_one_row_per_conversation_has_the_gradients_of_one_row_per_reply(tmp_path, tokenizer, template, end):
    """Templates without history tricks: one with marks of its own, and Llama 3's, which has TRL's training version."""
    tokenizer.chat_template = template
    model, rows, args = text_model(tokenizer), rows_of(*TALKS), training(tmp_path)
    held_out = to_prompt_completion(rows)
    whole = text_trainer(tokenizer, args, training_rows(rows, tokenizer, args), held_out, model)
    assert args.assistant_only_loss and len(whole.train_dataset) == 3
    assert learned(whole.train_dataset, tokenizer) == [
        "".join(f"{reply}{end}" for reply in part) for part in (REPLIES[:3], REPLIES[3:4], REPLIES[4:])
    ]
    # Rows to validate on have one reply each, and learn that one alone
    assert learned(whole.eval_dataset, tokenizer) == [f"{reply}{end}" for reply in REPLIES]

    split = text_trainer(tokenizer, training(tmp_path), held_out, model=model)
    ours, theirs = (gradients(model, **batch_of(trainer)) for trainer in (whole, split))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    tokens = [(batch_of(trainer)["attention_mask"]).sum() for trainer in (whole, split)]
    assert tokens[0] < 0.7 * tokens[1]


def test_what_follows_the_last_reply_is_not_read(tmp_path, tokenizer):
    args = training(tmp_path)
    rows = training_rows(rows_of(*TALKS), tokenizer, args)
    assert rows["messages"][1] == TALKS[1][:2]
    assert rows["messages"][0] == TALKS[0]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (PLAIN, "TRL has no training version of this chat template"),
        (NO_END, "the chat template does not mark the end of a reply as part of it"),
    ],
)
def test_one_row_per_reply_where_the_template_cannot_tell_replies(tmp_path, tokenizer, caplog, template, why):
    tokenizer.chat_template, args = template, training(tmp_path)
    caplog.set_level(logging.INFO, logger="grades_trl")
    talks = [talk("a" * 10, "b" * 10, "c" * 10, "d" * 10)] * 2
    rows = training_rows(rows_of(*talks), tokenizer, args)
    assert rows.column_names == ["prompt", "completion"] and len(rows) == 4
    assert not args.assistant_only_loss
    (warning,) = warnings_in(caplog)
    assert f"2 conversations become 4 rows, one per reply, with 1.5 times the text: {why}" in warning


def test_the_last_reply_alone(tmp_path, tokenizer):
    args = training(tmp_path)
    rows = training_rows(rows_of(*TALKS), tokenizer, args, train_on="last")
    assert not args.assistant_only_loss
    assert [row[0]["content"] for row in rows["completion"]] == ["third reply", "fourth reply", "sixth reply"]
    assert rows["prompt"][0] == TALKS[0][:-1]


def test_conversations_of_one_reply_are_prompts_and_completions(tmp_path, tokenizer):
    """Under the template that the model is used with: TRL's training version may differ from it."""
    args = training(tmp_path)
    rows = training_rows(rows_of(talk("a?", "b"), talk("c?", "d")), tokenizer, args)
    assert rows.column_names == ["prompt", "completion"] and not args.assistant_only_loss
    texts = Dataset.from_dict({"text": ["a"]})
    assert training_rows(texts, tokenizer, args) is texts


@pytest.mark.parametrize("grouped", [True, False], ids=["conversations", "prompts and completions"])
def test_prompts_are_learned_too_where_that_is_asked_for(tmp_path, tokenizer, capsys, grouped):
    """`completion_only_loss=False`, as TRL means it: all tokens, and a conversation stays one row."""
    talks = rows_of(*TALKS)
    train = talks if grouped else to_prompt_completion(talks)
    args = training(tmp_path, completion_only_loss=False)
    rows = training_rows(train, tokenizer, args)
    assert len(rows) == len(train) and not args.assistant_only_loss and args.completion_only_loss is False
    trainer = text_trainer(tokenizer, args, rows)
    batch = batch_of(trainer)
    assert torch.equal(batch["labels"] != -100, batch["attention_mask"] == 1)
    capsys.readouterr()
    show_example(trainer, rows_left(trainer, {"train": train}))
    assert "  [[<|system|>be brief<|end|><|user|>one?" in capsys.readouterr().out


def test_replies_left_out_and_prompts_to_be_learned_contradict_each_other(tmp_path, tokenizer):
    args = training(tmp_path, completion_only_loss=False)
    for talks, train_on in ((rows_of(*TALKS), "last"), (read(tmp_path, marked_talks()), "all")):
        with pytest.raises(DataError, match="completion_only_loss is false, so that all of a conversation is learned"):
            training_rows(talks, tokenizer, args, train_on=train_on)


def test_assistant_only_loss_needs_a_template_that_can_tell_replies(tmp_path, tokenizer):
    args = training(tmp_path, assistant_only_loss=True)
    assert len(training_rows(rows_of(*TALKS), tokenizer, args)) == 3
    tokenizer.chat_template = PLAIN
    with pytest.raises(DataError, match="assistant_only_loss is true, and this model's chat template does not mark"):
        training_rows(rows_of(*TALKS), tokenizer, args)


def test_chat_templates(tmp_path, tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="this model has no chat template: take its instruct version"):
        training_rows(rows_of(*TALKS), tokenizer, training(tmp_path))
    texts = Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})
    assert training_rows(texts, tokenizer, training(tmp_path)) is texts
    (tmp_path / "template.jinja").write_text(MARKED)
    args = training(tmp_path, chat_template_path=str(tmp_path / "template.jinja"))
    assert len(training_rows(rows_of(*TALKS), tokenizer, args)) == 3 and args.assistant_only_loss

    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
    )
    tokenizer.chat_template += "{{ m.content }}{% endfor %}"
    with pytest.raises(
        DataError, match=r"train: row 0 .*\(roles: system, user, .*the chat template refuses it: No sys"
    ):
        training_rows(rows_of(*TALKS), tokenizer, training(tmp_path))
    tokenizer.chat_template = "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"row 0 .*the chat template leaves its reply out .*'third reply'"):
        training_rows(rows_of(*TALKS), tokenizer, training(tmp_path))


def test_a_template_that_leaves_calls_of_tools_out_is_an_error(tmp_path, tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    rows = Dataset.from_list(
        [{"messages": [turn("user", "1 + 1?"), called, turn("tool", "2"), turn("assistant", "two")]}],
        on_mixed_types="use_json",
    )
    with pytest.raises(
        DataError, match=r"row 0 .*the chat template leaves its calls of tools out \(add\): --chat_temp"
    ):
        training_rows(rows, tokenizer, training(tmp_path))
    tokenizer.chat_template = PLAIN.replace("<|end|>", "{% if m.tool_calls %}{{ m.tool_calls }}{% endif %}<|end|>", 1)
    assert len(training_rows(rows, tokenizer, training(tmp_path))) == 2


# Images


@pytest.fixture
def processor(tokenizer):
    return llava_processor(tokenizer, 32)


def seen():
    """Two conversations of two replies, with images in both turns of the first."""
    image = {"type": "image"}
    first = [
        turn("user", [image, {"type": "text", "text": "one?"}]),
        turn("assistant", "first reply"),
        turn("user", [image, {"type": "text", "text": "two?"}]),
        turn("assistant", "second reply"),
        turn("user", [image, {"type": "text", "text": "never answered"}]),
    ]
    second = [turn("user", [{"type": "text", "text": "none?"}]), turn("assistant", "fourth"), *talk("and?", "fifth")]
    second[2] = turn("user", [{"type": "text", "text": "and?"}])
    noise = [PILImage.effect_noise((32, 32), 50).convert("RGB") for _ in range(3)]
    rows = Dataset.from_list([{"messages": m} for m in (first, second)], on_mixed_types="use_json")
    images = Dataset.from_dict({"images": [noise, []]}, features=Features({"images": List(RGB)}))
    return concatenate_datasets([rows, images], axis=1)


def vision_model(processor):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = Qwen2Config(vocab_size=len(processor.tokenizer), num_key_value_heads=2, **sizes)
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    return llava(text_config=text, image_token_index=image_token)


def vision_trainer(processor, args, rows, held_out, model=None):
    model = model or vision_model(processor)
    return GradESVLMTrainer(
        model, args, train_dataset=rows, eval_dataset=held_out, processing_class=processor, grades=None
    )


def test_with_images_one_row_per_conversation_where_trl_can(tmp_path, processor, caplog):
    """The fallback in older versions; in newer ones the same gradients, and held-out rows of one reply each."""
    processor.chat_template = MARKED
    args, rows = training(tmp_path), seen()
    held_out = to_prompt_completion(rows)
    ours = training_rows(rows, processor, args, vision=True)
    if whole_conversations_problem(processor, vision=True):
        assert ours[:]["completion"] == held_out[:]["completion"] and not args.assistant_only_loss
        assert "2 conversations become 4 rows" in caplog.text and "needs TRL 1.16 and Transformers 5.18" in caplog.text
        return
    assert args.assistant_only_loss and len(ours[0]["images"]) == 2
    whole = vision_trainer(processor, args, ours, held_out)
    split = vision_trainer(processor, training(tmp_path), held_out, held_out, whole.model)
    theirs = batch_of(split)
    for name, gradient in gradients(whole.model, **batch_of(whole)).items():
        assert gradient.abs().sum() > 0 or "post_layernorm" in name or "_proj.bias" in name, name
    ours_grad, theirs_grad = gradients(whole.model, **batch_of(whole)), gradients(whole.model, **theirs)
    for name in ours_grad:
        torch.testing.assert_close(ours_grad[name], theirs_grad[name], rtol=1e-3, atol=1e-6)
    same = whole.data_collator([dict(row) for row in held_out])
    assert torch.equal(same["labels"], theirs["labels"])
    assert whole.evaluate()["eval_loss"] == pytest.approx(split.evaluate()["eval_loss"])


# Marked not to be learned


def marked_talks(key="weight"):
    """Six replies, of which three are left out: one in the middle, one at the start, and one at the end."""
    said = [
        ("be brief", [("one?", "first", 1), ("two?", "second", 1), ("three?", "third", 0), ("four?", "fourth", None)]),
        (None, [("five?", "fifth", 0), ("six?", "sixth", 1), ("seven?", "seventh", 0)]),
        (None, [("eight?", "eighth", None), ("nine?", "ninth", 1)]),
    ]
    talks = []
    for system, pairs in said:
        messages = [turn("system", system)] if system else []
        for question, reply, mark in pairs:
            mark = mark if mark is None or key == "weight" else bool(mark)
            messages += [turn("user", question), turn("assistant", reply) | ({} if mark is None else {key: mark})]
        talks.append(messages)
    return talks


LEARNED = ["first", "second", "fourth", "sixth", "eighth", "ninth"]


def read(tmp_path, talks, **kwargs):
    """As a file that is read; the rows to train on in their order."""
    rows = [{"messages": messages} for messages in talks]
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    return load(str(tmp_path), **kwargs)["train"]


def masked_by_hand(talks, tokenizer):
    """Whole conversations, and labels that are found in their text: of a reply and its end, if its name is learned."""
    width, batch = 0, []
    for messages in talks:
        text = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages)
        is_learned = [False] * len(text)
        for m in messages:
            if m["role"] == "assistant" and m["content"] in LEARNED:
                start = text.index(f"<|assistant|>{m['content']}<|end|>") + len("<|assistant|>")
                end = start + len(m["content"]) + len("<|end|>")
                is_learned[start:end] = [True] * (end - start)
        coded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        labels = [
            token if is_learned[start] else -100
            for token, (start, _) in zip(coded["input_ids"], coded["offset_mapping"], strict=True)
        ]
        batch.append((coded["input_ids"], labels))
        width = max(width, len(labels))
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in batch]),
    }


@pytest.mark.parametrize(("template", "rows"), [(MARKED, 4), (PLAIN, 6)], ids=["whole conversations", "per reply"])
def test_marked_replies_have_the_gradients_of_a_mask_made_by_hand(tmp_path, tokenizer, template, rows):
    tokenizer.chat_template = template
    args, talks = training(tmp_path), marked_talks()
    train = training_rows(read(tmp_path, talks), tokenizer, args)
    assert len(train) == rows and args.assistant_only_loss == (template == MARKED)
    assert "weight" not in str(train[:]) and "left_out" not in str(train[:])
    trainer = text_trainer(tokenizer, args, train)
    assert "".join(learned(trainer.train_dataset, tokenizer)) == "".join(f"{reply}<|end|>" for reply in LEARNED)
    show_example(trainer, rows_left(trainer, {"train": train}))
    model = trainer.model
    ours, theirs = gradients(model, **batch_of(trainer)), gradients(model, **masked_by_hand(talks, tokenizer))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss", "loss_scale", "loss_weight"])
def test_every_tools_mark_is_honoured(tmp_path, tokenizer, key):
    rows = to_prompt_completion(read(tmp_path, marked_talks(key)))
    assert [row[0] for row in rows["completion"]] == [turn("assistant", reply) for reply in LEARNED]
    # What is left out is still read, by the replies after it
    assert turn("assistant", "third") in rows["prompt"][2]


def test_marks_and_the_last_reply(tmp_path, tokenizer):
    """The last of those that are learned."""
    rows = training_rows(read(tmp_path, marked_talks()), tokenizer, training(tmp_path), train_on="last")
    assert [row[0]["content"] for row in rows["completion"]] == ["fourth", "sixth", "ninth"]


def test_replies_left_out_at_the_end_leave_whole_conversations(tmp_path, tokenizer):
    talks = [talk("a?", "b", "c?", "d", "e?", "f") for _ in range(2)]
    talks[0][5]["train"] = False
    args = training(tmp_path)
    rows = training_rows(read(tmp_path, talks), tokenizer, args)
    assert args.assistant_only_loss and rows["messages"][0] == talk("a?", "b", "c?", "d")
    assert rows["messages"][1] == talks[1]


def test_conversations_without_a_learned_reply_are_left_out(tmp_path, caplog):
    talks = [talk("a?", "b"), talk("c?", "d"), talk("e?", "f")]
    talks[1][1]["loss"] = False
    assert [row[0]["content"] for row in read(tmp_path, talks)["messages"]] == ["a?", "e?"]
    assert "train: 1 of 3 conversations left out" in warnings_in(caplog)[0]
    for messages in talks:
        messages[1]["loss"] = False
    with pytest.raises(DataError, match="train: every reply is marked not to be learned, expected at least one"):
        read(tmp_path, talks)


def test_marks_that_ask_for_a_prompt_are_said(tmp_path, caplog):
    """As in axolotl's documentation; a mark that leaves a prompt out says what is so anyway."""
    talks = [[turn("user", "a?") | {"train": False}, turn("assistant", "b") | {"train": True}] for _ in range(3)]
    read(tmp_path, talks)
    assert not warnings_in(caplog)
    talks[1][0]["train"] = True
    read(tmp_path, talks)
    assert warnings_in(caplog)[0] == (
        "train: 1 row (the first is row 1) marks other messages than replies to be learned: only replies are."
    )


CONTENT = [{"type": "text", "text": "b", "train": False}, {"type": "text", "text": "c", "train": True}]
SPAN = {"begin_offset": 0, "end_offset": 1}


@pytest.mark.parametrize(
    ("mark", "match"),
    [
        ({"weight": 0.5}, r"has weight 0\.5, expected 0 or 1 \(false or true\)"),
        ({"loss_scale": 2.0}, r"has loss_scale 2\.0, expected 0 or 1"),
        ({"train": "no"}, r"has train 'no', expected 0 or 1"),
        ({"weight": 1, "train": False}, r"has marks that contradict each other \(weight 1, train False\): keep one"),
        ({"content": CONTENT}, "has a part that is marked not to be learned: only whole messages can be left out"),
        ({"train_detail": [SPAN | {"train": False}]}, "has a part that is marked not to be learned"),
    ],
)
def test_other_marks_are_refused_with_their_row(tmp_path, mark, match):
    talks = [talk("a?", "b"), [turn("user", "a?"), turn("assistant", "b") | mark]]
    with pytest.raises(DataError, match=rf"train: row 1 \(the first is 0\): messages\[1\] {match}"):
        read(tmp_path, talks)


def test_parts_that_are_all_learned_are_no_fault(tmp_path):
    marks = {"train_detail": [SPAN | {"train": True}], "content": [CONTENT[1]]}
    rows = read(tmp_path, [[turn("user", "a?"), turn("assistant", "b") | marks]] * 2)
    assert rows["messages"][0][1] == turn("assistant", "c")


def test_a_completion_is_what_is_learned(tmp_path, caplog):
    prompt = [turn("user", "a?"), turn("assistant", "b") | {"weight": 0}, turn("user", "c?")]
    row = {"prompt": prompt, "completion": [turn("assistant", "d") | {"weight": 1}]}
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps([row, row]))
    found = load(str(tmp_path))["train"][0]
    assert found["completion"] == [turn("assistant", "d")] and not warnings_in(caplog)
    row["completion"][0]["weight"] = 0
    (tmp_path / "train.json").write_text(json.dumps([row, row]))
    with pytest.raises(DataError, match=r"row 0 .*completion\[0\] is marked not to be learned, but a completion is"):
        load(str(tmp_path))


def test_marked_replies_with_images_have_the_gradients_of_a_mask_made_by_hand(tmp_path, processor):
    """A row per reply that is learned, under a template that could tell replies apart too."""
    processor.chat_template = MARKED
    rows = seen()
    conversations = list(rows["messages"])
    conversations[0][1]["left_out"] = True  # as `clean` leaves it
    marks = Dataset.from_list([{"messages": m} for m in conversations], on_mixed_types="use_json")
    args = training(tmp_path)
    train = training_rows(
        concatenate_datasets([marks, rows.select_columns("images")], axis=1), processor, args, vision=True
    )
    assert [row[0]["content"] for row in train["completion"]] == ["second reply", "fourth", "fifth"]
    assert [len(images) for images in train["images"]] == [2, 0, 0] and not args.assistant_only_loss
    trainer = vision_trainer(processor, args, train, None)
    batch = batch_of(trainer)

    whole = trainer.data_collator([dict(row) for row in train])  # its tokens, of which the labels are made anew
    labels = torch.full_like(whole["input_ids"], -100)
    for row, reply in enumerate(["second reply", "fourth", "fifth"]):
        ids = whole["input_ids"][row].tolist()
        sought = processor.tokenizer(f"{reply}<|end|>", add_special_tokens=False)["input_ids"]
        (start,) = [i for i in range(len(ids)) if ids[i : i + len(sought)] == sought]
        labels[row, start : start + len(sought)] = torch.tensor(sought)
    theirs = gradients(trainer.model, **(dict(whole) | {"labels": labels}))
    for name, gradient in gradients(trainer.model, **batch).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6)


# Seen before training


def test_the_first_example_is_shown_with_what_it_learns(tmp_path, tokenizer, capsys):
    args, rows = training(tmp_path, max_length=80), rows_of(*TALKS, talk("x" * 100, "a", "b", "c"))
    train = training_rows(rows, tokenizer, args)
    trainer = text_trainer(tokenizer, args, train, to_prompt_completion(rows_of(*TALKS)))
    given = {"train": train, "validation": to_prompt_completion(rows_of(*TALKS))}
    capsys.readouterr()
    show_example(trainer, rows_left(trainer, given))
    said, shown = capsys.readouterr().out.splitlines()
    first = trainer.train_dataset[0]
    count = sum(label != -100 for label in first["labels"])
    assert said == f"First example, {len(first['input_ids'])} tokens, of which {count} are learned, in [[ ]]:"
    assert shown.startswith(
        "  <|system|>be brief<|end|><|user|>one?<|end|><|assistant|>[[first reply<|end|>]]<|user|>tw"
    )

    show_example(trainer, rows_left(trainer, given), whole=True)
    printed = capsys.readouterr().out
    assert "<|assistant|>[[second reply<|end|>]]<|user|>three?" in printed
    lengths = sorted(map(len, trainer.train_dataset["input_ids"]))
    assert f"train: 3 rows of {lengths[0]} to 70 tokens, median {lengths[1]}; 0 reach" in printed
    assert "0 reach --max_length 80 and 0 of them lose their end, 1 of 4 have no reply left and are dropped" in printed
    assert "validation: 6 rows of " in printed


def test_an_example_with_an_image(tmp_path, processor, capsys):
    args = training(tmp_path)
    train = training_rows(seen(), processor, args, vision=True)
    trainer = vision_trainer(processor, args, train, None)
    capsys.readouterr()
    show_example(trainer, rows_left(trainer, {"train": train}), whole=True)
    printed = capsys.readouterr().out
    assert "<|user|><image> x 16 one?<|end|><|assistant|>[[first reply<|end|>]]\n" in printed
    assert "train: 4 rows of " in printed and "of the 4, their images included" in printed


def test_runs_of_one_token_are_written_once(tokenizer):
    ids = tokenizer("<image>" * 5 + "<|user|>" + "<image>" * 2 + "hi")["input_ids"]
    assert marked(ids, [-100] * 8 + ids[8:], tokenizer) == "<image> x 5 <|user|><image><image>[[hi]]"


def shown(tmp_path, tokenizer, template, rows, **changes):
    tokenizer.chat_template = template
    args = training(tmp_path, **changes)
    trainer = text_trainer(tokenizer, args, rows)
    show_example(trainer, rows_left(trainer, {"train": rows}))


def test_a_template_that_learns_the_prompt_is_an_error(tmp_path, tokenizer):
    """It begins otherwise where a reply is asked for, so that the prompt is no beginning of the whole."""
    rows = to_prompt_completion(rows_of(*[talk("what is it?", "it is that")] * 3))
    begins_otherwise = "{% if add_generation_prompt %}<|system|>{% endif %}" + PLAIN
    with pytest.raises(DataError, match=r"row 0 .*its prompt is learned \('what is it\?'\): the chat template"):
        shown(tmp_path, tokenizer, begins_otherwise, rows)
    shown(tmp_path, tokenizer, PLAIN, rows)
    # A reply that says its prompt again is no mistake
    shown(tmp_path, tokenizer, PLAIN, to_prompt_completion(rows_of(talk("say hi", "say hi"))))


def test_a_template_that_learns_nothing_is_an_error(tmp_path, tokenizer):
    rows = to_prompt_completion(rows_of(*[talk("what is it?", "it is that")] * 3))
    no_reply = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'assistant' %}")
    with pytest.raises(DataError, match=r"row 0 .*nothing is learned from it: the chat template leaves the reply out"):
        shown(tmp_path, tokenizer, no_reply, rows)
    always_the_same = PLAIN.replace("{{ m.content }}", "{{ 'no' if m.role == 'assistant' else m.content }}")
    with pytest.raises(DataError, match=r"row 0 .*its reply is not learned"):
        shown(tmp_path, tokenizer, always_the_same, rows)


def test_plain_text_and_packed_rows_are_shown_too(tmp_path, tokenizer, capsys):
    texts = Dataset.from_dict({"text": ["all of it"] * 8})
    shown(tmp_path, tokenizer, PLAIN, texts)
    assert "  [[all of it<|end|>]]\n" in capsys.readouterr().out
    shown(tmp_path, tokenizer, PLAIN, texts, max_length=40, packing=True, packing_strategy="wrapped")
    assert "First example, 40 tokens, of which 40 are learned" in capsys.readouterr().out
