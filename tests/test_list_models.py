"""--list-models prints the table of models, and documents give its length."""

import re

import pytest
from helpers.paths import ROOT

import train
import train_sota
import train_vit
from models import MODELS, inspection


@pytest.mark.parametrize("script", [train, train_vit, train_sota])
def test_list_models_prints_an_entry_of_the_table_on_each_line(script, capsys, monkeypatch):
    """Here every network has a tenth of a GMAC: counting them all takes seconds."""
    monkeypatch.setattr(inspection, "describe", lambda name, *_: (MODELS[name].parameters, 10**8))
    assert not script.main(["--list-models"])
    rows = [line.split()[:5] for line in capsys.readouterr().out.splitlines()[1:]]
    assert [name for name, *_ in rows] == list(MODELS)
    for name, *numbers in rows:
        entry = MODELS[name]
        expected = (f"{entry.parameters:,}", "0.100", str(entry.classes), str(entry.image_size))
        assert tuple(numbers) == expected


@pytest.mark.parametrize("document", ["README.md", "docs/usage.md"])
def test_documents_give_the_number_of_models(document):
    numbers = re.findall(r"\b(\d+) models\b", (ROOT / document).read_text())
    assert numbers and set(numbers) == {str(len(MODELS))}
