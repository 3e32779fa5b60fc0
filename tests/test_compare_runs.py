"""Any metrics.csv with an epoch and one loss or accuracy is compared; what can't be is named."""

import json

import pytest

import compare_runs
from errors import UserError

HEADER = "epoch,step,lr,train_loss,train_acc,test_loss,test_acc,epoch_seconds,images_per_second"


def write(directory, header=HEADER, rows=("1,10,0.1,2.0,20,1.8,30,5,100", "2,20,0.1,1.0,60,0.9,66.5,5,110"), **summary):
    directory.mkdir(exist_ok=True)
    (directory / "metrics.csv").write_text("\n".join([header, *rows, ""]))
    if summary:
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def cells(capsys):
    lines = capsys.readouterr().out.splitlines()
    return [line.split() for line in lines]


def test_a_table_and_a_picture_of_two_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", status="finished", test_acc=66.5, parameters=272474, gmacs=0.0408)
    write(tmp_path / "b", rows=("1,10,0.1,2.1,19,1.9,71,5,90", "2,20,0.1,1.1,58,1.0,,5,95"))
    assert compare_runs.main(["a", "b/metrics.csv"]) == 0
    header, first, second = cells(capsys)
    assert first[:4] == ["a", "finished", "2", "66.50"] and "272,474" in first
    assert second[:4] == ["b", "unfinished", "2", "71.00"]  # the last epoch was not evaluated
    picture = (tmp_path / "comparison.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_patterns_are_expanded_and_a_run_counts_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write(tmp_path / name)
    assert [str(p) for p in compare_runs.find_metrics(["*/metrics.csv", "a"])] == ["a/metrics.csv", "b/metrics.csv"]


def test_the_average_is_shown_where_there_is_one_and_held_out_before_test(tmp_path):
    run = write(tmp_path / "a", "epoch,val_acc,ema_val_acc,ema_val_loss", ["1,50,55,1.0"])
    found = compare_runs.Run(run / "metrics.csv")
    assert found.curve("eval_acc") == ((1,), (55.0,)) and found.row()["on"] == "held-out (ema)"


@pytest.mark.parametrize("header", ["test_acc,epoch", "epoch,train_loss", "epoch,other,val_loss"])
def test_missing_and_reordered_columns_are_no_trouble(tmp_path, capsys, header):
    values = {"epoch": "3", "test_acc": "44.25", "train_loss": "1.5", "val_loss": "0.5", "other": "x"}
    run = write(tmp_path / "a", header, [",".join(values[name] for name in header.split(","))])
    assert compare_runs.main([str(run), "--output", str(tmp_path / "x.svg")]) == 0
    assert cells(capsys)[1][2] == "3" and (tmp_path / "x.svg").read_text().lstrip().startswith("<?xml")


def test_a_torn_last_line_is_left_out(tmp_path):
    run = write(tmp_path / "a")
    with open(run / "metrics.csv", "a") as file:
        file.write("3,30,0.1,0.")
    assert compare_runs.Run(run / "metrics.csv").epochs == [1, 2]


def test_labels_at_the_ends_do_not_cover_each_other(tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots()
    axis.set_ylim(0, 100)
    compare_runs._label_ends(axis, [(50.0, 1, "k"), (50.1, 1, "k"), (49.9, 1, "k"), (10.0, 1, "k")], ".1f")
    heights = sorted(text.xy[1] for text in axis.texts)
    plt.close(figure)
    assert all(b - a >= 4.49 for a, b in zip(heights, heights[1:]))
    assert [text.get_text() for text in axis.texts] == ["10.0", "49.9", "50.0", "50.1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nothing"], "no metrics at nothing"), (["no*thing"], "no metrics"), (["empty"], "no finished epoch"),
     (["foreign"], "no column of a loss or an accuracy"), (["binary"], "can't be read|no finished epoch"),
     (["a", "--labels", "x", "y"], "2 names for 1 runs"), (["a", "--output", "no/where.png"], "--output"),
     (["a", "--output", "x.mp3"], "--output")],
)  # fmt: skip
def test_what_can_not_be_compared_is_named(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a")
    write(tmp_path / "empty", rows=())
    write(tmp_path / "foreign", "epoch,x", ["1,2"])
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "metrics.csv").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=message) as refused:
        compare_runs.main(arguments)
    assert "\n" not in str(refused.value)


def test_runs_of_one_experiment_are_a_row_with_mean_deviation_and_n_and_one_curve(tmp_path):
    a = write(tmp_path / "a", status="finished", test_acc=66.0, parameters=1234, gmacs=0.5)
    b = write(tmp_path / "b", rows=("1,10,0.1,2,22,1,34,5,9",), status="finished", test_acc=69.0, parameters=1234, gmacs=0.5)
    runs = [compare_runs.Run(path / "metrics.csv") for path in (a, b)]
    both, one = compare_runs.over_seeds({"both": runs, "one": runs[:1]})
    assert (both["n"], both["test %"], both["last train %"]) == ("2", "67.50 ± 2.12", "41.00 ± 26.87")
    assert (one["n"], one["test %"], one["parameters"], one["GMACs"]) == ("1", "66.00", "1,234", "0.500")
    assert compare_runs.Mean("both", runs).curve("eval_acc") == ((1,), (32.0,))  # where both have been
    assert compare_runs.Mean("both", runs).curve("eval_top5") == ((), ())
    assert compare_runs.markdown_table([{"run": "x", "n": "1"}]) == "| run | n |\n| :-- | --: |\n| x | 1 |\n"
