"""The user's data: every format in, one shape out, and every fault named by its row before training starts."""

import json

import pytest
import torch
from datasets import Dataset, DatasetDict, Image, List
from PIL import Image as PILImage
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from grades_trl.recipe import data
from grades_trl.recipe.arguments import RecipeArguments
from grades_trl.recipe.data import DataError, check, load, to_prompt_completion
from helpers import PLAIN, chat_tokenizer, llava_processor

IMAGE, USER, ASSISTANT = {"type": "image"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


def text(value):
    return {"type": "text", "text": value}


def turn(role, content):
    return {"role": role, "content": content}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_image(path, color="red", mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.new(mode, (16, 16), color).save(path)
    return path


def color(image):
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / ".cache")


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer(PLAIN)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return llava_processor(tokenizer, 16)


def learned(batch, tokenizer):
    """What the labels spell, row by row; <image> placeholders would show up here too."""
    return [tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]


# Sources


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_file_of_each_kind(tmp_path, suffix):
    rows = [{"prompt": f"{i} + {i} =", "completion": f"00{2 * i}", "id": i} for i in range(20)]
    path = tmp_path / f"data{suffix}"
    dataset = Dataset.from_list(rows)
    {
        ".jsonl": dataset.to_json,
        ".json": lambda p: p.write_text(json.dumps(rows)),
        ".parquet": dataset.to_parquet,
        ".csv": dataset.to_csv,
    }[suffix](path)
    loaded = load(str(path), test_size=5)
    assert {split: part.column_names for split, part in loaded.items()} == {
        "train": ["prompt", "completion"],
        "test": ["prompt", "completion"],
    }
    assert (len(loaded["train"]), len(loaded["test"])) == (15, 5)
    both = {row["prompt"]: row["completion"] for part in loaded.values() for row in part}
    assert both == {row["prompt"]: row["completion"] for row in rows}  # 004 is not 4


def test_csv_keeps_words_that_pandas_reads_as_missing(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("prompt,completion\na,NA\nb,None\n")
    loaded = load(str(path), test_size=1)
    assert sorted(row["completion"] for part in loaded.values() for row in part) == ["NA", "None"]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.jsonl", "test.jsonl"),
        ("my_train_1.jsonl", "my-eval-1.jsonl"),
        ("train/data.jsonl", "test/data.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("data.train.jsonl", "data.validation.jsonl"),
    ],
)
def test_splits_by_file_name(tmp_path, train, test):
    write(tmp_path / train, [{"text": "a"}, {"text": "b"}])
    write(tmp_path / test, [{"text": "c"}])
    loaded = load(str(tmp_path))
    assert loaded["train"]["text"][:] == ["a", "b"]
    assert loaded["test"]["text"][:] == ["c"]


@pytest.mark.parametrize("train", ["training_extra.jsonl", "train-00000-of-00001.jsonl", "training/extra.jsonl"])
def test_files_without_a_split_are_named(tmp_path, caplog, train):
    """Once the names of others have one, as in `datasets`."""
    for name in ("chats_a.jsonl", "more/chats_b.jsonl", train):
        write(tmp_path / name, [{"text": f"{name} {i}"} for i in range(3)])
    assert {row["text"].split()[0] for part in load(str(tmp_path)).values() for row in part} == {train}
    assert "are left out, since others have one: chats_a.jsonl, more/chats_b.jsonl. Rename them" in caplog.text
    caplog.clear()
    load(str(tmp_path / "more"))
    assert "left out" not in caplog.text


def test_folder_without_split_names_is_one_training_split(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "a"}])
    write(tmp_path / "b.jsonl", [{"text": "b"}])
    loaded = load(str(tmp_path), test_size=1)
    assert sorted(loaded["train"]["text"][:] + loaded["test"]["text"][:]) == ["a", "b"]


def test_named_splits(tmp_path):
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", [{"text": f"{split} {i}"} for i in range(3)])
    loaded = load(str(tmp_path), train_split="validation", test_split="train")
    assert loaded["train"]["text"][:] == ["validation 0", "validation 1", "validation 2"]
    assert sorted(loaded["test"]["text"][:]) == ["train 0", "train 1", "train 2"]


def test_saved_to_disk(tmp_path):
    rows = Dataset.from_list([{"text": str(i)} for i in range(4)])
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "two")
    assert {k: len(v) for k, v in load(str(tmp_path / "one"), test_size=1).items()} == {"train": 3, "test": 1}
    assert {k: len(v) for k, v in load(str(tmp_path / "two")).items()} == {"train": 4, "test": 1}


def test_hub_ids_go_to_the_hub(monkeypatch):
    asked = []

    def hub(*args):
        asked.append(args)
        return DatasetDict(train=Dataset.from_list([{"text": str(i)} for i in range(10)]))

    monkeypatch.setattr(data.sources, "load_dataset", hub)
    assert len(load("trl-lib/Capybara", config="default", test_size=0.2)["test"]) == 2
    assert asked == [("trl-lib/Capybara", "default")]


