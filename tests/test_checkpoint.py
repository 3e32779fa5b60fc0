"""A file is the old one or the new one; damaged, foreign and hostile files are refused and run nothing."""

import os
import pickle
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from common import checkpoint
from common.errors import UserError

STATE = {
    "weights": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)},
    "step": 7,
    "names": ["x", "y"],
    "none": None,
    "nested": ({"t": torch.tensor(3)}, 0.25),
}


def test_what_is_saved_comes_back(tmp_path):
    checkpoint.save(STATE, tmp_path / "a.pt")
    back = checkpoint.load(tmp_path / "a.pt")
    assert checkpoint.digest(back) == checkpoint.digest(STATE)
    assert torch.equal(back["weights"]["b"], STATE["weights"]["b"]) and back["nested"][1] == 0.25
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_view_is_saved_without_its_base(tmp_path):
    checkpoint.save({"row": torch.zeros(1000, 1000)[0]}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 20_000


def test_the_digest_sees_every_change():
    base = checkpoint.digest(STATE)
    changed = [
        {**STATE, "step": 8},
        {**STATE, "step": 7.0},
        {**STATE, "names": ("x", "y")},
        {**STATE, "weights": {**STATE["weights"], "a": STATE["weights"]["a"].view(3, 2)}},
        {**STATE, "weights": {**STATE["weights"], "a": STATE["weights"]["a"].double()}},
        {**STATE, "more": 1},
    ]
    assert len({base, *map(checkpoint.digest, changed)}) == 1 + len(changed)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.3, 0.9, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "a.pt"
    checkpoint.save(STATE, path)
    whole = path.read_bytes()
    size = (
        int(len(whole) * keep)
        if isinstance(keep, float)
        else keep
        if keep >= 0
        else len(whole) + keep
    )
    path.write_bytes(whole[:size])
    with pytest.raises(UserError, match="a.pt"):
        checkpoint.load(path)


def test_a_flipped_bit_is_noticed(tmp_path):
    """Anywhere in the file: either it can't be read, or the digest of the contents differs, or the bit carries nothing."""
    path = tmp_path / "a.pt"
    checkpoint.save(STATE, path)
    whole = bytearray(path.read_bytes())
    wanted, noticed = checkpoint.digest(STATE), 0
    for position in range(0, len(whole), 61):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            assert checkpoint.digest(checkpoint.load(path)) == wanted  # padding between the records
        except UserError:
            noticed += 1
    assert noticed > 5


def test_a_flipped_bit_in_the_weights_is_found_by_the_digest(tmp_path):
    path = tmp_path / "a.pt"
    weights = torch.full((5000,), 1.5)
    checkpoint.save({"w": weights}, path)
    whole = bytearray(path.read_bytes())
    at = whole.find(weights.numpy().tobytes()[:400])
    assert at > 0
    whole[at + 101] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match="digest|damaged"):
        checkpoint.load(path)


def test_a_save_takes_the_memory_of_the_state_once(tmp_path):
    """In a process of its own, whose peak has seen nothing larger; of 384 MiB, beside the tens that go anyway."""
    code = f"""
import torch, engine, rundir
state = {{str(i): torch.randn(64, 64, 16, 16).contiguous(memory_format=torch.channels_last) for i in range(96)}}
run, peaks = rundir.RunDir.create({str(tmp_path / "run")!r}, {{}}), []
for contents in ({{"w": torch.zeros(9)}}, state, state):
    run.end_epoch({{"epoch": 1, "step": 1}}, contents)
    run.wait()
    peaks.append(engine.peak_memory_mb(torch.device("cpu")))
print(*((peak - peaks[0]) * 2**20 / sum(value.nbytes for value in state.values()) for peak in peaks[1:]))
"""
    if sys.platform != "linux":
        pytest.skip("elsewhere the peak may be that of the process that started this one")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(0.9 < float(peak) <= 1.2 for peak in done.stdout.split())


class Hostile:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return (os.mkdir, (str(self.sentinel),))


