"""Whatever stands in a file or on the command line: it is read, or refused in one line. The draws are the same each time."""

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
from training import experiment, run_directory

FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PARSER = train.build_parser
OPTIONS = sorted(
    {option for action in PARSER()._actions for option in action.option_strings} - {"-h", "--help"}
)
NAMES = [option.removeprefix("--").replace("-", "_") for option in OPTIONS]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "resnet20"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def refuses_in_one_line(function, *arguments):
    """What a function returns, or None where it raises a UserError of one line, or argparse ends it with one."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return function(*arguments)
    except UserError as error:
        assert error.status in (1, 2) and "\n" not in str(error) and str(error)
    except SystemExit as error:
        assert error.code == 2 and len(said.getvalue().splitlines()) == 1
    return None


def mutations(raw):
    """bytes like `raw`: with some replaced, cut out, put in, or the end left out."""
    place = st.integers(0, len(raw) - 1)
    edit = st.tuples(place, st.integers(0, 9), st.binary(max_size=9))

    def apply(edits, end):
        out = bytearray(raw[: len(raw) - end])
        for at, length, new in edits:
            out[at : at + length] = new
        return bytes(out)

    return st.builds(
        apply,
        st.lists(edit, min_size=1, max_size=4),
        st.sampled_from([0, 0, 0, 1, 7, len(raw) // 2]),
    )


# ---- command line and config.json ------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    [
        *OPTIONS,
        "0",
        "1",
        "-1",
        "1e999",
        "nan",
        "0x1",
        "9" * 5000,
        "none",
        "crop,flip",
        "auto",
        "adam",
        "",
        "timm/x",
        "models",
        "é\n",
        "=",
        "--",
        "-",
        "--lr=",
        "--epochs=2",
    ]
) | st.text(max_size=6)


@FUZZ
@given(st.lists(WORDS, max_size=6))
def test_command_lines(words):
    found = refuses_in_one_line(
        lambda: experiment.resolve_arguments(PARSER(), [w.replace("\0", "") for w in words])
    )
    if found:
        args, origin, state = found
        assert (
            isinstance(args, argparse.Namespace)
            and set(origin) == set(vars(args))
            and state is None
        )


CONFIG = st.dictionaries(st.sampled_from([*NAMES, "other"]), JSON, max_size=5)


@FUZZ
@given(
    JSON
    | CONFIG
    | st.builds(
        lambda arguments, origin: {"arguments": arguments, "from": origin}, CONFIG, CONFIG | JSON
    )
)
def test_config_json(tmp_path, value):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(value))

    def read():
        args, _, _ = experiment.resolve_arguments(PARSER(), ["--config", str(path)])
        models.parse_options(args.model_arg, args.model, args.image_size, args.drop_path)
        return args

    args = refuses_in_one_line(read)
    if args:
        assert (
            args.epochs >= 1
            and args.batch_size >= 1
            and args.lr >= 0
            and isinstance(args.model, str)
        )


@FUZZ
@given(
    st.binary(max_size=60)
    | mutations(b'{"arguments": {"lr": 0.1, "model": "resnet20"}, "from": {"lr": "config"}}')
    | st.sampled_from([b"[" * 20_000, b'{"epochs": ' + b"9" * 5000 + b"}"])
)
def test_bytes_as_config_json(tmp_path, raw):
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    refuses_in_one_line(experiment.arguments, PARSER(), ["--config", str(path)])


# ---- metrics.csv -----------------------------------------------------------------------------------------------------

TABLE = b"epoch,step,lr,train_loss,val_acc\n1,3,0.1,2.5,10\n2,6,0.1,2.25,20\n"


@FUZZ
@given(
    st.binary(max_size=80)
    | mutations(TABLE)
    | st.sampled_from([TABLE.replace(b"\n2", b"\n" + b"2" * 5000)])
)
def test_metrics_csv(tmp_path, raw):
    path = tmp_path / "metrics.csv"
    path.write_bytes(raw)
    rows = refuses_in_one_line(metrics.read_metrics, path)
    assert rows is None or all(int(row["epoch"]) >= 0 for row in rows)
    refuses_in_one_line(lambda: metrics.Run(path).figures)
    with contextlib.closing(run_directory.RunDir(tmp_path)) as run:

        def go_on():
            run.keep_rows(2)
            run.log({"epoch": 3, "step": 9, "train_loss": 2.0, "val_acc": 30.0})
            return run.rows()

        found = refuses_in_one_line(go_on)
    assert found is None or [int(row["epoch"]) for row in found] == [1, 2, 3]


# ---- checkpoints and archives ----------------------------------------------------------------------------------------


@cache
def saved():
    file = io.BytesIO()
    contents = {"state_dict": {"w": torch.arange(4.0)}, "card": {"model": "resnet20"}}
    torch.save({"format": 1, "digest": checkpoint.digest(contents), "contents": contents}, file)
    return file.getvalue()


FOREIGN = st.one_of(
    JSON,
    st.sampled_from(
        [torch.ones(2), torch.ones(2, 2).to_sparse(), torch.float32, torch.device("cpu")]
    ),
)


@FUZZ
@given(st.data())
def test_checkpoints(tmp_path, data):
    path = tmp_path / "a.pt"
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(mutations(saved())))
    else:
        kinds = {"format": st.just(1) | FOREIGN, "digest": FOREIGN, "contents": FOREIGN}
        torch.save({key: data.draw(kind) for key, kind in kinds.items()}, path)
    found = refuses_in_one_line(checkpoint.load, path)
    assert found is None or checkpoint.digest(found) == checkpoint.digest(checkpoint.load(path))


@cache
def members():
    contents = archive_contents("cifar10")
    return {name: pickled(contents[name]) for name in ("batches.meta", "test_batch")}, contents


@FUZZ
@given(st.data())
def test_archives(tmp_path, data):
    """Where the digest fits: of a member, of the tar and of the file that it is packed in."""
    raw, contents = members()
    archive, path = archives.ARCHIVES["cifar10"], tmp_path / archives.ARCHIVES["cifar10"].file
    what = data.draw(st.sampled_from(["batches.meta", "test_batch", "tar", "gz"]))
    changed = {what: data.draw(mutations(raw[what]))} if what in raw else {}
    write_archive(path, archive.folder, contents | changed)
    if what == "tar":
        path.write_bytes(
            gzip.compress(data.draw(mutations(gzip.decompress(path.read_bytes())[:4096])), 1)
        )
    elif what == "gz":
        path.write_bytes(data.draw(mutations(path.read_bytes())))
    with pytest.MonkeyPatch.context() as patch:
        publish(patch, "cifar10", path.read_bytes())
        split = refuses_in_one_line(archives.load_archive, "cifar10", tmp_path, None)
    assert split is None or (
        split.train.images.dtype == torch.uint8 and int(split.test.labels.max()) < 10
    )
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
