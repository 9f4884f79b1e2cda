"""The built-in model and data for vision: nothing is downloaded.

The data are images of numbers of two to four digits, made of real scans: scikit-learn's 1,797 handwritten digits.
The model is a LLaVA (CLIP vision + Qwen2 text) of 0.7 million parameters that learns to read them on a CPU in about
a minute.
"""

from __future__ import annotations

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
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

PROMPT = "Read the number."
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


def _draw_images(scans: np.ndarray, labels: np.ndarray, count: int, rng: np.random.Generator) -> Dataset:
    rows: dict[str, list] = {"images": [], "prompt": [], "completion": []}
    for _ in range(count):
        chosen = rng.integers(len(scans), size=rng.integers(2, 5))
        number = "".join(str(label) for label in labels[chosen])
        rows["images"].append([_draw(scans[chosen], rng)])
        rows["prompt"].append([{"role": "user", "content": PROMPT}])
        rows["completion"].append([{"role": "assistant", "content": number}])
    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"images": List(Image()), "prompt": List(message), "completion": List(message)})
    return Dataset.from_dict(rows, features=features)


def digit_images(train: int = 4000, test: int = 300, seed: int = 0) -> DatasetDict:
    """Makes images of numbers from real handwriting, in TRL's conversational prompt-completion format.

    The scans are split first (see [`split_scans`]), so no scan of a test image is in any training image. Numbers
    have two to four digits, evenly often; size, place, ink and paper vary a little.

    Args:
        train (`int`, *optional*, defaults to `4000`):
            Number of training images.
        test (`int`, *optional*, defaults to `300`):
            Number of test images.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split and of the images.

    Returns:
        `DatasetDict`: splits `"train"` and `"test"` with columns `images` (a list of one grey PIL image of
        112 x 32 pixels, stored as PNG), `prompt` and `completion` (a list of one message each).
    """
    # Imported here: it is slow to import, and only this function needs it.
    from sklearn.datasets import load_digits

    digits = load_digits()
    parts = split_scans(seed)
    return DatasetDict(
        {
            split: _draw_images(
                digits.images[parts[split]], digits.target[parts[split]], count, np.random.default_rng([seed, i])
            )
            for i, (split, count) in enumerate([("train", train), ("test", test)])
        }
    )


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
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROMPT, "user\n", "assistant\n", "system\n"] * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )


def tiny_llava(seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Builds an untrained LLaVA (CLIP vision, Qwen2 text) of under a million parameters, and its processor.

    Images of any shape are stretched to a square of 32 x 32 pixels, 16 patches. The tokenizer is byte-level BPE,
    trained on the spot; each digit is one token. Every weight matrix gets a gradient: `vision_feature_layer` is the
    last one.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global random state is left as it was.

    Returns:
        `tuple[LlavaForConditionalGeneration, LlavaProcessor]`: the model in float32, and its processor with chat
        template. Both save and reload.
    """
    tokenizer = _tokenizer()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
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
