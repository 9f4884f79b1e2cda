"""What people get: the wheel, and the files that name its version."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory):
    """Names of all files in a wheel built from this checkout."""
    source, target = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("grades_trl", "vlm", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", target, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = target.iterdir()
    return zipfile.ZipFile(wheel).namelist()


def test_a_wheel_claims_no_name_but_grades_trl(wheel_files):
    names = {name.split("/")[0] for name in wheel_files}
    assert {name for name in names if not name.endswith(".dist-info")} == {"grades_trl"}


def test_a_wheel_has_every_module_and_the_mark_of_its_types(wheel_files):
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "grades_trl").rglob("*.py")}
    assert modules | {"grades_trl/py.typed"} <= set(wheel_files)


def test_the_citation_names_the_version_of_the_package():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.M)[1] == version