def test_split_is_deterministic(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"text": str(i)} for i in range(50)])
    first, again = (load(str(path), seed=1)["test"]["text"][:] for _ in range(2))
    other = load(str(path), seed=2)["test"]["text"][:]
    assert first == again
    assert len(first) == 5
    assert sorted(first) != sorted(other)


@pytest.mark.parametrize("name", ["./nowhere", "data.jsonl", "/no/such/folder", "a/b/c"])
def test_missing_path(name):
    with pytest.raises(DataError, match=f"{name}: there is no such file or folder"):
        load(name)


def test_missing_split(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": "a"}])
    write(tmp_path / "dev.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r'no split "test"; there are: train, validation'):
        load(str(tmp_path), test_split="test")
    with pytest.raises(DataError, match=r'no split "trian"; there are: train, validation'):
        load(str(tmp_path), train_split="trian")


def test_unreadable_sources(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": "b\n')
    with pytest.raises(DataError, match=r"broken\.jsonl: cannot be read"):
        load(str(tmp_path / "broken.jsonl"))
    (tmp_path / "notes.doc").write_text("a")
    with pytest.raises(
        DataError, match=r"notes\.doc: cannot be read, expected \.jsonl, \.json, \.parquet, \.csv, \.txt"
    ):
        load(str(tmp_path / "notes.doc"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: the folder has no data file, expected \.jsonl"):
        load(str(tmp_path / "empty"))
    write(tmp_path / "two/a.jsonl", [{"text": "a"}])
    (tmp_path / "two/b.csv").write_text("text\nb\n")
    with pytest.raises(DataError, match=r"two: expected files of one kind, found \.csv, \.jsonl"):
        load(str(tmp_path / "two"))
    with pytest.raises(DataError, match=r'is a local path, expected no config, got "en"'):
        load(str(tmp_path / "two"), config="en")


# Images


def test_relative_paths_of_images(tmp_path):
    """Relative to the file they are in, also where both splits use the same names; images never name a split."""
    for split, value in (("train", "red"), ("test", "blue")):
        write_image(tmp_path / split / "img/eval_0.png", value)
        rows = [{"messages": [USER, ASSISTANT], "images": ["img/eval_0.png"]}, {"messages": [USER, ASSISTANT]}]
        write(tmp_path / split / "data.jsonl", rows)
    loaded = load(str(tmp_path), vision=True)
    assert color(loaded["train"][0]["images"][0]) == RED
    (with_image,) = (row for row in loaded["test"] if row["images"])
    assert color(with_image["images"][0]) == BLUE
    assert loaded["train"][1]["images"] == []
    assert loaded["train"].features["images"] == List(data.images.RGB)


def gray(image):
    """The values of the upper left and the lower right pixel, which are gray."""
    assert image.mode == "RGB"
    pixels = image.getpixel((0, 0)), image.getpixel((15, 15))
    assert all(len(set(pixel)) == 1 for pixel in pixels)
    return pixels[0][0], pixels[1][0]


def halves(dark, bright, dtype="uint16"):
    values = torch.full((16, 16), dark, dtype=torch.float64).numpy()
    values[8:] = bright
    return PILImage.fromarray(values.astype(dtype))


def transparent(mode):
    """Black, and opaque only in its lower half."""
    alpha = halves(0, 255, "uint8")
    if mode == "P":
        image = PILImage.new("P", (16, 16))
        image.putpalette([0, 0, 0, 10, 10, 10])
        image.paste(1, (0, 8, 16, 16))
        image.info["transparency"] = 0
        return image
    image = PILImage.new(mode, (16, 16))
    image.putalpha(alpha)
    return image


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("a.png", halves(100 * 256, 200 * 256), (100, 200)),
        ("a.tif", halves(100 * 256, 200 * 256), (100, 200)),
        ("black.png", halves(0, 0), (0, 0)),
        ("a.png", transparent("RGBA"), (255, 0)),
        ("a.png", transparent("LA"), (255, 0)),
        ("a.png", transparent("P"), (255, 10)),
        ("a.png", halves(0, 255, "uint8").convert("1"), (0, 255)),
        ("a.png", halves(100, 200, "uint8"), (100, 200)),
        ("a.tif", halves(100, 200, "uint8").convert("RGB").convert("CMYK"), (100, 200)),
    ],
    ids=["16-bit", "16-bit-tif", "16-bit-black", "RGBA", "LA", "palette", "1-bit", "8-bit", "CMYK"],
)
@pytest.mark.parametrize("source", ["path", "bytes", "folders"])
def test_images_keep_what_they_show(tmp_path, name, image, expected, source):
    """However they come into a dataset, and from there to the answers that a model gives."""
    image.save(tmp_path / name)
    rows = [{"messages": [USER, ASSISTANT], "images": [str(tmp_path / name)]}] * 4
    path = tmp_path / "data"
    if source == "bytes":
        path.mkdir()
        rows = [{**row, "images": [{"bytes": (tmp_path / name).read_bytes(), "path": None}]} for row in rows]
        Dataset.from_list(rows).to_parquet(path / "a.parquet")
    else:
        for folder in ("b", "c") if source == "folders" else ("b",):
            write(path / folder / "data.jsonl", rows)
    loaded = load(str(path), vision=True, test_size=2)
    assert gray(loaded["train"][0]["images"][0]) == expected
    for _ in range(2):  # the second comes from the cache
        (row,) = to_prompt_completion(loaded["test"].select([0]))
        assert gray(row["images"][0]) == expected


@pytest.mark.parametrize(
    ("name", "image", "match"),
    [
        ("a.tif", halves(100, 70000, "int32"), "integers of 32 bits, of which black and white are not known: save it"),
        ("a.tif", halves(0.2, 0.9, "float32"), "floating-point numbers, of which black and white are not known: save"),
        ("a.png", halves(1600, 3200), "the brightest is 3,200 of 65,535, as in images of 12 bits, .*: save it"),
    ],
    ids=["32-bit", "float", "12-bit"],
)
def test_images_of_an_unknown_range_are_refused(tmp_path, name, image, match):
    image.save(tmp_path / name)
    rows = [{"messages": [USER, ASSISTANT], "images": [name]}] * 4
    with pytest.raises(DataError, match=rf"row 0 \(the first is 0\): image \(.*{name}\) cannot be shown .*{match}"):
        load(str(write(tmp_path / "data.jsonl", rows)), vision=True)


def test_single_image_column_becomes_a_list(tmp_path):
    write_image(tmp_path / "a.png")
    absolute = write_image(tmp_path / "elsewhere/b.png", "blue")
    rows = [{"prompt": [USER], "completion": [ASSISTANT], "image": path} for path in ("a.png", str(absolute), None)]
    loaded = load(str(write(tmp_path / "data.jsonl", rows)), vision=True, test_size=1)
    both = [image for part in loaded.values() for image in part["images"]]
    assert sorted(len(images) for images in both) == [0, 1, 1]
    assert {color(image) for images in both for image in images} == {RED, BLUE}


def test_imagefolder(tmp_path):
    for i, (value, mode) in enumerate([("red", "RGBA"), ("green", "P"), ("blue", "RGB")]):
        write_image(tmp_path / f"images/{i}.png", value if mode != "P" else 0, mode)
    (tmp_path / "metadata.csv").write_text(
        "file_name,prompt,completion\n" + "".join(f"images/{i}.png,<image>{i}?,a\n" for i in range(3))
    )
    write(tmp_path / "notes.json", [{"anything": 1}])
    loaded = load(str(tmp_path), vision=True, test_size=1)
    for part in loaded.values():
        assert part.column_names == ["prompt", "completion", "images"]
        for row in part:
            if row["prompt"] != "<image>1?":
                assert color(row["images"][0]) == {"<image>0?": RED, "<image>2?": BLUE}[row["prompt"]]


def test_relative_paths_of_files_in_several_folders(tmp_path):
    for folder, value in (("a", "red"), ("b", "blue")):
        write_image(tmp_path / folder / "0.png", value)
        write(tmp_path / folder / "data.jsonl", [{"messages": [turn("user", folder), ASSISTANT], "image": "0.png"}])
    loaded = load(str(tmp_path), vision=True, test_size=1)
    for part in loaded.values():
        assert color(part[0]["images"][0]) == {"a": RED, "b": BLUE}[part[0]["messages"][0]["content"]]


def test_rows_without_stored_images_get_an_empty_list(tmp_path):
    image = PILImage.open(write_image(tmp_path / "a.png"))
    rows = {"messages": [[USER, ASSISTANT]] * 3, "images": [[image], None, []]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    loaded = load(str(tmp_path / "a.parquet"), vision=True, test_size=1)
    assert sorted(len(images) for part in loaded.values() for images in part["images"]) == [0, 0, 1]


def test_images_stored_in_the_data(tmp_path):
    """As `datasets` writes them, and as pandas does: a struct of bytes and path without the feature."""
    image = PILImage.open(write_image(tmp_path / "a.png", "green"))
    raw = (tmp_path / "a.png").read_bytes()
    rows = {"prompt": [[USER]] * 2, "completion": [[ASSISTANT]] * 2}
    for i, images in enumerate([[image] * 2, [{"bytes": raw, "path": "x.png"}] * 2, [[image]] * 2, [raw] * 2]):
        path = tmp_path / f"{i}.parquet"
        Dataset.from_dict({**rows, "image" if i != 2 else "images": images}).to_parquet(path)
        loaded = load(str(path), vision=True, test_size=1)
        assert [color(x) for x in loaded["train"][0]["images"]] == [GREEN], i


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", r"row 1 \(the first is 0\): image 0 .*b\.png\) cannot be opened, expected an image: Unidentified"),
        (b"not an image", r"row 1 .*expected an image: Unidentified"),
        ("truncated", r"row 1 .*expected an image: OSError"),
        (None, r"row 1 .*expected an image: FileNotFoundError"),
    ],
)
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_unreadable_image(tmp_path, content, expected, suffix):
    PILImage.effect_noise((64, 64), 50).save(tmp_path / f"a{suffix}")
    whole = (tmp_path / f"a{suffix}").read_bytes()
    if content is not None:
        (tmp_path / f"b{suffix}").write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
    rows = [{"messages": [USER, ASSISTANT], "images": [f"{name}{suffix}"]} for name in "ab"]
    with pytest.raises(DataError, match=expected.replace("png", suffix[1:])):
        load(str(write(tmp_path / "data.jsonl", rows)), vision=True)


def test_images_are_opened_evenly_over_a_large_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(data.images, "MAX_OPENED", 5)
    good = str(write_image(tmp_path / "a.png"))
    for broken, found in ((0, True), (1, False), (16, True), (19, False)):
        paths = [[good] if i != broken else ["nowhere.png"] for i in range(20)]
        dataset = Dataset.from_dict({"messages": [[USER, ASSISTANT]] * 20, "images": paths})
        if found:
            with pytest.raises(DataError, match=f"row {broken} "):
                check(dataset, vision=True)
        else:
            check(dataset, vision=True)


def test_wrong_image_column(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"messages": [USER, ASSISTANT], "image": 3}])
    with pytest.raises(DataError, match=r'column "image" should hold images or paths of images, found .*int64'):
        load(str(path), vision=True)


