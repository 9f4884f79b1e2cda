"""What is exported is loaded again as its users do it, and answers as the trained model."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Gemma3Config,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from trl import ModelConfig

from grades_trl.recipe import builtin
from grades_trl.recipe import export as exporting
from grades_trl.recipe.arguments import RecipeArguments
from grades_trl.recipe.export import (
    TOLERANCE,
    Answer,
    answer_all,
    check_architecture,
    check_exports,
    check_request,
    check_vocabulary,
    difference,
    export,
    own_prompts,
    prompt_inputs,
)
from grades_trl.recipe.modelfile import modelfile, ollama_template
from grades_trl.recipe.models import find_gguf, load_gguf, load_model
from grades_trl.recipe.trained import load_trained
from helpers import SMALL, write_gguf
from vlm.builtin import READER, digit_images, pretrained_llava

ROWS = builtin.dates(train=1, test=3)["test"]


def adapter(base, folder, vision=False, **changes):
    """An adapter that changes what the model says, as a run leaves it."""
    args = ModelConfig(model_name_or_path=str(base), use_peft=True, lora_r=4, **changes)
    model, processor = load_model(args, "transformers", vision=vision)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02 if vision else 0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return args


def answers(model, processor, rows, vision=False):
    return answer_all(model.eval(), prompt_inputs(processor, rows, vision), 8)


@pytest.mark.parametrize("bits", [{}, {"load_in_4bit": True}, {"load_in_8bit": True}], ids=["16", "4", "8"])
def test_an_adapter_merged_and_alone(folder, tmp_path, bits):
    args = adapter(folder, tmp_path / "run", **bits)
    (tmp_path / "run" / "training_args.bin").touch()
    written = export(["merged", "adapter"], str(tmp_path / "run"), tmp_path / "run", args, ROWS, vision=False)
    assert written == {"merged": tmp_path / "run" / "merged", "adapter": tmp_path / "run" / "adapter"}
    assert not (written["adapter"] / "training_args.bin").exists()

    trained, tokenizer = load_trained(str(tmp_path / "run"), args, vision=False)
    expected = answers(trained, tokenizer, ROWS)
    merged = AutoModelForCausalLM.from_pretrained(written["merged"])
    assert merged.dtype == torch.bfloat16 and not getattr(merged.config, "quantization_config", None)
    assert not isinstance(merged, PeftModel) and not any("lora" in name for name, _ in merged.named_parameters())
    again = AutoTokenizer.from_pretrained(written["merged"])
    assert again.chat_template == tokenizer.chat_template
    found = answers(merged.float(), again, ROWS)
    alone = answers(load_trained(str(written["adapter"]), args, vision=False)[0], again, ROWS)
    for ours, theirs, of_adapter in zip(expected, found, alone, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
        assert (ours.logits - theirs.logits).norm() < 0.02 * ours.logits.norm()  # 0.8 % in 16 bits
        assert torch.equal(ours.logits, of_adapter.logits)

    # The comparison sees an adapter that is not there
    base, _ = load_trained(folder, args, vision=False)
    assert "differ by" in difference(expected, answers(base, tokenizer, ROWS))


def test_the_tokenizer_of_an_adapter_says_where_answers_end(folder, tmp_path):
    """As after `--eos_token`: the base's own files know another token."""
    args = adapter(folder, tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    of_base = tokenizer.eos_token_id
    tokenizer.eos_token = "<|user|>"
    tokenizer.save_pretrained(tmp_path / "run")
    expected = [tokenizer.eos_token_id, of_base]

    model, _ = load_trained(str(tmp_path / "run"), args, vision=False)
    assert model.generation_config.eos_token_id == expected
    written = export(["merged"], str(tmp_path / "run"), tmp_path / "out", args, ROWS, vision=False)
    assert GenerationConfig.from_pretrained(written["merged"]).eos_token_id == expected


def test_all_weights_of_a_model_that_sees(tmp_path):
    model, processor = pretrained_llava()
    rows = digit_images(train=1, test=3)["test"]
    written = export(["merged"], str(READER), tmp_path, ModelConfig(dtype="float32"), rows, vision=True)
    merged = AutoModelForImageTextToText.from_pretrained(written["merged"])
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    found = answers(merged.float(), processor, rows, vision=True)
    assert difference(answers(model, processor, rows, vision=True), found) is None
    assert AutoProcessor.from_pretrained(written["merged"]).chat_template == processor.chat_template


def test_an_adapter_of_a_model_that_sees(tmp_path):
    args = adapter(READER, tmp_path / "run", vision=True)
    rows = digit_images(train=1, test=2)["test"]
    written = export(["merged"], str(tmp_path / "run"), tmp_path / "out", args, rows, vision=True)
    model, processor = load_trained(str(tmp_path / "run"), args, vision=True)
    merged = AutoModelForImageTextToText.from_pretrained(written["merged"], dtype=torch.float32)
    pairs = zip(answers(model, processor, rows, True), answers(merged, processor, rows, True), strict=True)
    assert all(torch.equal(ours.tokens, theirs.tokens) for ours, theirs in pairs)


CONVERTER = """
import argparse, sys
parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?")
parser.add_argument("--outfile")
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0"])
parser.add_argument("--mmproj", action="store_true")
parser.add_argument("--print-supported-models", action="store_true")
args = parser.parse_args()
if args.print_supported_models:
    for line in ["TEXT models:", *{text}, "MMPROJ models:", *{images}]:
        print(line if line.endswith(":") else "  - " + line, file=sys.stderr)
    sys.exit()
if {fails}:
    sys.exit("this tokenizer is not known")
if args.mmproj:
    open(args.outfile, "w").write("what reads images")
    sys.exit()
sys.path.insert(0, {tests!r})
from helpers import write_gguf
from transformers import AutoModelForCausalLM
write_gguf(args.outfile, AutoModelForCausalLM.from_pretrained(args.model).float())
"""
LLAMA, GEMMA = "LlamaForCausalLM", "Gemma3ForConditionalGeneration"


def converter(folder, fails=False, text=(LLAMA,), images=()):
    """A stand-in for llama.cpp's script: its command line, and real GGUF files of tiny Llamas."""
    folder.mkdir(exist_ok=True)
    values = {"tests": str(Path(__file__).parent), "fails": fails, "text": text, "images": images}
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER.format(**values))
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    _, tokenizer = builtin.tiny_qwen3()
    torch.manual_seed(0)
    sizes = SMALL | {"vocab_size": len(tokenizer), "initializer_range": 0.3}
    LlamaForCausalLM(LlamaConfig(**sizes, head_dim=8, tie_word_embeddings=False)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_gguf_with_a_modelfile(llama, tmp_path):
    args = adapter(llama, tmp_path / "run")
    path = converter(tmp_path / "llama.cpp")
    written = export(
        ["gguf"], str(tmp_path / "run"), tmp_path / "run", args, ROWS, vision=False, converter=path, gguf_type="f16"
    )
    assert list(written) == ["gguf"]
    file = written["gguf"] / "model-f16.gguf"
    assert find_gguf(str(written["gguf"])) == file
    assert not (written["gguf"] / "merged").exists() and not (tmp_path / "run" / "merged").exists()
    trained, tokenizer = load_trained(str(tmp_path / "run"), args, vision=False)
    expected, found = answers(trained, tokenizer, ROWS), answers(load_gguf(file)[0], tokenizer, ROWS)
    assert [a.tokens.tolist() for a in expected] == [a.tokens.tolist() for a in found]
    text = (written["gguf"] / "Modelfile").read_text()
    assert text.startswith("FROM ./model-f16.gguf\nTEMPLATE ") and f'PARAMETER stop "{tokenizer.eos_token}"' in text
    assert (written["gguf"] / "chat_template.jinja").exists()


def test_a_model_that_the_converter_does_not_know_is_refused_before_anything_is_written(llama, tmp_path):
    def refused(source, vision, path):
        with pytest.raises(ValueError, match=r"Update llama\.cpp, or use --export merged") as error:
            rows = digit_images(train=1, test=1)["test"] if vision else ROWS
            export(["gguf"], str(source), tmp_path / "out", ModelConfig(), rows, vision=vision, converter=path)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    path = converter(tmp_path / "old", text=["Llama"])
    assert "does not know the language model of this model (LlamaForCausalLM)" in refused(llama, False, path)
    llava = ["LlavaForConditionalGeneration"]
    path = converter(tmp_path / "new", text=llava, images=llava)  # Pixtral, to llama.cpp
    assert "(LlavaForConditionalGeneration with a tower of the type clip_vision_model)" in refused(READER, True, path)
    config = Gemma3Config(architectures=[GEMMA])
    path = Path(converter(tmp_path / "text", text=[GEMMA])) / "convert_hf_to_gguf.py"
    with pytest.raises(ValueError, match="does not know the part that reads images of this model"):
        check_architecture(config, path)
    check_architecture(config, Path(converter(tmp_path / "both", text=[GEMMA], images=[GEMMA])) / path.name)
    # SmolVLM: the language model has an architecture of its own
    path = Path(converter(tmp_path / "smol", text=[LLAMA], images=["SmolVLM"])) / path.name
    text = LlamaConfig(architectures=[LLAMA])
    check_architecture(SimpleNamespace(architectures=["SmolVLM"], text_config=text, vision_config=text), path)
    path.write_text("raise ImportError('no sentencepiece')")
    with pytest.raises(ValueError, match=r"(?s)does not run.*no sentencepiece"):
        check_architecture(config, path)


def test_both_files_of_a_model_that_sees(llama, tmp_path, monkeypatch):
    """By the stand-in: the language model's file is that of a Llama, as only its place matters here."""
    path = converter(tmp_path / "llama.cpp")
    monkeypatch.setattr(exporting, "check_architecture", lambda config, converter: None)
    monkeypatch.setattr(exporting, "_convert", convert_of(llama))
    rows = digit_images(train=1, test=1)["test"]
    written = export(
        ["gguf"], str(READER), tmp_path, ModelConfig(), rows, vision=True, converter=path, gguf_type="f16"
    )
    assert sorted(file.name for file in written["gguf"].glob("*.gguf")) == ["mmproj-f16.gguf", "model-f16.gguf"]
    assert (written["gguf"] / "Modelfile").read_text().startswith("FROM ./model-f16.gguf\nFROM ./mmproj-f16.gguf\n")
    assert not (written["gguf"] / "merged").exists() and (written["gguf"] / "processor_config.json").exists()


def convert_of(language_model):
    """`_convert`, with the language model in a folder of its own, since the stand-in can only write that."""
    convert = exporting._convert

    def of(merged, folder, *others):
        return convert(language_model, folder, *others)

    return of


def test_a_vocabulary_that_llama_cpp_cannot_read_is_an_error(llama, tmp_path):
    tokenizer, model = AutoTokenizer.from_pretrained(llama), AutoModelForCausalLM.from_pretrained(llama)
    write_gguf(tmp_path / "right.gguf", model)
    check_vocabulary(tmp_path / "right.gguf", tokenizer)
    write_gguf(tmp_path / "wrong.gguf", model, kind="llama")
    with pytest.raises(SystemExit, match=r"wrong\.gguf: the converter has taken the tokenizer for SentencePiece's"):
        check_vocabulary(tmp_path / "wrong.gguf", tokenizer)


def test_an_export_that_answers_otherwise_is_an_error(llama, tmp_path, monkeypatch):
    args = adapter(llama, tmp_path / "run")
    monkeypatch.setattr(exporting, "_merge", lambda model, folder: model.unload().save_pretrained(folder))
    with pytest.raises(SystemExit, match=r"merged does not answer as .*run does: the logits of prompt 1 differ by"):
        export(["merged"], str(tmp_path / "run"), tmp_path, args, ROWS, vision=False)


def test_what_cannot_be_exported(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))

    def refused(exports, **changes):
        request = {"is_adapter": True, "base": "some/model", "backend": "transformers"} | changes
        with pytest.raises(ValueError) as error:
            check_request(exports, **request)
        return str(error.value)

    assert "there is no adapter. Use --export merged" in refused(["adapter"], is_adapter=False)
    assert "git clone https://github.com/ggml-org/llama.cpp" in refused(["gguf"])
    assert "expected the path of llama.cpp's" in refused(["gguf"], converter=str(tmp_path))
    path = converter(tmp_path / "llama.cpp")
    assert "the tokenizers of the built-in models" in refused(["gguf"], is_adapter=False, base=None)
    assert "--gguf_type q4_k_m" in refused(["gguf"], converter=path, gguf_type="q4_k_m")
    check_request(["gguf"], is_adapter=True, base="x", backend="unsloth", gguf_type="q4_k_m")
    with pytest.raises(ValueError, match="the built-in model is not on disk"):
        check_exports(RecipeArguments(export=["merged"]), ModelConfig(use_peft=True), "transformers")
    check_exports(RecipeArguments(), ModelConfig(use_peft=True), "transformers")
    check_exports(RecipeArguments(export=["merged"]), ModelConfig(), "transformers")

    failing = converter(tmp_path / "failing", fails=True)
    with pytest.raises(SystemExit, match=r"(?s)failed with exit code 1\..*this tokenizer is not known"):
        export(["gguf"], str(llama), tmp_path, ModelConfig(), ROWS, vision=False, converter=failing)


