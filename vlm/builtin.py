"""The built-in models and data for vision: nothing is downloaded.

The data are images of numbers of two to four digits, made of real scans: scikit-learn's 1,797 handwritten digits.
The models are LLaVAs (CLIP vision + Qwen2 text): an untrained one of 0.7 million parameters that learns to read on a
CPU in about a minute, and a pretrained one of 1.4 million that reads already (`reader/`, made by `vlm/pretrain.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageOps
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from grades_trl.extras import require

PROMPT = "Read the number."
# Prompt -> the answer to it, of the digits of a number. The pretrained model was trained on all of these,
PRETRAINED_TASKS: dict[str, Callable[[str], str]] = {
    PROMPT: str,
    "Read the first digit.": lambda number: number[0],
    "Read the second digit.": lambda number: number[1],
    "Read the last digit.": lambda number: number[-1],
    "Count the digits.": lambda number: str(len(number)),
    "Read the largest digit.": max,
    "Read the smallest digit.": min,
}
# and not these.
BACKWARDS, DIGITS = "Read the number backwards.", "Read the digits."
TASKS = PRETRAINED_TASKS | {BACKWARDS: lambda number: number[::-1], DIGITS: "-".join}
READER = Path(__file__).parent / "reader"
CANVAS_SIZE = (112, 32)  # width and height of an image, in pixels: four cells of 28 x 32, one for each digit
CELL_WIDTH = 28
TEST_SCANS = 297  # of 1,797

IMAGE_SIZE = 32  # the side of the square that the vision tower sees
PATCH_SIZE = 8  # so that each digit is one column of four patches

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == "image" -%}<image>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}"""


def split_scans(seed: int = 0) -> dict[str, np.ndarray]:
    """Splits scikit-learn's 1,797 scans of handwritten digits by chance.

    The scans of the two splits are disjoint. Their writers are not: the data do not say who wrote which digit.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split.

    Returns:
        `dict[str, np.ndarray]`: for `"train"` (1,500) and `"test"` (297) the sorted indices into `load_digits()`.
    """
    order = np.random.default_rng(seed).permutation(1797)
    return {"train": np.sort(order[TEST_SCANS:]), "test": np.sort(order[:TEST_SCANS])}


def _draw(scans: np.ndarray, rng: np.random.Generator) -> PILImage.Image:
    """Draws scans of shape (digits, 8, 8), ink from 0 to 16, side by side: dark ink on light paper."""
    width, height = CANVAS_SIZE
    sizes = rng.integers(21, 27, size=(len(scans), 2))  # width, height of each digit
    lefts = CELL_WIDTH * np.arange(len(scans)) + rng.integers(0, CELL_WIDTH - sizes[:, 0] + 1)  # anywhere in its cell
    ink = np.zeros((height, width))
    for scan, (w, h), left in zip(scans, sizes, lefts, strict=True):
        digit = PILImage.fromarray((scan * (255 / 16)).astype(np.uint8)).resize((int(w), int(h)), PILImage.BILINEAR)
        top = rng.integers(0, height - h + 1)
        ink[top : top + h, left : left + w] = np.asarray(digit) / 255 * rng.uniform(0.7, 1.0)
    paper = rng.uniform(225, 255)
    return PILImage.fromarray((paper * (1 - 0.9 * ink)).astype(np.uint8))


def draw_numbers(split: str, count: int, rng: np.random.Generator) -> tuple[list[PILImage.Image], list[str]]:
    """Draws images of numbers of two to four digits, evenly often, from the scans of one split of [`split_scans`].

    Args:
        split (`str`): `"train"` or `"test"`.
        count (`int`): how many.
        rng (`np.random.Generator`): of the choice, the sizes and the places.

    Returns:
        `tuple[list[PIL.Image.Image], list[str]]`: grey images of 112 x 32 pixels, and their numbers.
    """
    # Imported here: it is slow to import, and only this function needs it.
    require("sklearn", "The handwritten digits of the built-in datasets")
    from sklearn.datasets import load_digits

    digits = load_digits()
    indices = split_scans()[split]
    scans, labels = digits.images[indices], digits.target[indices]
    images, numbers = [], []
    for _ in range(count):
        chosen = rng.integers(len(scans), size=rng.integers(2, 5))
        numbers.append("".join(str(label) for label in labels[chosen]))
        images.append(_draw(scans[chosen], rng))
    return images, numbers


def _rows(images: list[PILImage.Image], numbers: list[str], prompt: str) -> Dataset:
    rows: dict[str, list] = {"images": [], "prompt": [], "completion": []}
    for image, number in zip(images, numbers, strict=True):
        rows["images"].append([image])
        rows["prompt"].append([{"role": "user", "content": prompt}])
        rows["completion"].append([{"role": "assistant", "content": TASKS[prompt](number)}])
    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"images": List(Image()), "prompt": List(message), "completion": List(message)})
    return Dataset.from_dict(rows, features=features)


