"""Models from local folders and GGUF files, through the real loading code; what trains of them."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from peft import LoraConfig, PeftModel, get_peft_model
from trl import ModelConfig, SFTConfig

from grades_trl.model.matrices import find_matrices
from grades_trl.recipe.builtin import dates
from grades_trl.recipe.generation import answers
from grades_trl.recipe.lora import refuse_resized_embeddings
from grades_trl.recipe.models import find_gguf, load_model, make_trainable
from helpers import PLAIN, SMALL, chat_tokenizer, llava, qwen3, qwen3_moe, write_gguf
from vlm import builtin as vlm_builtin


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_full_fine_tuning_of_a_local_folder(folder):
    model, tokenizer = load_model(ModelConfig(model_name_or_path=folder), "transformers")
    assert model.dtype == torch.float32
    assert trained(model) == {name for name, _ in model.named_parameters()}
    assert tokenizer.chat_template


def test_lora_goes_on_the_matrices_that_grades_watches(folder):
    arguments = ModelConfig(model_name_or_path=folder, use_peft=True, lora_r=4, dtype="bfloat16")
    model, _ = load_model(arguments, "transformers")
    assert len(find_matrices(model)) == 28
    assert all(".lora_" in name for name in trained(model))
    few = ModelConfig(model_name_or_path=folder, use_peft=True, lora_target_modules=["q_proj"])
    assert {m.role for m in find_matrices(load_model(few, "transformers")[0]).values()} == {"q_proj"}


def test_the_seed_is_that_of_the_adapters_too(folder):
    arguments = ModelConfig(model_name_or_path=folder, use_peft=True, lora_r=4)

    def adapters(seed):
        torch.rand(3)  # whatever has been drawn before
        model, _ = load_model(arguments, "transformers", seed=seed)
        return torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name])

    assert torch.equal(adapters(0), adapters(0))
    assert not torch.equal(adapters(0), adapters(1))


def test_four_bits_on_a_cpu(folder):
    arguments = ModelConfig(model_name_or_path=folder, use_peft=True, load_in_4bit=True)
    model, _ = load_model(arguments, "transformers")
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert weight.dtype == torch.uint8
    assert find_matrices(model)["model.layers.0.self_attn.q_proj"].shape == (128, 128)


def test_generation_leaves_the_gradients_of_a_4_bit_model_as_they_are(folder):
    arguments = ModelConfig(model_name_or_path=folder, use_peft=True, lora_dropout=0.0, load_in_4bit=True)
    model, tokenizer = load_model(arguments, "transformers")
    ids = torch.arange(3, 19).view(1, 16)

    def gradients():
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    before = gradients()
    answers(model, tokenizer, dates(train=1, test=2)["test"], max_new_tokens=2)
    assert torch.equal(gradients(), before)


def test_a_vision_language_model_and_its_processor(tmp_path):
    model, processor = vlm_builtin.tiny_llava()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    arguments = ModelConfig(model_name_or_path=str(tmp_path))
    loaded, reloaded = load_model(arguments, "transformers", vision=True, towers=["vision"])
    assert type(reloaded).__name__ == "LlavaProcessor"
    assert trained(loaded)
    assert all("vision_tower" in name for name in trained(loaded))


@pytest.mark.parametrize("peft", [False, True])
def test_towers_of_choice(peft):
    arguments = ModelConfig(use_peft=peft, lora_r=2)
    model = make_trainable(llava(), arguments, ["projector", "language"])
    assert any("multi_modal_projector" in name for name in trained(model))
    assert any("language_model.layers.1" in name for name in trained(model))
    assert not any("vision_tower" in name for name in trained(model))


def test_errors(folder, tmp_path):
    with pytest.raises(ValueError, match="add --use_peft"):
        load_model(ModelConfig(model_name_or_path=folder, load_in_4bit=True), "transformers")
    with pytest.raises(ValueError, match=r"loads with --backend transformers and without 4 or 8 bits"):
        load_model(ModelConfig(model_name_or_path=str(tmp_path / "x.gguf")), "unsloth")
    four_bit = ModelConfig(model_name_or_path=str(tmp_path / "x.gguf"), load_in_4bit=True, use_peft=True)
    with pytest.raises(ValueError, match=r"x\.gguf is a GGUF file"):
        load_model(four_bit, "transformers")


def test_a_gguf_file_becomes_a_model_that_trains_and_saves(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    original = LlamaForCausalLM(LlamaConfig(**SMALL, head_dim=8, tie_word_embeddings=False, pad_token_id=0)).eval()
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "tiny.gguf", original)
    assert find_gguf(str(tmp_path / "gguf")) == tmp_path / "gguf" / "tiny.gguf"  # the only one in the folder
    model, tokenizer = load_model(ModelConfig(model_name_or_path=str(tmp_path / "gguf")), "transformers")
    ids = torch.arange(3, 19).view(1, 16)
    with torch.no_grad():
        assert torch.allclose(model.eval()(ids).logits, original(ids).logits, atol=1e-5)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<unk>")
    assert len(find_matrices(model)) == 14
    model.save_pretrained(tmp_path / "saved")
    assert find_gguf(str(tmp_path / "saved")) is None


@pytest.mark.parametrize(
    ("split", "pieces"),
    [
        ("default", ["It", "'s", "Ġ1998"]),
        ("smollm", ["It", "'s", "Ġ", "1", "9", "9", "8"]),
        ("llama-bpe", ["It", "'s", "Ġ", "199", "8"]),
        ("of-tomorrow", ["It", "'s", "Ġ1998"]),
    ],
)
def test_the_tokenizer_of_a_gguf_file_is_byte_level(tmp_path, caplog, split, pieces):
    """As llama.cpp needs it: with SentencePiece's fallback, the file of an exported model made it abort."""
    write_gguf(tmp_path / "tiny.gguf", T.LlamaForCausalLM(T.LlamaConfig(**SMALL, head_dim=8)), split=split)
    tokenizer = load_model(ModelConfig(model_name_or_path=str(tmp_path)), "transformers")[1]
    assert ("which is not known here" in caplog.text) == (split == "of-tomorrow")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = T.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [p for p, _ in again.backend_tokenizer.pre_tokenizer.pre_tokenize_str("It's 1998")] == pieces
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert saved["model"]["byte_fallback"] is False and saved["decoder"]["type"] == "ByteLevel"
    assert again.decode(again('!"#$%&')["input_ids"]) == '!"#$%&'


