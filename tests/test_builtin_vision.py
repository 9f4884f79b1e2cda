"""The built-in vision model and data, and generation with them."""

from io import BytesIO

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoProcessor, LlavaForConditionalGeneration
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from grades_trl.model.flops import TokenCounter, step_flops
from grades_trl.model.matrices import find_matrices
from grades_trl.recipe.generation import exact_match
from vlm import builtin, pretrain
from vlm.builtin import (
    DATASETS,
    DIGITS,
    PRETRAINED_TASKS,
    blank,
    digit_images,
    pretrained_llava,
    split_scans,
    tiny_llava,
)
from vlm.generation import answers


@pytest.fixture(scope="module")
def data():
    return digit_images(train=64, test=24)


@pytest.fixture(scope="module")
def collated(data):
    _, processor = tiny_llava()
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    return processor, collator([data["train"][i] for i in range(16)])


def numbers(split: Dataset) -> list[str]:
    return [completion[0]["content"] for completion in split["completion"]]


def test_scans_are_split_without_overlap():
    parts = split_scans(seed=3)
    assert sorted([*parts["train"], *parts["test"]]) == list(range(1797))
    assert len(parts["test"]) == 297
    assert not np.array_equal(split_scans(seed=4)["test"], parts["test"])


@pytest.mark.parametrize(
    ("seed", "name"), [(0, "digits"), (5, "digits"), (5, "digits_dashes"), (6, "digits_inverted")]
)
def test_images_are_made_of_their_own_split_and_labelled_right(monkeypatch, seed, name):
    """For every seed and dataset the same split: no scan of a test image was in the training of any model."""
    seen = []
    white = Image.new("L", builtin.CANVAS_SIZE, "white")
    monkeypatch.setattr(builtin, "_draw", lambda scans, rng: seen.append(scans) or white)
    images = DATASETS[name](train=40, test=20, seed=seed)
    digits = load_digits()
    index = {scan.tobytes(): i for i, scan in enumerate(digits.images)}
    assert len(index) == 1797  # no two scans are alike: the scans of an image tell where they are from
    used = [[index[scan.tobytes()] for scan in scans] for scans in seen]
    parts = split_scans()
    assert {i for scans in used[:40] for i in scans} <= set(parts["train"])
    assert {i for scans in used[40:] for i in scans} <= set(parts["test"])
    joint = "-" if name == "digits_dashes" else ""
    expected = [joint.join(str(digits.target[i]) for i in scans) for scans in used]
    assert numbers(images["train"]) + numbers(images["test"]) == expected


def test_rows_are_in_trl_format_and_show_as_many_digits_as_they_say(data):
    row = data["test"][0]
    assert set(row) == {"images", "prompt", "completion"}
    assert [image.size for image in row["images"]] == [builtin.CANVAS_SIZE]
    assert row["prompt"] == [{"role": "user", "content": "Read the number."}]
    assert [message["role"] for message in row["completion"]] == ["assistant"]
    assert {len(number) for number in numbers(data["train"])} == {2, 3, 4}
    assert all(number.isdecimal() for number in numbers(data["train"]) + numbers(data["test"]))
    # Digits stand in cells from the left: ink in as many cells as the number is long, and none after it.
    for row, number in zip(data["test"], numbers(data["test"]), strict=True):
        image = np.asarray(row["images"][0], dtype=float)
        cells = image.reshape(32, 4, builtin.CELL_WIDTH).min(axis=(0, 2))
        assert (cells < image.max() - 50).tolist() == [i < len(number) for i in range(4)]


def test_images_are_stored_as_png(data):
    stored = data["test"].with_format("arrow")[:]["images"][0][0]["bytes"].as_py()
    assert Image.open(BytesIO(stored)).format == "PNG"


def test_images_depend_on_the_seed_alone():
    def content(seed):
        test = digit_images(train=4, test=8, seed=seed)["test"]
        return numbers(test), [row["images"][0].tobytes() for row in test]

    first = content(1)
    np.random.seed(7)
    assert content(1) == first
    assert content(2) != first


def test_inverted_images_have_light_ink_on_dark_paper():
    dark, light = DATASETS["digits_inverted"](train=3, test=3, seed=2), digit_images(train=3, test=3, seed=2)
    for split in ("train", "test"):
        assert numbers(dark[split]) == numbers(light[split])
        for ours, theirs in zip(dark[split], light[split], strict=True):
            assert np.array_equal(np.asarray(ours["images"][0]), 255 - np.asarray(theirs["images"][0]))
            assert np.median(np.asarray(ours["images"][0])) < 50


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Read the number.", "3729"),
        ("Read the first digit.", "3"),
        ("Read the second digit.", "7"),
        ("Read the last digit.", "9"),
        ("Count the digits.", "4"),
        ("Read the largest digit.", "9"),
        ("Read the smallest digit.", "2"),
        ("Read the number backwards.", "9273"),
        ("Read the digits.", "3-7-2-9"),
    ],
)
def test_every_task_has_its_answer(monkeypatch, prompt, answer):
    white = Image.new("L", builtin.CANVAS_SIZE, "white")
    monkeypatch.setattr(builtin, "draw_numbers", lambda split, count, rng: ([white] * count, ["3729"] * count))
    row = digit_images(train=1, test=1, prompt=prompt)["test"][0]
    assert (row["prompt"][0]["content"], row["completion"][0]["content"]) == (prompt, answer)
    assert builtin.TASKS.keys() - PRETRAINED_TASKS.keys() == {builtin.BACKWARDS, DIGITS}


