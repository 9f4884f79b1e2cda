"""Tokens are written nowhere; hostile strings reach neither HTML, nor the terminal, nor a path outside the output
folder; what is read runs no code."""

import ast
import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from toy_runs import summary, toy_matrices
from trl import ModelConfig, SFTConfig

from grades_trl import GradESConfig
from grades_trl.recipe import builtin, comparison_page
from grades_trl.recipe.arguments import RecipeArguments, parse
from grades_trl.recipe.bad_input import CONTROL
from grades_trl.recipe.card import _data
from grades_trl.recipe.comparison import summarize
from grades_trl.recipe.console import format_start
from grades_trl.recipe.data import DataError, check
from grades_trl.recipe.generation import format_samples
from grades_trl.recipe.results import format_run, format_scores
from grades_trl.recipe.secret import hide_secrets, is_secret, without_secrets
from grades_trl.report import page
from grades_trl.report.environment import Environment
from grades_trl.report.history import RunHistory
from grades_trl.report.recipe_facts import RecipeFacts, Sample, write_samples

ROOT = Path(__file__).parents[1]
TOKEN = "hf_" + "S3cr3t" * 5


# ---- tokens ----


def files_with(folder, text):
    """The files below a folder that hold a text, in UTF-8 or UTF-16, plainly or in a pickle."""
    needles = [text.encode(), text.encode("utf-16-le")]
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert paths
    return [str(path.relative_to(folder)) for path in paths if any(n in path.read_bytes() for n in needles)]


WAYS = {
    "flag and value": (["--hub_token", TOKEN], {}),
    "one word": ([f"--hub_token={TOKEN}"], {}),
    "dashes": (["--hub-token", TOKEN], {}),
    "config": ([], {"hub_token": TOKEN}),
    "variable": ([], {"env": {"WANDB_API_KEY": TOKEN}}),
}


@pytest.fixture
def clean_environment(monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


@pytest.mark.parametrize("way", ["flag and value", "config"])
def test_a_token_of_a_run_is_in_no_file_and_on_no_line(tmp_path, way, clean_environment):
    """The whole recipe, recorded offline by W&B, with a checkpoint."""
    flags, config = WAYS[way]
    config = yaml.safe_load((ROOT / "configs" / "demo_text.yaml").read_text()) | config
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "grades_trl.cli", "text", "--config", str(tmp_path / "config.yaml"), *flags]
    command += ["--output_dir", str(out), "--max_steps", "1", "--max_train_samples", "64", "--max_eval_samples", "4"]
    command += ["--num_eval_generations", "0", "--num_samples", "1", "--max_new_tokens", "1"]
    command += ["--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "1"]
    command += ["--report_to", "wandb"] if way == "flag and value" else ["--report_to", "none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert {"result.json", "arguments.json", "README.md"} <= {path.name for path in out.iterdir()}
    assert (out / "checkpoint-1" / "training_args.bin").exists() and (out / "grades" / "report.html").exists()
    assert (out / "wandb").exists() == (way == "flag and value")
    assert files_with(out, TOKEN) == []


@pytest.mark.parametrize("way", WAYS)
def test_a_token_of_a_comparison_is_in_no_file(tmp_path, monkeypatch, way, clean_environment):
    import runpy

    flags, config = WAYS[way]
    (tmp_path / "given.yaml").write_text(yaml.safe_dump({"max_steps": 1} | config))
    out = tmp_path / "compare"
    words = [
        "--recipe",
        "sft_text",
        "--config",
        str(tmp_path / "given.yaml"),
        "--seeds",
        "0",
        "--variants",
        "baseline",
    ]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "recipes/compare.py"), *words, "--output_dir", str(out), *flags])
    compare = runpy.run_path(sys.argv[0])
    commands = []

    def run_recipe(command, run_id, variant, log_file):
        commands.append(command)
        log_file.write_text("")
        result = {"id": run_id, "results": {"final/test_loss": None}, "diverged_at": 1, "steps": 1, "total_steps": 1}
        (log_file.parent / "result.json").write_text(json.dumps(result))
        return 0

    compare["main"].__globals__["run_recipe"] = run_recipe
    compare["main"]()
    assert (out / "baseline-seed0" / "run.json").exists() and (out / "compare.json").exists()
    assert files_with(out, TOKEN) == []
    assert commands and not any(TOKEN in word for command in commands for word in command)
    assert not any(TOKEN in word for word in sys.argv)