# Faults


def fault(tmp_path, bad, good, match, **kwargs):
    """The fault is found in row 2, whether or not the rows are held out of the training split."""
    rows = [good, good, bad, good]
    with pytest.raises(DataError, match=rf"train: row 2 \(the first is 0\): {match}"):
        load(str(write(tmp_path / "data.jsonl", rows)), **kwargs)
    load(str(write(tmp_path / "good.jsonl", [good] * 4)), **kwargs)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("hello", r"messages is 'hello', expected a list of \{\"role\""),
        ([], r"messages is \[\], expected a list of"),
        (None, "messages is None, expected a list of"),
        (["hello"], r"messages\[0\] is 'hello', expected \{\"role\""),
        ([{"text": "x"}], r"messages\[0\] has the role None, expected one of system, developer, user, assist"),
        (
            [turn("narrator", "x"), ASSISTANT],
            r"messages\[0\] has the role 'narrator', expected one of system, developer, user, assist",
        ),
        ([turn("user", None), ASSISTANT], r"messages\[0\] has the content None, expected text or a list of parts"),
        ([USER, turn("assistant", " ")], r"messages\[1\] has the content ' ', expected some text"),
        ([USER, turn("assistant", [])], r"messages\[1\] has the content \[\], expected some text"),
        ([USER, turn("assistant", [text("")])], r"messages\[1\] has the content .*expected some text"),
        ([USER], "messages has no assistant message, expected at least one; its roles are user"),
        ([ASSISTANT, USER, ASSISTANT], r"messages\[0\] is an assistant message without a prompt, expected a user"),
        ([turn("system", "s"), ASSISTANT], r"messages\[1\] is an assistant message without a prompt"),
        (
            [turn("user", [{"type": "audio"}]), ASSISTANT],
            r"messages\[0\] has a part of the type audio: video and audio are not supported, expected text and images",
        ),
        ([turn("user", ["x"]), ASSISTANT], r"messages\[0\] has the part 'x', expected \{\"type\""),
    ],
)
def test_bad_messages(tmp_path, messages, match):
    fault(tmp_path, {"messages": messages}, {"messages": [turn("system", ""), USER, ASSISTANT]}, match)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"prompt": "a", "completion": ""}, "completion is '', expected text"),
        ({"prompt": "a", "completion": None}, "completion is None, expected text"),
        ({"prompt": None, "completion": "b"}, "prompt is None, expected text"),
        ({"prompt": "a", "completion": [ASSISTANT]}, r"completion is \[.*, expected text, as in prompt"),
        ({"prompt": [USER], "completion": "b"}, "completion is 'b', expected a list of"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "is messages, but row 0 is text, expected the same in every"),
    ],
)
def test_bad_prompt_and_completion(tmp_path, bad, match):
    fault(tmp_path, bad, {"prompt": "a", "completion": "b"}, match)


