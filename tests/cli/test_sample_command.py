"""`scir sample` with any model."""

import json

import pytest
from typer.testing import CliRunner

from scir.cli import app
from scir.store import Response, read_rows, write_rows

from commands import FEW, TINY, one_line, works


pytestmark = pytest.mark.usefixtures("at_root")

PROMPTS = ["Why is the sky blue?", "Hi", "2+2?", "Hi", "", "y" * 5000]


@pytest.fixture
def prompts(tmp_path):
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": p} for p in PROMPTS])
    return tmp_path / "prompts.jsonl"


def sampled(file):
    return [(r.prompt, r.candidate, r.response) for r in read_rows(file, Response)]


def test_sampling_any_model(node, prompts, tmp_path):
    found = json.loads(
        works(
            "sample",
            "--model",
            node,
            "--prompts",
            prompts,
            "--out",
            tmp_path / "r.jsonl",
            "--candidates",
            1,
            "--json",
            *FEW,
        )
    )
    rows = sampled(tmp_path / "r.jsonl")
    assert (
        [(p, c) for p, c, _ in rows] == [(p, 0) for p in PROMPTS[:3]]
        and found["prompts"] == found["responses"] == 3
        and found["mean_tokens"] <= 6
    )
    assert (
        found["dropped"] == {"duplicate": 1, "empty": 1, "prompt too long": 1}
        and sorted(p.name for p in tmp_path.glob("*.jsonl")) == ["prompts.jsonl", "r.jsonl"]
        and not list(tmp_path.glob(".r.*"))
    )
    said = works(
        "sample",
        "--model",
        node,
        "--prompts",
        prompts,
        "--out",
        tmp_path / "other.jsonl",
        "--limit",
        2,
        "--seed",
        1,
        *FEW,
    )
    other = sampled(tmp_path / "other.jsonl")
    assert (
        [p for p, *_ in other] == [p for p in PROMPTS[:2] for _ in range(4)]
        and other[0] != rows[0]
        and len(set(other)) > 4
        and "prompts: 2" in said
        and f"rows: {tmp_path / 'other.jsonl'}" in said
    )


def test_an_interrupted_sampling_is_continued_but_not_with_another_seed(prompts, tmp_path, monkeypatch):
    ask = lambda seed: CliRunner().invoke(
        app,
        [
            "sample",
            "--model",
            TINY,
            "--prompts",
            str(prompts),
            "--out",
            str(tmp_path / "r.jsonl"),
            "--candidates",
            "1",
            "--seed",
            str(seed),
            *FEW,
        ],
    )

    def stop(*a):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr("scir.store.Journal.finish", stop)
        done = ask(3)
        assert (
            done.exit_code == 130
            and done.stderr.splitlines()[-1] == "scir: interrupted; rerun the same command to resume"
            and not (tmp_path / "r.jsonl").exists()
        )
    (part,) = tmp_path.glob(".r.*.partial.jsonl")
    write_rows(part, [r | {"response": "kept"} for r in read_rows(part)[:1]])
    assert ask(4).exit_code == 0 and "kept" not in {r for *_, r in sampled(tmp_path / "r.jsonl")}
    assert ask(3).exit_code == 0 and [r for *_, r in sampled(tmp_path / "r.jsonl")].count("kept") == 1


@pytest.mark.parametrize(
    "args, words",
    [
        (("--model", "runs/absent"), ("model runs/absent", "save_pretrained")),
        (("--prompts", "absent.jsonl"), ("absent.jsonl", "no such file")),
        (("--set", "sampling.max_new_tokens=5000"), ("leave no room", "lower sampling.max_new_tokens")),
        (("--set", "data.max_prompt_tokens=1"), ("no prompt of at most 1 tokens", "raise data.max_prompt_tokens")),
    ],
)
def test_a_sampling_that_cannot_be_done(prompts, tmp_path, args, words):
    one_line(("sample", "--model", TINY, "--prompts", prompts, "--out", tmp_path / "r.jsonl", *args), *words)
    assert not (tmp_path / "r.jsonl").exists()