def test_the_libraries_get_the_token_that_is_hidden(tmp_path, monkeypatch, clean_environment):
    from huggingface_hub import get_token

    argv = ["sft_text.py", "--model_name_or_path", "m", "--report_to", "none", "--hub_token", TOKEN, "--seed", "3"]
    monkeypatch.setattr(sys, "argv", argv)
    _, training, _, _ = parse("", tmp_path)
    assert training.hub_token is None and get_token() == TOKEN
    assert sys.argv[-4:] == ["--hub_token", "***", "--seed", "3"]
    assert TOKEN not in str(vars(training))


def test_all_secrets_of_the_command_line_are_known():
    """A new argument of TRL that could be one is looked at here."""
    names = {f.name for kind in (SFTConfig, ModelConfig, GradESConfig, RecipeArguments) for f in fields(kind)}
    looks_like_one = {name for name in names if re.search(r"token$|passw|secret|key|credential", name)}
    assert {name for name in names if is_secret(name)} == {"hub_token"}
    assert looks_like_one == {"hub_token", "eos_token", "pad_token"}
    assert without_secrets(["--eos_token", "<e>", "--hub-token", "x", "--wandb_api_key=y"]) == [
        *("--eos_token", "<e>", "--hub-token", "***", "--wandb_api_key=***"),
    ]
    hide_secrets(SFTConfig(output_dir="x", bf16=False, use_cpu=True, report_to=[]))  # there is none


# ---- hostile strings ----

HOSTILE = {
    "html": "<script>alert(1)</script>",
    "attribute": "\"><img src=x onerror=alert(1)>'",
    "clear screen": "\x1b[2J\x1b[31mred",
    "title": "\x1b]0;owned\x07",
    "8-bit": "\x9b31m",
    "direction": "\u202egnp.exe",
    "backspace": "ok\x08\x08no",
    "return": "good\rbad",
    "parent": "../../../etc/passwd",
    "absolute": "/etc/passwd",
    "backslash": "..\\..\\x",
    "percent": "%2e%2e%2f",
    "brace": "{0.__class__}",
    "shell": "$(touch owned); `touch owned`",
}


class Tags(HTMLParser):
    """Tags and attributes of a page that could run something, or load something."""

    def __init__(self, text):
        super().__init__()
        self.harmful = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        of_tag = [name for name, value in attrs if name.startswith("on") or (name in ("src", "href") and ":" in value)]
        if tag in ("script", "iframe", "object", "b") or [n for n in of_tag if not dict(attrs)[n].startswith("data:")]:
            self.harmful.append((tag, attrs))


