"""What people get: the wheel, the command that it installs, its extras, and the files that name its version."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from trl import ModelConfig

from grades_trl.extras import EXTRAS, installed
from grades_trl.recipe.arguments import parse
from grades_trl.recipe.models import load_gguf, load_model
from grades_trl.recipe.places import RECIPES, find_config
from vlm import builtin as vlm_builtin
from vlm.samples import save_samples

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# What the extras install, by the names of their files: hidden from the environment that has no extra.
HIDDEN = ("bitsandbytes", "gguf", "matplotlib", "mpl_toolkits", "pylab", "scikit_learn", "sklearn", "wandb")
QUICK = "--max_steps 3 --max_train_samples 40 --num_eval_generations 2 --max_new_tokens 4 --output_dir out"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from this checkout."""
    source, target = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("grades_trl", "vlm", "recipes", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", target, source]
    subprocess.run(build, check=True, capture_output=True)
    (file,) = target.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel_files(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An empty virtual environment with the wheel. The other libraries are those of this one, without the extras."""
    folder, libraries = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("libraries")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith((*HIDDEN, "__editable__", "grades_trl")):
            (libraries / path.name).symlink_to(path)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(f"{libraries}\n")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True, capture_output=True)
    return folder


def run(environment, cwd, program, *words):
    """Runs a program of the environment, with nothing of this checkout on its path."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "WANDB_MODE")}
    command = [environment / "bin" / program, *(word for of in words for word in str(of).split())]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=120)


def succeeded(done):
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def test_a_wheel_claims_no_name_but_grades_trl(wheel_files):
    names = {name.split("/")[0] for name in wheel_files}
    assert {name for name in names if not name.endswith(".dist-info")} == {"grades_trl"}


def test_a_wheel_has_every_module_and_the_mark_of_its_types(wheel_files):
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "grades_trl").rglob("*.py")}
    assert modules | {"grades_trl/py.typed"} <= wheel_files


def test_a_wheel_has_recipes_configs_and_vlm_with_its_model(wheel_files):
    files = [*ROOT.glob("recipes/*.py"), *ROOT.glob("configs/**/*.yaml"), *ROOT.glob("vlm/*.py")]
    files += ROOT.glob("vlm/reader/*")
    assert len(files) > 30
    assert {f"grades_trl/{path.relative_to(ROOT).as_posix()}" for path in files} <= wheel_files


@pytest.mark.parametrize("name", RECIPES)
def test_a_wheel_has_the_recipe_of_every_subcommand(wheel_files, name):
    assert f"grades_trl/recipes/{RECIPES[name]}" in wheel_files


def test_the_command_lists_its_recipes_and_refuses_other_names(environment, tmp_path):
    printed = succeeded(run(environment, tmp_path, "grades-trl", "--help"))
    assert re.findall(r"^  (\w+) +\w", printed, re.M) == list(RECIPES)
    assert "demo_vlm" in printed and "paper/qwen3_14b_lora" in " ".join(printed.split())
    assert max(map(len, printed.splitlines())) <= 80
    unknown = run(environment, tmp_path, "grades-trl", "train")
    assert unknown.returncode != 0
    assert "has no subcommand 'train'; expected one of text, vlm, compare, evaluate, export, plan" in unknown.stderr


def test_a_text_run_of_an_installed_package_without_any_extra(environment, tmp_path):
    printed = succeeded(run(environment, tmp_path, "grades-trl", "text --config demo_text --eval_steps 3", QUICK))
    assert printed.count("This run is not recorded in W&B, which is not installed: pip install wandb") == 1
    assert printed.count("The report has no figures, which need matplotlib: pip install matplotlib") == 1
    assert "\n  grades-trl compare --recipe sft_text --config demo_text" in printed
    assert "\n  grades-trl evaluate out" in printed
    assert json.loads((tmp_path / "out" / "result.json").read_text())["steps"] == 3
    assert not (tmp_path / "out" / "grades" / "timeline.png").exists()
    page = (tmp_path / "out" / "grades" / "report.html").read_text()
    assert "<img" not in page and "Settings" in page

    printed = succeeded(run(environment, tmp_path, "grades-trl", "evaluate out --max_eval_samples 20"))
    assert "side by side: grades-trl evaluate ANOTHER_MODEL out --max_eval_samples 20" in printed


