"""What is exported of a run that is no longer what its recipe says."""

from pathlib import Path

import pytest

from scir.export.folders import export_adapter, export_dataset, export_merged
from scir.recipe import load_recipe
from scir.runner.manifest import start_manifest
from scir.store import read_json, write_json

from exported import NODE


@pytest.fixture
def moved(tiny_run, tmp_path):
    "The run somewhere else, without the data that it names; and a way to begin it anew with other settings, interrupted at once."
    import shutil

    run = tmp_path / "moved"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("notebooks", "report", ".locks"))

    def begin(*setting):
        start_manifest(load_recipe(tiny_run / "recipe.yaml", setting), run)
        return run

    return begin


EXPORTED = (("adapter", export_adapter), ("merged", export_merged), ("dataset", export_dataset))


@pytest.mark.parametrize(
    "setting, why",
    [
        (("train.beta=0.7",), f"optimise:{NODE} is stale: train.beta was 5.0, is 0.7"),
        (
            ("sampling.temperature=0.5", "data.prompt_limit=7"),
            "warm_start:seed0/m1 is stale: data.prompt_limit was 8, is 7; sampling.temperature was 1.0, is 0.5",
        ),
        (("lora.r=2",), "sft:seed0/sft is stale: lora.r was 4, is 2"),
        (("arms=[scir]", "iterations=1"), ""),
    ],
)
def test_weights_of_other_settings_are_not_exported(moved, tmp_path, at_root, setting, why):
    run = moved(*setting)
    for to, make in EXPORTED:
        if not why:
            make(str(run / NODE), tmp_path / to)
        else:
            with pytest.raises(ValueError) as e:
                make(str(run / NODE), tmp_path / to)
            assert str(e.value) == f"{run}: {why}; run `scir run` first" and not (tmp_path / to).exists()


def test_what_was_trained_from_files_made_anew_is_not_exported(moved, tmp_path, at_root):
    run = moved()
    manifest = read_json(run / "manifest.json")
    manifest["steps"]["judge:seed0/scir/m2"]["outputs"]["seed0/scir/m2/scores.jsonl"] = "another"
    del manifest["steps"]["sample:seed0/m1"], manifest["steps"]["optimise:seed0/srlm/m2"]
    write_json(run / "manifest.json", manifest)
    for node, why in (
        (NODE, f"optimise:{NODE} is stale: seed0/scir/m2/scores.jsonl changed"),
        ("seed0/scir/m2", "judge:seed0/m1 is stale: seed0/m1/responses.jsonl is gone"),
        ("seed0/srlm/m2", "optimise:seed0/srlm/m2 is not done"),
    ):
        with pytest.raises(ValueError, match=f"{why}; run `scir run` first"):
            export_adapter(str(run / node), tmp_path / "out")
    (run / "seed0/m1/adapter/adapter_config.json").write_text(
        (run / "seed0/m1/adapter/adapter_config.json").read_text() + " "
    )
    with pytest.raises(
        ValueError, match="warm_start:seed0/m1 is stale: seed0/m1/adapter has changed since it was written"
    ):
        export_merged(str(run / "seed0/m1"), tmp_path / "out")


def test_data_code_and_place_do_not_matter(moved, tmp_path, recipe, monkeypatch):
    run = moved()
    manifest = read_json(run / "manifest.json")
    for r in manifest["steps"].values():
        r["inputs"] = {
            k: "another" if k.split(" ")[0] in ("data", "code", "notebook") else v for k, v in r["inputs"].items()
        }
    write_json(run / "manifest.json", manifest)
    (tmp_path / "data/models").mkdir(parents=True)
    (tmp_path / "data/models/tiny-random").symlink_to(recipe.model.name)
    monkeypatch.chdir(tmp_path)
    card = (export_adapter(str(run / NODE), "out"), Path("out/README.md").read_text())[1]
    assert "model-index" in card and "Not evaluated." not in card


def test_an_evaluation_of_other_settings_is_not_told(moved, tmp_path, at_root):
    run = moved("data.test_limit=11")
    export_adapter(str(run / NODE), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not evaluated." in card and "model-index" not in card and "| evaluation sets | not evaluated |" in card