def test_what_is_no_gguf(tmp_path, folder):
    assert find_gguf("Qwen/Qwen3-0.6B") is None
    assert find_gguf(folder) is None
    assert find_gguf("somewhere/model.gguf").name == "model.gguf"


@pytest.mark.parametrize(("max_length", "limit"), [(None, SMALL["max_position_embeddings"]), (512, 512)])
def test_without_a_max_length_unsloth_cuts_no_row_with_pictures(monkeypatch, max_length, limit):
    """A stand-in that does what Unsloth does: it notes the length in all modules, for its trainer."""

    def from_pretrained(name, max_seq_length, **_):
        model = llava()
        for module in model.modules():
            module.max_seq_length = max_seq_length
        return model, "processor"

    fast = SimpleNamespace(from_pretrained=from_pretrained)
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastVisionModel=fast, FastLanguageModel=fast))
    args = ModelConfig(model_name_or_path="some/model")
    model, processor = load_model(args, "unsloth", vision=True, max_length=max_length)
    assert processor == "processor"
    assert {module.max_seq_length for module in model.modules()} == {limit}


@pytest.mark.parametrize("given", [["q_proj"], ["q_proj", "v_proj"], None])
def test_one_target_module_is_a_name_and_no_pattern(monkeypatch, folder, given):
    """Where ModelConfig makes a str of a list of one; a str is a pattern over whole paths to PEFT and Unsloth."""
    passed = {}
    fast = SimpleNamespace(
        from_pretrained=lambda *_, **__: (qwen3(), "tokenizer"),
        get_peft_model=lambda model, **arguments: (
            passed.update(arguments)
            or get_peft_model(model, LoraConfig(target_modules=arguments.get("target_modules", "all-linear")))
        ),
    )
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastVisionModel=fast, FastLanguageModel=fast))
    args = ModelConfig(model_name_or_path=folder, use_peft=True, lora_target_modules=given)
    load_model(args, "unsloth")
    assert passed.get("target_modules") == given
    if given:
        assert set(load_model(args, "transformers")[0].peft_config["default"].target_modules) == set(given)


# ---- what LoRA adapts ----


def deepseek(**changes):
    torch.manual_seed(0)
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    moe = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
    config = T.DeepseekV3Config(
        **(
            SMALL
            | sizes
            | moe
            | {"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_shared_experts": 1}
            | changes
        )
    )
    return T.DeepseekV3ForCausalLM(config)


DENSE = {f"model.layers.{name}_proj" for name in ("0.mlp.gate", "0.mlp.up", "0.mlp.down")} | {
    f"model.layers.1.mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")
}


