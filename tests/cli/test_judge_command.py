"""`scir judge` on files nobody has seen before."""

import json, subprocess

import pandas as pd
import pytest
from typer.testing import CliRunner

from scir.cli import app
from scir.data.load import split_of
from scir.method.scores import score, set_reference
from scir.model.weights import for_scoring, load_tokenizer, save_tiny
from scir.recipe import load_recipe, parse_recipe
from scir.stages.evaluate import file_pairs, judge_file
from scir.store import Score, read_rows, write_rows

from commands import PLAIN, TINY, WIDE, made_recipe, one_line, save_adapter, works
from helpers import ROOT, SCIR, scir


pytestmark = pytest.mark.usefixtures("at_root")


PAIRS = [
    ("Why is the sky blue?", "Air scatters blue light.", "no", "a"),
    ("Hi", "Go away", "Hello! ☃", "B"),
    ("2+2?", "4", "5", "a"),
    ("Name a bird.", "Cat", "Owl", " b "),
    ("Sum up.", "z", "x y z\nand more", "b"),
]


ROWS = [dict(zip(("prompt", "response_a", "response_b", "label"), p)) for p in PAIRS]


@pytest.fixture
def pairs(tmp_path):
    write_rows(tmp_path / "pairs.jsonl", ROWS)
    return tmp_path / "pairs.jsonl"


def scored(source, out, recipe, adapter=None):
    "Margins by prompt, from scir.stages.judge itself."
    tokenizer, policy = load_tokenizer(recipe.model), for_scoring(recipe.model, adapter)
    found, _ = file_pairs(tokenizer, str(source), recipe)
    set_reference(policy, found, recipe.judge.batch_tokens)
    return {s.prompt: s.margins for s in score(policy, tokenizer, found, recipe, out)}


def same_margins(table, expected):
    for r in table.itertuples():
        assert {"generative": r.margin_generative, "implicit": r.margin_implicit} == pytest.approx(
            expected[r.prompt], abs=1e-5
        )


