"""Outputs of a frozen vision tower read from memory: the same gradients, without the tower's work."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from vision_models import FAMILIES, llava_batch

from grades_trl import GradESConfig
from grades_trl.freezing import encoder_store
from grades_trl.freezing.batch_content import Images
from grades_trl.freezing.encoder_cache import EncoderCache
from grades_trl.freezing.freeze import Freezer
from grades_trl.freezing.frozen_prefix import FrozenPrefix
from grades_trl.model.structure import is_lora
from grades_trl.model.towers import towers_of_parameters
from grades_trl.report.summary import format_summary
from helpers import CountMatmuls, arguments, gradients, llava, losses, warnings_in
from vlm import GradESVLMTrainer, builtin


def frozen_tower(model, cache_bytes=2**24):
    for name, tower in towers_of_parameters(model).items():
        model.get_parameter(name).requires_grad_(tower != "vision")
    return FrozenPrefix(model.train(), encoder_cache=EncoderCache(cache_bytes) if cache_bytes else None)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_without_the_cache_and_the_tower_does_not_run(family):
    build, batch = FAMILIES[family]
    torch.manual_seed(0)
    model = build()
    prefix = frozen_tower(model, cache_bytes=0)
    orders = [(0, 1, 2, 3), (2, 3), (0, 1), (3, 1, 0, 2)]
    batches = [batch(model, order) for order in orders]
    for inputs in batches:
        gradients(model, **inputs)
    assert prefix.update()
    expected = [gradients(model, **inputs) for inputs in batches]
    with CountMatmuls() as computed:
        model(**batches[-1])
    prefix.close()

    prefix = frozen_tower(model)
    gradients(model, **batches[0])
    assert prefix.update()
    for inputs in batches[:3]:  # the first pass sees what is read, the others keep it
        gradients(model, **inputs)
    gradients(model, **batches[0])
    cache = prefix.encoder_cache
    assert cache.off == ""
    hits = cache.use.hits
    found = [gradients(model, **inputs) for inputs in batches]
    assert cache.use.hits == hits + 4
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6) for name in theirs)
    with CountMatmuls() as read:
        model(**batches[-1])
    assert read.count <= computed.count - 8
    prefix.close()
    assert cache.bytes == 0


def test_an_image_with_other_adapters_is_another_image():
    model = get_peft_model(llava(image_token_index=60), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "vision_tower" in name:
            parameter.requires_grad_(False)
    prefix = FrozenPrefix(model.train(), encoder_cache=EncoderCache(2**24))
    inputs = llava_batch(model, (0, 1))
    gradients(model, **inputs)
    assert prefix.update()
    for _ in range(3):
        gradients(model, **inputs)
    assert prefix.encoder_cache.use.hits == 2
    with model.disable_adapter():
        reference = model(**inputs).logits
    prefix.close()
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, reference)


def test_dropout_turns_it_off(caplog):
    model = llava(image_token_index=60)
    model.config.vision_config.attention_dropout = 0.5
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.dropout = 0.5
    prefix = frozen_tower(model)
    inputs = llava_batch(model, (0, 1))
    gradients(model, **inputs)
    assert prefix.update()
    for _ in range(4):
        gradients(model, **inputs)
    assert prefix.encoder_cache.use.hits == 0
    assert "draws random numbers" in caplog.text


def test_a_tower_whose_adapters_had_dropout_is_cached_once_they_are_frozen():
    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(llava(image_token_index=60), lora).train()
    prefix = FrozenPrefix(model, encoder_cache=EncoderCache(2**24))
    inputs = llava_batch(model, (0, 1))
    gradients(model, **inputs)
    Freezer(model).freeze(p for name, p in model.named_parameters() if "vision_tower" in name)
    assert prefix.update()
    for _ in range(3):
        gradients(model, **inputs)
    assert prefix.encoder_cache.off == ""
    assert prefix.encoder_cache.use.hits == 2


def test_memory_is_bounded_and_evaluation_passes_by():
    model = llava(image_token_index=60)
    image = 17 * 32 * 4
    prefix = frozen_tower(model, cache_bytes=3 * image)
    inputs = llava_batch(model, (0, 1, 2, 3))
    gradients(model, **inputs)
    assert prefix.update()
    for _ in range(3):
        gradients(model, **inputs)
    assert prefix.encoder_cache.bytes == 3 * image
    assert prefix.encoder_cache.use.hits == 0
    gradients(model, **llava_batch(model, (0, 1, 2)))
    assert prefix.encoder_cache.use.hits == 1
    model.eval()
    model(**inputs)
    assert prefix.encoder_cache.use.hits == 1


def test_a_tower_that_trains_in_part_is_not_cached():
    model = llava(image_token_index=60)
    prefix = frozen_tower(model)
    model.model.vision_tower.encoder.layers[1].requires_grad_(True)
    inputs = llava_batch(model, (0, 1))
    gradients(model, **inputs)
    prefix.update()
    for _ in range(3):
        gradients(model, **inputs)
    assert prefix.skipped_layers == {"model.vision_tower.encoder.layers": 1}
    assert (prefix.encoder_cache.use.hits, prefix.encoder_cache.use.misses, prefix.encoder_cache.bytes) == (0, 0, 0)


def test_without_images_nothing_happens():
    cache = EncoderCache(2**20)
    cache.start(torch.nn.Module(), torch.nn.Module(), ["a"])
    cache.begin_pass(Images(), 1, "cpu")
    assert not cache.handles("a")


def image_batches(order):
    model = llava(image_token_index=60)
    return [llava_batch(model, rows) for rows in order]


def run_with_disk(directory, model, batches, max_bytes=0):
    prefix = FrozenPrefix(model.train(), encoder_cache=EncoderCache(max_bytes, str(directory)))
    for name, tower in towers_of_parameters(model).items():
        model.get_parameter(name).requires_grad_(tower != "vision")
    gradients(model, **batches[0])
    assert prefix.update()
    found = [gradients(model, **batch) for batch in batches]
    prefix.close()
    return prefix.encoder_cache, found


@pytest.fixture
def batches():
    return image_batches([(0, 1), (2, 3), (1, 2), (3, 0)])


def test_the_next_run_reads_the_outputs_from_disk(tmp_path, batches):
    first, expected = run_with_disk(tmp_path, llava(image_token_index=60), batches)
    assert (first.use.hits, first.use.peak_bytes) == (0, 0)  # written at the end, and no memory is allowed
    files = list(tmp_path.glob("*/*"))
    assert [file.suffix for file in files] == [".safetensors"]
    second, found = run_with_disk(tmp_path, llava(image_token_index=60), batches)
    assert second.use.hits == 3  # the first pass shows which layers are read
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6) for name in theirs)
    assert list(tmp_path.glob("*/*")) == files  # nothing new


def test_an_encoder_with_other_weights_or_settings_reads_nothing(tmp_path, batches):
    run_with_disk(tmp_path, llava(image_token_index=60), batches)
    model = llava(image_token_index=60)
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[0].mlp.fc1.bias[0] += 1
    assert run_with_disk(tmp_path, model, batches)[0].use.hits == 0
    model = llava(image_token_index=60)
    model.model.vision_tower.config.layer_norm_eps = 0.1
    assert run_with_disk(tmp_path, model, batches)[0].use.hits == 0
    assert len(list(tmp_path.iterdir())) == 3


def test_adapters_of_the_language_layers_make_no_other_encoder(tmp_path, batches):
    from peft import LoraConfig, get_peft_model

    run_with_disk(tmp_path, llava(image_token_index=60), batches)
    language = LoraConfig(r=4, target_modules=r".*language_model.*q_proj")
    model = get_peft_model(llava(image_token_index=60), language)
    assert run_with_disk(tmp_path, model, batches)[0].use.hits == 3


@pytest.mark.parametrize("other", [{"lora_alpha": 64}, {"use_rslora": True}], ids=["alpha", "rslora"])
def test_the_same_adapter_with_another_scale_is_another_encoder(tmp_path, batches, other):
    def adapted(**settings):
        torch.manual_seed(0)
        vision = LoraConfig(r=4, target_modules=r".*vision_tower.*q_proj", init_lora_weights=False, **settings)
        return get_peft_model(llava(image_token_index=60), vision)

    run_with_disk(tmp_path, adapted(), batches)
    assert run_with_disk(tmp_path, adapted(), batches)[0].use.hits == 3
    cache, found = run_with_disk(tmp_path, adapted(**other), batches)
    assert cache.use.hits == 0
    _, expected = run_with_disk(tmp_path / "other", adapted(**other), batches)
    assert all(
        torch.equal(ours[name], theirs[name]) for ours, theirs in zip(found, expected, strict=True) for name in theirs
    )
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2


def test_an_image_with_a_rescaled_adapter_is_another_image():
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(llava(image_token_index=60), lora)
    prefix = frozen_tower(model)
    inputs = llava_batch(model, (0, 1))
    gradients(model, **inputs)
    assert prefix.update()
    for _ in range(3):
        gradients(model, **inputs)
    assert prefix.encoder_cache.use.hits == 2
    for module in model.base_model.model.model.vision_tower.modules():
        if is_lora(module):
            module.set_scale("default", 3.0)
    gradients(model, **inputs)
    assert prefix.encoder_cache.use.hits == 2


def test_a_damaged_file_is_left_out_with_one_warning(tmp_path, batches, caplog):
    run_with_disk(tmp_path, llava(image_token_index=60), batches)
    [whole] = tmp_path.glob("*/*.safetensors")
    for name in ("a", "b"):
        whole.with_name(f"{name}.safetensors").write_bytes(whole.read_bytes()[:-100])
    whole.with_name("c.partial").write_bytes(b"")  # a run that was killed
    cache, _ = run_with_disk(tmp_path, llava(image_token_index=60), batches)
    assert cache.use.hits == 3
    assert len([message for message in warnings_in(caplog) if "damaged" in message]) == 1


def test_the_disk_is_not_filled(tmp_path, batches, monkeypatch, caplog):
    monkeypatch.setattr(encoder_store, "SHARD_BYTES", 1)  # a file for each image
    image = 17 * 32 * 4
    free = SimpleNamespace(free=int(2.5 * image / encoder_store.DISK_FRACTION))
    monkeypatch.setattr(encoder_store.shutil, "disk_usage", lambda _: free)
    run_with_disk(tmp_path, llava(image_token_index=60), batches)
    assert len(list(tmp_path.glob("*/*"))) == 2
    assert "Delete the folders" in caplog.text


def test_outputs_with_dropout_are_not_written(tmp_path, batches):
    model = llava(image_token_index=60)
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.dropout = 0.5
    cache, _ = run_with_disk(tmp_path, model, batches)
    assert "random" in cache.off
    assert list(tmp_path.glob("*/*")) == []


def test_it_says_what_it_takes_and_turns_itself_off_if_that_is_too_much(caplog):
    caplog.set_level("INFO")
    inputs = llava_batch(llava(image_token_index=60), (0, 1), per_row=2)
    for max_bytes, must_fit in ((2**20, True), (2**12, True), (2**12, False)):
        cache = EncoderCache(max_bytes, rows=100, must_fit=must_fit)
        model = llava(image_token_index=60)
        prefix = FrozenPrefix(model.train(), encoder_cache=cache)
        model.model.vision_tower.requires_grad_(False)
        gradients(model, **inputs)
        assert prefix.update()
        for _ in range(3):
            gradients(model, **inputs)
        assert bool(cache.off) == (max_bytes < 200 * 17 * 32 * 4 and must_fit)
        prefix.close()
    enough, too_little, allowed = caplog.messages
    assert "are cached: 200 images, about 0 MiB." in enough
    assert "not cached: those of 200 images take about 0 MiB" in too_little
    assert "are kept in memory" in allowed


def test_an_encoder_that_freezes_in_the_last_epoch_is_not_cached():
    model = llava(image_token_index=60)
    prefix = frozen_tower(model)
    inputs = llava_batch(model, (0, 1))
    gradients(model, **inputs)
    assert prefix.update(rows_come_back=False)
    for _ in range(3):
        gradients(model, **inputs)
    assert prefix.cache_use == {}


def test_images_in_a_model_whose_leading_language_layers_are_frozen_too():
    """No gradient comes back to the encoder then; one pass without skipping the language layers shows what is read."""
    model = llava(image_token_index=60)
    model.requires_grad_(False)
    model.model.language_model.layers[1].requires_grad_(True)
    batches = image_batches([(0, 1), (2, 3), (0, 2)])
    expected = [gradients(model.train(), **batch) for batch in batches]
    prefix = FrozenPrefix(model, encoder_cache=EncoderCache(2**24))
    gradients(model, **batches[0])
    assert prefix.update()
    assert prefix.skipped_layers == {"model.vision_tower.encoder.layers": 2, "model.language_model.layers": 1}
    found = [gradients(model, **batch) for batch in batches]
    assert prefix.encoder_cache.use.hits == 1
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6) for name in theirs)


def test_the_flops_of_a_run_are_without_the_passes_that_were_read(tmp_path):
    dataset = builtin.digit_images(train=16, test=8)
    runs = []
    for mib in (0, 16):
        model, processor = builtin.tiny_llava()
        config = {"metric": "schedule", "schedule": {"vision": 1}, "freeze_norms": True, "freeze_embeddings": True}
        trainer = GradESVLMTrainer(
            model=model,
            args=arguments(tmp_path / str(mib), max_steps=6, max_length=None),
            train_dataset=dataset["train"],
            processing_class=processor,
            grades=GradESConfig(**config, activation_cache_mib=mib, stopping="end_of_schedule"),
        )
        trainer.train()
        runs.append(trainer)
    off, on = (trainer.grades_summary.flops for trainer in runs)
    hits = runs[1].grades_summary.caches["encoder"].hits
    weights = sum(m.params for m in runs[1].grades.matrices.values() if m.tower == "vision")
    assert hits > 0
    assert off.run - on.run == hits * 8 * 17 * 2 * weights
    assert on.baseline_full_schedule == off.baseline_full_schedule


def test_a_run_whose_tower_is_frozen_from_the_start_reads_it_from_the_second_epoch_on(tmp_path, caplog):
    """By default, and it says so; the losses are those without the cache."""
    caplog.set_level("INFO")
    dataset = builtin.digit_images(train=32, test=8)
    runs = []
    for mib in (0, None):
        model, processor = builtin.tiny_llava()
        for name, tower in towers_of_parameters(model).items():
            model.get_parameter(name).requires_grad_(tower != "vision")
        trainer = GradESVLMTrainer(
            model=model,
            args=arguments(tmp_path / str(mib), max_steps=12, max_length=None),
            train_dataset=dataset["train"],
            processing_class=processor,
            grades=GradESConfig(metric="none", activation_cache_mib=mib),
        )
        trainer.train()
        runs.append((trainer, losses(trainer)))
    (off, expected), (trainer, found) = runs
    assert off.grades_summary.caches == {}
    cache = trainer.grades_summary.caches["encoder"]
    # 4 steps an epoch. The tower is skipped from step 2 on, so the rows of step 1 are kept in the second epoch.
    assert cache.hits >= 4
    assert cache.hits + cache.misses == 11
    assert cache.saved_seconds > 0
    assert cache.mib > 0
    assert found == pytest.approx(expected, rel=1e-4)
    assert any("are cached: 32 images" in message for message in caplog.messages)
    assert f"{cache.hits} of 11 passes read" in format_summary(trainer.grades_summary)
