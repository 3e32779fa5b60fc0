"""The page to try a model on: what it answers, and in a browser, where there is gradio and a Chromium."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from conftest import ROOT
from helpers.samples import write_checkpoint
from PIL import Image

from show import predict, serve


def test_an_answer_is_the_models_and_names_what_it_looks_at(tmp_path):
    predictor = predict.Predictor(write_checkpoint(tmp_path / "run"), torch.device("cpu"))
    named, looked = serve.try_picture(predictor, Image.new("RGBA", (90, 50), (200, 10, 10, 255)), 3)
    images = torch.tensor([200, 10, 10], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    top = predictor.logits(images).softmax(1)[0].topk(3)
    assert list(named.values()) == pytest.approx(
        top.values.tolist(), abs=1e-5
    ) and looked.shape == (384, 384, 3)
    turned = Image.new("RGB", (90, 90), (200, 10, 10))
    turned.paste((0, 0, 250), (0, 0, 90, 30))
    upright, exif = turned.rotate(90), Image.Exif()
    exif[0x0112] = 6  # a camera's: turn it by 90 degrees clockwise to see it upright
    upright.getexif().update(exif)
    for one, other in zip(
        serve.try_picture(predictor, turned, 3), serve.try_picture(predictor, upright, 3)
    ):
        assert (one == other) if isinstance(one, dict) else (one == other).all()
    mixer = predict.Predictor(
        write_checkpoint(tmp_path / "mixer", model="mlp_mixer_tiny"), torch.device("cpu")
    )
    named, looked = serve.try_picture(mixer, Image.new("L", (9, 9)), 2)
    assert len(named) == 2 and looked is None


@pytest.mark.extras("gradio", "playwright", "chromium")
def test_in_a_browser(tmp_path):
    pytest.importorskip("gradio", reason="no gradio")
    api = pytest.importorskip("playwright.sync_api", reason="no playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium")
    path = write_checkpoint(tmp_path / "run")
    Image.new("RGB", (64, 48), (30, 200, 90)).save(tmp_path / "picture.png")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        str(ROOT / "show_example.py"),
        "--checkpoint",
        str(path),
        "--serve",
        "--port",
        str(port),
    ]
    server = subprocess.Popen(
        [*command, "--device", "cpu"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"http://127.0.0.1:{port}/"
        for _ in range(600):
            try:
                urllib.request.urlopen(address).close()
                break
            except OSError:
                assert server.poll() is None, "the server ended"
                time.sleep(0.2)
        with api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(address)
            page.set_input_files("input[type=file]", str(tmp_path / "picture.png"), timeout=120_000)
            page.wait_for_function("document.body.innerText.includes('%')", timeout=120_000)
            assert page.locator("img").count() >= 2
            browser.close()
    finally:
        server.terminate()
        server.wait()
