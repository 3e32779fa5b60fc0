"""Constants of CIFAR are those of its images. Tests of data that is not there are skipped."""

import pytest
from helpers.paths import ROOT

import data
from datasets import archives, image_folder

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", archives.ARCHIVES)
def test_mean_and_std_are_those_of_the_archive(name):
    directory, archive = ROOT / "data", archives.ARCHIVES[name]
    if not (directory / archive.file).is_file():
        pytest.skip(f"there is no data/{archive.file}")
    mean, std = data.channel_statistics(data.load(name, directory).train)
    assert mean == pytest.approx(archive.mean, abs=5e-5)
    assert std == pytest.approx(archive.std, abs=5e-5)


@pytest.mark.parametrize("name", archives.ARCHIVES)
def test_mean_and_std_are_those_of_the_images_in_a_folder(name, monkeypatch):
    directory, archive = ROOT / f"data/{name}-png", archives.ARCHIVES[name]
    if not directory.is_dir():
        pytest.skip(f"there is no data/{name}-png")
    not_cached = f"data/{name}-png was not loaded before, and a test doesn't write there"
    monkeypatch.setattr(image_folder, "_decode_folder", lambda *_: pytest.skip(not_cached))
    split = data.load("folder", directory, image_size=32)
    assert (len(split.train), split.num_classes) == (50_000, archive.num_classes)
    assert split.mean == pytest.approx(archive.mean, abs=5e-5)
    assert split.std == pytest.approx(archive.std, abs=5e-5)
