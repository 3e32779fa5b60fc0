"""A checkpoint is the old or the new file; damaged and hostile files are refused, run nothing."""

import os
import pickle
import random
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from helpers.hostile import Hostile
from helpers.paths import ROOT

from common import checkpoint, files
from common.errors import UserError
from models.weights import read_weights

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
STATE = {
    "weights": WEIGHTS,
    "step": 7,
    "names": ["x", "y"],
    "none": None,
    "nested": ({"t": torch.tensor(3)}, 0.25),
}


@pytest.fixture
def path(tmp_path):
    """a.pt with STATE, alone in its directory."""
    checkpoint.save(STATE, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_a_saved_state_is_loaded(path):
    loaded = checkpoint.load(path)
    assert checkpoint.digest(loaded) == checkpoint.digest(STATE)
    assert torch.equal(loaded["weights"]["b"], WEIGHTS["b"]) and loaded["nested"][1] == 0.25
    assert os.listdir(path.parent) == ["a.pt"]


def test_a_view_is_saved_without_its_storage(path):
    checkpoint.save({"row": torch.zeros(1000, 1000)[0]}, path)
    assert path.stat().st_size < 20_000


def test_the_digest_depends_on_values_types_and_shapes():
    a = WEIGHTS["a"]
    changed = [
        STATE | {"step": 8},
        STATE | {"step": 7.0},
        STATE | {"names": ("x", "y")},
        STATE | {"weights": WEIGHTS | {"a": a.view(3, 2)}},
        STATE | {"weights": WEIGHTS | {"a": a.double()}},
        STATE | {"more": 1},
    ]
    assert len({checkpoint.digest(state) for state in [STATE, *changed]}) == 1 + len(changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_the_digest_does_not_depend_on_the_layout(dtype):
    tensor = torch.arange(120).view(2, 3, 4, 5).to(dtype)
    channels_last = tensor.contiguous(memory_format=torch.channels_last)
    assert checkpoint.digest(channels_last) == checkpoint.digest(tensor)


THREADS_OF_A_SAVE = """
import os, threading, torch
from common import checkpoint

def threads():
    return len(os.listdir("/proc/self/task"))

def save():
    before = threads()
    checkpoint.save({"weight": weight}, "a.pt")
    print(threads() - before)

weight = torch.ones(64, 64, 3, 3).contiguous(memory_format=torch.channels_last) + 1
assert threads() > 1 and torch.get_num_threads() == 2  # that operation was parallel
thread = threading.Thread(target=save)
thread.start()
thread.join()
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux")
def test_a_thread_that_saves_starts_no_others(tmp_path):
    """They would make the threads that train sleep at each wait, see checkpoint._bytes."""
    env = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", THREADS_OF_A_SAVE]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.stdout == "0\n", result.stderr


@pytest.mark.parametrize("keep", [0.0, 0.0005, 0.03, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_refused(path, keep):
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep)])
    with pytest.raises(UserError, match="a.pt"):
        checkpoint.load(path)


def test_a_flipped_bit_is_noticed(path):
    """Anywhere in the file, unless it belongs to the padding between records."""
    raw, noticed = path.read_bytes(), 0
    for position in range(0, len(raw), 61):
        damaged = bytearray(raw)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            assert checkpoint.digest(checkpoint.load(path)) == checkpoint.digest(STATE)
        except UserError:
            noticed += 1
    assert noticed > 5


def test_a_flipped_bit_in_the_weights_changes_the_digest(path):
    weights = torch.full((5000,), 1.5)
    checkpoint.save({"w": weights}, path)
    raw = bytearray(path.read_bytes())
    at = raw.find(weights.numpy().tobytes()[:400])
    assert at > 0
    raw[at + 101] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="digest|damaged"):
        checkpoint.load(path)


MEASURE_SAVES = """
import sys
import torch
from training import devices, run_directory
channels_last = dict(memory_format=torch.channels_last)
state = {str(i): torch.randn(64, 64, 16, 16).contiguous(**channels_last) for i in range(96)}
run, peaks = run_directory.RunDir.create(sys.argv[1], {}), []
for contents in ({"w": torch.zeros(9)}, state, state):
    run.end_epoch({"epoch": 1, "step": 1}, contents)
    run.wait()
    peaks.append(devices.peak_memory_mb(torch.device("cpu")))
size = sum(value.nbytes for value in state.values())
print(*((peak - peaks[0]) * 2**20 / size for peak in peaks[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak may be that of the parent process")
def test_a_save_takes_the_memory_of_the_state_once(tmp_path):
    """384 MiB, in a process of its own, whose peak has not been higher."""
    command = [sys.executable, "-c", MEASURE_SAVES, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(0.9 < float(peak) <= 1.2 for peak in done.stdout.split())


@pytest.mark.parametrize("kind", ["torch", "pickle", "inside"])
def test_a_hostile_file_is_refused_and_runs_nothing(path, kind):
    created = path.parent / "created"
    bad = Hostile(created)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(bad))
    else:
        inside = {"format": 1, "digest": "", "contents": {"x": bad}}
        torch.save(inside if kind == "inside" else bad, path)
    with pytest.raises(UserError, match="a.pt"):
        checkpoint.load(path)
    assert not created.exists()


FOREIGN = {
    "empty": b"",
    "csv": b"epoch,step\n1,2\n",
    "pickle": b"\x80\x04N.",
    "zip": b"PK\x03\x04 nothing",
    "noise": random.Random(0).randbytes(2000),
}


@pytest.mark.parametrize("contents", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_refused(path, contents):
    path.write_bytes(contents)
    with pytest.raises(UserError, match="a.pt is truncated, damaged or not a checkpoint"):
        checkpoint.load(path)


def test_missing_files_and_other_formats_are_named(path):
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.load(path.with_name("none.pt"))
    other = {"format": 99, "digest": "", "contents": {}}
    for state, message in ((other, "format 99"), ({"w": 0}, "not a checkpoint of this program")):
        torch.save(state, path)
        with pytest.raises(UserError, match=message):
            checkpoint.load(path)


@pytest.mark.parametrize("broken", ["torch.save", "os.fsync", "os.replace", "torch.load"])
def test_a_failed_save_keeps_the_old_file(path, monkeypatch, broken):
    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(broken, fail)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save({**STATE, "step": 8}, path)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["a.pt"]


@pytest.mark.parametrize("works", [True, False])
def test_the_cache_of_the_disk_is_emptied_where_fsync_does_not(path, monkeypatch, works):
    """On macOS, if the file system can."""
    asked, synced = [], []

    def fcntl(descriptor, command):
        asked.append(command)
        if not works:
            raise OSError(45, "Operation not supported")

    monkeypatch.setattr(files, "fcntl", SimpleNamespace(F_FULLFSYNC=51, fcntl=fcntl))
    monkeypatch.setattr(os, "fsync", synced.append)
    checkpoint.save({**STATE, "step": 8}, path)
    assert asked == [51, 51] and len(synced) == (0 if works else 2)  # the file and its directory


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_a_file_that_reads_back_differently_is_not_renamed(path, monkeypatch, at):
    def save_on_a_bad_disk(state, file, save=torch.save):
        save(state, file)
        file.flush()
        (written,) = path.parent.glob(".a.pt.*.tmp")
        raw = bytearray(written.read_bytes())
        raw[int(at * len(raw))] ^= 1
        written.write_bytes(raw)

    monkeypatch.setattr("torch.save", save_on_a_bad_disk)
    with pytest.raises(UserError, match="reads back differently"):
        checkpoint.save({**STATE, "step": 8}, path)
    assert checkpoint.load(path)["step"] == 7 and os.listdir(path.parent) == ["a.pt"]


def test_a_state_that_could_not_be_loaded_is_not_saved(path):
    message = "could not be written .*more than tensors and plain values"
    with pytest.raises(UserError, match=message):
        checkpoint.save({**STATE, "path": path}, path)
    assert checkpoint.load(path)["step"] == 7


HOSTILE_WEIGHTS = {
    "4 TB in one element": lambda: torch.zeros(1).expand(10**6, 10**6),
    "no elements": lambda: torch.empty(16, 3, 3, 3, device="meta"),
    "sparse": lambda: torch.eye(9).to_sparse(),
}


@pytest.mark.parametrize("kind", HOSTILE_WEIGHTS)
def test_tensors_without_their_elements_are_refused(path, kind):
    torch.save({"stem.0.weight": HOSTILE_WEIGHTS[kind](), "fc.bias": torch.zeros(10)}, path)
    with pytest.raises(UserError, match=r"a\.pt was refused: .*elements"):
        read_weights(path)


def test_adapters_of_another_program_are_refused(path):
    layer = "blocks.0.mlp.fc1.base_layer.weight"  # adapters have a scale, which isn't in the file
    torch.save({layer: torch.zeros(4, 4)}, path)
    with pytest.raises(UserError, match=r"a\.pt holds adapters of another program"):
        read_weights(path)


def test_tensors_without_their_elements_are_refused_before_they_are_copied(path, monkeypatch):
    weights = {"w": torch.zeros(1).expand(10**5, 10**5)}
    torch.save({"format": 1, "digest": "", "contents": weights}, path)
    monkeypatch.setattr(checkpoint, "_bytes", lambda tensor: pytest.fail("copied"))
    with pytest.raises(UserError, match=r"a\.pt is damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize("mean", [0.5, "abc", [0.5, 0.5], [0.5, 0.5, float("nan")], None])
def test_statistics_that_are_no_three_numbers_are_not_used(path, mean):
    card = {"model": "resnet20", "mean": mean, "std": [0.2, 0.2, 0.2]}
    contents = {"state_dict": {"fc.bias": torch.zeros(10)}, "card": card}
    checkpoint.save(contents, path)
    assert read_weights(path)[1] is None
    card["mean"] = [0.5, 0.5, 0.5]
    checkpoint.save(contents, path)
    assert read_weights(path)[1] == card


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(path):
    bomb = path.with_name("bomb.pt")
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for record in plain.infolist():
            zeros = record.filename.endswith("data/0")
            packed.writestr(record.filename, bytes(10**8) if zeros else plain.read(record))
    assert bomb.stat().st_size < 10**6
    with pytest.raises(UserError, match="bomb.pt was refused: it claims to hold more than its"):
        checkpoint.load_untrusted(bomb)
