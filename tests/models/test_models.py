"""Some models of the matrix from warm start to export; `make test-models` takes all of them."""

import pytest

from models.make import MODELS, ODD
from models.matrix import MARK, PAGE, Row, cells_of, fault_of, try_model


@pytest.mark.parametrize("name", ["llama", "gemma3 with images", "qwen3-moe", "gpt2"])
def test_a_model_goes_from_warm_start_to_export_and_matches_transformers(name):
    row = try_model(name)
    assert row.works, row
    assert float(row.exported) > 0 and row.run == "done"


def test_a_model_that_cannot_be_sampled_says_so():
    row = try_model("mamba")
    assert "keeps a state that rows cannot share" in row.says and row.prompts == "4 of 4"


def test_the_matrix_names_what_differs():
    row = Row("llama", "4 of 4", "1e-06", "3 of 3", "9%", "done", "1e-06")
    assert not fault_of(row)
    assert fault_of(row._replace(prompts="3 of 4", logps="2e-02")) == "prompt ids differ; log-probs differ"
    assert fault_of(row._replace(sampling="2 of 3", exported="nan")) == "answers differ; exported log-probs differ"


def test_the_matrix_has_many_architectures():
    assert len({tiny.type for tiny in MODELS.values()}) >= 35
    assert not set(MODELS) & set(ODD)


def test_the_page_has_a_row_for_every_model():
    table = PAGE.read_text().partition(MARK)[2]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]
    assert rows[2:] == [cells_of(Row(name))[0] for name in [*MODELS, *ODD]]
