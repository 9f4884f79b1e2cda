"""Outputs of the frozen prefix read from memory: the same run, without the prefix's work."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_frozen_prefix import CountMatmuls, bottom_up, config_for

from grades_trl import GradESConfig, GradESTrainer
from grades_trl.freezing.activation_cache import PrefixCache
from grades_trl.freezing.frozen_prefix import PrefixCut
from grades_trl.recipe import builtin
from helpers import llava, qwen3

MIB = 2**20


def half_frozen(cache_bytes=MIB, layers=4, **changes):
    torch.manual_seed(0)
    model = get_peft_model(qwen3(num_hidden_layers=layers, **changes), LoraConfig(r=4, target_modules="all-linear"))
    model.train().base_model.model.model.layers[: layers // 2].requires_grad_(False)
    cut = PrefixCut(model, cache_bytes)
    model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert cut.update()
    return model, cut


def forward(model, **inputs):
    with CountMatmuls() as counter:
        logits = model(**inputs).logits
    return counter.count, logits


def test_a_batch_that_comes_back_skips_the_prefix_and_gives_the_same_numbers():
    model, cut = half_frozen()
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    first, expected = forward(model, input_ids=ids)
    again, logits = forward(model, input_ids=ids)
    assert torch.equal(logits, expected)
    outside = 2  # rotary embedding and head
    assert again - outside == (first - outside) / 2  # two of four layers
    assert (cut.cache.hits, cut.cache.misses) == (1, 1)
    shuffled = ids[[2, 0, 3, 1]]
    _, logits = forward(model, input_ids=shuffled)
    assert torch.equal(logits, expected[[2, 0, 3, 1]])
    assert cut.cache.hits == 2
    other = ids.clone()
    other[1, 5] = 61
    forward(model, input_ids=other)
    assert cut.cache.hits == 2  # one changed token, and the batch is computed


def test_padding_does_not_matter():
    model, cut = half_frozen()
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    _, expected = forward(model, input_ids=ids, attention_mask=mask)
    longer, wider = torch.nn.functional.pad(ids, (0, 5)), torch.nn.functional.pad(mask, (0, 5))
    _, logits = forward(model, input_ids=longer, attention_mask=wider)
    assert cut.cache.hits == 1
    assert torch.allclose(logits[0, :12], expected[0], atol=1e-5)
    assert torch.allclose(logits[1, :7], expected[1, :7], atol=1e-5)


def test_whole_runs_with_and_without_the_cache_are_equal(tmp_path):
    tokenizer = builtin.tiny_qwen3()[1]
    dataset = builtin.dates(train=32, test=8)
    runs = []
    for mib in (0, 16):
        trainer = bottom_up(GradESTrainer, most=2)(
            model=qwen3(num_hidden_layers=4, vocab_size=len(tokenizer), bos_token_id=None),
            args=config_for(tmp_path, False, num_train_epochs=6, save_strategy="no"),
            train_dataset=dataset["train"],
            eval_dataset=dataset["test"],
            processing_class=tokenizer,
            grades=GradESConfig(cache_prefix=mib),
            peft_config=LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear"),
        )
        trainer.train()
        runs.append((trainer, [row["loss"] for row in trainer.state.log_history if "loss" in row]))
    (_, expected), (trainer, losses) = runs
    cache = trainer.grades.cut.cache
    # 4 steps an epoch; a new cut, and an empty cache, after steps 4 and 8: from step 13 on all is there.
    assert (cache.hits, cache.misses) == (12, 8)
    assert losses == pytest.approx(expected, rel=1e-4)


def test_memory_is_bounded():
    row = 12 * 32 * 4
    model, cut = half_frozen(cache_bytes=3 * row)
    ids = torch.randint(3, 60, (8, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        forward(model, input_ids=ids)
    assert cut.cache.bytes == 3 * row
    assert cut.cache.hits == 0
    forward(model, input_ids=ids[:3])
    assert cut.cache.hits == 1
    cut.update()
    assert cut.cache.bytes == 3 * row  # nothing moved
    model.base_model.model.model.layers[2].requires_grad_(False)
    cut.update()
    assert cut.cache.bytes == 0  # another depth


def test_nothing_is_cached_where_the_key_would_not_tell():
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    left_padded = torch.ones_like(ids)
    left_padded[1, :4] = 0
    model, cut = half_frozen()
    for inputs in ({"position_ids": torch.arange(12).expand(2, -1)}, {"attention_mask": left_padded}):
        for _ in range(2):
            forward(model, input_ids=ids, **inputs)
    assert (cut.cache.hits, cut.cache.bytes) == (0, 0)
    model, cut = half_frozen(attention_dropout=0.1)
    for _ in range(2):
        forward(model, input_ids=ids)
    assert (cut.cache.hits, cut.cache.bytes) == (0, 0)


@pytest.mark.parametrize("noise", [None, 5.0])
def test_neftune_switches_it_off(tmp_path, capsys, noise):
    tokenizer = builtin.tiny_qwen3()[1]
    dataset = builtin.dates(train=32, test=8)
    trainer = bottom_up(GradESTrainer, most=2)(
        model=qwen3(num_hidden_layers=4, vocab_size=len(tokenizer), bos_token_id=None),
        args=config_for(tmp_path, None, num_train_epochs=4, save_strategy="no", neftune_noise_alpha=noise),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        processing_class=tokenizer,
        grades=GradESConfig(cache_prefix=16),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    assert (trainer.grades.cut.cache.hits == 0) == (noise is not None)
    assert ("--cache_prefix is off" in capsys.readouterr().out) == (noise is not None)


def test_the_same_words_with_another_picture_are_another_sample():
    model = llava(image_token_id=3).train()
    model.requires_grad_(False)
    model.model.language_model.layers[1].requires_grad_(True)
    ids = torch.cat([torch.full((2, 16), 3), torch.arange(10, 18).expand(2, -1)], 1)
    pictures = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    cut = PrefixCut(model, MIB)
    model(input_ids=ids, pixel_values=pictures)
    assert cut.update()
    full, expected = forward(model, input_ids=ids, pixel_values=pictures)
    cached, logits = forward(model, input_ids=ids, pixel_values=pictures)
    assert cut.cache.hits == 1
    assert torch.equal(logits, expected)
    assert cached < full / 2  # the vision tower is not run either
    _, swapped = forward(model, input_ids=ids, pixel_values=pictures[[1, 0]])
    assert torch.equal(swapped, expected[[1, 0]])
    forward(model, input_ids=ids, pixel_values=pictures + 1)
    assert cut.cache.hits == 2


def test_evaluation_does_not_touch_the_cache():
    model, cut = half_frozen()
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = model.eval()(input_ids=ids).logits
    assert (cut.cache.hits, cut.cache.misses) == (0, 0)
    model.train()
    forward(model, input_ids=ids)
    assert torch.equal(model.eval()(input_ids=ids).logits, expected)


def test_an_empty_cache_of_no_size_is_off():
    assert PrefixCut(qwen3()).cache is None
    assert PrefixCache(0).bytes == 0


def test_a_pass_is_looked_up_with_one_transfer_from_the_device_for_each_input(monkeypatch):
    moved = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (moved.append(tuple(self.shape)), self)[1])
    cache = PrefixCache(MIB)
    inputs = {"input_ids": torch.ones(8, 5, dtype=torch.long), "pixel_values": torch.ones(8, 3, 4, 4)}
    cache.begin_pass(inputs | {"attention_mask": torch.ones(8, 5, dtype=torch.long), "labels": torch.ones(8, 5)})
    assert cache.misses == 1
    assert sorted(moved) == [(8, 3, 4, 4), (8, 5), (8, 5)]
