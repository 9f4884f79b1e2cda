"""Which replies are learned: all of a conversation in one row, where the chat template can tell them; and what the
model will read, shown and checked before training."""

import logging
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset, Features, List, concatenate_datasets
from PIL import Image as PILImage
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl import SFTConfig, SFTTrainer

from grades_trl.recipe.data import DataError, show_example, to_prompt_completion, training_rows
from grades_trl.recipe.data.images import RGB
from grades_trl.recipe.data.preview import marked
from grades_trl.recipe.data.replies import whole_conversations_problem
from helpers import gradients, llava, warnings_in
from vlm import GradESVLMTrainer

LLAMA = (Path(trl.__file__).parent / "chat_templates" / "llama3.jinja").read_text()
PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
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
    tokens = [
        "<pad>",
        "<image>",
        "<|end|>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ]
    tokens += ["<|begin_of_text|>", "<|eot_id|>"]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator([], trainers.BpeTrainer(special_tokens=tokens, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<|begin_of_text|>",
        eos_token="<|end|>",
        chat_template=MARKED,
        extra_special_tokens=tokens,
    )


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


# Images


@pytest.fixture
def processor(tokenizer):
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=PLAIN,
        num_additional_image_tokens=1,
    )


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


# Seen before training


def test_the_first_example_is_shown_with_what_it_learns(tmp_path, tokenizer, capsys):
    args, rows = training(tmp_path, max_length=80), rows_of(*TALKS, talk("x" * 100, "a", "b", "c"))
    train = training_rows(rows, tokenizer, args)
    trainer = text_trainer(tokenizer, args, train, to_prompt_completion(rows_of(*TALKS)))
    given = {"train": train, "validation": to_prompt_completion(rows_of(*TALKS))}
    capsys.readouterr()
    show_example(trainer, given)
    said, shown = capsys.readouterr().out.splitlines()
    first = trainer.train_dataset[0]
    count = sum(label != -100 for label in first["labels"])
    assert said == f"First example, {len(first['input_ids'])} tokens, of which {count} are learned, in [[ ]]:"
    assert shown.startswith(
        "  <|system|>be brief<|end|><|user|>one?<|end|><|assistant|>[[first reply<|end|>]]<|user|>tw"
    )

    show_example(trainer, given, whole=True)
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
    show_example(trainer, {"train": train}, whole=True)
    printed = capsys.readouterr().out
    assert "<|user|><image> x 16 one?<|end|><|assistant|>[[first reply<|end|>]]\n" in printed
    assert "train: 4 rows of " in printed and "of the 4, their images included" in printed


def test_runs_of_one_token_are_written_once(tokenizer):
    ids = tokenizer("<image>" * 5 + "<|user|>" + "<image>" * 2 + "hi")["input_ids"]
    assert marked(ids, [-100] * 8 + ids[8:], tokenizer) == "<image> x 5 <|user|><image><image>[[hi]]"


def shown(tmp_path, tokenizer, template, rows, **changes):
    tokenizer.chat_template = template
    args = training(tmp_path, **changes)
    show_example(text_trainer(tokenizer, args, rows), {"train": rows})


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
