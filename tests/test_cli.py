"""The commands as a user types them: files nobody has seen before, on the tiny random model. What fails is asked in this process, once in another: a start takes seconds."""

import json, os, re, shlex, shutil, signal, subprocess, sys, time
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from scir import __version__
from scir.cli import app, stdout_to_stderr
from scir.data.load import split_of
from scir.stages.evaluate import file_pairs, judge_file
from scir.export.benchmarks import EXPORTS
from scir.export.folders import FOLDERS
from scir.export.benchmarks import SECTIONS
from scir.model.weights import for_scoring, load_base, load_tokenizer, new_adapter, save_tiny
from scir.recipe import dump_recipe, load_recipe, parse_recipe
from scir.method.scores import score, set_reference
from scir.store import Response, Score, read_json, read_rows, write_json, write_rows, write_text

ROOT = Path(__file__).resolve().parent.parent
TINY, SCIR = "data/models/tiny-random", str(Path(sys.executable).parent / "scir")
PAIRS = [
    ("Why is the sky blue?", "Air scatters blue light.", "no", "a"),
    ("Hi", "Go away", "Hello! ☃", "B"),
    ("2+2?", "4", "5", "a"),
    ("Name a bird.", "Cat", "Owl", " b "),
    ("Sum up.", "z", "x y z\nand more", "b"),
]
ROWS = [dict(zip(("prompt", "response_a", "response_b", "label"), p)) for p in PAIRS]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    save_tiny()


@pytest.fixture
def pairs(tmp_path):
    write_rows(tmp_path / "pairs.jsonl", ROWS)
    return tmp_path / "pairs.jsonl"


