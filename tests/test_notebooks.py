"""The notebooks in docs/notebooks, run on the CPU with tiny models: only the cells with a tag are replaced."""

import json
import runpy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
HARDWARE = '\nhardware = {"bf16": False, "use_cpu": True, "max_length": 128}\n'
TEXT = {
    "install": "",
    "settings": "STEPS, QUESTION = 3, '1 May 1998'",
    "model": "from peft import LoraConfig, get_peft_model\nfrom grades_trl.recipe import builtin\n"
    "model, tokenizer = builtin.tiny_qwen3()\n"
    'tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"\n'
    'model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))' + HARDWARE,
    "data": "split = builtin.dates(train=32, test=8)",
}
VISION = {
    "install": "import sys, vlm\nsys.modules['grades_trl.vlm'] = vlm",  # where a wheel has it
    "settings": "STEPS = 3",
    "model": "from peft import LoraConfig, get_peft_model\nfrom vlm import builtin\n"
    "model, processor = builtin.tiny_llava()\n"
    'model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))'
    + HARDWARE.replace(', "max_length": 128', ""),
    "data": "split = builtin.digit_images(train=32, test=8)",
}


@pytest.mark.parametrize(("name", "tiny"), [("text", TEXT), ("vision", VISION)])
def test_a_notebook_runs_from_its_first_cell_to_its_last(tmp_path, name, tiny):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    replaced = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    assert replaced == list(tiny)
    for cell in notebook.cells:
        for tag in cell.metadata.get("tags", []):
            cell.source = tiny[tag]
    NotebookClient(
        notebook, timeout=120, startup_timeout=180, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "matrices froze; 3 steps ran" in printed
    assert (tmp_path / "model" / "adapter_model.safetensors").exists()
    assert (tmp_path / "outputs" / "grades" / "report.html").exists()


@pytest.mark.parametrize("name", ["text", "vision"])
def test_a_notebook_is_what_the_script_writes_and_has_no_outputs(name):
    written = runpy.run_path(str(FOLDER / "build.py"))["NOTEBOOKS"]
    kept = json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))
    assert kept == json.loads(json.dumps(written[name]))
    code = [cell for cell in kept["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    for cell in code:
        compile("".join(cell["source"]).replace("%pip", "#"), name, "exec")
