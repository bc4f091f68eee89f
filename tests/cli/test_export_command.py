"""`scir export`: benchmarks from a model's own answers."""

import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from scir.cli import app
from scir.export.benchmarks import SECTIONS
from scir.store import read_json, read_rows, write_json, write_rows

from commands import FEW, TINY, one_line, works


pytestmark = pytest.mark.usefixtures("at_root")


def test_export_to_alpaca_eval(tmp_path):
    data, out = tmp_path / "alpaca_eval.json", tmp_path / "new/model_outputs.json"
    write_json(
        data,
        [
            {"dataset": d, "instruction": i, "output": "x", "generator": "g"}
            for d, i in (
                ("koala", "Name a bird."),
                ("vicuna", "é ☃?"),
                ("koala", ""),
                ("koala", "y" * 5000),
                ("vicuna", "Name a bird."),
            )
        ],
    )
    said = works("export", TINY, "--to", "alpaca_eval", "--data", data, "--out", out, *FEW)
    made = read_json(out)
    assert [(r["dataset"], r["instruction"], r["generator"]) for r in made] == [
        ("vicuna", "Name a bird.", TINY),
        ("vicuna", "é ☃?", TINY),
    ] and all(r["output"] for r in made)
    assert (
        "rows: 2" in said
        and "1 empty" in said
        and "1 duplicate" in said
        and "1 prompt too long" in said
        and [p.name for p in out.parent.iterdir()] == [out.name]
    )
    works("export", TINY, "--to", "alpaca_eval", "--data", data, "--out", tmp_path / "again.json", *FEW, "--limit", 1)
    assert read_json(tmp_path / "again.json") == made[:1]


def test_an_interrupted_export_is_continued_but_not_with_other_settings(tmp_path, monkeypatch):
    write_rows(tmp_path / "ae.jsonl", [{"instruction": i} for i in ("Name a bird.", "Why?")])
    export = lambda tokens: CliRunner().invoke(
        app,
        [
            "export",
            TINY,
            "--to",
            "alpaca_eval",
            "--data",
            str(tmp_path / "ae.jsonl"),
            "--out",
            str(tmp_path / "o.json"),
            "--set",
            f"sampling.max_new_tokens={tokens}",
        ],
    )

    def stop(*a):
        raise ValueError("stopped")

    with monkeypatch.context() as m:
        m.setattr("scir.store.Journal.finish", stop)
        assert "scir: stopped" in export(6).stderr and not (tmp_path / "o.json").exists()
    (part,) = tmp_path.glob(".o.*.partial.jsonl")
    write_rows(part, [r | {"response": "kept"} for r in read_rows(part)[:1]])
    assert export(5).exit_code == 0 and "kept" not in [r["output"] for r in read_json(tmp_path / "o.json")]
    assert export(6).exit_code == 0 and [r["output"] for r in read_json(tmp_path / "o.json")].count("kept") == 1


