"""The page to try a model on: its answers, and in a browser where gradio and Chromium are there."""

import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from helpers.errors import refused
from helpers.samples import write_checkpoint
from PIL import Image

import show_example
from show import predict, serve

CPU = torch.device("cpu")


def test_an_answer_is_the_models_with_where_it_looks(tmp_path):
    predictor = predict.Predictor(write_checkpoint(tmp_path / "run"), CPU)
    file = tmp_path / "red.png"
    Image.new("RGBA", (90, 50), (200, 10, 10, 255)).save(file)
    named, looked = serve.classify(predictor, file, 3)
    images = torch.tensor([200, 10, 10], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    top = predictor.logits(images).softmax(1)[0].topk(3)
    assert list(named.values()) == pytest.approx(top.values.tolist(), abs=1e-5)
    assert looked.shape == (384, 384, 3)


def test_an_image_is_turned_as_its_camera_says(tmp_path):
    predictor = predict.Predictor(write_checkpoint(tmp_path / "run"), CPU)
    upright = Image.new("RGB", (90, 90), (200, 10, 10))
    upright.paste((0, 0, 250), (0, 0, 90, 30))
    turned, exif = upright.rotate(90), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    upright.save(tmp_path / "upright.png")
    turned.save(tmp_path / "turned.png", exif=exif)
    wanted, looked = serve.classify(predictor, tmp_path / "upright.png", 3)
    named, looked_turned = serve.classify(predictor, tmp_path / "turned.png", 3)
    assert named == wanted and (looked == looked_turned).all()


def test_a_model_that_can_not_be_explained_answers(tmp_path):
    path = write_checkpoint(tmp_path / "mixer", model="mlp_mixer_tiny")
    Image.new("L", (9, 9)).save(tmp_path / "black.png")
    named, looked = serve.classify(predict.Predictor(path, CPU), tmp_path / "black.png", 2)
    assert len(named) == 2 and looked is None


def test_an_image_of_a_format_that_can_start_programs_is_refused(tmp_path):
    predictor = predict.Predictor(write_checkpoint(tmp_path / "run"), CPU)
    Image.new("RGB", (9, 9)).save(tmp_path / "disguised.png", format="EPS")
    with refused(tmp_path, "can't be read as an image"):
        serve.classify(predictor, tmp_path / "disguised.png", 3)


@pytest.mark.extras("gradio", "playwright", "chromium")
@pytest.mark.slow
def test_the_page_answers_in_a_browser(tmp_path, browser):
    pytest.importorskip("gradio", reason="no gradio")
    Image.new("RGB", (64, 48), (30, 200, 90)).save(tmp_path / "image.png")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    checkpoint = write_checkpoint(tmp_path / "run")
    command = [sys.executable, show_example.__file__, "--checkpoint", str(checkpoint)]
    command += ["--serve", "--port", str(port), "--device", "cpu"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = subprocess.Popen(command, cwd=tmp_path, **quiet)
    try:
        address = f"http://127.0.0.1:{port}/"
        wait_for(address, server)
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.goto(address)
        page.set_input_files("input[type=file]", tmp_path / "image.png", timeout=120_000)
        page.wait_for_function("document.body.innerText.includes('%')", timeout=120_000)
        assert page.locator("img").count() >= 2
    finally:
        server.terminate()
        server.wait()


def wait_for(address, server):
    for _ in range(600):
        try:
            urllib.request.urlopen(address).close()
            return
        except OSError:
            assert server.poll() is None, "the server ended"
            time.sleep(0.2)
    raise TimeoutError(address)