def test_the_default_lora_run_of_a_mixture_of_experts_leaves_experts_and_routers_out(caplog):
    """With TRL's default dropout, which adapters on parameters do not know."""
    model = make_trainable(qwen3_moe(), ModelConfig(use_peft=True, lora_r=2))
    assert {m.role for m in find_matrices(model).values()} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "LoRA leaves out experts.gate_up_proj (2), experts.down_proj (2)" in caplog.text


def test_dense_layers_and_shared_experts_are_adapted_where_peft_takes_their_names_for_those_of_experts(
    tmp_path, caplog
):
    with_dropout = make_trainable(deepseek(), ModelConfig(use_peft=True, lora_r=2))
    assert DENSE.isdisjoint(find_matrices(with_dropout))
    assert "--lora_dropout 0, without 4 or 8 bits, adapts them" in caplog.text
    caplog.clear()
    model = make_trainable(deepseek(), ModelConfig(use_peft=True, lora_r=2, lora_dropout=0.0))
    matrices = find_matrices(model)
    assert matrices.keys() >= DENSE
    assert matrices["model.layers.0.mlp.gate_proj"].shape == (48, 32)
    assert "gate_proj" not in caplog.text.replace("gate_up_proj", "")

    for parameter in model.parameters():  # LoRA's B is zero
        if parameter.requires_grad:
            parameter.data += 0.1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(deepseek(), tmp_path)
    ids = torch.arange(3, 19).view(1, 16)
    assert torch.allclose(loaded.eval()(ids).logits, model.eval()(ids).logits, atol=1e-6)


def test_what_peft_refuses_to_adapt_in_mamba_is_left_out_and_said(caplog):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    model = make_trainable(T.MambaForCausalLM(T.MambaConfig(**sizes)), ModelConfig(use_peft=True, lora_r=2))
    assert {m.role for m in find_matrices(model).values()} == {"in_proj", "x_proj", "dt_proj"}
    assert "LoRA leaves out mixer.out_proj (2)" in caplog.text


def test_targets_without_an_adapter_are_an_error():
    with pytest.raises(
        ValueError, match=r"name nothing_proj, and PEFT has put no adapter there.*down_proj, gate_proj"
    ):
        make_trainable(qwen3(), ModelConfig(use_peft=True, lora_target_modules=["q_proj", "nothing_proj"]))


def test_dropout_on_experts_is_an_error_that_says_what_to_do():
    experts = ModelConfig(use_peft=True, lora_target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    with pytest.raises(ValueError, match=r"knows no dropout: lora_dropout is 0\.05; set --lora_dropout 0"):
        make_trainable(qwen3_moe(), experts)


def test_adapters_that_peft_puts_elsewhere_are_said(caplog):
    names = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    args = ModelConfig(use_peft=True, lora_r=2, lora_target_modules=names, lora_dropout=0.0)
    model = make_trainable(qwen3_moe(), args)
    assert {m.role for m in find_matrices(model).values()} == {"q_proj", "gate_up_proj", "down_proj"}
    assert "LoRA adapts parameters, which have the names that were asked for" in caplog.text


def test_adapters_with_the_tokens_of_another_model_are_refused(tmp_path):
    own, donor = chat_tokenizer(PLAIN), chat_tokenizer(PLAIN, "<|new|>")
    for name, tokenizer in (("own", own), ("donor", donor)):
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "own.jinja").write_text(PLAIN)
    padded = 64 * -(-len(own) // 64)
    assert len(own) < padded
    lora = ModelConfig(use_peft=True, lora_r=2)

    def check(rows, template, args=lora):
        path = str(tmp_path / template)
        refuse_resized_embeddings(
            make_trainable(qwen3(vocab_size=rows), args),
            own,
            SFTConfig(str(tmp_path / "out"), chat_template_path=path, bf16=False, use_cpu=True),
        )

    for template, new in (("donor", 1), ("own", 0)):  # TRL pads the embeddings without new tokens too
        said = rf"\({new} are new\), and resizes the embeddings from {len(own)} to {padded} rows.*\.jinja"
        with pytest.raises(ValueError, match=said):
            check(len(own), template)
    with pytest.raises(ValueError, match=r"\(1 are new\), and does not train their embeddings"):
        check(padded, "donor")
    check(padded, "donor", ModelConfig(use_peft=True, lora_modules_to_save=["embed_tokens", "lm_head"]))
    check(padded, "own")
    check(len(own), "own.jinja")
    check(len(own), "donor", ModelConfig())
