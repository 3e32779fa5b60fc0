"""Any file and any command line is read, or refused in one line. The draws are always the same."""

import argparse
import contextlib
import gzip
import io
import json
from functools import cache

import pytest
import torch
from helpers.archives import archive_contents, pickled, publish, write_archive
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import models
import train
from analysis import metrics
from common import checkpoint
from common.errors import UserError
from datasets import archives
from training import arguments, run_directory

FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ACTIONS = train.build_parser()._actions
OPTIONS = sorted({text for a in ACTIONS if a.dest != "help" for text in a.option_strings})
NAMES = [option.removeprefix("--").replace("-", "_") for option in OPTIONS]
WORDS = ["auto", "none", "crop,flip", "adam", "timm/x", "models", "é\n", "", "=", "--", "-"]
NUMBERS = ["0", "1", "-1", "1e999", "nan", "0x1", "9" * 5000, "--lr=", "--epochs=2"]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["auto", "resnet20"]),
)
JSON = st.recursive(
    VALUES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def refuses_in_one_line(function, *arguments):
    """What a function returns, or None if a UserError or argparse ends it with one line."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return function(*arguments)
    except UserError as error:
        assert error.status in (1, 2) and "\n" not in str(error) and str(error)
    except SystemExit as error:
        assert error.code == 2 and len(stderr.getvalue().splitlines()) == 1
    return None


def mutations(raw):
    """bytes like `raw`, with some replaced, removed or inserted, or without the end."""
    edit = st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 9), st.binary(max_size=9))

    def apply(edits, end):
        out = bytearray(raw[: len(raw) - end])
        for at, length, new in edits:
            out[at : at + length] = new
        return bytes(out)

    edits = st.lists(edit, min_size=1, max_size=4)
    return st.builds(apply, edits, st.sampled_from([0, 0, 0, 1, 7, len(raw) // 2]))


# ---- command line and config.json ----------------------------------------------------------------


def resolve(*argv):
    return arguments.resolve(train.build_parser(), list(argv))


@FUZZ
@given(st.lists(st.sampled_from([*OPTIONS, *WORDS, *NUMBERS]) | st.text(max_size=6), max_size=6))
def test_command_lines(words):
    found = refuses_in_one_line(resolve, *(word.replace("\0", "") for word in words))
    if found:
        args, saved = found
        assert isinstance(args, argparse.Namespace) and saved is None
        assert {*args.origin, "origin"} == set(vars(args))


CONFIG = st.dictionaries(st.sampled_from([*NAMES, "other"]), JSON, max_size=5)
OF_RUN = st.fixed_dictionaries({"arguments": CONFIG, "from": CONFIG | JSON})


@FUZZ
@given(JSON | CONFIG | OF_RUN)
def test_config_json(tmp_path, value):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(value))

    def read():
        args, _ = resolve("--config", str(path))
        models.parse_options(args.model_arg, args.model, args.image_size, args.drop_path)
        return args

    args = refuses_in_one_line(read)
    if args:
        assert args.epochs >= 1 and args.batch_size >= 1 and args.lr >= 0
        assert isinstance(args.model, str)


CONFIG_BYTES = b'{"arguments": {"lr": 0.1, "model": "resnet20"}, "from": {"lr": "config"}}'
LARGE = st.sampled_from([b"[" * 20_000, b'{"epochs": ' + b"9" * 5000 + b"}"])


@FUZZ
@given(st.binary(max_size=60) | mutations(CONFIG_BYTES) | LARGE, st.sampled_from(["json", "yaml"]))
def test_bytes_as_a_config(tmp_path, raw, suffix):
    path = tmp_path / f"config.{suffix}"
    path.write_bytes(raw)
    refuses_in_one_line(resolve, "--config", str(path))


# ---- metrics.csv ---------------------------------------------------------------------------------

TABLE = b"epoch,step,lr,train_loss,val_acc\n1,3,0.1,2.5,10\n2,6,0.1,2.25,20\n"
LARGE_EPOCH = TABLE.replace(b"\n2", b"\n" + b"2" * 5000)


@FUZZ
@given(st.binary(max_size=80) | mutations(TABLE) | st.just(LARGE_EPOCH))
def test_metrics_csv(tmp_path, raw):
    path = tmp_path / "metrics.csv"
    path.write_bytes(raw)
    refuses_in_one_line(metrics.read_table, path)
    refuses_in_one_line(lambda: metrics.Run(path).scalars)
    with contextlib.closing(run_directory.RunDir(tmp_path)) as run:

        def resume():
            run.keep_rows(2)
            run.append_row({"epoch": 3, "step": 9, "train_loss": 2.0, "val_acc": 30.0})
            return run.rows()

        found = refuses_in_one_line(resume)
    assert found is None or [int(row["epoch"]) for row in found] == [1, 2, 3]


# ---- checkpoints and archives --------------------------------------------------------------------


@cache
def saved():
    file = io.BytesIO()
    contents = {"state_dict": {"w": torch.arange(4.0)}, "card": {"model": "resnet20"}}
    torch.save({"format": 1, "digest": checkpoint.digest(contents), "contents": contents}, file)
    return file.getvalue()


UNUSUAL = [torch.ones(2), torch.ones(2, 2).to_sparse(), torch.float32, torch.device("cpu")]


@FUZZ
@given(st.data())
def test_checkpoints(tmp_path, data):
    path = tmp_path / "a.pt"
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(mutations(saved())))
    else:
        foreign = JSON | st.sampled_from(UNUSUAL)
        kinds = {"format": st.just(1) | foreign, "digest": foreign, "contents": foreign}
        torch.save({key: data.draw(kind) for key, kind in kinds.items()}, path)
    found = refuses_in_one_line(checkpoint.load, path)
    assert found is None or checkpoint.digest(found) == checkpoint.load_untrusted(path)["digest"]


@cache
def members():
    contents = archive_contents("cifar10")
    return {name: pickled(contents[name]) for name in ("batches.meta", "test_batch")}, contents


@FUZZ
@given(st.data())
def test_archives(tmp_path, data):
    """With the right digest: damage in a member, in the tar file, and in the compressed file."""
    raw, contents = members()
    archive, path = archives.ARCHIVES["cifar10"], tmp_path / archives.ARCHIVES["cifar10"].file
    place = data.draw(st.sampled_from(["batches.meta", "test_batch", "tar", "gz"]))
    changed = {place: data.draw(mutations(raw[place]))} if place in raw else {}
    write_archive(path, archive.folder, contents | changed)
    if place == "tar":
        start = gzip.decompress(path.read_bytes())[:4096]
        path.write_bytes(gzip.compress(data.draw(mutations(start)), 1))
    elif place == "gz":
        path.write_bytes(data.draw(mutations(path.read_bytes())))
    with pytest.MonkeyPatch.context() as patch:
        publish(patch, "cifar10", path.read_bytes())
        split = refuses_in_one_line(archives.load_archive, "cifar10", tmp_path, None)
    if split is not None:
        assert split.train.images.dtype == torch.uint8 and int(split.test.labels.max()) < 10
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
