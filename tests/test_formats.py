"""The formats of other tools: each file as their documentation has it becomes messages, without being edited."""

import base64
import io
import json

import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from grades_trl.recipe.data import DataError, load, to_prompt_completion
from grades_trl.recipe.data.formats import FORMATS, parse_columns

RED, BLUE = (255, 0, 0), (0, 0, 255)
IMAGE = {"type": "image"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / ".cache")


def turn(role, content):
    return {"role": role, "content": content}


def text(value):
    return {"type": "text", "text": value}


def png(color="red"):
    file = io.BytesIO()
    PILImage.new("RGB", (16, 16), color).save(file, "PNG")
    return file.getvalue()


def read(tmp_path, rows, vision=False, name="data.json", **kwargs):
    """The rows as they are trained on, in their order: a second file holds what is tested on."""
    for folder, colors in (("img", {"red.png": "red", "blue.png": "blue"}),):
        (tmp_path / folder).mkdir(exist_ok=True, parents=True)
        for file, color in colors.items():
            (tmp_path / folder / file).write_bytes(png(color))
    for split in ("train", "test"):
        (tmp_path / f"{split}_{name}").write_text(json.dumps(rows))
    loaded = load(str(tmp_path), vision=vision, **kwargs)
    return list(loaded["train"])


def messages(tmp_path, row, **kwargs):
    return read(tmp_path, [row, row], **kwargs)[0]["messages"]


def colors(row):
    return [image.getpixel((0, 0)) for image in row["images"]]


# Text


ALPACA = [
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n1 2"),
    ({"instruction": "Add.", "input": "", "output": "3"}, "Add."),
    ({"instruction": "Add.", "input": None, "output": "3"}, "Add."),
    ({"instruction": "Add.", "output": "3", "text": "### Instruction: Add. ### Response: 3"}, "Add."),  # tatsu-lab
    ({"instruction": "Add.", "context": "1 2", "response": "3", "category": "sums"}, "Add.\n1 2"),  # dolly
]


@pytest.mark.parametrize(("row", "prompt"), ALPACA)
def test_alpaca(tmp_path, row, prompt):
    assert messages(tmp_path, row) == [turn("user", prompt), turn("assistant", "3")]


def test_system_and_history_beside_alpaca(tmp_path):
    """As LLaMA-Factory and ms-swift have it."""
    row = {
        "instruction": "3?",
        "input": "",
        "output": "c",
        "system": "Be brief.",
        "history": [["1?", "a"], ["2?", "b"]],
    }
    assert messages(tmp_path, row) == [
        turn("system", "Be brief."),
        *(turn(role, said) for said_both in zip(["1?", "2?", "3?"], "abc", strict=True) for role, said in zip(
            ["user", "assistant"], said_both, strict=True)),
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_system_beside_texts_makes_conversations(tmp_path, suffix):
    row = {"prompt": "3?", "completion": "7", "system": "Be brief."}
    if suffix == "jsonl":
        assert messages(tmp_path, row) == [turn("system", "Be brief."), turn("user", "3?"), turn("assistant", "7")]
        assert messages(tmp_path, {**row, "system": ""}) == [turn("user", "3?"), turn("assistant", "7")]
        return
    (tmp_path / "data.csv").write_text("prompt,completion,System\n3?,007,Be brief.\n3?,007,\n")
    loaded = load(str(tmp_path / "data.csv"), test_size=1)
    found = sorted((row["messages"] for part in loaded.values() for row in part), key=len)
    assert found == [[turn("user", "3?"), turn("assistant", "007")], [turn("system", "Be brief."), *found[0]]]


def test_earlier_turns_beside_texts_make_conversations(tmp_path):
    row = {"prompt": "2?", "completion": "b", "history": [["1?", "a"]]}
    assert messages(tmp_path, row) == [
        turn("user", "1?"), turn("assistant", "a"), turn("user", "2?"), turn("assistant", "b")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "reply"),
    [
        ("prompt", "response"),
        ("query", "response"),
        ("question", "answer"),
        ("input", "output"),
        ("instruction", "response"),
        ("problem", "solution"),
        ("prompt", "answer"),
    ],
)
def test_pairs(tmp_path, prompt, reply):
    assert messages(tmp_path, {"id": 7, prompt: "1 + 1?", reply: "2"}) == [
        turn("user", "1 + 1?"),
        turn("assistant", "2"),
    ]


def test_pairs_with_a_context_a_system_and_numbers(tmp_path):
    row = {"system_prompt": "Be brief.", "context": "x = 1", "question": "x + 1?", "answer": 2}
    assert messages(tmp_path, row) == [
        turn("system", "Be brief."),
        turn("user", "x + 1?\nx = 1"),
        turn("assistant", "2"),
    ]


