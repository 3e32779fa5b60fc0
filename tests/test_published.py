"""timm's networks: every family of them, and the hub that their weights come from."""

import http.server
import threading

import pytest
import torch

import engine
import memory
from conftest import refused
from errors import UserError
from models import checkpoint_gradients, choose_attention, create_model, describe, normalization, parse_options
from models.weights import classifier_keys
from optim import create_optimizer, param_groups

# ---- the hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of this test: what it was asked for; hub.answers: whether it answers, with 404 to everything."""
    from huggingface_hub import constants

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle(self):
            if server.answers:
                super().handle()
            else:  # the connection is closed without an answer
                server.asked.append("nothing")

        def do_HEAD(self):
            server.asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answers, server.cache = [], False, tmp_path / "hub"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(server.cache))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def test_a_hub_that_can_not_be_reached_is_asked_once(hub):
    with refused("timm/test_resnet", "could not be downloaded", "can't be reached", "--weights FILE"):
        create_model("timm/test_resnet.r160_in1k", 10, pretrained=True)
    assert hub.asked == ["nothing"]


def test_a_hub_that_answers_is_asked_for_the_weights(hub):
    hub.answers = True
    with refused("timm/test_resnet", "could not be downloaded", "--weights FILE"):
        create_model("timm/test_resnet.r160_in1k", 10, pretrained=True)
    assert any("timm/test_resnet.r160_in1k" in path for path in hub.asked)


def test_weights_in_the_cache_need_no_hub(hub):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    published = create_model("timm/test_resnet.r160_in1k", 1000)
    place = hub.cache / "models--timm--test_resnet.r160_in1k"
    (place / "snapshots" / "0a").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0a")
    save_file(published.state_dict(), place / "snapshots" / "0a" / "model.safetensors")
    model = create_model("timm/test_resnet.r160_in1k", 10, pretrained=True)
    for name, value in published.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(model.state_dict()[name], value), name