@pytest.mark.parametrize(
    ("prompt", "completion", "match"),
    [
        ([USER], [], r"completion is \[\], expected a list of"),
        ([USER], [ASSISTANT, USER], "completion ends with the role user, expected an assistant message"),
        ([turn("system", "s")], [ASSISTANT], "prompt ends with the role system, expected a user or tool message"),
        ([USER], [turn("assistant", "")], r"completion\[0\] has the content '', expected some text"),
    ],
)
def test_bad_conversational_prompt_and_completion(tmp_path, prompt, completion, match):
    good = {"prompt": [USER], "completion": [ASSISTANT]}
    fault(tmp_path, {"prompt": prompt, "completion": completion}, good, match)


@pytest.mark.parametrize("value", [None, "", " \n"])
def test_bad_text(tmp_path, value):
    fault(tmp_path, {"body": value}, {"body": "a"}, "body is .*, expected text", text_column="body")


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (
            {"messages": [turn("user", [IMAGE, text("a")]), ASSISTANT], "images": []},
            r"the messages have 1 .* has 0 images, expected",
        ),
        (
            {"messages": [turn("user", [IMAGE, text("a")]), ASSISTANT], "images": None},
            r"the messages have 1 .* has 0 images, expected",
        ),
        (
            {"messages": [turn("user", [IMAGE, text("a")]), ASSISTANT], "images": ["a.png", "a.png"]},
            r"the messages have 1 image \(\"<image>\" in a text, or .* and the row has 2 images, expected as many",
        ),
        (
            {"messages": [turn("user", [text("a")]), ASSISTANT], "images": ["a.png"]},
            "the messages have 0 .* has 1 image, expected",
        ),
        (
            {"messages": [turn("user", "<image>\n<image>"), ASSISTANT], "images": ["a.png"]},
            "the messages have 2 images .* and the row has 1 image, expected as many",
        ),
        (
            {"messages": [USER, turn("assistant", "<image>")], "images": ["a.png"]},
            'a reply has "<image>" in its text, expected images in system or user messages',
        ),
        (
            {"messages": [USER, turn("assistant", [IMAGE, text("a")])], "images": ["a.png"]},
            r"messages\[1\] has an image, but its role is assistant: expected images in system or user messages",
        ),
    ],
)
def test_bad_placeholders(tmp_path, bad, match):
    write_image(tmp_path / "a.png")
    good = {"messages": [turn("user", [IMAGE, text("a")]), ASSISTANT], "images": ["a.png"]}
    fault(tmp_path, bad, good, match, vision=True)