@pytest.mark.parametrize("columns", [None, {"prompt": "question", "completion": "answer"}])
def test_an_answer_that_is_a_class_is_its_name(tmp_path, columns):
    features = Features({"question": Value("string"), "answer": ClassLabel(names=["neg", "pos"])})
    rows = {"question": ["a", "a"], "answer": [1, 1]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data.parquet")
    found = load(str(tmp_path / "data.parquet"), test_size=1, columns=columns)["train"]
    assert found[0]["messages"] == [turn("user", "a"), turn("assistant", "pos")]
    Dataset.from_dict({**rows, "answer": [1, -1]}, features=features).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"row 1 .* has the content None"):
        load(str(tmp_path / "data.parquet"), test_size=1, columns=columns)


def test_columns_that_are_not_read_are_named(tmp_path, caplog):
    row = {"id": 1, "question": "a", "choices": ["x", "y"], "answer": "B", "history": [["1", "2"]], "system": "s"}
    read(tmp_path, [row, row])
    (said,) = [record.getMessage() for record in caplog.records if "not read" in record.getMessage()]
    assert said.startswith("Columns not read: choices. If the model should see one")
    caplog.clear()
    read(tmp_path, [row, row], columns={"prompt": "question", "completion": "answer"})
    assert "not read" not in caplog.text
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    read(tmp_path, [{"conversations": turns, "history": [["1", "2"]], "input": "c", "system": "s"}] * 2)
    assert "Columns not read: history, input." in caplog.text


def test_a_csv_of_pairs_keeps_its_text(tmp_path):
    (tmp_path / "data.csv").write_text("question,answer\n007,NA\n008,010\n")
    loaded = load(str(tmp_path / "data.csv"), test_size=1)
    rows = [row["messages"] for part in loaded.values() for row in part]
    assert sorted((m[0]["content"], m[1]["content"]) for m in rows) == [("007", "NA"), ("008", "010")]


def test_pairs_that_could_be_several(tmp_path):
    rows = [{"question": "a", "answer": "b", "solution": "c"}]
    with pytest.raises(DataError, match=r"the columns answer and solution could each be .*--columns prompt=question"):
        read(tmp_path, rows)
    chosen = read(tmp_path, rows, columns={"prompt": "question", "completion": "solution"})
    assert chosen[0]["messages"] == [turn("user", "a"), turn("assistant", "c")]


def test_an_empty_reply_names_its_row(tmp_path):
    rows = [{"question": "a", "answer": "b"}, {"question": "a", "answer": None}]
    with pytest.raises(DataError, match=r"train: row 1 \(the first is 0\): messages\[1\] has the content None"):
        read(tmp_path, rows)


SHAREGPT_ROLES = [
    *((name, "user") for name in ("human", "user", "Human")),
    *((name, "assistant") for name in ("gpt", "assistant", "chatgpt", "bing", "bard", "model")),
]


@pytest.mark.parametrize(("name", "role"), SHAREGPT_ROLES)
def test_sharegpt_roles(tmp_path, name, role):
    """FineTome and its like, with the columns that are beside them."""
    turns = [("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    first = next(i for i, (who, _) in enumerate(turns) if (who == "human") == (role == "user"))
    turns[first] = (name, turns[first][1])
    row = {"conversations": [{"from": who, "value": said} for who, said in turns], "source": "web", "score": 5.1}
    roles = ["user", "assistant"] * 2
    assert messages(tmp_path, row) == [turn(role, said) for role, said in zip(roles, "abcd", strict=True)]


@pytest.mark.parametrize("name", ["system", "developer"])
def test_a_system_in_sharegpt_or_beside_it(tmp_path, name):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    expected = [turn("system", "s"), turn("user", "a"), turn("assistant", "b")]
    assert messages(tmp_path, {"conversations": [{"from": name, "value": "s"}, *turns]}) == expected
    if name == "system":
        assert messages(tmp_path, {"conversations": turns, name: "s"}) == expected
        assert messages(tmp_path, {"messages": expected[1:], name: "s"}) == expected
        assert messages(tmp_path, {"messages": expected, name: "another"}) == expected


def test_conversations_of_roles_and_contents(tmp_path):
    row = {"conversations": [turn("user", "a"), turn("assistant", "b")]}
    assert messages(tmp_path, row) == row["conversations"]


def test_calls_of_tools_in_sharegpt(tmp_path):
    """LLaMA-Factory's glaive_toolcall_en_demo.json: calls and tools are JSON in texts."""
    tool = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
    row = {
        "conversations": [
            {"from": "human", "value": "1 + 1?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 1}}'},
            {"from": "observation", "value": '{"sum": 2}'},
            {"from": "gpt", "value": "2"},
        ],
        "tools": json.dumps([tool]),
    }
    no_tools = {"conversations": row["conversations"][::3], "tools": ""}
    with_tools, without = read(tmp_path, [row, no_tools])
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}}
    assert with_tools["messages"] == [
        turn("user", "1 + 1?"),
        {"role": "assistant", "tool_calls": [call]},
        turn("tool", '{"sum": 2}'),
        turn("assistant", "2"),
    ]
    assert with_tools["tools"] == [{"type": "function", "function": tool}]
    assert without["tools"] is None


def test_roles_of_ms_swift_in_messages(tmp_path):
    calls = [turn("tool_call", '{"name": "add", "arguments": {}}'), turn("tool_response", "2")]
    row = {"messages": [turn("user", "a"), *calls, turn("assistant", "b")]}
    found = messages(tmp_path, row)
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "assistant"]
    assert found[1]["tool_calls"][0]["function"]["name"] == "add"


