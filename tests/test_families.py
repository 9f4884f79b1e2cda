"""Some rows of docs/models.md, tried again. `make families` tries all of them, and writes the page."""

import importlib
import sys
from pathlib import Path

import pytest

SHORT = ["qwen3_moe", "deepseek_v3", "cohere", "qwen2_5_vl", "blip-2", "whisper"]


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "families"))
    yield importlib.import_module("table")
    for name in ("table", "check", "zoo"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", SHORT)
def test_the_page_says_what_comes_of_an_architecture(table, name):
    assert str(table.try_architecture(name)) == table.rows_of_page()[name]


def test_the_page_has_as_many_architectures_as_it_claims(table):
    rows = table.rows_of_page()
    assert rows.keys() <= {*table.TEXT, *table.WITH_IMAGES_OR_SOUND}
    assert len(rows.keys() & set(table.TEXT)) >= 80
    assert len(rows.keys() & set(table.WITH_IMAGES_OR_SOUND)) >= 45