@pytest.mark.parametrize(
    ("beside", "none", "match"),
    [
        ("tools", "[]", "has tools, which TRL does not show .* remove the column, or write the tools into the system"),
        ("tools", None, "has tools"),
        ("chat_template_kwargs", {}, "has chat_template_kwargs, which TRL does not show .* --chat_template_path"),
    ],
)
def test_what_trl_drops_beside_images(tmp_path, beside, none, match):
    """Answers would be with it, and the training without."""
    tools = [{"type": "function", "function": {"name": "zoom", "parameters": {"type": "object", "properties": {}}}}]
    value = {"tools": json.dumps(tools), "chat_template_kwargs": {"enable_thinking": False}}[beside]
    path = str(write_image(tmp_path / "a.png"))
    rows = [{"messages": [USER, ASSISTANT], "images": [path], beside: of_row} for of_row in (none, none, value)]
    with pytest.raises(DataError, match=rf"row 2 \(the first is 0\): {match}"):
        load(str(write(tmp_path / "data.jsonl", rows)), vision=True)
    assert load(str(write(tmp_path / "none.jsonl", rows[:2])), vision=True, test_size=1)
    del rows[2]["images"]
    assert load(str(write(tmp_path / "text.jsonl", [{**rows[2]}] * 2)), test_size=1)["train"][0][beside]


def test_placeholders_of_prompt_and_completion(tmp_path):
    write_image(tmp_path / "a.png")
    good = {"prompt": "<image>a", "completion": "b", "image": "a.png"}
    bad = {"prompt": "<image><image>a", "completion": "b", "image": "a.png"}
    fault(tmp_path, bad, good, r'prompt has 2 "<image>" and the row has 1 image, expected as many', vision=True)
    fault(tmp_path, {**bad, "prompt": "a"}, good, r'prompt has 0 "<image>" and the row has 1 image', vision=True)
    other = {**bad, "prompt": "<|vision_start|><|image_pad|><|vision_end|>a"}
    load(str(write(tmp_path / "other.jsonl", [good, other])), vision=True)
    good = {"prompt": [turn("user", [IMAGE, text("a")])], "completion": [ASSISTANT], "image": "a.png"}
    bad = {"prompt": [USER], "completion": [turn("user", [IMAGE]), ASSISTANT], "image": "a.png"}
    fault(tmp_path, bad, good, "completion has image placeholders, expected them in prompt only", vision=True)


def test_columns(tmp_path):
    path = str(write(tmp_path / "a.jsonl", [{"left": "a", "right": "b"}] * 2))
    with pytest.raises(
        DataError,
        match=r'"messages", or "prompt" and "completion", or "text"; found: left, right.*--columns prompt=NAME',
    ):
        load(path)
    write_image(tmp_path / "a.png")
    path = str(write(tmp_path / "b.jsonl", [{"messages": [USER, ASSISTANT], "image": "a.png"}] * 2))
    with pytest.raises(DataError, match=r'train: .*\(column "image"\): use recipes/sft_vlm\.py'):
        load(path)
    path = str(write(tmp_path / "c.jsonl", [{"messages": [USER, ASSISTANT]}] * 2))
    with pytest.raises(DataError, match=r'expected a column "image" or "images"; found: messages\. .*sft_text\.py'):
        load(path, vision=True)
    path = str(write(tmp_path / "d.jsonl", [{"text": "<image>a", "image": "a.png"}] * 2))
    with pytest.raises(DataError, match='TRL does not train on "text" with images, expected a column "messages"'):
        load(path, vision=True)


