"""The model card of a recipe's run, and its upload, with a stand-in for the hub's server."""

import base64
import json
import sys
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import yaml

from grades_trl.recipe import card
from grades_trl.recipe.record import command_line

ROOT = Path(__file__).parents[2]
QUICK = "--max_steps 6 --eval_strategy no --num_eval_generations 2 --num_samples 1 --max_new_tokens 2"
QUICK += " --max_train_samples 64 --max_eval_samples 20 --warmup_steps 0 --report_to none --output_dir out"
PUSH = "--push_to_hub --hub_model_id me/tiny --hub_token hf_secret"


class Hub:
    """Answers as the hub does, and keeps what is committed. `fails` is the status of every commit."""

    def __init__(self, fails=None):
        self.files, self.tokens, self.commits, self.fails = {}, set(), 0, fails

    def __call__(self, request):
        self.tokens.add(request.headers.get("authorization"))
        path = request.url.path
        if path == "/api/repos/create":
            name = json.loads(request.content)["name"]
            return httpx.Response(200, json={"url": f"https://huggingface.co/me/{name}", "id": f"me/{name}"})
        if "/preupload/" in path:
            files = json.loads(request.content)["files"]
            sent = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return httpx.Response(200, json={"files": sent})
        if path == "/api/validate-yaml":
            return httpx.Response(200, json={"errors": [], "warnings": []})
        if "/commit/" in path:
            if self.fails:
                return httpx.Response(self.fails, json={"error": "no"})
            self.commits += 1
            for line in request.content.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = "https://huggingface.co/me/tiny/commit/abc"
            return httpx.Response(200, json={"commitUrl": url, "commitOid": "abc", "success": True})
        if request.method == "GET" and path.startswith("/api/models/"):
            return httpx.Response(200, json={"id": "me/tiny", "sha": "abc", "siblings": []})
        return httpx.Response(404, json={"error": f"not here: {request.method} {path}"})


@pytest.fixture
def hub(monkeypatch):
    """Requests of the hub's client end here."""

    def connect(**changes):
        hub = Hub(**changes)
        huggingface_hub.set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(hub)))
        return hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield connect
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


def sections(text):
    """Heading -> what is below it; `front` is the YAML."""
    _, front, body = text.split("---\n", 2)
    found = {"front": yaml.safe_load(front)}
    title = ""
    for line in body.splitlines():
        if line.startswith("#") and not line.startswith("#!"):
            title = line.lstrip("# ")
        found[title] = found.get(title, "") + line + "\n"
    return found


def test_a_run_that_is_pushed(run, hub, tmp_path):
    server = hub()
    flags = (
        "--metric grad_change --auto_ratio 1000 --alpha 0.3 --push_to_hub --hub_model_id me/tiny --hub_token hf_secret"
    )
    printed = run("sft_text.py", QUICK, flags, "--save_strategy steps --save_steps 3")
    assert "On the hub: https://huggingface.co/me/tiny/commit/abc" in printed
    assert server.commits == 1 and server.tokens - {None} == {"Bearer hf_secret"}  # at the end alone
    out = tmp_path / "out"
    assert server.files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert {"README.md", "tokenizer_config.json", "grades/timeline.png", "grades/report.html"} <= set(server.files)
    assert not [name for name in server.files if name.startswith("checkpoint") or "wandb" in name]
    assert "training_args.bin" not in server.files
    assert not [name for name, content in server.files.items() if b"hf_secret" in content]

    text = server.files["README.md"].decode()
    found = sections(text)
    assert {"grades", "sft", "trl"} <= set(found["front"]["tags"])
    assert "hf_secret" not in text and "None" not in text
    assert 'model="me/tiny"' in found["Quick start"]
    result = json.loads((out / "result.json").read_text())
    ran = found["What ran"]
    assert f"| steps | {result['steps']} of 6, 32 examples each |" in ran
    assert f"s on {result['environment']['device']} |" in ran and "| ended by | all matrices frozen |" in ran
    assert "| learning rate | 0.003, cosine |" in ran
    assert "![What froze when](grades/timeline.png)" in found["What froze when"]
    assert (
        "| language | 28 | 28 | 3 to " in found["What froze when"]
        or "| language | 28 | 28 | " in found["What froze when"]
    )
    assert "`dates`, built into the recipes; examples: 64 (train), 20 (test)" in found["Data"]
    assert "20 (validation); seed 42" in found["Data"]
    scores = result["results"]
    assert f"| test_loss | - | {scores['final/test_loss']:.4g} |" in found["Scores"]
    before, after = (f"{100 * scores[f'{when}/exact_match_test']:.1f} %" for when in ("before", "final"))
    assert f"| exact_match_test | {before} | {after} |" in found["Scores"]
    assert "sft_text.py --max_steps 6" in found["Command"] and "--hub_model_id me/tiny" in found["Command"]
    assert "2509.01842" in found["Citations"] and "vonwerra2020trl" in text


def test_a_baseline_on_a_local_folder_with_adapters(run, folder, tmp_path):
    rows = [json.dumps({"prompt": f"{i}?", "completion": str(i)}) for i in range(40)]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    flags = f"--config {ROOT / 'configs' / 'demo_text.yaml'} --model_name_or_path {folder} --use_peft --lora_r 2"
    run("sft_text.py", flags, QUICK, f"--grades false --dataset_name {tmp_path / 'mine.jsonl'}")
    text = (tmp_path / "out" / "README.md").read_text()
    found = sections(text)
    assert "| trained | LoRA, r 2, " in found["What ran"]
    assert "trained without GradES" in found["What froze when"] and "timeline.png" not in text
    assert "`mine.jsonl`, local" in found["Data"]
    assert f"fine-tuned version of `{Path(folder).name}`" in text and "None" not in text
    assert "2509.01842" not in text


def test_a_card_that_fails_costs_no_run(run, tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no template")

    monkeypatch.setattr(card, "complete", fail)
    printed = run("sft_text.py", QUICK, "--export merged")
    assert "The model card could not be written. The model and its scores are in out." in printed
    assert (tmp_path / "out" / "result.json").exists()
    assert (tmp_path / "out" / "merged" / "model.safetensors").exists()


def test_an_upload_that_fails_leaves_the_run(run, hub, tmp_path):
    hub(fails=403)
    with pytest.raises(SystemExit, match=r"(?s)upload failed.*The run is whole in out\. .* hf upload me/tiny out \."):
        run("sft_text.py", QUICK, PUSH)
    assert (tmp_path / "out" / "model.safetensors").exists() and (tmp_path / "out" / "result.json").exists()
    assert (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize("flag", [["--hub_token", "hf_x"], ["--hub_token=hf_x"]])
def test_the_token_is_in_no_file(monkeypatch, flag):
    monkeypatch.setattr(sys, "argv", ["sft.py", "--seed", "3", *flag, "--grades", "false"])
    assert "hf_x" not in command_line() and "--seed 3" in command_line() and "--grades false" in command_line()