@pytest.fixture(scope="module")
def reader():
    return pretrained_llava()


@pytest.mark.parametrize("prompt", ["Read the number.", "Read the second digit.", "Count the digits."])
def test_the_pretrained_model_answers_what_it_has_learned(reader, prompt):
    rows = digit_images(train=1, test=60, seed=1, prompt=prompt)["test"]
    assert exact_match(answers(*reader, rows, batch_size=60, max_new_tokens=6), rows) >= 0.8


def test_the_pretrained_model_cannot_do_the_new_task_yet(reader):
    rows = DATASETS["digits_dashes"](train=1, test=30, seed=1)["test"]
    assert {prompt[0]["content"] for prompt in rows["prompt"]} == {DIGITS}
    assert exact_match(answers(*reader, rows, batch_size=30, max_new_tokens=8), rows) == 0.0
    assert exact_match(answers(*reader, rows, batch_size=30, max_new_tokens=8, blank=True), rows) == 0.0


def test_most_flops_of_the_pretrained_model_are_in_its_vision_tower(reader, data):
    model, processor = reader
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 1_300_000 < sum(p.numel() for p in model.parameters()) < 1_500_000
    counter = TokenCounter()
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    counter.add(collator([data["train"][i] for i in range(8)]), model.config)
    matrices, tokens = find_matrices(model).values(), counter.per_batch()
    vision = step_flops([m for m in matrices if m.tower == "vision"], tokens=tokens)
    assert 0.5 < vision / step_flops(matrices, tokens=tokens) < 0.7


def test_pretraining_saves_a_model_that_loads(tmp_path, monkeypatch, data):
    pretrain.pretrain(tmp_path / "first", steps=2, images=40)
    pretrain.pretrain(tmp_path / "again", steps=2, images=40)
    loaded = []
    for folder in ("first", "again"):
        monkeypatch.setattr(builtin, "READER", tmp_path / folder)
        loaded.append(pretrained_llava())
    model, processor = loaded[0]
    weights = loaded[1][0].state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    untrained = tiny_llava(vision_layers=5, vision_size=128)[0].state_dict()
    moved = [name for name, w in model.state_dict().items() if not torch.equal(w, untrained[name].bfloat16().float())]
    assert any("vision_tower" in name for name in moved) and any("language_model" in name for name in moved)
    assert len(answers(model, processor, data["test"].select(range(2)), max_new_tokens=2)) == 2