def test_empty_split(tmp_path):
    with pytest.raises(DataError, match="heldout: the split is empty, expected at least one row"):
        check(Dataset.from_list([{"text": "a"}]).select([]), vision=False, name="heldout")
    write(tmp_path / "train.jsonl", [{"text": "a"}])
    write(tmp_path / "test.jsonl", [])
    with pytest.raises(DataError, match=r"test\.jsonl: cannot be read: it has no rows"):
        load(str(tmp_path))
    for file in ("blank.jsonl", "blank.csv"):
        (tmp_path / file).write_text("\n\n")
        with pytest.raises(DataError, match=f"{file}: cannot be read"):
            load(str(tmp_path / file))
    with pytest.raises(DataError, match=r"train\.jsonl: cannot hold out test_size=0\.1 of 1 rows: "):
        load(str(tmp_path / "train.jsonl"))


def test_fault_in_the_test_split_names_it(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": "a"}])
    write(tmp_path / "validation.jsonl", [{"text": "a"}, {"text": None}])
    with pytest.raises(DataError, match=r"validation: row 1 \(the first is 0\): text is None, expected text"):
        load(str(tmp_path))


# Shape


def test_columns_that_trl_does_not_read_are_dropped(tmp_path):
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    messages = [USER, {"role": "assistant", "tool_calls": calls}, turn("tool", "2"), ASSISTANT]
    tools = [{"name": "add", "a": 1}, {"name": "sub", "b": 2}]
    rows = [{"messages": messages, "tools": tools, "source": "web"}, {"messages": [USER, ASSISTANT], "source": "x"}]
    for rows_of in (
        lambda p: write(p / "a.jsonl", rows),
        lambda p: Dataset.from_list(rows).to_parquet(p / "a.parquet"),
    ):
        rows_of(tmp_path)
    for suffix in ("jsonl", "parquet"):
        loaded = load(str(tmp_path / f"a.{suffix}"), test_size=1)
        both = [row for part in loaded.values() for row in part]
        both.sort(key=lambda row: len(row["messages"]))
        assert both[0] == {"messages": [USER, ASSISTANT], "tools": None}  # nothing that Arrow filled in
        assert both[1] == {"messages": messages, "tools": tools}
        expanded = to_prompt_completion(loaded["train" if len(loaded["train"][0]["messages"]) > 2 else "test"])
        assert [row["prompt"] + row["completion"] for row in expanded] == [messages[:2], messages]
        assert [row["tools"] for row in expanded] == [tools, tools]


def test_text_column_is_renamed(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"body": "a", "title": "b"}] * 3)
    loaded = load(str(path), text_column="body", test_size=1)
    assert loaded["train"].column_names == ["text"]
    assert to_prompt_completion(loaded["train"])["text"][:] == ["a", "a"]


def test_to_prompt_completion_has_one_row_per_reply():
    system = turn("system", "s")
    first, second, third = (turn("assistant", x) for x in "abc")
    rows = [[system, USER, first, USER, second], [USER, third, turn("user", "bye")]]
    expanded = to_prompt_completion(Dataset.from_list([{"messages": messages} for messages in rows]))
    assert expanded.column_names == ["prompt", "completion"]
    assert expanded[:] == {
        "prompt": [[system, USER], [system, USER, first, USER], [USER]],
        "completion": [[first], [second], [third]],
    }


def test_to_prompt_completion_leaves_other_formats():
    for columns in ({"text": ["a"]}, {"prompt": ["a"], "completion": ["b"]}):
        assert to_prompt_completion(Dataset.from_dict(columns))[:] == columns


def test_to_prompt_completion_gives_each_row_the_images_of_its_prompt(tmp_path, monkeypatch):
    for name in ("red", "green", "blue"):
        write_image(tmp_path / f"{name}.png", name)
    explicit = [
        turn("user", [IMAGE, text("one")]),
        turn("assistant", "a"),
        turn("user", [text("more"), IMAGE, IMAGE]),
        turn("assistant", "b"),
        turn("user", "and?"),  # text only: TRL would put all images here once more
        turn("assistant", "c"),
    ]
    implicit = [USER, turn("assistant", "d"), USER, turn("assistant", "e")]
    rows = [
        {"messages": explicit, "images": ["red.png", "green.png", "blue.png"]},
        {"messages": implicit, "images": ["blue.png", "red.png"]},
        {"messages": [USER, turn("assistant", "f")], "images": []},
    ]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", rows)
    loaded = load(str(tmp_path), vision=True)["train"]

    def decode(*_):
        raise AssertionError("an image was decoded")

    with monkeypatch.context() as patch:
        patch.setattr(Image, "decode_example", decode)
        expanded = to_prompt_completion(loaded)
    assert [row[0]["content"] for row in expanded["completion"]] == list("abcdef")
    assert [[color(image) for image in images] for images in expanded["images"]] == [
        [RED],
        [RED, GREEN, BLUE],
        [RED, GREEN, BLUE],
        [BLUE, RED],
        [BLUE, RED],
        [],
    ]
    assert expanded[4]["prompt"] == implicit[:3]
    assert to_prompt_completion(load(str(tmp_path), vision=True)["train"].select([0, 1]))[:] == expanded[:5]