def test_calls_and_tools_that_are_json_in_texts(tmp_path):
    """OpenAI's arguments, axolotl's parameters, ms-swift's list of tools: chat templates would write them as texts."""
    function = {"name": "add", "parameters": {"type": "object"}}
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    talk = [A, {"role": "assistant", "content": None, "tool_calls": [call]}, turn("tool", "2"), B]
    stored = [{"type": "function", "function": function | {"parameters": json.dumps(function["parameters"])}}]
    for tools in (stored, json.dumps(stored), json.dumps([function])):
        (found, _) = read(tmp_path, [{"messages": talk, "tools": tools}] * 2)
        assert found["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
        assert found["tools"] == [{"type": "function", "function": function}]
    # A text that is no JSON is what the model is to write
    talk[1]["tool_calls"][0]["function"]["arguments"] = "a = 1"
    assert messages(tmp_path, {"messages": talk})[1]["tool_calls"][0]["function"]["arguments"] == "a = 1"


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_null_in_json_is_a_value(tmp_path, suffix):
    """Of a call and of a tool. What Arrow adds, to give all calls the same keys, is none."""
    given = {"city": "Paris", "unit": None, "of": [{"a": None}]}
    unit = {"type": ["string", "null"], "default": None, "enum": ["C", None]}
    schema = {"type": "object", "properties": {"unit": unit}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]

    def row(arguments, **others):
        calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}} | others]
        called = {"role": "assistant", "content": None, "tool_calls": calls}
        return {"messages": [A, called], "tools": json.dumps(tools)}

    def found(*rows):
        if suffix == "json":
            return read(tmp_path, rows)
        Dataset.from_list(list(rows)).to_parquet(tmp_path / "train.parquet")
        Dataset.from_list(list(rows)).to_parquet(tmp_path / "test.parquet")
        return list(load(str(tmp_path))["train"])

    one, other = found(row(json.dumps(given)), row(json.dumps({}), id="1"))
    assert "content" not in one["messages"][1] and "id" not in one["messages"][1]["tool_calls"][0]
    assert one["messages"][1]["tool_calls"][0]["function"]["arguments"] == given
    assert other["messages"][1]["tool_calls"][0] == row({}, id="1")["messages"][1]["tool_calls"][0]
    assert one["tools"] == tools
    one, other = found(row({"a": 1}), row({"b": 2}))  # objects, which get the keys of each other
    assert [m["messages"][1]["tool_calls"][0]["function"]["arguments"] for m in (one, other)] == [{"a": 1}, {"b": 2}]


def test_several_calls_at_once_are_one_message(tmp_path):
    calls = [turn("tool_call", json.dumps({"name": "add", "arguments": {"a": i}})) for i in (1, 2)]
    row = {"messages": [A, *calls, turn("tool_response", "3"), turn("tool_response", "4"), B]}
    found = messages(tmp_path, row)
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [call["function"]["arguments"] for call in found[1]["tool_calls"]] == [{"a": 1}, {"a": 2}]


def test_turn_pairs(tmp_path):
    """ms-swift's `conversation`, and the `texts` of the Cauldron and FineVision."""
    expected = [
        turn("system", "s"),
        *(turn(role, x) for role, x in zip(["user", "assistant"] * 2, "abcd", strict=True)),
    ]
    row = {"system": "s", "conversation": [{"human": "a", "assistant": "b"}, {"human": "c", "assistant": "d"}]}
    assert messages(tmp_path, row) == expected
    row = {"texts": [{"user": "a", "assistant": "b", "source": "x"}, {"user": "c", "assistant": "d", "source": "x"}]}
    assert messages(tmp_path, row) == expected[1:]


def test_every_format_has_a_function_that_is_documented():
    assert all(convert.__doc__ for _, convert in FORMATS.values())


# The files of the quick starts of other tools, one row of each, with the columns that they have there


