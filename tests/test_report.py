"""The page of a comparison: whole in itself, and in a browser it sorts, shows and says nothing on the console."""

import base64
import html
import re
import shutil

import pytest
from samples import write_seeds

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
def test_the_page_needs_nothing_else_and_names_do_nothing(page):
    text = page.read_text()
    assert not re.findall(r"""<(?:script|link|img)[^>]*(?:src|href)=["'](?!data:)""", text)
    assert (
        HOSTILE not in text
        and "&lt;/script&gt;" in text
        and 'src="data:image/png;base64,iVBOR' in text
    )


def test_unreadable_example_images_are_left_out_with_a_note(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "_plot", lambda groups: ("", 1))  # needs plotly
    runs = tmp_path / "runs"
    write_seeds(runs, "be", [95.0])
    write_seeds(runs, "c", [50.0])
    (runs / "c-s0/examples.png").write_bytes(PNG)
    (runs / "c-s0/errors.png").symlink_to("nowhere")
    (runs / "c-s0/report.png").mkdir()
    (runs / "be-s0/examples<b>.png").write_text("no image")
    assert (
        compare_runs.main([str(runs / "*"), "--no-figures", "--html", str(tmp_path / "page.html")])
        == 0
    )
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    text = (tmp_path / "page.html").read_text()
    assert text.count("<figure>") == 1 and 'src="data:image/png;base64,iVBOR' in text
    reasons = {
        "errors.png": "No such file",
        "report.png": "Is a directory",
        "examples<b>.png": "not a PNG image",
    }
    for name, reason in reasons.items():
        (note,) = [note for note in notes if name in note]
        assert (
            reason in note
            and f'<p class="quiet">{html.escape(note.removeprefix("note: "))}</p>' in text
        )


@pytest.mark.extras("plotly", "playwright", "chromium")
def test_in_a_browser(page):
    """It renders, sorts by clicks, hides a curve, and the console stays empty: no error, nothing asked of a network."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab, said, asked = browser.new_page(viewport={"width": 1300, "height": 900}), [], []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.as_uri())
        tab.wait_for_selector("#curves .legendtext")

        def column(number):
            return [
                cell.inner_text()
                for cell in tab.locator(f"#runs tbody tr td:nth-child({number})").all()
            ]

        heads = [head.inner_text() for head in tab.locator("#runs th").all()]
        test = heads.index("test %") + 1
        tab.click(f"#runs th:nth-child({test}) button")
        assert column(test) == ["95.50 ± 0.71", "50.00", "9.50 ± 0.71"]
        tab.click(f"#runs th:nth-child({test}) button")
        assert column(test) == ["9.50 ± 0.71", "50.00", "95.50 ± 0.71"]
        tab.click("#runs th:nth-child(1) button")
        assert column(1) == [HOSTILE, "alpha", "be"]

        shown = "[...document.querySelectorAll('#curves .scatterlayer .trace')].length"
        before = tab.evaluate(shown)
        tab.locator("#curves .legendtoggle").first.click()
        for _ in range(
            100
        ):  # the page's policy lets nobody evaluate texts, so this asks until it is so
            if tab.evaluate(shown) < before:
                break
            tab.wait_for_timeout(100)
        assert tab.evaluate(shown) < before
        assert HOSTILE in tab.text_content("#curves .legend")
        assert tab.evaluate("document.images[0].naturalWidth") == 1
        buttons = tab.evaluate(
            "[...document.querySelectorAll('.modebar-btn')].map(each => each.dataset.title)"
        )
        assert buttons and not any(
            "hare" in title or "loud" in title for title in buttons
        )  # Share, Plotly Cloud
        browser.close()
    assert said == [] and all(url.startswith(("file:", "data:")) for url in asked)