def test_null_parts_of_arrow_are_taken_out(tmp_path):
    """Arrow gives every part every key, and templates would see an image in `{"type": "text", "image": None}`."""
    write_image(tmp_path / "a.png")
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "a"}]
    messages = [turn("user", content), turn("assistant", [text("b")])]
    Dataset.from_list([{"messages": messages, "images": ["a.png"]}] * 2).to_parquet(tmp_path / "a.parquet")
    row = load(str(tmp_path / "a.parquet"), vision=True, test_size=1)["train"][0]
    assert row["messages"] == [turn("user", [IMAGE, text("a")]), turn("assistant", [text("b")])]


# TRL takes it


def conversations(tmp_path):
    for name in ("red", "green", "blue"):
        write_image(tmp_path / f"{name}.png", name)
    rows = [
        {
            "messages": [
                turn("system", "be brief"),
                turn("user", [IMAGE, text("one")]),
                turn("assistant", "first reply"),
                turn("user", "more"),
                turn("assistant", "second reply"),
            ],
            "images": ["red.png"],
        },
        {"messages": [USER, turn("assistant", "third reply")], "images": ["blue.png", "green.png"]},
        {"messages": [USER, turn("assistant", "fourth reply")], "images": []},
    ]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", rows)
    return load(str(tmp_path), vision=True)


def test_collator_learns_responses_only(tmp_path, processor):
    dataset = to_prompt_completion(conversations(tmp_path)["train"])
    batch = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(list(dataset))
    assert learned(batch, processor.tokenizer) == [
        f"{reply} reply<|end|>" for reply in ("first", "second", "third", "fourth")
    ]
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image_token).sum(1).tolist() == [4, 4, 8, 0]  # 2 x 2 patches an image
    assert batch["pixel_values"].shape == (4, 3, 16, 16)
    assert processor.tokenizer.decode(batch["input_ids"][1]) == (
        "<|system|>be brief<|end|><|user|><image><image><image><image>one<|end|><|assistant|>first reply<|end|>"
        "<|user|>more<|end|><|assistant|>second reply<|end|>" + "<pad>" * int((batch["attention_mask"][1] == 0).sum())
    )


def test_collator_takes_every_vision_format(tmp_path, processor):
    loaded = conversations(tmp_path)["train"]
    batch = DataCollatorForVisionLanguageModeling(processor)(list(loaded))  # not to_prompt_completion: all is learned
    assert learned(batch, processor.tokenizer)[2] == "<|user|>hi<|end|><|assistant|>fourth reply<|end|>"
    rows = [{"prompt": f"<image>{i}", "completion": f"reply {i}", "image": "red.png"} for i in range(2)]
    path = write(tmp_path / "strings/data.jsonl", [{**row, "image": "../red.png"} for row in rows])
    dataset = to_prompt_completion(load(str(path), vision=True, test_size=1)["train"])
    batch = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(list(dataset))
    assert learned(batch, processor.tokenizer)[0] in ("reply 0", "reply 1")


def test_trains_a_vision_model(tmp_path, processor):
    loaded = conversations(tmp_path)
    text_config = Qwen2Config(
        vocab_size=len(processor.tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    vision_config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision_config, text_config=text_config, image_token_index=image_token)
    model = LlavaForConditionalGeneration(config)
    args = SFTConfig(
        str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=4,
        max_length=None,
        report_to="none",
        use_cpu=True,
    )
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=to_prompt_completion(loaded["train"]),
        eval_dataset=to_prompt_completion(loaded["test"]),
        processing_class=processor,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert sorted(learned(batch, processor.tokenizer))[0] == "first reply<|end|>"
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"messages": [turn("system", "s"), USER, ASSISTANT, USER, turn("assistant", "bye")]},
            ["yo<|end|>", "bye<|end|>"],
        ),
        ({"messages": [turn("user", [text("hi")]), turn("assistant", [text("yo")])]}, ["yo<|end|>"]),
        ({"prompt": [USER], "completion": [ASSISTANT]}, ["yo<|end|>"]),
        ({"prompt": "hi ", "completion": "yo"}, ["yo<|end|>"]),
        ({"body": "all of it"}, ["all of it<|end|>"]),
    ],
)
def test_trainer_learns_responses_of_every_text_format(tmp_path, tokenizer, row, expected):
    loaded = load(str(write(tmp_path / "a.jsonl", [row] * 4)), text_column="body", test_size=1)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    args = SFTConfig(str(tmp_path / "out"), max_steps=1, report_to="none", use_cpu=True)
    trainer = SFTTrainer(
        Qwen2ForCausalLM(config), args, train_dataset=to_prompt_completion(loaded["train"]), processing_class=tokenizer
    )
    labels = [[token for token in row["labels"] if token != -100] for row in trainer.train_dataset]
    assert sorted({tokenizer.decode(row) for row in labels}) == sorted(expected)
    assert len(labels) == 3 * len(expected)
    trainer.train()


