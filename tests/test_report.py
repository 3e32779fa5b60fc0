"""The HTML page is self-contained, and works in a browser without anything on the console."""

import base64
import html
import re

import pytest
from helpers.samples import write_seeds

import compare_runs
from analysis import metrics, replicates, report, tables

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture
def page(tmp_path):
    pytest.importorskip("plotly", reason="no plotly")
    write_seeds(tmp_path / "runs", "be", [95.0, 96.0], lr=0.1)
    write_seeds(tmp_path / "runs", "alpha", [9.0, 10.0], lr=0.2)
    write_seeds(tmp_path / "runs", "c", [50.0], lr=0.3)
    (tmp_path / "runs/c-s0/examples.png").write_bytes(PNG)
    groups = replicates.group(metrics.load_runs([str(tmp_path / "runs/*")]))
    groups[2].name = HOSTILE
    (tmp_path / "report.html").write_text(report.page(groups, tables.compare(groups))[0])
    return tmp_path / "report.html"


@pytest.mark.extras("plotly")
def test_the_page_loads_nothing_and_names_are_escaped(page):
    text = page.read_text()
    assert not re.findall(r"""<(?:script|link|img)[^>]*(?:src|href)=["'](?!data:)""", text)
    assert HOSTILE not in text and "&lt;/script&gt;" in text
    assert 'src="data:image/png;base64,iVBOR' in text


def test_unreadable_example_images_are_left_out_with_a_note(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "_plot", lambda groups: ("", 1))  # needs plotly
    monkeypatch.setattr(report, "require_plotly", lambda: None)
    runs, page = tmp_path / "runs", tmp_path / "page.html"
    write_seeds(runs, "be", [95.0])
    write_seeds(runs, "c", [50.0])
    (runs / "c-s0/examples.png").write_bytes(PNG)
    (runs / "c-s0/errors.png").symlink_to("nowhere")
    (runs / "c-s0/report.png").mkdir()
    (runs / "be-s0/examples<b>.png").write_text("not an image")
    assert compare_runs.main([str(runs / "*"), "--no-figures", "--html", str(page)]) == 0
    lines = capsys.readouterr().err.splitlines()
    notes = [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]
    text = page.read_text()
    assert text.count("<figure>") == 1 and 'src="data:image/png;base64,iVBOR' in text
    for name, reason in {
        "errors.png": "No such file",
        "report.png": "Is a directory",
        "examples<b>.png": "not a PNG image",
    }.items():
        (note,) = [note for note in notes if name in note]
        assert reason in note and f'<p class="quiet">{html.escape(note)}</p>' in text


@pytest.mark.extras("plotly", "playwright", "chromium")
@pytest.mark.slow
def test_the_page_works_in_a_browser(page, browser):
    """It is drawn, sorts by clicks, hides a curve, and asks nothing of a network."""
    tab, messages, requests = browser.new_page(), [], []
    tab.set_default_timeout(120_000)
    tab.set_viewport_size({"width": 1300, "height": 900})
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(page.as_uri())
    tab.wait_for_selector("#curves .legendtext")
    check_sorting(tab)
    check_curves(tab)
    assert tab.evaluate("document.images[0].naturalWidth") == 1
    assert messages == [] and all(url.startswith(("file:", "data:")) for url in requests)


def check_sorting(tab):
    def column(number):
        cells = tab.locator(f"#runs tbody tr td:nth-child({number})")
        return [cell.inner_text() for cell in cells.all()]

    titles = [head.inner_text() for head in tab.locator("#runs th").all()]
    test = titles.index("test %") + 1
    best_first = ["95.50 ± 0.71", "50.00", "9.50 ± 0.71"]
    for expected in (best_first, best_first[::-1]):
        tab.click(f"#runs th:nth-child({test}) button")
        assert column(test) == expected
    tab.click("#runs th:nth-child(1) button")
    assert column(1) == [HOSTILE, "alpha", "be"]


def check_curves(tab):
    def count():
        return tab.locator("#curves .scatterlayer .trace").count()

    before = count()
    tab.locator("#curves .legendtoggle").first.click()
    for _ in range(1000):  # the page's policy forbids wait_for_function, which evaluates a string
        if count() < before:
            break
        tab.wait_for_timeout(100)
    assert count() < before
    assert HOSTILE in tab.text_content("#curves .legend")
    titles = "[...document.querySelectorAll('.modebar-btn')].map(each => each.dataset.title)"
    buttons = tab.evaluate(titles)
    assert buttons
    assert not any("hare" in title or "loud" in title for title in buttons)  # Share, Plotly Cloud
