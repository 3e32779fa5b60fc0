"""train_vit.py from start to end on tiny data: from scratch, from weights, frozen backbones."""

import functools

import pytest
import torch
from helpers.errors import refused
from helpers.runs import VIT, last, read_json, rows, same, words

import data
import models
import train_vit
from common import checkpoint
from common.scopes import flag
from datasets.pipeline import Pipeline
from models.weights import load_checkpoint, load_weights
from training import linear_probe

OPTIONS = dict(width=24, depth=2, heads=2)


@pytest.fixture
def train_small(train):
    return functools.partial(train, *VIT, script=train_vit)


@pytest.fixture
def weights(tmp_path):
    """A file of weights of the small transformer with seven classes."""
    torch.manual_seed(5)
    path = tmp_path / "weights.pt"
    torch.save(models.create_model("vit_custom", 7, **OPTIONS).state_dict(), path)
    return path


# ---- from scratch and from weights ---------------------------------------------------------------


@pytest.mark.slow
def test_the_recipe_for_small_data_trains(train_small):
    options = "--epochs 1 --repeated-augment 2 --model-arg spt=True --model-arg lsa=True"
    directory = train_small(*words(options))
    config = read_json(directory / "config.json")
    for name in ("optimizer", "lr", "weight_decay", "random_erasing", "augment"):
        assert config["arguments"][name] == train_vit.RECIPE[name]
        assert config["from"][name] == "recipe"
    model, card = load_checkpoint(directory / "best.pt")
    assert card["options"] == OPTIONS | dict(spt=True, lsa=True, image_size=32)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.slow
def test_weights_of_a_file_train_as_the_same_weights_in_memory(train_small, weights, monkeypatch):
    """The classifier starts alike, too: it is drawn with the model, before the file is read."""
    from_file = train_small(*words("--epochs 1 --layer-decay 0.7 --weights"), weights, output="f")
    loaded = {k: v for k, v in torch.load(weights).items() if not k.startswith("head")}
    create = models.create_model

    def create_with_weights(name, num_classes=10, **options):
        model = create(name, num_classes, **options)
        if model.head.weight.device.type != "meta":
            model.load_state_dict(model.state_dict() | loaded)
        return model

    monkeypatch.setattr(models, "create_model", create_with_weights)
    changed = dict(layer_decay=0.7, random_erasing=0, epochs=1, batch_size=32)
    recipe = models.recipe("vit_custom", True, False) | changed
    options = [f"{flag(name)}={value}" for name, value in recipe.items()]
    in_memory = train_small(*options, output="memory")
    assert same(last(from_file)["state_dict"], last(in_memory)["state_dict"])
    assert rows(from_file) == rows(in_memory)
    first_lines = [(run / "log.txt").read_text().split("\n")[0] for run in (from_file, in_memory)]
    assert ["vit_custom from scratch" in line for line in first_lines] == [False, True]


@pytest.mark.slow
def test_weights_of_a_run_bring_their_mean_and_deviation(train_small, train):
    first = train_small("--epochs", 1, output="first")
    contents = checkpoint.load(first / "best.pt")
    contents["card"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    checkpoint.save(contents, first / "best.pt")
    second = train_small(
        "--epochs", 2, "--weights", first / "best.pt", output="second", stop_after=1
    )
    assert last(second)["card"]["mean"] == [0.1, 0.2, 0.3]
    train("--resume", second, script=train_vit)
    assert last(second)["card"]["std"] == [0.4, 0.5, 0.6]


# ---- frozen backbone -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vit_custom", "vit_tiny", "tinyvit_5m", "nfnet_f0", "timm/resnet18", "convnext_tiny"]
)
def test_a_classifier_on_features_is_the_frozen_forward_pass(name, few_shapes):
    torch.manual_seed(0)
    model = models.create_model(name, 10, **models.parse_options([], name, 32))
    probe = linear_probe.Probe(model).eval()
    pipeline = Pipeline((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 32)
    batches = data.Batches(few_shapes.test.take(torch.arange(12)), 5, pipeline, shuffle=False)
    examples = linear_probe.features(probe, batches)
    with torch.no_grad():
        for start, (inputs, labels) in zip(range(0, 12, 5), batches):
            assert torch.equal(examples.labels[start : start + 5], labels)
            assert torch.equal(probe(examples.images[start : start + 5]), model(inputs))
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in model.get_classifier().parameters()}


@pytest.mark.slow
def test_only_the_classifier_of_a_frozen_backbone_changes(train_small, weights):
    directory = train_small("--epochs", 3, "--weights", weights, "--freeze-backbone")
    source = models.create_model("vit_custom", 10, **OPTIONS)
    load_weights(source, weights)
    trained = load_checkpoint(directory / "best.pt")[0].state_dict()
    for key, value in source.state_dict().items():
        assert torch.equal(value, trained[key]) != key.startswith("head."), key


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--image-size 30", "image_size 30, patch_size 4: the first must be"),
        ("--pretrained", "vit_custom has no published weights"),
        ("--model-arg head=2", "vit_custom has no option 'head'"),
        ("--weights WEIGHTS --freeze-backbone --augment flip", "add --augment none"),
        ("--weights WEIGHTS --model-arg width=48", "another model"),
        ("--weights CUT", "cut.pt"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(train_small, weights, tmp_path, options, message):
    (tmp_path / "cut.pt").write_bytes(weights.read_bytes()[:5000])
    options = options.replace("WEIGHTS", str(weights)).replace("CUT", str(tmp_path / "cut.pt"))
    with refused("", message):
        train_small(*words(options))
    assert not (tmp_path / "run").exists()
