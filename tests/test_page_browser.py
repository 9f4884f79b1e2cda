"""What headless Chromium makes of the pages of a run and of a comparison."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from chromium import CHROMIUM, Browser
from test_page import trained
from toy_runs import summary, toy_matrices

from grades_trl.recipe import comparison_page
from grades_trl.recipe.comparison import draw
from grades_trl.report import figure, page
from grades_trl.report.recipe_facts import RecipeFacts, Sample, thumbnail
from grades_trl.report.timing import Evaluation

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

COMPARISON = Path(__file__).parents[1] / "benchmarks" / "results" / "compare_demo_vlm.json"
LONG = "w" * 300 + " <b>bold</b> & 'quotes'"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def picture():
    from PIL import Image

    return thumbnail(Image.new("RGB", (400, 80), "navy"))


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    """A page with every section, and words that are longer than a phone is wide."""
    directory = tmp_path_factory.mktemp("run")
    history = trained(directory, toy_matrices())
    for step, score in ((10, 4.0), (20, 1.5), (30, 1.25)):
        history.step = step
        history.record_heldout("loss", score)
    history.all_events[0] = replace(history.all_events[0], reason=LONG)
    facts = RecipeFacts(
        command=f"python recipes/sft_vlm.py --dataset_name {LONG}",
        arguments={"training": {"learning_rate": 1e-3, "name": LONG, "nested": {"a": [1, 2]}}},
        samples=[Sample("read it", "372", LONG, "372", picture()), Sample("read it", "1", "2", "3")],
        next_commands=[("Compare it with the baseline", f"python recipes/compare.py {LONG}")],
    )
    png = figure.render(figure.draw(history), dpi=40)
    results = {"before/exact_match": 0.1, "final/exact_match": 0.75, "final/test_loss": 1.5}
    facts_of_run = summary(weights=LONG, settings={"tau": "auto", LONG: LONG}, results=results)
    evaluations = [Evaluation(10, 1.0, 3.0), Evaluation(20, 2.0, 2.0)]
    path = directory / "report.html"
    path.write_text(page.build(history, facts_of_run, png, png, evaluations=evaluations, facts=facts), "utf-8")
    (directory / "summary.json").write_text(json.dumps(facts_of_run.to_json()), "utf-8")
    return path


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    directory = tmp_path_factory.mktemp("comparison")
    record = json.loads(COMPARISON.read_text("utf-8"))
    record["runs"].append({"variant": "baseline", "seed": 9, "skipped": LONG})
    draw(record, directory / "compare.png")
    comparison_page.write(record, directory / "compare.png", directory / "compare.html")
    return directory / "compare.html"


@pytest.fixture(params=["run_page", "comparison"])
def path(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("width", [360, 1280])
def test_a_page_fits_and_says_nothing_in_the_console(browser, path, width):
    browser.open(path, width)
    assert browser.messages == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
    # The page itself does not scroll sideways; what is wider scrolls in a box of its own.
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    beyond = """[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
        && !e.closest('.wide, .scroll')).map(e => e.outerHTML.slice(0, 80))"""
    assert browser.evaluate(beyond) == []
    assert browser.evaluate("[...document.images].every(i => i.naturalWidth > 0 && i.alt)")


def test_a_script_on_the_page_would_not_run(browser, run_page, tmp_path):
    """The policy of the page, if escaping should ever fail."""
    hurt = tmp_path / "hurt.html"
    hurt.write_text(run_page.read_text("utf-8").replace("</h1>", "</h1><script>document.title = 'hurt'</script>"))
    browser.open(hurt, 1280)
    assert browser.evaluate("document.title") == "toy - GradES"
    assert any("Content Security Policy" in message for message in browser.messages)


@pytest.mark.skipif(find_spec("axe_playwright_python") is None, reason="needs axe, see tests/requirements.txt")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page_passes_the_accessibility_rules(browser, path, dark):
    (folder,) = find_spec("axe_playwright_python").submodule_search_locations
    browser.open(path, 1280, dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    browser.evaluate((Path(folder) / "axe.min.js").read_text("utf-8") + "; 1")
    found = browser.evaluate(
        "axe.run().then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html).slice(0, 3)]))"
    )
    assert found == []


def test_the_page_shows_the_numbers_of_summary_json(browser, run_page):
    browser.open(run_page, 1280)
    facts = json.loads(run_page.with_name("summary.json").read_text("utf-8"))
    shown = browser.evaluate("document.querySelector('main').innerText")
    rows = dict(
        browser.evaluate("""[...document.querySelectorAll('tr')].map(r => [r.cells[0].textContent.trim(),
            [...r.cells].slice(1).map(c => c.textContent.trim())])""")
    )
    assert browser.evaluate("document.querySelector('h1').innerText") == (
        f"The run ended after {facts['steps']} of {facts['total_steps']} steps, "
        f"{facts['speedup']['against_full_schedule']:.2f}x as fast as the whole schedule"
    )
    assert rows["training"] == [f"{facts['seconds']['training']:.3g} s"]
    assert rows["Cheaper steps"][1] == f"{facts['speedup']['cheaper_steps']['ratio']:.2f}x"
    limit = facts["flops"]["baseline_same_length"] / facts["flops"]["run"]
    assert rows["Cheaper steps"][2] == f"{limit:.2f}x"
    assert rows["All together, against a baseline of the full schedule"][1:3] == [
        f"{facts['speedup']['against_full_schedule']:.2f}x",
        f"{1 / facts['flops']['fraction']:.2f}x",
    ]
    assert rows["exact match"] == ["10.0\u00a0%", "75.0\u00a0%"] and rows["test loss"] == ["-", "1.5"]
    assert rows["best score"] == [f"{facts['heldout']['best_score']:.4g}"]
    assert rows["vision"] == ["12.5\u00a0%", "1.0\u00a0%", "25.0\u00a0%"]
    assert facts["stop_reason"] in shown and "{" not in shown


def test_the_comparison_shows_the_numbers_of_its_record(browser, comparison):
    browser.open(comparison, 1280)
    record = json.loads(COMPARISON.read_text("utf-8"))["variants"]
    rows = browser.evaluate("""Object.fromEntries([...document.querySelectorAll('section:nth-of-type(3) tbody tr')]
        .map(r => [...r.cells].map(c => c.textContent)).map(([name, ...cells]) => [name, cells]))""")
    assert rows.keys() == record.keys()
    for name, numbers in record.items():
        loss = numbers["test_loss"]
        assert rows[name][0] == f"{numbers['steps']['mean']:,.0f}"
        assert rows[name][1] == f"{loss['mean']:.4f} ± {loss['sd']:.4f}"
    assert "GradES took" in browser.evaluate("document.querySelector('h1').innerText")


def test_pages_can_be_printed(browser, path):
    browser.open(path, 800, media="print", dark=True)
    assert browser.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert browser.pdf()[:4] == b"%PDF"