def test_export_to_mt_bench(node, tmp_path):
    data, out = tmp_path / "question.jsonl", tmp_path / "mine.jsonl"
    write_rows(
        data,
        [
            {"question_id": 82, "category": "math", "turns": ["2+2?", "And 3+3?"], "reference": ["4", "6"]},
            {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
            {"question_id": 83, "category": "none", "turns": []},
        ],
    )
    said = works("export", node, "--to", "mt_bench", "--data", data, "--out", out, *FEW)
    made = read_rows(out)
    assert (
        [r["question_id"] for r in made] == [81, 82]
        and all(r["model_id"] == "mine" and len(r["choices"][0]["turns"]) == 2 for r in made)
        and "dropped: 1 no turns" in said
    )
    works("export", node, "--to", "mt_bench", "--data", data, "--out", tmp_path / "b/mine.jsonl", *FEW)
    assert [r["choices"] for r in read_rows(tmp_path / "b/mine.jsonl")] == [r["choices"] for r in made]


def test_export_to_reward_bench(node, tmp_path):
    kinds = [*SECTIONS["Chat"], "hep-cpp"]
    pd.DataFrame(
        [
            dict(id=f"{k}{i}", prompt=f"{k} {i}?", chosen="yes" * (i + 1), rejected="no", subset=k)
            for k in kinds
            for i in range(3)
        ]
    ).to_parquet(tmp_path / "rb.parquet")
    for reward in ("generative", "implicit"):
        said = works(
            "export",
            node,
            "--to",
            "reward_bench",
            "--data",
            tmp_path / "rb.parquet",
            "--out",
            tmp_path / f"{reward}.json",
            "--reward",
            reward,
        )
        made, table = read_json(tmp_path / f"{reward}.json"), pd.read_parquet(tmp_path / f"{reward}.pairs.parquet")
        right = table[f"right_{reward}"].groupby(table.subset).mean()
        assert (
            {k: made[k] for k in kinds} == pytest.approx(right.to_dict())
            and len(table) == 18
            and made["model"] == str(node)
        )
        assert (
            made["missing"] == ["Chat Hard", "Safety", "Reasoning"]
            and f"Chat: {made['Chat']:.3f}" in said
            and "missing: Chat Hard, Safety, Reasoning" in said
        )


@pytest.mark.parametrize(
    "to, rows, words",
    [
        ("alpaca_eval", [{"prompt": "Hi"}], ("alpaca_eval", "data.jsonl", "['prompt']", "missing instruction")),
        ("mt_bench", [{"turns": ["Hi"]}], ("mt_bench", "data.jsonl", "missing question_id")),
        ("mt_bench", [{"question_id": 1, "turns": ["Hi"]}] * 2, ("duplicate question_id 1",)),
        ("reward_bench", [{"prompt": "Hi", "chosen": "x", "rejected": "y"}], ("reward_bench", "missing subset")),
        (
            "reward_bench",
            [{"prompt": "Hi", "chosen": "x", "rejected": "y", "subset": s} for s in ("hep-go", "")],
            ("data.jsonl, row 2", "no subset"),
        ),
    ],
)
def test_a_file_that_cannot_be_exported(tmp_path, to, rows, words):
    write_rows(tmp_path / "data.jsonl", rows)
    one_line(("export", TINY, "--to", to, "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out.json"), *words)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    "args, words",
    [
        (("--reward", "oracle"), ("'oracle'", "generative, implicit")),
        (("--data", "absent.jsonl"), ("absent.jsonl", "no such file")),
    ],
)
def test_an_export_that_cannot_be_met(tmp_path, args, words):
    one_line(
        ("export", TINY, "--to", "reward_bench", "--data", "data/pairs.jsonl", "--out", tmp_path / "out.json", *args),
        *words,
    )


@pytest.mark.parametrize(
    "args, words",
    [
        (("--to", "reward_bench"), ("--to reward_bench", "--data")),
        (("--to", "merged", "--data", "x.jsonl", "--limit", "3"), ("--to merged takes no --data, --limit",)),
        (("--to", "dataset", "--set", "train.beta=1"), ("--to dataset takes no --set",)),
        (("--to", "mt_bench", "--data", "x.jsonl", "--push", "me/x"), ("--to mt_bench takes no --push",)),
        (("--to", "adapter", "--reward", "implicit"), ("--to adapter takes no --reward",)),
        (("--to", "folder"), ("--to folder", "adapter, merged, dataset, alpaca_eval, mt_bench, reward_bench")),
        (("--to", "rewardbench", "--data", "x.jsonl"), ("--to rewardbench", "reward_bench")),
    ],
)
def test_an_option_that_a_target_does_not_take(tmp_path, args, words):
    one_line(("export", TINY, "--out", tmp_path / "out", *args), *words, "export --help", code=2)
    assert not (tmp_path / "out").exists()


def test_only_a_runs_model_is_shared(tmp_path):
    one_line(
        ("export", TINY, "--out", tmp_path / "out", "--to", "adapter"),
        "not a model of a run",
        "data/runs/smol/seed0/scir/m2",
    )


def test_a_benchmark_is_no_folder(tmp_path):
    one_line(
        ("export", TINY, "--to", "reward_bench", "--data", "data/pairs.jsonl", "--out", tmp_path),
        "is a folder",
        code=2,
    )


def test_an_export_in_json(tmp_path):
    write_rows(tmp_path / "ae.jsonl", [{"instruction": "Name a bird."}])
    made = json.loads(
        works(
            "export",
            TINY,
            "--to",
            "alpaca_eval",
            "--data",
            tmp_path / "ae.jsonl",
            "--out",
            tmp_path / "o.json",
            *FEW,
            "--json",
        )
    )
    assert made["rows"] == 1 and made["file"] == str(tmp_path / "o.json")