A, B = turn("user", "a"), turn("assistant", "b")
SHAREGPT = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
MATHS = {"expected_answer": "b", "problem": "a", "generated_solution": "b", "inference_mode": "cot"}
THINKING = [A | {"thinking": None}, B | {"thinking": "c"}]
OPENORCA = {"id": "1", "system_prompt": "s", "question": "a", "response": "b"}
QUICK_STARTS = {
    # unslothai/notebooks, in nb/
    "mlabonne/FineTome-100k (Llama3.2_(1B_and_3B)-Conversational)": (SHAREGPT | {"source": "x", "score": 5.2}, [A, B]),
    "unsloth/alpaca-cleaned (Mistral_v0.3_(7B)-Alpaca, with its text)": (
        {"output": "b", "input": "", "instruction": "a", "text": "### Instruction:\na\n### Response:\nb</s>"},
        [A, B],
    ),
    "unsloth/OpenMathReasoning-mini (Qwen3_(14B)-Reasoning-Conversational)": (MATHS, [A, B]),
    "HuggingFaceH4/Multilingual-Thinking (gpt-oss-(20B)-Fine-tuning)": (
        {"developer": "d", "user": "a", "analysis": "c", "final": "b", "messages": THINKING},
        [A, B | {"thinking": "c"}],
    ),
    # hiyouga/LLaMA-Factory, in data/
    "alpaca_en_demo.json": ({"instruction": "a", "input": "", "output": "b"}, [A, B]),
    "identity.json": (
        {"instruction": "a", "input": "", "output": "I am {{name}}"},
        [A, turn("assistant", "I am {{name}}")],
    ),
    "v1_sft_demo.jsonl": (
        {"messages": [
            {"role": "user", "content": [{"type": "text", "value": "a"}], "loss_weight": 0.0},
            {"role": "assistant", "content": [{"type": "text", "value": "b"}], "loss_weight": 1.0},
        ]},
        [A, B],
    ),
    "reason_tool_use_demo_50.jsonl": (
        {"messages": [A, {"role": "assistant", "content": [
            {"type": "reasoning", "value": "hm"},
            {"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        ]}, turn("tool", "1"), B]},
        [A, {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
        }, turn("tool", "1"), B],
    ),
    # modelscope/ms-swift, in tests/llm/data/ and docs/source_en/Customization/Custom-dataset.md
    "swift_single.jsonl": ({"system": "s", "query": "a", "response": "b"}, [turn("system", "s"), A, B]),
    "sharegpt.jsonl": ({"conversation": [{"human": "a", "assistant": "b"}]}, [A, B]),
    "conversations.jsonl": (
        {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
        [A, B],
    ),
    "swift/self-cognition": ({"query": "a", "response": "b", "tag": "en"}, [A, B]),
    "Custom-dataset.md, loss": ({"messages": [A, B | {"loss": True}]}, [A, B]),
    # axolotl-ai-cloud/axolotl, in examples/ and docs/dataset-formats/
    "cgato/SlimOrcaDedupCleaned": (
        {"conversations": [
            {"from": "human", "value": "a", "weight": 0.0}, {"from": "gpt", "value": "b", "weight": 1.0},
        ]},
        [A, B],
    ),
    "AI-MO/NuminaMath-CoT": ({"source": "x", "problem": "a", "solution": "c", "messages": [A, B]}, [A, B]),
    "inst_tune.qmd, oasst": ({"INSTRUCTION": "a", "RESPONSE": "b"}, [A, B]),
    "inst_tune.qmd, metharme": ({"prompt": "a", "generation": "b"}, [A, B]),
    "inst_tune.qmd, context_qa": ({"article": "x", "question": "a", "answer": "b"}, [turn("user", "a\nx"), B]),
    "conversation.qmd, reasoning in parts": (
        {"messages": [A, B | {"content": [text("b")], "reasoning_content": [text("h"), text("m")]}]},
        [A, B | {"reasoning_content": "hm"}],
    ),
    "inst_tune.qmd, load_open_orca": (OPENORCA, [turn("system", "s"), A, B]),
    "conversation.qmd, pygmalion": (
        {"conversations": [{"role": "human", "value": "a"}, {"role": "bot", "value": "b"}]},
        [A, B],
    ),
    # huggingface/trl, in docs/source/dataset_formats.md
    "trl-lib/Capybara": ({"source": "x", "messages": [A, B], "num_turns": 1}, [A, B]),
}  # fmt: skip


@pytest.mark.parametrize("name", QUICK_STARTS)
def test_a_file_of_a_quick_start_is_read_as_it_is(tmp_path, name):
    row, expected = QUICK_STARTS[name]
    assert messages(tmp_path, row) == expected


IMAGE_FILES = {
    "unsloth/LaTeX_OCR": {"image": "img/red.png", "text": "b"},
    "unsloth/Radiology_mini": {"image": "img/red.png", "image_id": "r", "caption": "b", "cui": ["C1"]},
    "hezarai/parsynth-ocr-200k": {"image_path": "img/red.png", "text": "b"},  # Unsloth's Deepseek_OCR_(3B)
    "LLaMA-Factory/data/v1_multimodal_demo.jsonl": {"messages": [
        {"role": "user", "content": [{"type": "image_url", "value": "img/red.png"}, {"type": "text", "value": "a"}]},
        {"role": "assistant", "content": [{"type": "text", "value": "b"}]},
    ]},
    "LLaMA-Factory/data/mllm_demo.json": {
        "messages": [turn("user", "<image>a"), B, turn("user", "c<image>"), turn("assistant", "d")],
        "images": ["img/red.png", "img/red.png"],
    },
    "ms-swift/tests/llm/data/multi_modal_2.jsonl": {"query": "a", "response": "b", "images": ["img/red.png"]},
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGE_FILES)
def test_a_file_of_a_quick_start_with_images_is_read_as_it_is(tmp_path, name):
    row = IMAGE_FILES[name]
    (found, _) = read(tmp_path, [row, row], vision=True)
    assert set(colors(found)) == {RED}
    reply = found["messages"][1]
    assert reply["role"] == "assistant" and reply["content"] in ("b", [text("b")])


@pytest.mark.parametrize("reply", ["1.50", "007", '{"a": 1}', '["x"]', "true", "one"])
def test_replies_that_are_json_stay_texts(tmp_path, reply):
    """Beside contents that are lists of parts, and beside values that are numbers, `datasets` would decode them."""
    talk = [turn("user", [text("a")]), turn("assistant", reply)]
    assert messages(tmp_path, {"messages": talk}) == [A, turn("assistant", reply)]
    assert messages(tmp_path, {"conversations": talk}) == [A, turn("assistant", reply)]
    rows = read(tmp_path, [{"question": "a", "answer": reply}, {"question": "b", "answer": 7}])
    assert [row["messages"][1]["content"] for row in rows] == [reply, "7"]


def test_a_text_file_is_learned_line_by_line(tmp_path):
    """LLaMA-Factory's wiki_demo.txt, and axolotl's completion; in a folder, such a file is a README."""
    (tmp_path / "wiki_demo.txt").write_text("one\n\n  \ntwo\nthree\n")
    loaded = load(str(tmp_path / "wiki_demo.txt"), test_size=1)
    assert sorted(row["text"] for part in loaded.values() for row in part) == ["one", "three", "two"]
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert sum(map(len, load(str(tmp_path), test_size=1).values())) == 2


# Data for other kinds of training


GOOD, BAD = {"from": "gpt", "value": "b"}, {"from": "gpt", "value": "c"}
DPO = "a better and a worse answer, for DPO; these recipes learn one answer"
OTHER_TRAINING = {
    "LLaMA-Factory/data/dpo_en_demo.json": (
        {
            "conversations": [*SHAREGPT["conversations"], {"from": "human", "value": "d"}],
            "chosen": GOOD,
            "rejected": BAD,
        },
        f"the columns chosen and rejected are {DPO}",
    ),
    "LLaMA-Factory, alpaca": ({"instruction": "a", "input": "", "chosen": "b", "rejected": "c"}, DPO),
    "LLaMA-Factory/data/v1_dpo_demo.jsonl": (
        {"chosen_messages": [A, B], "rejected_messages": [A, B]},
        "--columns messages=chosen_messages",
    ),
    "TRL": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "prompt=NAME completion=chosen"),
    "LLaMA-Factory/data/kto_en_demo.json": ({"messages": [A, B], "label": False}, 'the column "label" says .*for KTO'),
    "LLaMA-Factory, ShareGPT": (SHAREGPT | {"kto_tag": True}, "would learn the bad ones too"),
    "axolotl, input_output": ({"segments": [{"label": True, "text": "a"}]}, "axolotl's input_output"),
    "axolotl, tokenized": ({"input_ids": [1, 2], "labels": [-100, 2]}, "tokenized already"),
    "ms-swift, pre-training": ({"response": "a"}, "text=NAME to learn the whole text"),
    "axolotl, reasoning left out": (
        {"messages": [A, B | {"reasoning_content": [text("h") | {"train": False}]}]},
        "only whole messages can be left out",
    ),
    "reasoning without text": ({"messages": [A, B | {"reasoning_content": [IMAGE]}]}, "has the reasoning_content"),
}


@pytest.mark.parametrize("name", OTHER_TRAINING)
def test_data_for_another_kind_of_training(tmp_path, name):
    row, match = OTHER_TRAINING[name]
    with pytest.raises(DataError, match=match):
        read(tmp_path, [row, row])


@pytest.mark.parametrize(
    "given", [{"prompt": "a", "completion": "b"}, {"messages": [A, B]}, {"query": "a", "answer": "b"}]
)
def test_feedback_in_numbers(tmp_path, given):
    with pytest.raises(DataError, match='the column "label" says of each answer whether it is good, for KTO'):
        read(tmp_path, [{**given, "label": label} for label in (1, 0, 1)])
    for labels in ([1, 1], [0, 1, 2]):  # categories
        assert read(tmp_path, [{**given, "label": label} for label in labels])
    assert read(tmp_path, [{"text": "a", "label": label} for label in (1, 0)])


def test_a_whole_conversation_is_learned_beside_other_columns(tmp_path):
    """UltraFeedback's messages are the better answer, and a label that is no true or false is a category."""
    pair = {"prompt": "a", "chosen": [A, B], "rejected": [A, turn("assistant", "c")], "messages": [A, B]}
    assert messages(tmp_path, pair) == [A, B]
    assert messages(tmp_path, {"messages": [A, B], "label": 1}) == [A, B]
    del pair["messages"]
    assert messages(tmp_path, pair, columns={"messages": "chosen"}) == [A, B]


# Columns


def test_columns_of_other_names(tmp_path):
    """Only those that are named are read, whatever else is in the file."""
    row = {"messages": "no", "text": "no", "frage": "a", "antwort": "b", "system": "s"}
    found = messages(tmp_path, row, columns=parse_columns(["prompt=frage", "completion=antwort"]))
    assert found == [turn("system", "s"), turn("user", "a"), turn("assistant", "b")]
    rows = read(
        tmp_path,
        [{"a": [turn("user", "x")], "b": [turn("assistant", "y")]}],
        columns={"prompt": "a", "completion": "b"},
    )
    assert rows[0] == {"prompt": [turn("user", "x")], "completion": [turn("assistant", "y")]}
    rows = read(tmp_path, [{"body": "a"}], columns={"text": "body"})
    assert rows[0] == {"text": "a"}
    rows = read(
        tmp_path, [{"prompt": "a", "completion": "b"}], columns={"prompt": "completion", "completion": "prompt"}
    )
    assert rows[0]["messages"] == [turn("user", "b"), turn("assistant", "a")]


def test_an_image_column_of_another_name(tmp_path):
    row = {"photo": "img/red.png", "frage": "a", "antwort": "b"}
    columns = parse_columns(["prompt=frage", "completion=antwort", "image=photo"])
    (found, _) = read(tmp_path, [row, row], vision=True, columns=columns)
    assert colors(found) == [RED]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["prompt"], "--columns prompt: expected NAME=COLUMN OF THE FILE"),
        (["prompt="], "--columns prompt=: expected NAME=COLUMN OF THE FILE"),
        (["promt=a"], "--columns promt=a: promt is not read; expected one of messages, prompt"),
        (["prompt=a", "prompt=b"], "--columns prompt=b: prompt is given twice"),
    ],
)
def test_bad_columns(given, match):
    with pytest.raises(DataError, match=match):
        parse_columns(given)


def test_columns_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="--columns names frage; the columns are: a, b"):
        read(tmp_path, [{"a": "1", "b": "2"}], columns={"prompt": "frage", "completion": "b"})


# Images


def test_llava(tmp_path):
    """`<image>` in a text; one image, several, or none; the mark may be anywhere."""
    rows = [
        {"id": 1, "image": "img/red.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]},
        {"id": "b", "image": ["img/red.png", "img/blue.png"], "conversations": [
            {"from": "human", "value": "First <image> then <image>"}]},
        {"id": 3, "conversations": [{"from": "human", "value": "No image."}]},
    ]  # fmt: skip
    for row in rows:
        row["conversations"].append({"from": "gpt", "value": "yes"})
    one, two, none = read(tmp_path, rows, vision=True)
    assert [colors(row) for row in (one, two, none)] == [[RED], [RED, BLUE], []]
    assert one["messages"][0] == turn("user", [IMAGE, text("What?")])
    assert two["messages"][0] == turn("user", [text("First "), IMAGE, text(" then "), IMAGE])
    assert none["messages"] == [turn("user", "No image."), turn("assistant", "yes")]


def test_an_image_in_some_rows_and_several_in_others(tmp_path):
    talk = {"messages": [turn("user", "What?"), turn("assistant", "b")]}
    red, blue = "img/red.png", "img/blue.png"
    rows = [{"image": red, **talk}, {"images": [blue, red], **talk}, {"image": red, "images": [], **talk}, talk]
    assert [colors(row) for row in read(tmp_path, rows, vision=True)] == [[RED], [BLUE, RED], [RED], []]
    rows.append({"image": red, "images": [blue], **talk})
    with pytest.raises(DataError, match=r'row 4 \(the first is 0\) has images in "image" and in "images", exp'):
        read(tmp_path, rows, vision=True)
    chosen = read(tmp_path, rows, vision=True, columns={"images": "images", "messages": "messages"})
    assert [len(row["images"]) for row in chosen] == [0, 2, 0, 0, 1]


@pytest.mark.parametrize("style", ["LLaMA-Factory", "ms-swift", "alpaca"])
def test_marks_beside_a_list_of_images(tmp_path, style):
    """LLaMA-Factory's mllm_demo.json, ms-swift's messages (images as dicts too), and alpaca with images."""
    images = ["img/red.png", "img/blue.png"]
    talk = [
        turn("user", "<image>Who?"),
        turn("assistant", "A."),
        turn("user", "And <image>?"),
        turn("assistant", "B."),
    ]
    row = {
        "LLaMA-Factory": {"messages": talk, "images": images},
        "ms-swift": {
            "messages": talk,
            "images": [{"path": images[0]}, {"bytes": base64.b64encode(png("blue")).decode()}],
        },
        "alpaca": {"instruction": "<image>Who?", "input": "And <image>?", "output": "B.", "images": images},
    }[style]
    if style == "ms-swift":
        row["images"][1] = {"url": "data:image/png;base64," + row["images"][1]["bytes"]}
    (found, _) = read(tmp_path, [row, row], vision=True)
    assert colors(found) == [RED, BLUE]
    assert found["messages"][0]["content"][0] == IMAGE
    parts = [part for message in found["messages"] for part in message["content"] if isinstance(part, dict)]
    assert parts.count(IMAGE) == 2
    prompts = [row["images"] for row in to_prompt_completion(Dataset.from_list([found], on_mixed_types="use_json"))]
    assert [len(images) for images in prompts] == ([2] if style == "alpaca" else [1, 2])


def test_paths_that_start_in_the_current_folder(tmp_path, monkeypatch):
    """As in LLaMA-Factory's v1_multimodal_demo.jsonl, ms-swift and axolotl; beside the data file is looked first."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in ("img/red.png", "data/blue.png"):
        (elsewhere / path).parent.mkdir()
        (elsewhere / path).write_bytes(png("blue"))
    monkeypatch.chdir(elsewhere)
    parts = [{"type": "image_url", "value": path} for path in ("img/red.png", "data/blue.png")]
    inside = {"messages": [turn("user", [*parts, text("a")]), B]}
    beside = {"messages": [turn("user", "<image><image>a"), B], "images": ["img/red.png", "data/blue.png"]}
    for row in (inside, beside):
        (found, _) = read(tmp_path / "data_of_run", [row, row], vision=True)
        assert colors(found) == [RED, BLUE]


DATA_URL = "data:image/png;base64," + base64.b64encode(png()).decode()
INLINE = {
    "Unsloth, Qwen": {"type": "image", "image": "img/red.png"},
    "OpenAI": {"type": "image_url", "image_url": {"url": DATA_URL}},
    "OpenAI, short": {"type": "image_url", "image_url": "img/red.png"},
    "OpenAI, responses": {"type": "input_image", "image_url": DATA_URL},
    "axolotl, url": {"type": "image", "url": DATA_URL},
    "axolotl, path": {"type": "image", "path": "img/red.png"},
    "axolotl, base64": {"type": "image", "base64": DATA_URL},
    "Anthropic": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA_URL}},
    "without a type": {"image": "img/red.png"},
}


@pytest.mark.parametrize("part", INLINE.values(), ids=INLINE)
def test_images_inside_of_messages(tmp_path, part):
    row = {"messages": [turn("user", [text("What?"), part]), turn("assistant", [text("Red.")])]}
    (found, _) = read(tmp_path, [row, row], vision=True)
    assert found["messages"] == [turn("user", [text("What?"), IMAGE]), turn("assistant", [text("Red.")])]
    assert colors(found) == [RED]


def test_several_images_per_turn_and_several_turns(tmp_path):
    red, blue = INLINE["OpenAI"], {"type": "image", "image": "img/blue.png"}
    row = {"messages": [
        turn("user", [red, blue, text("a")]), turn("assistant", "b"), turn("user", [red]), turn("assistant", "c"),
    ]}  # fmt: skip
    plain = {"messages": [turn("user", "no image"), turn("assistant", "d")]}
    found, none = read(tmp_path, [row, plain], vision=True)
    assert colors(found) == [RED, BLUE, RED] and colors(none) == []
    prompts = to_prompt_completion(load(str(tmp_path), vision=True)["train"])
    assert [len(images) for images in prompts["images"]] == [2, 3, 0]


@pytest.mark.parametrize("stored", ["PIL", "bytes", "feature"])
def test_images_inside_of_messages_that_are_stored(tmp_path, stored):
    image = PILImage.open(io.BytesIO(png())) if stored != "bytes" else png()
    row = {"messages": [turn("user", [{"type": "image", "image": image, "text": None}, text("a") | {"image": None}]),
                        turn("assistant", [text("b") | {"image": None}])]}  # fmt: skip
    features = None
    if stored == "feature":
        part = {"type": Value("string"), "image": Image(), "text": Value("string")}
        features = Features({"messages": List({"role": Value("string"), "content": List(part)})})
    Dataset.from_list([row] * 3, features=features).to_parquet(tmp_path / "data.parquet")
    found = load(str(tmp_path / "data.parquet"), vision=True, test_size=1)["train"][0]
    assert found["messages"] == [turn("user", [IMAGE, text("a")]), turn("assistant", [text("b")])]
    assert colors(found) == [RED]


def test_images_that_are_written_twice_are_read_once(tmp_path):
    row = {
        "messages": [turn("user", [INLINE["OpenAI"], text("a")]), turn("assistant", "b")],
        "images": ["img/blue.png"],
    }
    inline_only = {**row, "images": []}
    twice, once = read(tmp_path, [row, inline_only], vision=True)
    assert colors(twice) == [BLUE] and colors(once) == [RED]


def test_images_in_base64_in_their_column(tmp_path):
    noise = io.BytesIO()
    PILImage.effect_noise((64, 64), 50).save(noise, "PNG")
    images = [DATA_URL, base64.b64encode(noise.getvalue()).decode(), "file://" + str(tmp_path / "img/blue.png")]
    row = {"messages": [turn("user", "a"), turn("assistant", "b")], "images": images}
    (found, _) = read(tmp_path, [row, row], vision=True)
    assert [image.size for image in found["images"]] == [(16, 16), (64, 64), (16, 16)]


@pytest.mark.parametrize("column", ["text", "caption"])
def test_captions(tmp_path, column):
    """A folder of images and their texts, as Unsloth's notebooks for LaTeX and radiology have them."""
    row = {"image": "img/red.png", "image_id": "x", column: "x^2"}
    (found, _) = read(tmp_path, [row, row], vision=True)
    assert found["messages"] == [turn("user", [IMAGE]), turn("assistant", "x^2")]
    assert colors(found) == [RED]


def test_folders_of_several_types(tmp_path):
    """One has text alone, one has parts: both are read as one dataset."""
    for folder, content in (("a", "hi"), ("b", [text("hi")])):
        (tmp_path / "both" / folder).mkdir(parents=True)
        row = {"messages": [turn("user", content), turn("assistant", "yo")]}
        (tmp_path / "both" / folder / "data.json").write_text(json.dumps([row, row]))
    loaded = load(str(tmp_path / "both"), test_size=1)
    assert sum(map(len, loaded.values())) == 4


def part_of(part):
    return {"messages": [turn("user", [part, text("a")]), turn("assistant", "b")]}


ADDRESS, REPLY = "https://example.com/a.png", turn("assistant", "b")
FAULTS = [
    (part_of({"type": "image_url", "image_url": {"url": ADDRESS}}), r"messages\[0\] has the image https://example.com"),
    (part_of({"type": "image", "image": "data:image/png;base64,!!"}), r"messages\[0\] has the image data:image/png"),
    (part_of({"type": "image", "image": 3}), r"messages\[0\] has an image that is 3, expected a path"),
    (part_of({"type": "video", "video": "a.mp4"}), r"messages\[0\] has a part of the type video: video and audio are"),
    (part_of({"type": "input_audio", "input_audio": {}}), r"messages\[0\] has a part of the type input_audio: video"),
    (part_of({"type": "image", "image": "img/no.png"}), r"image 0 \(.*no\.png\) cannot be opened"),
    ({"messages": [turn("user", "a"), REPLY], "images": [ADDRESS]}, "has the image https://example.com"),
    ({"messages": [turn("user", "<video>a"), REPLY], "videos": ["a.mp4"]}, 'column "videos" is not empty'),
    ({"messages": [turn("user", "<image>a"), REPLY], "images": []}, "the messages have 1 image .* has 0"),
    (
        {"messages": [turn("user", "<image>a"), turn("assistant", "<bbox>")], "images": ["img/red.png"],
         "objects": {"bbox": [[1, 2, 3, 4]]}},
        "has <bbox> or <ref-object>, which ms-swift fills in",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "match"), FAULTS)
def test_faults_name_the_row(tmp_path, bad, match):
    good = part_of({"type": "image", "image": "img/red.png"})
    if "messages" in bad and isinstance(bad["messages"][0]["content"], str):
        good = {"messages": [turn("user", "<image>a"), turn("assistant", "b")], "images": ["img/red.png"]}
    with pytest.raises(DataError, match=rf"(train|test): row 1 \(the first is 0\): .*{match}"):
        read(tmp_path, [good, bad, good], vision=True)


def test_images_in_the_text_recipe(tmp_path):
    with pytest.raises(DataError, match=r"train: the rows have images .* use recipes/sft_vlm\.py"):
        read(tmp_path, [part_of({"type": "image", "image": "img/red.png"})])
    with pytest.raises(DataError, match=r"row 0 .*messages\[0\] has an image: use recipes/sft_vlm\.py"):
        read(tmp_path, [part_of({"type": "image_url", "image_url": ADDRESS})])
