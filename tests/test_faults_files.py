"""Files from elsewhere: of other kinds of training and other versions, hostile ones, those that several processes want."""

import shutil

import pytest
import torch
from conftest import TINY
from processes import note_loaded, train_as
from test_faults import go_on
from test_folder import folder  # noqa: F401
from test_sources import Server, cifar, publish  # noqa: F401
from test_train import rows

import checkpoint

# ---- checkpoints of one kind of training in another -------------------------------------------------------------------

KINDS = ("plain", "compiled", "DDP")
SMALL = (
    *TINY, "--device", "cpu", "--model", "vit_custom", "--model-arg", "width=24", "--model-arg", "depth=1", "--model-arg",
    "heads=2", "--amp", "off", "--schedule", "constant", "--warmup-epochs", 0, "--lr", 1e-3, "--ema-decay", 0.8,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("writer", KINDS)
def test_a_checkpoint_of_each_kind_goes_on_as_each(forks, tmp_path, writer):
    whole, written = tmp_path / "whole", tmp_path / "written"
    assert forks.run(*SMALL, "--epochs", 2, "--output-dir", whole).returncode == 0
    compiling = ["--compile"] * (writer == "compiled")
    done = forks.run(*SMALL, *compiling, "--epochs", 1, "--output-dir", written, faults=[train_as(writer)])
    assert done.returncode == 0, done.err
    state = checkpoint.load(written / "last.pt")
    expected = checkpoint.digest({"weights": state["state_dict"], "average": state["ema"]["average"]})
    assert not any(part in key for key in state["state_dict"] for part in ("module.", "_orig_mod"))
    for reader in KINDS:
        copy, note = shutil.copytree(written, tmp_path / reader), tmp_path / f"{reader}.txt"
        compiling = ["--compile"] * (reader == "compiled")
        go_on(forks, copy, "--epochs", 2, *compiling, faults=[train_as(reader), note_loaded(note)])
        assert note.read_text() == expected
        ours, theirs = (checkpoint.load(directory / "last.pt") for directory in (copy, whole))
        assert list(ours["state_dict"]) == list(theirs["state_dict"])
        for kind in (lambda state: state["state_dict"], lambda state: state["ema"]["average"]):
            for key, value in kind(theirs).items():
                torch.testing.assert_close(kind(ours)[key], value, rtol=1e-4, atol=1e-5, msg=key)
        assert [row["epoch"] for row in rows(copy)] == ["1", "2"]