def test_a_file_never_seen_before(pairs, tmp_path):
    said = works(
        "judge", "--model", TINY, "--pairs", pairs, "--out", tmp_path / "s.parquet", "--set", "model.dtype=float32"
    )
    assert (
        "accuracy_generative: " in said
        and "flip_rate: " in said
        and "n=5" in said
        and "dropped: nothing" in said
        and f"rows: {tmp_path / 's.parquet'}" in said
    )
    assert (
        "accuracy_implicit" not in said and "inconsistency: " not in said
    )  # without an adapter the implicit model is silent
    table = pd.read_parquet(tmp_path / "s.parquet")
    assert list(table[["prompt", "response_a", "response_b", "label"]].itertuples(index=False, name=None)) == [
        (p, a, b, l.strip().lower()) for p, a, b, l in PAIRS
    ]
    same_margins(table, scored(pairs, tmp_path / "s.jsonl", made_recipe()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs.jsonl", "s.jsonl", "s.parquet"]


def test_a_prompt_with_several_pairs_keeps_its_sides(tmp_path):
    rows = [
        dict(prompt="2+2?", response_a=a, response_b=b, label=l)
        for a, b, l in (("4", "5", "a"), ("6", "4", "b"), ("5", "4", "b"), ("7", "6", "b"))
    ]
    write_rows(tmp_path / "p.jsonl", rows)
    works("judge", "--model", TINY, "--pairs", tmp_path / "p.jsonl", "--out", tmp_path / "s.parquet")
    kept = pd.read_parquet(tmp_path / "s.parquet")[["prompt", "response_a", "response_b", "label"]].to_dict("records")
    assert kept == [r for n, r in enumerate(rows) if n != 2]  # the third is the first again, sides swapped


def test_only_one_split(tmp_path):
    rows = [dict(prompt=f"Question {i}", response_a="yes", response_b="no", label="a") for i in range(30)]
    write_rows(tmp_path / "p.jsonl", rows)
    test = [r["prompt"] for r in rows if split_of(r["prompt"]) == "test"]
    said = works(
        "judge", "--model", TINY, "--pairs", tmp_path / "p.jsonl", "--split", "test", "--out", tmp_path / "s.parquet"
    )
    assert (
        0 < len(test) < 30
        and sorted(pd.read_parquet(tmp_path / "s.parquet").prompt) == sorted(test)
        and f"dropped: {30 - len(test)} not in the test split" in said
    )
    works(
        "judge",
        "--model",
        TINY,
        "--pairs",
        tmp_path / "p.jsonl",
        "--split",
        "test",
        "--limit",
        2,
        "--out",
        tmp_path / "s.parquet",
    )
    assert list(pd.read_parquet(tmp_path / "s.parquet").prompt) == test[:2]
    wrong = CliRunner().invoke(
        app, ["judge", "--model", TINY, "--pairs", str(tmp_path / "p.jsonl"), "--split", "tests"]
    )
    assert wrong.exit_code == 2 and "--split tests" in wrong.output


def test_an_adapter_folder(pairs, tmp_path):
    recipe = made_recipe()
    adapter = save_adapter(tmp_path / "adapter", recipe)
    said = works(
        "judge", "--model", adapter, "--pairs", pairs, "--out", tmp_path / "s.parquet", "--set", "model.dtype=float32"
    )
    assert all(
        f"\n{k}: " in "\n" + said for k in ("inconsistency", "accuracy_generative", "accuracy_implicit", "flip_rate")
    )
    table = pd.read_parquet(tmp_path / "s.parquet")
    same_margins(table, scored(pairs, tmp_path / "s.jsonl", recipe, adapter))
    assert (table.margin_implicit.abs() > 1e-3).all()
    share = (~table.agree).mean()
    assert f"inconsistency: {share:.1%}" in said


@pytest.mark.parametrize("settings", [(), ("train.beta=0.6", "judge.verdicts=[C, D]")])
def test_a_runs_model_brings_its_recipe_and_settings_change_it(node, pairs, tmp_path, settings):
    found = json.loads(
        works(
            "judge",
            "--model",
            node,
            "--pairs",
            pairs,
            "--out",
            tmp_path / "s.parquet",
            "--json",
            *(x for s in settings for x in ("--set", s)),
        )
    )
    assert (
        found["inconsistency"]["n"] == 5
        and {"low", "high", "value", "n", "prompts"} == set(found["accuracy_implicit"])
        and found["dropped"] == {}
    )
    same_margins(
        pd.read_parquet(tmp_path / "s.parquet"),
        scored(pairs, tmp_path / "s.jsonl", load_recipe(tmp_path / "run/recipe.yaml", settings), node / "adapter"),
    )


def interrupted(monkeypatch, *args):
    "A try that ends before its table is written."

    def stop(*a):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr("scir.store.Journal.finish", stop)
        with pytest.raises(KeyboardInterrupt):
            judge_file(*args)


def marked(folder):
    "Keep one row of the unfinished file, with a margin that no model gave."
    (part,) = folder.glob(".s.*.partial.jsonl")
    first = read_rows(part, Score)[0]
    write_rows(part, [first.model_copy(update={"margins": {"generative": 123.0, "implicit": 1.0}})])


def test_an_interrupted_try_is_continued_but_not_by_another_model(pairs, tmp_path, monkeypatch):
    adapter = save_adapter(tmp_path / "adapter", made_recipe())
    judge = ("judge", "--model", adapter, "--pairs", pairs, "--out", tmp_path / "s.parquet")
    interrupted(monkeypatch, str(adapter), str(pairs), tmp_path / "s.parquet", parse_recipe({}))
    assert not (tmp_path / "s.parquet").exists()
    marked(tmp_path)
    works(*judge, "--limit", 4)
    assert 123.0 not in set(pd.read_parquet(tmp_path / "s.parquet").margin_generative)
    works(*judge)
    table = pd.read_parquet(tmp_path / "s.parquet")
    assert (table.margin_generative == 123.0).sum() == 1 and len(table) == 5 and not list(tmp_path.glob(".s.*"))
    interrupted(monkeypatch, str(adapter), str(pairs), tmp_path / "s.parquet", parse_recipe({}))
    marked(tmp_path)
    save_adapter(adapter, made_recipe(), 0.1)
    works(*judge)
    assert 123.0 not in set(pd.read_parquet(tmp_path / "s.parquet").margin_generative)


def test_a_base_whose_weights_changed_does_not_continue(pairs, tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base")
    interrupted(monkeypatch, str(base), str(pairs), tmp_path / "s.parquet", parse_recipe({}))
    marked(tmp_path)
    from scir.model.weights import tiny_model

    tiny_model(seed=1)[0].save_pretrained(base)
    works("judge", "--model", base, "--pairs", pairs, "--out", tmp_path / "s.parquet")
    assert 123.0 not in set(pd.read_parquet(tmp_path / "s.parquet").margin_generative)


def test_reward_benchs_columns_and_a_limit(tmp_path):
    pd.DataFrame(
        [
            dict(id=n, prompt=f"{p}{n}", chosen=a, rejected=b, subset=s)
            for n, (p, a, b, _) in enumerate(PAIRS)
            for s in ["hep-cpp", "hep-go"][n % 2 : n % 2 + 1]
        ]
    ).to_parquet(tmp_path / "rb.parquet")
    said = works(
        "judge", "--model", TINY, "--pairs", tmp_path / "rb.parquet", "--out", tmp_path / "s.parquet", "--limit", 3
    )
    table = pd.read_parquet(tmp_path / "s.parquet")
    assert (
        "n=3" in said and table.subset.tolist() == ["hep-cpp", "hep-go", "hep-cpp"] and set(table.label) <= {"a", "b"}
    )
    for r, (_, chosen, rejected, _) in zip(table.itertuples(), PAIRS):
        assert (r.response_a, r.response_b) == ((chosen, rejected) if r.label == "a" else (rejected, chosen))


def test_a_fault_in_another_process(tmp_path):
    done = scir(
        "judge", "--model", "runs/absent", "--pairs", "data/pairs.jsonl", "--out", tmp_path / "s.parquet", env=WIDE
    )
    assert (
        done.returncode == 1
        and done.stdout == ""
        and len(done.stderr.strip().splitlines()) == 1
        and "model runs/absent" in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize(
    "content, words",
    [
        (
            [{k: v for k, v in r.items() if k != "response_b"} for r in ROWS],
            ("pairs.jsonl", "['label', 'prompt', 'response_a']", "response_b"),
        ),
        ([ROWS[0], ROWS[1] | {"label": "c"}], ("pairs.jsonl, row 2", "'c'", "'a' nor 'b'")),
        ([], ("pairs.jsonl", "empty")),
        ([ROWS[0] | {"response_b": ROWS[0]["response_a"]}], ("pairs.jsonl", "no usable row", "equal responses")),
        ([ROWS[0] | {"prompt": "x" * 600}], ("prompt too long", "raise data.max_prompt_tokens")),
    ],
)
def test_a_file_that_cannot_be_judged(tmp_path, content, words):
    write_rows(tmp_path / "pairs.jsonl", content)
    one_line(("judge", "--model", TINY, "--pairs", tmp_path / "pairs.jsonl", "--out", tmp_path / "s.parquet"), *words)
    assert not (tmp_path / "s.parquet").exists()


@pytest.mark.parametrize(
    "args, words",
    [
        (("--model", "data/models/absent"), ("model data/models/absent", "config.json", "save_pretrained")),
        (("--model", "runs/absent"), ("model runs/absent", "save_pretrained", "hub id")),
        (("--model", "recipes"), ("model recipes", "save_pretrained")),
        (("--set", "judge.verdicts=[First, Second]"), ("'First' is not a single token", "judge.verdicts")),
        (("--set", "rewards=[generative, oracle]"), ("oracle not registered", "implicit")),
        (("--set", "judge.verdict=[A, B]"), ("judge.verdict is not a field", "judge.verdicts")),
        (("--set", "judge.verdicts"), ("section.field=value",)),
        (("--recipe", "recipes/absent.yaml"), ("recipes/absent.yaml", "no such recipe")),
        (("--reference", "data/models/absent"), ("model data/models/absent",)),
    ],
)
def test_a_request_that_cannot_be_met(pairs, tmp_path, args, words):
    one_line(("judge", "--model", TINY, "--pairs", pairs, "--out", tmp_path / "s.parquet", *args), *words)


@pytest.mark.parametrize(
    "args, words",
    [
        (("--limit", "0"), ("'--limit'", "greater than or equal to 1")),
        (("--split", "foo"), ("--split foo", "train, validation or test")),
        (("--out", "."), ("--out .", "is a folder")),
    ],
)
def test_options_that_make_no_sense_are_usage(args, words):
    one_line(("judge", "--model", TINY, "--pairs", "data/pairs.jsonl", *args), *words, code=2)


def test_data_of_the_package_is_not_taken_silently(tmp_path):
    done = subprocess.run(
        [
            SCIR,
            "judge",
            "--model",
            str(ROOT / TINY),
            "--pairs",
            "data/pairs.jsonl",
            "--limit",
            "2",
            "--out",
            "s.parquet",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=PLAIN,
    )
    assert (
        done.returncode == 0
        and f"data/pairs.jsonl: no such file in {tmp_path}; using the one that comes with scir" in done.stdout
    )