@pytest.mark.parametrize("evil", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_string_is_text_in_every_page(tmp_path, evil):
    matrices = toy_matrices(1)
    history = RunHistory(tmp_path, matrices, 10, evil, 1)
    history.record(1, [], dict.fromkeys(matrices, 1.0))
    sample = Sample(evil, evil, evil, evil)
    facts = RecipeFacts(evil, {evil: {evil: evil}}, [sample], [(evil, evil)])
    told = summary(
        metric=evil, stop_reason=evil, environment=Environment(evil, evil, {evil: evil}), settings={evil: evil}
    )
    html = page.build(history, told, None, None, facts=facts)
    runs = [{"variant": "baseline", "seed": 0, "skipped": evil}]
    compared = {"recipe": evil, "config": evil, "flags": [evil], "jobs": 1, "environment": None, "commit": evil}
    compared |= {**summarize(runs), "runs": runs}
    for text in (html, comparison_page.build(compared, None)):
        assert Tags(text).harmful == []
    write_samples(tmp_path / "out" / "samples", [replace(sample, image=b"jpeg")])
    assert {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()} == {
        *("samples/samples.jsonl", "samples/0.jpg"),
    }


class Stub:
    """What `format_run` reads of a trainer."""

    grades_config = None
    grades_summary = None

    def __init__(self, output_dir):
        self.args = type("Arguments", (), {"output_dir": output_dir})()


@pytest.mark.parametrize("evil", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_string_carries_nothing_out_on_the_terminal(evil, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/sft_text.py"])
    rows = Dataset.from_dict({"prompt": [evil], "completion": [evil]})
    shown = [
        format_start(Environment(evil, evil, {}), {"train": 1}, evil),
        format_samples(rows, {evil: [evil]}),
        format_scores({evil: {evil: 1.0}}),
        format_run(Stub(evil), {evil: 1.0}),
    ]
    with pytest.raises(DataError) as refused:
        check(Dataset.from_dict({"messages": [[{"role": evil, "content": evil}]]}), vision=False)
    from grades_trl.recipe.bad_input import _in_short

    shown.append(_in_short(refused.value))
    for text in shown:
        assert not CONTROL.search(text), repr(text)


@pytest.mark.parametrize("evil", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_name_stays_in_its_place_in_the_card(evil):
    text = _data(RecipeArguments(dataset_name=evil), 0, {"train": Dataset.from_dict({"a": [1]})})
    (named,) = re.findall(r"`([^`]*)`, (?:local|on the hub); examples", text, re.DOTALL)
    assert named in (evil.replace("`", "'"), Path(evil).name)


def test_whatever_a_run_is_called_it_writes_into_its_folder_alone(tmp_path):
    """Names of data, splits, columns and runs that are paths, in a whole run."""
    work, out = tmp_path / "work", tmp_path / "work" / "out"
    work.mkdir()
    rows = [{"prompt": f"{evil} {i}", "completion": evil} for i, evil in enumerate([*HOSTILE.values()] * 3)]
    data = work / "..%2f<b>\x1b[31m.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    before = set(tmp_path.rglob("*"))
    command = [sys.executable, "-m", "grades_trl.cli", "text", "--dataset_name", str(data), "--output_dir", str(out)]
    command += ["--run_name", "../../../owned", "--max_steps", "1", "--test_size", "8", "--report_to", "wandb"]
    command += ["--eval_strategy", "no", "--num_eval_generations", "2", "--max_new_tokens", "2", "--warmup_steps", "0"]
    done = subprocess.run(command, cwd=work, capture_output=True, env=_environment())
    assert done.returncode == 0, done.stderr.decode()
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(out)} == before
    for stream in (done.stdout, done.stderr):
        assert not CONTROL.search(stream.decode().replace("\r", "")), stream
    assert Tags((out / "grades" / "report.html").read_text()).harmful == []


def _environment():
    import os

    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": python_path, "WANDB_MODE": "offline"}


# ---- what is read runs no code ----

SOURCES = [path for folder in ("grades_trl", "recipes", "vlm") for path in (ROOT / folder).rglob("*.py")]
UNSAFE = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}


def test_nothing_of_ours_reads_pickles_or_runs_what_it_reads():
    assert len(SOURCES) > 100
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                assert not names & UNSAFE, (path, names)
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load"), (path, called)
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("shell", "False") == "False", (path, called)
                assert given.get("trust_remote_code", "False") != "True", (path, called)
                if called in ("torch.load", "np.load", "numpy.load"):
                    assert given.get("weights_only") == "True" or given.get("allow_pickle") == "False", (path, called)


def test_code_that_a_model_brings_does_not_run(tmp_path):
    """`trust_remote_code` is off unless it is asked for."""
    model, tokenizer = builtin.tiny_qwen3()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, "model_type": "own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w').close()\nraise SystemExit\n")
    command = [sys.executable, "-m", "grades_trl.cli", "text", "--model_name_or_path", str(folder)]
    command += ["--output_dir", str(tmp_path / "out"), "--dataset_name", "dates", "--report_to", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=_environment(), input="")
    assert done.returncode != 0
    assert "trust_remote_code" in done.stderr
    assert not (tmp_path / "owned").exists()


def test_a_state_of_a_checkpoint_is_json_and_safetensors(tmp_path):
    from grades_trl.trainers.checkpoint import load_state, save_state

    save_state(tmp_path, {"a": 1, "tensors": {}})
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert load_state(tmp_path) == {"a": 1, "tensors": {}}
    with pytest.raises(TypeError):
        save_state(tmp_path, {"code": print, "tensors": {}})
