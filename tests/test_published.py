"""timm's networks: all its families, and the hub that their weights come from."""

import http.server
import threading

import pytest
import torch
from helpers.errors import refused
from packaging.version import Version

from common.errors import UserError
from models import (
    checkpoint_gradients,
    choose_attention,
    create_model,
    describe,
    normalization,
    parse_options,
)
from models.weights import classifier_keys
from training import linear_probe, loop
from training.optimizers import build_optimizer, param_groups
from training.state import State

RESNET = "timm/test_resnet.r160_in1k"


# ---- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub. requests: what it was asked for; answers: whether it answers, always 404;
    silent: whether it keeps a connection open without an answer."""
    from huggingface_hub import constants

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle(self):
            if server.answers:
                super().handle()
            elif server.silent:
                server.requests.append("held")
                server.closed.wait(60)
                server.requests.append("released")
            else:  # the connection is closed without an answer
                server.requests.append("refused")

        def do_HEAD(self):
            server.requests.append(self.path)
            self.send_response(404)
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.answers, server.cache = [], False, tmp_path / "hub"
    server.silent, server.closed = False, threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(server.cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.closed.set()
    server.shutdown()
    server.server_close()


def test_hub_that_can_not_be_reached_is_asked_once(hub):
    message = ("timm/test_resnet", "could not be downloaded", "can't be reached", "--weights FILE")
    with refused(*message):
        create_model(RESNET, 10, pretrained=True)
    assert hub.requests == ["refused"]


def test_hub_that_is_silent_is_given_up(hub, monkeypatch):
    hub.silent = True
    monkeypatch.setattr("models.published.HUB_TIMEOUT", 1)
    with refused("timm/test_resnet", "could not be downloaded", "can't be reached"):
        create_model(RESNET, 10, pretrained=True)
    assert hub.requests == ["held"]


def test_hub_that_answers_is_asked_for_the_weights(hub):
    hub.answers = True
    with refused("timm/test_resnet", "could not be downloaded", "--weights FILE"):
        create_model(RESNET, 10, pretrained=True)
    assert any(RESNET in path for path in hub.requests)


def test_cached_weights_need_no_hub(hub):
    from safetensors.torch import save_file

    published = create_model(RESNET, 1000).state_dict()
    repository = hub.cache / "models--timm--test_resnet.r160_in1k"
    (repository / "snapshots" / "0a").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0a")
    save_file(published, repository / "snapshots" / "0a" / "model.safetensors")
    hub.shutdown()
    hub.server_close()
    state = create_model(RESNET, 10, pretrained=True).state_dict()
    for name in published.keys() - {"fc.weight", "fc.bias"}:
        assert torch.equal(state[name], published[name]), name


# ---- all families --------------------------------------------------------------------------------

VIT = "depth=2 embed_dim=96 num_heads=6"
# Of each of timm.list_modules(): its model with the fewest parameters, an image size that it takes,
# and options that shrink it where it is large. A new family of timm's must be added here.
# fmt: off
FAMILIES = {
    "beit": ("beit_base_patch16_224", 32, VIT), "byoanet": ("halonet_h1", 256, ""),
    "byobnet": ("test_byobnet", 32, ""), "cait": ("cait_xxs24_224", 32, VIT),
    "coat": ("coat_tiny", 32, ""), "convit": ("convit_tiny", 32, VIT),
    "convmixer": ("convmixer_768_32", 32, ""), "convnext": ("test_convnext", 32, ""),
    "cpubone": ("cpubone_nano", 32, ""), "crossvit": ("crossvit_tiny_240", 240, ""),
    "csatv2": ("csatv2", 64, ""), "cspnet": ("cs3darknet_focus_s", 32, ""),
    "cspnext": ("cspnext_tiny", 32, ""), "davit": ("davit_tiny", 32, "depths=(1,1,1,1)"),
    "deepseek_vit": ("deepseek_vit_412m", 56, VIT),
    "deit": ("deit_tiny_patch16_224", 32, "depth=2"),
    "densenet": ("densenet121", 32, "block_config=(1,1,1,1)"), "dla": ("dla46x_c", 32, ""),
    "dpn": ("dpn48b", 32, ""), "edgenext": ("edgenext_xx_small", 32, ""),
    "efficientformer": ("efficientformer_l1", 224, ""),
    "efficientformer_v2": ("efficientformerv2_s0", 32, ""),
    "efficientnet": ("test_efficientnet", 32, ""), "efficientvim": ("efficientvim_m1", 64, ""),
    "efficientvit_mit": ("efficientvit_b0", 32, ""),
    "efficientvit_msra": ("efficientvit_m0", 32, ""),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 32, "depth=2"), "fasternet": ("fasternet_t0", 32, ""),
    "fastvit": ("fastvit_t8", 32, ""), "focalnet": ("focalnet_tiny_srf", 32, ""),
    "gcvit": ("gcvit_xxtiny", 64, ""), "gemma4_vit": ("gemma4_vit_167m_enc", 48, VIT),
    "ghostnet": ("ghostnet_050", 32, ""), "hardcorenas": ("hardcorenas_b", 32, ""),
    "hgnet": ("hgnetv2_b0", 32, ""), "hiera": ("hiera_tiny_224", 32, "stages=(1,1,1,1)"),
    "hieradet_sam2": ("sam2_hiera_tiny", 32, "stages=(1,1,1,1)"),
    "hrnet": ("hrnet_w18_small", 32, ""), "iformer": ("iformer_t", 32, ""),
    "inception_next": ("inception_next_atto", 32, ""),
    "inception_resnet_v2": ("inception_resnet_v2", 96, ""),
    "inception_v3": ("inception_v3", 96, ""), "inception_v4": ("inception_v4", 96, ""),
    "lcnetv2": ("lcnetv2_small", 32, ""), "levit": ("levit_128s", 32, ""),
    "lowformer": ("lowformer_b0", 32, ""), "mambaout": ("test_mambaout", 32, ""),
    "maxxvit": ("test_coatnet", 32, ""), "metaformer": ("poolformerv2_s12", 32, ""),
    "mlp_mixer": ("gmlp_ti16_224", 32, ""), "mobilenetv3": ("lcnet_035", 32, ""),
    "mobilenetv5": ("mobilenetv5_base", 32, ""), "mobilevit": ("mobilevit_xxs", 32, ""),
    "mvitv2": ("mvitv2_tiny", 64, ""), "naflexvit": ("naflexvit_base_patch16_parfac_gap", 32, VIT),
    "nasnet": ("nasnetalarge", 32, ""), "nest": ("nest_tiny", 64, ""),
    "nextvit": ("nextvit_small", 32, ""), "nfnet": ("test_nfnet", 32, ""),
    "pit": ("pit_ti_224", 32, ""), "pnasnet": ("pnasnet5large", 32, ""),
    "pvt_v2": ("pvt_v2_b0", 32, "depths=(1,1,1,1)"), "qwen3_vit": ("qwen3_vit_88m", 32, VIT),
    "rdnet": ("rdnet_tiny", 32, ""), "regnet": ("regnetx_002", 32, ""),
    "repghost": ("repghostnet_050", 32, ""), "repvit": ("repvit_m1", 32, ""),
    "res2net": ("res2next50", 32, "layers=(1,1,1,1)"),
    "resnest": ("resnest14d", 32, "layers=(1,1,1,1)"), "resnet": ("test_resnet", 32, ""),
    "resnetv2": ("resnetv2_18", 32, "layers=(1,1,1,1)"), "rexnet": ("rexnet_100", 32, ""),
    "selecsls": ("selecsls42", 32, ""), "senet": ("legacy_seresnet18", 32, "layers=(1,1,1,1)"),
    "sequencer": ("sequencer2d_s", 32, "layers=(1,1,1,1)"), "shvit": ("shvit_s1", 32, ""),
    "sknet": ("skresnet18", 32, "layers=(1,1,1,1)"), "starnet": ("starnet_s050", 32, ""),
    "swiftformer": ("swiftformer_xs", 32, ""),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 32, "depths=(1,1,1,1)"),
    "swin_transformer_v2": ("swinv2_tiny_window16_256", 32, "depths=(1,1,1,1)"),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 32, "depths=(1,1,1,1)"),
    "tiny_vit": ("tiny_vit_5m_224", 32, ""), "tnt": ("tnt_s_legacy_patch16_224", 32, "depth=2"),
    "tresnet": ("tresnet_m", 32, "layers=(1,1,1,1)"),
    "twins": ("twins_svt_small", 32, "depths=(1,1,1,1)"), "vgg": ("vgg11", 32, ""),
    "visformer": ("visformer_tiny", 32, ""), "vision_transformer": ("test_vit", 32, ""),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 32, "depth=2"),
    "vision_transformer_relpos": ("test_vit_relpos", 32, ""),
    "vision_transformer_sam": ("samvit_base_patch16_224", 32, VIT),
    "vitamin": ("vitamin_small_224", 32, ""), "volo": ("volo_d1_224", 64, ""),
    "vovnet": ("ese_vovnet19b_slim_dw", 32, ""), "xception": ("legacy_xception", 32, ""),
    "xception_aligned": ("xception41p", 32, ""), "xcit": ("xcit_nano_12_p8_224", 32, "depth=2"),
}
# fmt: on
NEWEST = Version("1.0.31")  # the version of timm that the table was made with
ENCODERS = ("gemma4_vit",)  # families without a classifier


def test_every_family_of_timm_is_listed():
    import timm

    missing = sorted(set(timm.list_modules()) - set(FAMILIES))
    if missing and Version(timm.__version__) > NEWEST:
        pytest.skip(f"families that are newer than the table: {', '.join(missing)}")
    assert missing == []


class TwoImages:
    """An epoch of one batch, see data.Batches."""

    batch_size = 2

    def __init__(self, size):
        self.inputs, self.labels = torch.randn(2, 3, size, size), torch.tensor([1, 7])

    def __iter__(self):
        yield self.inputs, self.labels

    def epoch(self, epoch, start=0):
        return iter(self)


def works_or_is_refused(function, *arguments):
    try:
        function(*arguments)
    except UserError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_timm_is_described_and_trains(family):
    import timm

    name, size, pairs = FAMILIES[family]
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    name, device = f"timm/{name}", torch.device("cpu")
    options = parse_options(pairs.split(), name, size)
    if family in ENCODERS:
        with refused(name, "is not a classifier"):
            describe(name, 10, size, options)
        return
    parameters, macs = describe(name, 10, size, options)
    torch.manual_seed(0)
    model = choose_attention(create_model(name, 10, **options), device, None)
    assert sum(p.numel() for p in model.parameters()) == parameters and macs > parameters / 100
    keys = classifier_keys(model)
    assert keys and [len(values) for values in normalization(model)] == [3, 3]
    works_or_is_refused(param_groups, model, 0.05, 0.75)
    before = {key: model.state_dict()[key].clone() for key in keys}
    optimizer = build_optimizer("sgd", param_groups(model, 0.05), 0.1)
    row = loop.train_epoch(
        State(model, optimizer), TwoImages(size), loop.StepSettings(lambda step: 0.1)
    )
    assert row["step"] == 1
    assert any(not torch.equal(before[key], model.state_dict()[key]) for key in keys)
    works_or_is_refused(checkpoint_gradients, model, name)


def with_random_norms(name):
    torch.manual_seed(0)
    model = create_model(name, 10, **parse_options([], name, 64))
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def test_probe_computes_the_logits_from_features():
    model, batches = with_random_norms("timm/test_resnet"), TwoImages(64)
    examples = linear_probe.features(linear_probe.Probe(model), batches)
    torch.testing.assert_close(model.fc(examples.images), model(batches.inputs))


# The classifier of dla46x_c is a convolution; that of efficientvit_m0 has a norm before it.
@pytest.mark.parametrize("name", ["timm/levit_128s", "timm/dla46x_c", "timm/efficientvit_m0"])
def test_probe_needs_a_classifier_that_takes_features(name):
    message = "several classifiers" if "levit" in name else "needs more than its features"
    with refused("--freeze-backbone: ", message):
        linear_probe.features(linear_probe.Probe(with_random_norms(name)), TwoImages(64))