def digit_images(
    train: int = 4000, test: int = 300, seed: int = 0, prompt: str = PROMPT, inverted: bool = False
) -> DatasetDict:
    """Makes images of numbers from real handwriting, in TRL's conversational prompt-completion format.

    The scans are split first (see [`split_scans`]), so no scan of a test image is in any training image, whatever the
    seed. Numbers have two to four digits, evenly often; size, place, ink and paper vary a little.

    Args:
        train (`int`, *optional*, defaults to `4000`):
            Number of training images.
        test (`int`, *optional*, defaults to `300`):
            Number of test images.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the images.
        prompt (`str`, *optional*, defaults to `"Read the number."`):
            What is asked, one of `TASKS`.
        inverted (`bool`, *optional*, defaults to `False`):
            Light ink on dark paper: images of a kind that the pretrained model has never seen.

    Returns:
        `DatasetDict`: splits `"train"` and `"test"` with columns `images` (a list of one grey PIL image of
        112 x 32 pixels, stored as PNG), `prompt` and `completion` (a list of one message each).
    """
    splits = {}
    for i, (split, count) in enumerate([("train", train), ("test", test)]):
        images, numbers = draw_numbers(split, count, np.random.default_rng([seed, i]))
        splits[split] = _rows([ImageOps.invert(image) if inverted else image for image in images], numbers, prompt)
    return DatasetDict(splits)


# The built-in datasets by name: what the pretrained model can do, a new task on the same images (or a harder one), and
# the same task on images of a kind that it has never seen.
DATASETS: dict[str, Callable[..., DatasetDict]] = {
    "digits": digit_images,
    "digits_dashes": partial(digit_images, prompt=DIGITS),
    "digits_backwards": partial(digit_images, prompt=BACKWARDS),
    "digits_inverted": partial(digit_images, inverted=True),
}


def blank(images: list[PILImage.Image]) -> list[PILImage.Image]:
    """Returns white images of the same sizes and modes: what a model can answer without seeing.

    Args:
        images (`list[PIL.Image.Image]`):
            Images to blank; they are left as they are.

    Returns:
        `list[PIL.Image.Image]`: new images, one for each.
    """
    return [PILImage.new(image.mode, image.size, "white") for image in images]


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    # Digits are cut out first: no merge can join two of them.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*PRETRAINED_TASKS, BACKWARDS, "user\n", "assistant\n", "system\n"] * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )


def tiny_llava(
    seed: int = 0, vision_layers: int = 3, vision_size: int = 96
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Builds an untrained LLaVA (CLIP vision, Qwen2 text), by default of 0.7 million parameters, and its processor.

    Images of any shape are stretched to a square of 32 x 32 pixels, 16 patches. The tokenizer is byte-level BPE,
    trained on the spot; each digit is one token. Every weight matrix gets a gradient: `vision_feature_layer` is the
    last one.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global random state is left as it was.
        vision_layers (`int`, *optional*, defaults to `3`), vision_size (`int`, *optional*, defaults to `96`):
            Depth and width of the vision tower.

    Returns:
        `tuple[LlavaForConditionalGeneration, LlavaProcessor]`: the model in float32, and its processor with chat
        template. Both save and reload.
    """
    tokenizer = _tokenizer()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    vision = CLIPVisionConfig(
        hidden_size=vision_size,
        intermediate_size=4 * vision_size,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        initializer_range=0.2,  # positions must stand out from the first step; with 0.02 reading starts much later
        initializer_factor=2.0,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,  # about 1 / sqrt(hidden_size)
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,  # the default, -2, would leave the last vision layer without a gradient
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.update(eos_token_id=eos, pad_token_id=pad, bos_token_id=None)
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size=square,
            crop_size=square,
            do_center_crop=False,
            # Paper is near zero, so that the ink stands out: CLIP's own mean and std let the paper dominate.
            image_mean=[0.9] * 3,
            image_std=[0.25] * 3,
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops again
        chat_template=CHAT_TEMPLATE,
    )
    return model, processor


def pretrained_llava() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Loads the pretrained LLaVA that comes with this repository, and its processor.

    It has 1.4 million parameters. Of 200 test images it reads 86 % exactly, and it counts the digits of all; of the
    other `PRETRAINED_TASKS` it answers 97 % (second digit), 58 % (smallest), 51 % (largest) and 37 % (first and last,
    which it does not tell apart). Its vision tower makes up more than half of the FLOPs of a training step, as in
    vision-language models of 2 to 4 billion parameters. `python -m vlm.pretrain` makes it.

    Returns:
        `tuple[LlavaForConditionalGeneration, LlavaProcessor]`: the model in float32, and its processor.
    """
    model = LlavaForConditionalGeneration.from_pretrained(READER, dtype=torch.float32)
    return model, LlavaProcessor.from_pretrained(READER)