def test_pretraining_learns_the_answers_alone():
    processor = tiny_llava()[1]
    batch = pretrain.tokenized(processor, ["Read the number.", "Count the digits."], ["372", "2"])
    learned = [processor.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert learned == ["372<|im_end|>", "2<|im_end|>"]
    assert (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum(1).tolist() == [16, 16]
    assert torch.equal(batch["labels"][batch["labels"] != -100], batch["input_ids"][batch["labels"] != -100])


def test_blank_images_show_nothing(data):
    images = [data["test"][0]["images"][0], Image.new("RGB", (7, 5), "red")]
    before = images[0].tobytes()
    blanks = blank(images)
    assert [(b.size, b.mode) for b in blanks] == [(p.size, p.mode) for p in images]
    assert all(np.ptp(np.asarray(b)) == 0 for b in blanks)
    assert np.ptp(np.asarray(images[0])) > 50 and images[0].tobytes() == before


def test_model_is_small_and_depends_on_the_seed_alone():
    state = torch.get_rng_state()
    model, _ = tiny_llava(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again, other = tiny_llava(seed=1)[0], tiny_llava(seed=2)[0]
    weights = model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in again.state_dict().items())
    assert not torch.equal(other.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_each_digit_is_one_token():
    tokenizer = tiny_llava()[1].tokenizer
    ids = tokenizer("0123456789", add_special_tokens=False)["input_ids"]
    assert len(set(ids)) == 10
    assert [tokenizer.decode([i]) for i in ids] == list("0123456789")
    assert tokenizer.decode(tokenizer("héllo 7 <new>", add_special_tokens=False)["input_ids"]) == "héllo 7 <new>"


def test_special_tokens_agree():
    model, processor = tiny_llava()
    tokenizer = processor.tokenizer
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for config in [model.config, model.config.text_config, model.generation_config]:
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert model.config.image_token_index == tokenizer.convert_tokens_to_ids("<image>")


def test_model_and_processor_reload(data, tmp_path):
    model, processor = tiny_llava()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    reloaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    processor2 = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor2) is type(processor)
    assert type(processor2.image_processor) is type(processor.image_processor)
    batches = []
    for each in [processor, processor2]:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read 12."}]}]
        text = each.apply_chat_template(messages, add_generation_prompt=True)
        batches.append(each(images=data["test"][0]["images"], text=text, return_tensors="pt"))
    assert batches[0].keys() == batches[1].keys()
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, reloaded(**batches[1]).logits)
    assert reloaded.generation_config.eos_token_id == processor2.tokenizer.eos_token_id


def test_only_the_response_is_in_the_loss(data, collated):
    processor, batch = collated
    eos = processor.tokenizer.eos_token
    for labels, ids, number in zip(batch["labels"], batch["input_ids"], numbers(data["train"]), strict=False):
        assert processor.decode(labels[labels != -100]) == number + eos
        assert processor.decode(ids[: int((labels != -100).nonzero()[0])]) == (
            f"<|im_start|>user\n{'<image>' * 16}Read the number.{eos}<|im_start|>assistant\n"
        )


def test_paper_is_near_zero_and_ink_far_from_it(collated):
    pixels = collated[1]["pixel_values"]
    assert pixels.shape == (16, 3, 32, 32)
    assert pixels.median().abs() < 0.6
    assert pixels.amin() < -2


def test_every_linear_layer_gets_a_gradient(collated):
    model, _ = tiny_llava()
    model.train()
    model(**collated[1]).loss.backward()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(linear) == 3 * 6 + 2 + 3 * 7 + 1  # vision, projector, text, head
    assert [name for name, m in linear.items() if m.weight.grad is None or m.weight.grad.abs().max() < 1e-9] == []


def test_stock_trainer_lowers_the_loss(data, tmp_path):
    model, processor = tiny_llava()
    config = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=1.5e-3,
        logging_steps=1,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = SFTTrainer(model=model, args=config, train_dataset=data["train"], processing_class=processor)
    assert isinstance(trainer.data_collator, DataCollatorForVisionLanguageModeling)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) / 3 < losses[0] - 1


@pytest.mark.parametrize("training", [True, False])
def test_answers_are_text_and_the_mode_comes_back(data, training):
    model, processor = tiny_llava()
    model.train(training)
    modes = []
    hook = model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    texts = answers(model, processor, data["test"], batch_size=10, max_new_tokens=3)
    hook.remove()
    assert len(texts) == 24 and all(isinstance(text, str) for text in texts)
    assert modes and not any(modes)
    assert model.training is training


def test_answers_do_not_depend_on_the_batch(data):
    model, processor = tiny_llava()
    some = data["test"].select(range(6))
    # Prompts of several lengths need padding: a wrong side or mask would change the answers.
    prompts = [[{"role": "user", "content": "Read the number." * (1 + i % 3)}] for i in range(6)]
    some = some.remove_columns("prompt").add_column("prompt", prompts)
    together = answers(model, processor, some, batch_size=6, max_new_tokens=5)
    assert together == answers(model, processor, some, batch_size=1, max_new_tokens=5)


def test_answers_match_step_by_step_argmax(data):
    model, processor = tiny_llava()
    row = data["test"][0]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read the number."}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=row["images"], text=text, return_tensors="pt")
    ids, model = inputs["input_ids"], model.eval()
    with torch.no_grad():
        for _ in range(4):
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"], use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    expected = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answers(model, processor, data["test"].select([0]), max_new_tokens=4) == [expected]


def test_blank_answers_see_only_the_prompt(data):
    model, processor = tiny_llava()
    texts = answers(model, processor, data["test"], batch_size=24, max_new_tokens=4, blank=True)
    assert len(set(texts)) == 1
    assert len(set(answers(model, processor, data["test"], batch_size=24, max_new_tokens=4))) > 1


def test_answers_name_the_missing_column(data):
    model, processor = tiny_llava()
    with pytest.raises(ValueError, match=r"no column \['images'\]"):
        answers(model, processor, data["test"].rename_column("images", "image"))


def test_exact_match_counts_stripped_equals():
    completions = ["12", "345", " 67", "89"]
    plain = Dataset.from_dict({"completion": [[{"role": "assistant", "content": text}] for text in completions]})
    assert exact_match([" 12\n", "345", "67", "8"], plain) == 0.75
    parts = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in completions]
    assert exact_match(["12", "34", "6 7", "8"], Dataset.from_dict({"completion": parts})) == 0.25
    with pytest.raises(ValueError, match="3 answers to 4 examples"):
        exact_match(["12", "345", "67"], plain)