USE = """
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture
from grades_trl.vlm import GradESVLMTrainer
from grades_trl.vlm.builtin import READER
print(GradESVLMTrainer.__mro__[1].__module__, (READER / "config.json").is_file())
message = List({"role": Value("string"), "content": Value("string")})
said = lambda role, text: [[{"role": role, "content": text}]] * 80
rows = {"images": [[Picture.new("L", (112, 32), n)] for n in range(80)]}
rows |= {"prompt": said("user", "Read the number."), "completion": said("assistant", "12")}
features = Features({"images": List(Image()), "prompt": message, "completion": message})
Dataset.from_dict(rows, features=features).to_parquet("images.parquet")
"""


def test_the_vision_trainer_and_a_comparison_of_an_installed_package(environment, tmp_path):
    (tmp_path / "use.py").write_text(USE)
    assert "grades_trl.vlm.trainer True" in succeeded(run(environment, tmp_path, "python", "use.py"))
    flags = f"--config demo_vlm --dataset_name images.parquet --eval_steps 3 {QUICK}"
    command = "compare --recipe sft_vlm --variants grades --seeds 0"
    printed = succeeded(run(environment, tmp_path, "grades-trl", command, flags))
    assert "It has no figure, which needs matplotlib" in printed
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [(of["variant"], of["steps"]) for of in found["runs"]] == [("grades", 3)]
    assert found["commit"] is None
    assert "grades-trl evaluate out/grades-seed0" in (tmp_path / "out" / "grades-seed0" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            lambda: load_model(ModelConfig("model", load_in_4bit=True, use_peft=True), "transformers"),
            "load_in_4bit and load_in_8bit need bitsandbytes, which is not installed: pip install bitsandbytes",
        ),
        (lambda: load_gguf(Path("model.gguf")), "GGUF files need gguf, which is not installed: pip install gguf"),
        (
            lambda: vlm_builtin.draw_numbers("train", 1, np.random.default_rng()),
            r"digits of the built-in datasets need scikit-learn, which is not installed: .*grades-trl\[demo\]",
        ),
        (lambda: save_samples([], [], [], "samples.png"), "Sheets of samples need matplotlib"),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(monkeypatch, use, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=message):
        use()


def test_a_folder_that_is_called_like_a_library_does_not_count_as_it(tmp_path, monkeypatch):
    (tmp_path / "gguf").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "gguf", raising=False)
    assert importlib.util.find_spec("gguf") is not None
    assert not installed("gguf")


def test_a_config_that_does_not_exist_is_an_error_with_those_that_do():
    with pytest.raises(FileNotFoundError, match=r"--config demo_txet: no such file, and no config .* demo_text, "):
        parse("", ROOT / "unused", ["--config", "demo_txet"])


def test_the_extra_all_has_every_extra_that_a_message_names():
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    assert set(everything.partition("[")[2].rstrip("]").split(",")) == {extra for _, extra in EXTRAS.values()}
    for package, extra in EXTRAS.values():
        requirement, *others = extras[extra]
        assert requirement.startswith(f"{package}>=")
        assert others == (["sentencepiece>=0.2"] if extra == "gguf" else [])


@pytest.mark.parametrize(
    "name", ["demo_vlm", "demo_vlm.yaml", "paper/qwen3_0.6b_full", ROOT / "configs" / "demo_vlm.yaml"]
)
def test_a_config_is_found_by_its_name_and_by_its_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo_vlm").mkdir()  # a folder is no config
    assert find_config(name).is_relative_to(ROOT / "configs")
    (tmp_path / "demo_vlm.yaml").touch()
    assert find_config("demo_vlm.yaml") == Path("demo_vlm.yaml")  # a file of the user's goes first


def test_the_citation_names_the_version_of_the_package():
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.M)[1] == PROJECT["version"]