def test_with_unsloth_its_own_functions_write(llama, tmp_path):
    """A stand-in that keeps Unsloth's interface; tests/test_unsloth.py merges through Unsloth itself."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    calls = []

    def merged(folder, processor, save_method):
        calls.append(save_method)
        model.save_pretrained(folder)

    def to_gguf(folder, processor, quantization_method):
        calls.append(quantization_method)
        Path(f"{folder}_gguf").mkdir()
        write_gguf(Path(f"{folder}_gguf") / "llama.Q4_K_M.gguf", model)

    model.save_pretrained_merged, model.save_pretrained_gguf = merged, to_gguf
    written = export(
        ["merged", "gguf"],
        str(llama),
        tmp_path,
        ModelConfig(),
        None,
        vision=False,
        backend="unsloth",
        trained=(model, tokenizer),
        gguf_type="q4_k_m",
    )
    assert calls == ["merged_16bit", "q4_k_m"]
    assert (written["gguf"] / "llama.Q4_K_M.gguf").exists() and not (tmp_path / "gguf_gguf").exists()
    assert "FROM ./llama.Q4_K_M.gguf\n" in (written["gguf"] / "Modelfile").read_text()


def answer(tokens, logits):
    return [Answer(torch.tensor(tokens), torch.tensor(logits))]


def test_a_tie_may_go_either_way_and_nothing_else_may():
    ours = answer([0, 1], [[9.0, 0.0, -9.0], [5.0, 5.05, -9.0]])
    tie = answer([0, 0], [[9.0, 0.0, -9.0], [5.06, 5.0, -9.0]])
    assert difference(ours, tie) is None
    assert difference(ours, ours) is None
    clear = answer([0, 1], [[9.0, 0.0, -9.0], [5.0, 5.4, -9.0]])
    sly = answer([0, 2], [[9.0, 0.0, -9.0], [5.0, 5.4, -9.0]])
    assert difference(clear, sly) == "prompt 1 gets another answer, from token 2 on"
    moved = answer([0, 1], [[9.0, 0.0, -9.0], [5.0, 7.0, -9.0]])
    assert f"expected at most {100 * TOLERANCE:.0f} %" in difference(ours, moved)
    assert "differ by nan" in difference(ours, answer([0, 1], [[float("nan")] * 3] * 2))
    # After the first other token the rest is another text
    longer = answer([0, 0, 2], [*tie[0].logits.tolist(), [0.0, 0.0, 99.0]])
    assert difference(answer([0, 1, 1], [*ours[0].logits.tolist(), [0.0, 99.0, 0.0]]), longer) is None


CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def go(template, system, messages):
    """What Ollama makes of such a template."""
    head, _, body = template.partition("{{ range .Messages }}")
    with_system, _, without = head.removeprefix("{{ if .System }}").removesuffix("{{ end }}").partition("{{ else }}")
    user, _, assistant = body.partition('{{ else if eq .Role "assistant" }}')
    user = user.removeprefix('{{ if eq .Role "user" }}')
    assistant = assistant.removesuffix("{{ end }}{{ end }}")
    text = with_system.replace("{{ .System }}", system) if system else without
    for role, content in messages:
        text += (user if role == "user" else assistant).replace("{{ .Content }}", content)
    return text


@pytest.mark.parametrize("template", ["the model's own", CHATML], ids=["own", "chatml"])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_ollama_s_template_gives_the_same_text(template, system):
    _, tokenizer = builtin.tiny_qwen3()
    if template == CHATML:
        tokenizer.chat_template = CHATML
    messages = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    conversation = [{"role": "system", "content": system}] if system else []
    conversation += [{"role": role, "content": content} for role, content in messages]
    expected = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    assert go(ollama_template(tokenizer), system, messages) == expected


def test_a_template_that_ollama_cannot_express(caplog):
    _, tokenizer = builtin.tiny_qwen3()
    tokenizer.chat_template = "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}"
    assert modelfile(["a.gguf", "mmproj.gguf"], tokenizer).startswith("FROM ./a.gguf\nFROM ./mmproj.gguf\nPARAMETER")
    assert "Ollama cannot express the chat template" in caplog.text
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert ollama_template(tokenizer) is None
    tokenizer.chat_template = None
    assert "TEMPLATE" not in modelfile(["a.gguf"], tokenizer)
    ends = tokenizer.convert_tokens_to_ids([tokenizer.eos_token, tokenizer.pad_token])
    stops = "".join(f'PARAMETER stop "{token}"\n' for token in (tokenizer.eos_token, tokenizer.pad_token))
    assert modelfile(["a.gguf"], tokenizer, ends) == f"FROM ./a.gguf\n{stops}"
    assert own_prompts(tokenizer)["prompt"][0] == "What is the capital of France?"