def test_sharegpt_conversations_become_messages(tmp_path):
    rows = [
        {"conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "yes"}]} for i in range(10)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = load(str(tmp_path / "chats.jsonl"))["train"]
    assert train.column_names == ["messages"]
    (question, answer) = train[0]["messages"]
    assert question["role"] == "user" and question["content"].endswith("?")
    assert answer == {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_developer_is_a_system(tmp_path, suffix):
    """OpenAI's newer name of that role, which chat templates do not know."""
    turns = [turn("developer", "be brief"), USER, ASSISTANT]
    sharegpt = [{"from": "developer", "value": "be brief"}, {"from": "human", "value": "hi"}]
    formats = {
        "messages": {"messages": turns},
        "with_parts": {"messages": [turn("developer", [text("be brief")]), USER, ASSISTANT]},
        "prompt": {"prompt": turns[:2], "completion": turns[2:]},
        "sharegpt": {"conversations": [*sharegpt, {"from": "gpt", "value": "yo"}]},
    }
    for name, row in formats.items():
        path = tmp_path / f"{name}.{suffix}"
        rows = Dataset.from_list([row] * 4, on_mixed_types="use_json")
        (rows.to_json if suffix == "jsonl" else rows.to_parquet)(path)
        for example in to_prompt_completion(load(str(path))["train"]):
            assert [m["role"] for m in example["prompt"] + example["completion"]] == ["system", "user", "assistant"]


def test_a_developer_asks_nothing(tmp_path):
    good = {"messages": [USER, ASSISTANT]}
    bad = {"messages": [turn("developer", "be brief"), ASSISTANT]}
    fault(tmp_path, bad, good, r"messages\[1\] is an assistant message without a prompt")
    good = {"prompt": [USER], "completion": [ASSISTANT]}
    bad = {"prompt": [USER, turn("developer", "be brief")], "completion": [ASSISTANT]}
    fault(tmp_path, bad, good, "prompt ends with the role developer, expected a user or tool message")


def test_a_test_split_that_is_sorted_is_shuffled_before_it_is_halved(tmp_path):
    for split, size in (("train", 4), ("test", 40)):
        rows = [{"text": f"topic {i * 2 // size}"} for i in range(size)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = data.with_validation(load(str(tmp_path)))
    assert len(splits["test"]) == 20
    assert set(splits["validation"]["text"]) == set(splits["test"]["text"]) == {"topic 0", "topic 1"}


@pytest.mark.parametrize("as_list", [False, True], ids=["lines", "list"])
def test_dates_in_json_stay_as_they_are_written(tmp_path, as_list):
    """Arrow takes a column for times if each text in it is one."""
    days = [f"1998-05-0{day}" for day in range(1, 5)]
    rows = [
        {"instruction": f"As ISO 8601:\u2028{day}", "output": day, "history": [[day, "2020-01-01 10:00:00"]], "n": 1.5}
        for day in days
    ]
    path = write(tmp_path / "rows.json", rows)
    if as_list:
        path.write_text(json.dumps(rows))
    loaded = load(str(path))
    found = sorted(
        (row["messages"] for split in loaded.values() for row in split), key=lambda turns: turns[-1]["content"]
    )
    assert [[message["content"] for message in turns] for turns in found] == [
        [day, "2020-01-01 10:00:00", f"As ISO 8601:\u2028{day}", day] for day in days
    ]


# ---- rows that are trained on and held out as well ----


def said_of_both(train, held_out, caplog):
    caplog.clear()
    data.overlap.warn_of_rows_in_both(train, {"test": held_out})
    return [record.getMessage() for record in caplog.records]


def test_held_out_rows_that_are_trained_on_are_counted(tmp_path, caplog):
    rows = [{"prompt": f"{n % 30}?", "completion": f"{n % 30}!"} for n in range(60)]  # each row twice

    def loaded_from(name, rows):
        recipe = RecipeArguments(dataset_name=str(write(tmp_path / name, rows)))
        return data.load_data(recipe, SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), {})

    loaded = loaded_from("rows.jsonl", rows)
    train = {row["prompt"] for row in loaded["train"]}
    again = {split: sum(row["prompt"] in train for row in loaded[split]) for split in ("validation", "test")}
    assert again["validation"] and again["test"]
    for split, count in again.items():
        assert f"{count} of 3 rows of {split}" in caplog.text
    caplog.clear()
    loaded_from("other.jsonl", rows[:30])
    assert "among the rows to train on" not in caplog.text


def test_the_same_text_with_another_image_is_another_row(tmp_path, caplog):
    row = {"prompt": [USER], "completion": [ASSISTANT]}
    paths = [str(write_image(tmp_path / f"{name}.png", name)) for name in ("red", "green")]

    def with_image(path):
        return Dataset.from_list([{**row, "images": [path]}]).cast_column("images", List(Image()))

    red, green = map(with_image, paths)
    assert said_of_both(red, green, caplog) == []
    (said,) = said_of_both(red, red, caplog)
    assert "1 of 1 row of test" in said
    in_memory = [PILImage.open(path) for path in paths]
    red, green = map(with_image, in_memory)  # their bytes are in the rows
    assert said_of_both(red, green, caplog) == [] and len(said_of_both(green, green, caplog)) == 1