@pytest.mark.parametrize("kind", ["torch", "pickle", "inside"])
def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path, kind):
    path, sentinel = tmp_path / "bad.pt", tmp_path / "sentinel"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Hostile(sentinel)))
    else:
        bad = Hostile(sentinel)
        torch.save(
            {"format": 1, "digest": "", "contents": {"x": bad}} if kind == "inside" else bad, path
        )
    with pytest.raises(UserError, match="bad.pt"):
        checkpoint.load(path)
    assert not sentinel.exists()


FOREIGN = {
    "empty": b"",
    "csv": b"epoch,step\n1,2\n",
    "pickle": b"\x80\x04N.",
    "zip": b"PK\x03\x04 nothing",
    "noise": random.Random(0).randbytes(2000),
}


@pytest.mark.parametrize("contents", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_refused(tmp_path, contents):
    path = tmp_path / "a.pt"
    path.write_bytes(contents)
    with pytest.raises(UserError, match="a.pt"):
        checkpoint.load(path)


def test_a_missing_file_and_another_format_are_named(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.load(tmp_path / "none.pt")
    torch.save({"format": 99, "digest": "", "contents": {}}, tmp_path / "new.pt")
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load(tmp_path / "new.pt")
    torch.save({"w": torch.zeros(1)}, tmp_path / "plain.pt")
    with pytest.raises(UserError, match="not a checkpoint of this program"):
        checkpoint.load(tmp_path / "plain.pt")


@pytest.mark.parametrize("broken", ["save", "fsync", "replace", "verify"])
def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "a.pt"
    checkpoint.save(STATE, path)
    before = path.read_bytes()

    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    target = {
        "save": "torch.save",
        "fsync": "os.fsync",
        "replace": "os.replace",
        "verify": "torch.load",
    }[broken]
    monkeypatch.setattr(target, fail)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save({**STATE, "step": 8}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_a_file_that_reads_back_differently_is_not_renamed(tmp_path, monkeypatch, at):
    """A disk that turns one bit of what was written."""
    path, real = tmp_path / "a.pt", torch.save
    checkpoint.save(STATE, path)

    def bad_disk(state, file):
        real(state, file)
        file.flush()
        (written,) = tmp_path.glob(".a.pt.*.tmp")
        raw = bytearray(written.read_bytes())
        raw[int(at * len(raw))] ^= 1
        with open(written, "r+b") as other:
            other.write(raw)

    monkeypatch.setattr("torch.save", bad_disk)
    with pytest.raises(UserError, match="reads back differently"):
        checkpoint.save({**STATE, "step": 8}, path)
    assert checkpoint.load(path)["step"] == 7 and os.listdir(tmp_path) == ["a.pt"]


def test_a_state_that_could_not_be_loaded_is_not_saved(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(STATE, path)
    with pytest.raises(
        UserError, match="could not be written .*more than tensors and plain values"
    ):
        checkpoint.save({**STATE, "path": path}, path)
    assert checkpoint.load(path)["step"] == 7


HOSTILE_WEIGHTS = {
    "4 TB in one element": lambda: torch.zeros(1).expand(10**6, 10**6),
    "no elements": lambda: torch.empty(16, 3, 3, 3, device="meta"),
    "sparse": lambda: torch.eye(9).to_sparse(),
}


@pytest.mark.parametrize("kind", HOSTILE_WEIGHTS)
def test_tensors_that_claim_elements_are_refused_before_memory_is_asked_for(tmp_path, kind):
    from models.weights import read_weights

    torch.save(
        {"stem.0.weight": HOSTILE_WEIGHTS[kind](), "fc.bias": torch.zeros(10)},
        tmp_path / "weights.pt",
    )
    with pytest.raises(
        UserError, match=r"weights\.pt was refused: it holds tensors without elements of their own"
    ):
        read_weights(tmp_path / "weights.pt")


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path):
    import zipfile

    torch.save({"a": torch.zeros(10)}, tmp_path / "plain.pt")
    packed = zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, packed as bomb:
        for record in plain.infolist():
            content = bytes(10**8) if record.filename.endswith("data/0") else plain.read(record)
            bomb.writestr(record.filename, content)
    assert (tmp_path / "bomb.pt").stat().st_size < 10**6
    with pytest.raises(
        UserError, match="bomb.pt was refused: it claims to hold more than its size"
    ):
        checkpoint.load_untrusted(tmp_path / "bomb.pt")