def scir(*args):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run([SCIR, *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True)


def works(*args):
    done = scir(*args)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def save_adapter(folder, recipe, scale=0.05):
    "An adapter that is not the identity, as peft writes it."
    policy, g = new_adapter(load_base(recipe.model), recipe.lora), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.copy_(scale * torch.randn(p.shape, generator=g))
    policy.save_pretrained(folder)
    return folder


def made_recipe(**more):
    return parse_recipe({"model": {"name": TINY, "dtype": "float32"}, "lora": {"r": 4, "alpha": 8}} | more)


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


# scir judge -----------------------------------------------------------------


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


@pytest.fixture
def node(tmp_path):
    "A folder like a run's, with a judge's template of its own."
    recipe = made_recipe(
        judge={"template": "Q: {prompt}\nA: {first}\nB: {second}\nA or B?"}, train={"beta": 0.3, "reference": "initial"}
    )
    write_text(tmp_path / "run/recipe.yaml", dump_recipe(recipe))
    save_adapter(tmp_path / "run/seed0/scir/m2/adapter", recipe)
    return tmp_path / "run/seed0/scir/m2"


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


def one_line(args, *words, code=1):
    done = CliRunner().invoke(app, [*map(str, args)])
    assert done.exit_code == code and done.stdout == "" and isinstance(done.exception, SystemExit), (
        done.exit_code,
        done.exception,
        done.stdout,
    )
    assert len(done.stderr.strip().splitlines()) == 1 and all(w in done.stderr for w in words), done.stderr


def test_a_fault_in_another_process(tmp_path):
    done = scir("judge", "--model", "runs/absent", "--pairs", "data/pairs.jsonl", "--out", tmp_path / "s.parquet")
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


# scir export ----------------------------------------------------------------

FEW = ("--set", "sampling.max_new_tokens=6")


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


def test_help_has_an_example_of_each():
    said = works("export", "--help")
    assert all(f"--to {to}" in said for to in FOLDERS | EXPORTS) and "scir judge --model" in " ".join(
        works("judge", "--help").split()
    )


def test_fit_reward_says_how_good_it_is_and_is_a_reward_model(tmp_path):
    from scir.model.outside import reward_scores

    done = CliRunner().invoke(
        app,
        [
            "fit-reward",
            "--model",
            "data/models/tiny-random",
            "--pairs",
            "data/pairs.jsonl",
            "--limit",
            "40",
            "--out",
            str(tmp_path / "reward"),
        ],
    )
    assert done.exit_code == 0 and "pairs: 40" in done.output and "cross-validated: " in done.output
    assert len(reward_scores(str(tmp_path / "reward"), [("Q", "one"), ("Q", "two")])) == 2
    wrong = CliRunner().invoke(
        app,
        [
            "fit-reward",
            "--model",
            "data/models/tiny-random",
            "--pairs",
            "data/pairs.jsonl",
            "--split",
            "tests",
            "--out",
            str(tmp_path / "other"),
        ],
    )
    assert wrong.exit_code == 2 and "--split tests" in wrong.output and not (tmp_path / "other").exists()


# scir sample ----------------------------------------------------------------

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


@pytest.mark.parametrize(
    "args, words",
    [
        (("--limit", "0"), ("--limit 0", "at least 1")),
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
        and f"data/pairs.jsonl: no such file in {tmp_path}; the one that comes with scir is read" in done.stdout
    )


# help, exit codes, JSON -----------------------------------------------------

COMMANDS = get_command(app).commands
PLAIN = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS")} | {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
LONG = {
    "scir bench --out bench.json",
    "scir run recipes/smol.yaml --set name=mine --set train.beta=0.2",
}  # a quarter of an hour each


def helped(*args, width=400):
    return subprocess.run(
        [SCIR, *args, "--help"], capture_output=True, text=True, env=PLAIN | {"COLUMNS": str(width)}, check=True
    ).stdout


def examples(name):
    "The examples in a command's help, as they are typed."
    lines = [l.strip().removeprefix("Examples: ") for l in re.sub(r"\\\s*\n\s*", "", helped(name)).splitlines()]
    return [l for l in lines if l.startswith(f"scir {name} ") or l == f"scir {name}"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_parse_and_every_parameter_its_help(name):
    found = examples(name)
    assert found and all(p.help for p in COMMANDS[name].params)
    for line in found:
        assert COMMANDS[name].make_context(name, shlex.split(line)[2:]).params


def test_help_fits_80_columns_and_examples_can_be_copied():
    for name in COMMANDS:
        text = helped(name, width=80)
        assert max(map(len, text.splitlines())) <= 80
        for line in COMMANDS[name].epilog.splitlines():
            assert line.strip() in [l.strip() for l in text.splitlines()], (name, line)


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_run):
    "The project's folder as the examples expect it, with the tiny run in it."
    here = tmp_path_factory.mktemp("project")
    for name in ("nbs", "recipes", "docs", "constraints.txt", "data/pairs.jsonl", "data/prompts.jsonl"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).symlink_to(ROOT / name)
    shutil.copytree(tiny_run, here / "data/runs/tiny")
    return here


OTHERS = ("--push", "alpaca_eval.json", "question.jsonl", "allenai/")  # somebody else's place or file


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_run(project, name):
    for line in examples(name):
        if line in LONG or any(word in line for word in OTHERS):
            continue
        done = subprocess.run(
            [SCIR, *shlex.split(line.replace("smollm2-135m-instruct", "tiny-random"))[1:]],
            cwd=project,
            env=PLAIN,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and done.stdout, (line, done.stderr[-2000:])
        if "--json" in line.split():
            json.loads(done.stdout)


def test_json_and_nothing_else(project):
    ask = lambda *args: subprocess.run([SCIR, *args, "--json"], cwd=project, env=PLAIN, capture_output=True, text=True)
    ran, stands, checked, made = (
        json.loads(ask(*args).stdout)
        for args in (
            ("run", "recipes/tiny.yaml"),
            ("status", "data/runs/tiny"),
            ("verify", "data/runs/tiny"),
            ("report", "data/runs/tiny"),
        )
    )
    assert (
        ran["run"] == "data/runs/tiny"
        and ran["steps"] == stands["steps"]
        and stands["counts"] == {"done": len(stands["steps"])}
        and {"step", "state", "why"} == set(stands["steps"][0])
    )
    table = pd.read_csv(project / "data/runs/tiny/report/inconsistency.csv")
    assert pd.DataFrame(ran["tables"]["inconsistency"]).equals(table) and ran["tables"] == made["tables"]
    assert checked["faults"] == [] and all(n["right"] == n["of"] > 0 for n in checked["checks"].values())


def test_a_damaged_run_is_said_in_json_too(project, tmp_path):
    shutil.copytree(project / "data/runs/tiny", tmp_path / "run")
    (tmp_path / "run/seed0/m1/scores.jsonl").unlink()
    done = subprocess.run(
        [SCIR, "verify", tmp_path / "run", "--json"], cwd=project, env=PLAIN, capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and {"check": "files", "what": "seed0/m1/scores.jsonl", "fault": "is gone (judge:seed0/m1)"}
        in json.loads(done.stdout)["faults"]
    )


def test_what_is_printed_on_the_way_goes_to_stderr_under_json(capfd):
    with stdout_to_stderr(True):
        print("said by us")
        subprocess.run(["echo", "said by another program"])
    with stdout_to_stderr(False):
        print("shown")
    found = capfd.readouterr()
    assert found.out == "shown\n" and "said by us" in found.err and "said by another program" in found.err


@pytest.mark.parametrize(
    "args, code, words",
    [
        (("--version",), 0, (f"scir {__version__}",)),
        (("--help",), 0, ("Exit codes", "130")),
        ((), 2, ("Usage: scir",)),
        (("jugde",), 2, ("'judge'", "scir --help")),
        (("--nothing",), 2, ("--nothing", "scir --help")),
        (("judge",), 2, ("--model", "scir judge --help")),
        (("judge", "--limit", "x"), 2, ("--limit", "scir judge --help")),
        (("sample", "--model", TINY, "--prompts", "p.jsonl", "--candidates", "0"), 2, ("--candidates",)),
        (("doctor", "--set", "train.beta=1"), 2, ("--recipe",)),
        (("doctor", "--gpu", "24"), 2, ("--recipe",)),
        (("status", "data/absent"), 1, ("not a run directory", "scir run")),
        (("run", "recipes/absent.yaml"), 1, ("recipes/",)),
        *(
            (("run", "recipes/absent.yaml", *more.split()), 2, (words, "scir run --help"))
            for more, words in (
                ("--jobs 2 --processes 2", "use one or the other"),
                ("--cluster cluster=local", "with --jobs"),
                ("--jobs 2 --cluster slurm --dry-run", "--cluster slurm: must be KEY=VALUE"),
                ("--jobs 2 --cluster timeout_min=[", "--cluster: invalid YAML value"),
                ("--jobs 0", "--jobs"),
                ("--processes 0", "--processes"),
            )
        ),
    ],
)
def test_exit_codes(args, code, words):
    done = CliRunner().invoke(app, args, prog_name="scir")
    assert done.exit_code == code and all(w in done.output for w in words), done.output
    if code and args:
        assert done.stdout == "" and len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("scir: ")


@pytest.mark.parametrize("name", COMMANDS)
def test_debug_shows_the_traceback_of_every_command(name, monkeypatch, tmp_path):
    given = {
        "run": ["recipes/tiny.yaml"],
        "status": ["r"],
        "report": ["r"],
        "verify": ["r"],
        "judge": ["--model", TINY, "--pairs", "p"],
        "sample": ["--model", TINY, "--prompts", "p"],
        "export": [TINY, "--to", "mt_bench", "--data", "d", "--out", str(tmp_path / "o")],
        "fit-reward": ["--model", TINY, "--pairs", "p", "--out", "o"],
        "doctor": [],
        "bench": [],
        "testbed": ["--out", str(tmp_path / "t")],
    }[name]
    where = {
        "run": "runner.run.run_recipe",
        "report": "report.document.report",
        "fit-reward": "data.load.load_pairs",
        "doctor": "doctor.examine",
        "bench": "runner.bench.bench",
        "testbed": "data.testbed.write_testbed",
    }

    def broken(*a, **kw):
        raise LookupError("lost")

    monkeypatch.setattr(f"scir.{where.get(name, 'runner.work.quiet')}", broken)
    plain, debug = (CliRunner().invoke(app, [name, *given, *more]) for more in ([], ["--debug"]))
    assert plain.exit_code == 1 and plain.stderr == "scir: lost\n" and isinstance(debug.exception, LookupError)


def test_a_package_that_is_missing_names_the_way_out(monkeypatch):
    def broken(*a):
        raise ModuleNotFoundError("No module named 'trl'", name="trl")

    monkeypatch.setattr("scir.runner.bench.bench", broken)
    one_line(("bench",), "No module named 'trl'", "pip install trl", "scir doctor")


def test_ctrl_c_of_a_run_is_one_line_and_the_run_goes_on(tmp_path):
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        process = subprocess.Popen(
            [SCIR, "run", "recipes/tiny.yaml", "--out", tmp_path / "run", "--set", "iterations=1"],
            cwd=ROOT,
            env=PLAIN,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        deadline = time.time() + 60
        while "sft" not in (tmp_path / "out").read_text() and time.time() < deadline:
            time.sleep(0.1)
        time.sleep(2)  # the fork server is at its imports
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == 130
    said = (tmp_path / "err").read_text().splitlines()
    assert (
        said[-1] == "scir: interrupted; rerun the same command to resume"
        and "Traceback" not in " ".join(said)
        and (tmp_path / "run/manifest.json").exists()
    )


@pytest.mark.parametrize("args", [("status", "data/runs/tiny"), ("--help",), ("run", "recipes/tiny.yaml")])
def test_a_reader_that_leaves_is_no_fault(project, args):
    done = subprocess.Popen(
        [SCIR, *args], cwd=project, env=PLAIN, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    done.stdout.close()
    assert done.stderr.read() == "" and done.wait(60) == 1


def test_another_broken_pipe_is_a_fault(monkeypatch):
    def broken(*a):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("scir.runner.run.run_recipe", broken)
    one_line(("run", "recipes/tiny.yaml"), "Broken pipe")


def test_help_is_there_at_once():
    imported = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\nfrom scir.cli import app\ntry: app(['--help'])\nexcept SystemExit: print(*sys.modules)",
        ],
        capture_output=True,
        text=True,
        env=PLAIN,
    ).stdout
    assert (
        not {"torch", "transformers", "pandas", "pydantic", "numpy"} & set(imported.split()[-1000:])
        and "scir.cli" in imported
    )
    took = []
    for _ in range(3):
        started = time.perf_counter()
        helped()
        took.append(time.perf_counter() - started)
    assert min(took) < 0.5


def test_a_shell_can_complete():
    words = {"COMP_WORDS": "scir ver", "COMP_CWORD": "1", "_SCIR_COMPLETE": "complete_bash"}
    assert subprocess.run([SCIR], env=PLAIN | words, capture_output=True, text=True).stdout.split() == ["verify"]


def test_a_run_tells_where_it_is_from_where_it_was_called(project):
    (project / "data/deep").mkdir(exist_ok=True)
    done = subprocess.run(
        [SCIR, "run", "../../recipes/tiny.yaml", "--json"],
        cwd=project / "data/deep",
        env=PLAIN,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert Path(told["run"]) == project / "data/runs/tiny" and {s["state"] for s in told["steps"]} == {"done"}


def test_a_rehearsal_tells_where_the_run_is_from_where_it_was_called(project, monkeypatch):
    monkeypatch.chdir(project / "data")
    done = CliRunner().invoke(app, ["run", "../recipes/tiny.yaml", "--dry-run", "--json"])
    assert json.loads(done.stdout)["run"] == "runs/tiny"
