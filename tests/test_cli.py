"""`scir judge` and `scir export` as a user types them: files nobody has seen before, on the tiny random model. What fails is asked in this process, once in another: a start takes seconds."""
import json, os, subprocess, sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from scir.cli import app
from scir.data import split_of
from scir.evaluate import file_pairs, judge_file
from scir.exports import EXPORTS, FOLDERS, SECTIONS
from scir.model import for_scoring, load_base, load_tokenizer, new_adapter, save_tiny
from scir.recipe import dump_recipe, load_recipe, parse_recipe
from scir.score import score, set_reference
from scir.store import Score, read_json, read_rows, write_json, write_rows, write_text

ROOT = Path(__file__).resolve().parent.parent
TINY = "data/models/tiny-random"
PAIRS = [("Why is the sky blue?", "Air scatters blue light.", "no", "a"), ("Hi", "Go away", "Hello! ☃", "B"), ("2+2?", "4", "5", "a"), ("Name a bird.", "Cat", "Owl", " b "), ("Sum up.", "z", "x y z\nand more", "b")]
ROWS = [dict(zip(("prompt", "response_a", "response_b", "label"), p)) for p in PAIRS]

@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    save_tiny()

@pytest.fixture
def pairs(tmp_path):
    write_rows(tmp_path/"pairs.jsonl", ROWS)
    return tmp_path/"pairs.jsonl"

def scir(*args):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run([str(Path(sys.executable).parent/"scir"), *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True)

def works(*args):
    done = scir(*args)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

def save_adapter(folder, recipe, scale=.05):
    "An adapter that is not the identity, as peft writes it."
    policy, g = new_adapter(load_base(recipe.model), recipe.lora), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name: p.copy_(scale * torch.randn(p.shape, generator=g))
    policy.save_pretrained(folder)
    return folder

def made_recipe(**more): return parse_recipe({"model": {"name": TINY, "dtype": "float32"}, "lora": {"r": 4, "alpha": 8}} | more)

def scored(source, out, recipe, adapter=None):
    "Margins by prompt, from scir.score itself."
    tokenizer, policy = load_tokenizer(recipe.model), for_scoring(recipe.model, adapter)
    found, _ = file_pairs(tokenizer, str(source), recipe)
    set_reference(policy, found, recipe.judge.batch_tokens)
    return {s.prompt: s.margins for s in score(policy, tokenizer, found, recipe, out)}

def same_margins(table, expected):
    for r in table.itertuples(): assert {"generative": r.margin_generative, "implicit": r.margin_implicit} == pytest.approx(expected[r.prompt], abs=1e-5)

# scir judge -----------------------------------------------------------------

def test_a_file_never_seen_before(pairs, tmp_path):
    said = works("judge", "--model", TINY, "--pairs", pairs, "--out", tmp_path/"s.parquet", "--set", "model.dtype=float32")
    assert "accuracy_generative: " in said and "flip_rate: " in said and "n=5" in said and "dropped: nothing" in said and f"rows: {tmp_path/'s.parquet'}" in said
    assert "accuracy_implicit" not in said and "inconsistency: " not in said  # without an adapter the implicit model is silent
    table = pd.read_parquet(tmp_path/"s.parquet")
    assert list(table[["prompt", "response_a", "response_b", "label"]].itertuples(index=False, name=None)) == [(p, a, b, l.strip().lower()) for p, a, b, l in PAIRS]
    same_margins(table, scored(pairs, tmp_path/"s.jsonl", made_recipe()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs.jsonl", "s.jsonl", "s.parquet"]

def test_a_prompt_with_several_pairs_keeps_its_sides(tmp_path):
    rows = [dict(prompt="2+2?", response_a=a, response_b=b, label=l) for a, b, l in (("4", "5", "a"), ("6", "4", "b"), ("5", "4", "b"), ("7", "6", "b"))]
    write_rows(tmp_path/"p.jsonl", rows)
    works("judge", "--model", TINY, "--pairs", tmp_path/"p.jsonl", "--out", tmp_path/"s.parquet")
    kept = pd.read_parquet(tmp_path/"s.parquet")[["prompt", "response_a", "response_b", "label"]].to_dict("records")
    assert kept == [r for n, r in enumerate(rows) if n != 2]  # the third is the first again, sides swapped

def test_only_one_split(tmp_path):
    rows = [dict(prompt=f"Question {i}", response_a="yes", response_b="no", label="a") for i in range(30)]
    write_rows(tmp_path/"p.jsonl", rows)
    test = [r["prompt"] for r in rows if split_of(r["prompt"]) == "test"]
    said = works("judge", "--model", TINY, "--pairs", tmp_path/"p.jsonl", "--split", "test", "--out", tmp_path/"s.parquet")
    assert 0 < len(test) < 30 and sorted(pd.read_parquet(tmp_path/"s.parquet").prompt) == sorted(test) and f"dropped: {30 - len(test)} not in the test split" in said
    works("judge", "--model", TINY, "--pairs", tmp_path/"p.jsonl", "--split", "test", "--limit", 2, "--out", tmp_path/"s.parquet")
    assert list(pd.read_parquet(tmp_path/"s.parquet").prompt) == test[:2]
    wrong = CliRunner().invoke(app, ["judge", "--model", TINY, "--pairs", str(tmp_path/"p.jsonl"), "--split", "tests"])
    assert wrong.exit_code == 1 and "--split tests" in wrong.output

def test_an_adapter_folder(pairs, tmp_path):
    recipe = made_recipe()
    adapter = save_adapter(tmp_path/"adapter", recipe)
    said = works("judge", "--model", adapter, "--pairs", pairs, "--out", tmp_path/"s.parquet", "--set", "model.dtype=float32")
    assert all(f"\n{k}: " in "\n" + said for k in ("inconsistency", "accuracy_generative", "accuracy_implicit", "flip_rate"))
    table = pd.read_parquet(tmp_path/"s.parquet")
    same_margins(table, scored(pairs, tmp_path/"s.jsonl", recipe, adapter))
    assert (table.margin_implicit.abs() > 1e-3).all()
    share = (~table.agree).mean()
    assert f"inconsistency: {share:.1%}" in said

@pytest.fixture
def node(tmp_path):
    "A folder like a run's, with a judge's template of its own."
    recipe = made_recipe(judge={"template": "Q: {prompt}\nA: {first}\nB: {second}\nA or B?"}, train={"beta": .3})
    write_text(tmp_path/"run/recipe.yaml", dump_recipe(recipe))
    save_adapter(tmp_path/"run/seed0/scir/m2/adapter", recipe)
    return tmp_path/"run/seed0/scir/m2"

@pytest.mark.parametrize("settings", [(), ("train.beta=0.6", "judge.verdicts=[C, D]")])
def test_a_runs_model_brings_its_recipe_and_settings_change_it(node, pairs, tmp_path, settings):
    found = json.loads(works("judge", "--model", node, "--pairs", pairs, "--out", tmp_path/"s.parquet", "--json", *(x for s in settings for x in ("--set", s))))
    assert found["inconsistency"]["n"] == 5 and {"low", "high", "value", "n", "prompts"} == set(found["accuracy_implicit"]) and found["dropped"] == {}
    same_margins(pd.read_parquet(tmp_path/"s.parquet"), scored(pairs, tmp_path/"s.jsonl", load_recipe(tmp_path/"run/recipe.yaml", settings), node/"adapter"))

def interrupted(monkeypatch, *args):
    "A try that ends before its table is written."
    import scir.evaluate
    def stop(*a): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr("scir.store.Journal.finish", stop)
        with pytest.raises(KeyboardInterrupt): judge_file(*args)

def marked(folder):
    "Keep one row of the unfinished file, with a margin that no model gave."
    part, = folder.glob(".s.*.partial.jsonl")
    first = read_rows(part, Score)[0]
    write_rows(part, [first.model_copy(update={"margins": {"generative": 123., "implicit": 1.}})])

def test_an_interrupted_try_is_continued_but_not_by_another_model(pairs, tmp_path, monkeypatch):
    adapter = save_adapter(tmp_path/"adapter", made_recipe())
    judge = ("judge", "--model", adapter, "--pairs", pairs, "--out", tmp_path/"s.parquet")
    interrupted(monkeypatch, str(adapter), str(pairs), tmp_path/"s.parquet", parse_recipe({}))
    assert not (tmp_path/"s.parquet").exists()
    marked(tmp_path)
    works(*judge, "--limit", 4)
    assert 123. not in set(pd.read_parquet(tmp_path/"s.parquet").margin_generative)
    works(*judge)
    table = pd.read_parquet(tmp_path/"s.parquet")
    assert (table.margin_generative == 123.).sum() == 1 and len(table) == 5 and not list(tmp_path.glob(".s.*"))
    interrupted(monkeypatch, str(adapter), str(pairs), tmp_path/"s.parquet", parse_recipe({}))
    marked(tmp_path)
    save_adapter(adapter, made_recipe(), .1)
    works(*judge)
    assert 123. not in set(pd.read_parquet(tmp_path/"s.parquet").margin_generative)

def test_a_base_whose_weights_changed_does_not_continue(pairs, tmp_path, monkeypatch):
    base = save_tiny(tmp_path/"base")
    interrupted(monkeypatch, str(base), str(pairs), tmp_path/"s.parquet", parse_recipe({}))
    marked(tmp_path)
    from scir.model import tiny_model
    tiny_model(seed=1)[0].save_pretrained(base)
    works("judge", "--model", base, "--pairs", pairs, "--out", tmp_path/"s.parquet")
    assert 123. not in set(pd.read_parquet(tmp_path/"s.parquet").margin_generative)

def test_reward_benchs_columns_and_a_limit(tmp_path):
    pd.DataFrame([dict(id=n, prompt=f"{p}{n}", chosen=a, rejected=b, subset=s) for n, (p, a, b, _) in enumerate(PAIRS) for s in ["hep-cpp", "hep-go"][n % 2:n % 2 + 1]]).to_parquet(tmp_path/"rb.parquet")
    said = works("judge", "--model", TINY, "--pairs", tmp_path/"rb.parquet", "--out", tmp_path/"s.parquet", "--limit", 3)
    table = pd.read_parquet(tmp_path/"s.parquet")
    assert "n=3" in said and table.subset.tolist() == ["hep-cpp", "hep-go", "hep-cpp"] and set(table.label) <= {"a", "b"}
    for r, (_, chosen, rejected, _) in zip(table.itertuples(), PAIRS): assert (r.response_a, r.response_b) == ((chosen, rejected) if r.label == "a" else (rejected, chosen))

def one_line(args, *words):
    done = CliRunner().invoke(app, [*map(str, args)])
    assert done.exit_code == 1 and done.stdout == "" and isinstance(done.exception, SystemExit), (done.exit_code, done.exception, done.stdout)
    assert len(done.stderr.strip().splitlines()) == 1 and all(w in done.stderr for w in words), done.stderr

def test_a_fault_in_another_process(tmp_path):
    done = scir("judge", "--model", "runs/absent", "--pairs", "data/pairs.jsonl", "--out", tmp_path/"s.parquet")
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1 and "model runs/absent" in done.stderr and "Traceback" not in done.stderr

@pytest.mark.parametrize("content, words", [
    ([{k: v for k, v in r.items() if k != "response_b"} for r in ROWS], ("pairs.jsonl", "['label', 'prompt', 'response_a']", "response_b")),
    ([ROWS[0], ROWS[1] | {"label": "c"}], ("pairs.jsonl, row 2", "'c'", "'a' nor 'b'")),
    ([], ("pairs.jsonl", "empty")),
    ([ROWS[0] | {"response_b": ROWS[0]["response_a"]}], ("pairs.jsonl", "no usable row", "equal responses")),
    ([ROWS[0] | {"prompt": "x" * 600}], ("prompt too long", "raise data.max_prompt_tokens")),
])
def test_a_file_that_cannot_be_judged(tmp_path, content, words):
    write_rows(tmp_path/"pairs.jsonl", content)
    one_line(("judge", "--model", TINY, "--pairs", tmp_path/"pairs.jsonl", "--out", tmp_path/"s.parquet"), *words)
    assert not (tmp_path/"s.parquet").exists()

@pytest.mark.parametrize("args, words", [
    (("--model", "data/models/absent"), ("model data/models/absent", "config.json", "save_pretrained")),
    (("--model", "runs/absent"), ("model runs/absent", "save_pretrained", "hub id")),
    (("--model", "recipes"), ("model recipes", "save_pretrained")),
    (("--limit", "0"), ("--limit 0", "from 1 on")),
    (("--set", "judge.verdicts=[First, Second]"), ("'First' is not a single token", "judge.verdicts")),
    (("--set", "rewards=[generative, oracle]"), ("'oracle' is not registered", "implicit")),
    (("--set", "judge.verdict=[A, B]"), ("judge.verdict is not a field", "judge.verdicts")),
    (("--set", "judge.verdicts"), ("section.field=value",)),
    (("--recipe", "recipes/absent.yaml"), ("recipes/absent.yaml", "no such recipe")),
    (("--reference", "data/models/absent"), ("model data/models/absent",)),
    (("--out", "data"), ("--out data", "folder")),
])
def test_a_request_that_cannot_be_met(pairs, tmp_path, args, words):
    one_line(("judge", "--model", TINY, "--pairs", pairs, "--out", tmp_path/"s.parquet", *args), *words)

# scir export ----------------------------------------------------------------

FEW = ("--set", "sampling.max_new_tokens=6")

def test_export_to_alpaca_eval(tmp_path):
    data, out = tmp_path/"alpaca_eval.json", tmp_path/"new/model_outputs.json"
    write_json(data, [{"dataset": d, "instruction": i, "output": "x", "generator": "g"} for d, i in (("koala", "Name a bird."), ("vicuna", "é ☃?"), ("koala", ""), ("koala", "y" * 5000), ("vicuna", "Name a bird."))])
    said = works("export", TINY, "--to", "alpaca_eval", "--data", data, "--out", out, *FEW)
    made = read_json(out)
    assert [(r["dataset"], r["instruction"], r["generator"]) for r in made] == [("vicuna", "Name a bird.", TINY), ("vicuna", "é ☃?", TINY)] and all(r["output"] for r in made)
    assert "rows: 2" in said and "1 empty" in said and "1 duplicate" in said and "1 prompt too long" in said and [p.name for p in out.parent.iterdir()] == [out.name]
    works("export", TINY, "--to", "alpaca_eval", "--data", data, "--out", tmp_path/"again.json", *FEW, "--limit", 1)
    assert read_json(tmp_path/"again.json") == made[:1]

def test_an_interrupted_export_is_continued_but_not_with_other_settings(tmp_path, monkeypatch):
    write_rows(tmp_path/"ae.jsonl", [{"instruction": i} for i in ("Name a bird.", "Why?")])
    export = lambda tokens: CliRunner().invoke(app, ["export", TINY, "--to", "alpaca_eval", "--data", str(tmp_path/"ae.jsonl"), "--out", str(tmp_path/"o.json"), "--set", f"sampling.max_new_tokens={tokens}"])
    def stop(*a): raise ValueError("stopped")
    with monkeypatch.context() as m:
        m.setattr("scir.store.Journal.finish", stop)
        assert "scir: stopped" in export(6).stderr and not (tmp_path/"o.json").exists()
    part, = tmp_path.glob(".o.*.partial.jsonl")
    write_rows(part, [r | {"response": "kept"} for r in read_rows(part)[:1]])
    assert export(5).exit_code == 0 and "kept" not in [r["output"] for r in read_json(tmp_path/"o.json")]
    assert export(6).exit_code == 0 and [r["output"] for r in read_json(tmp_path/"o.json")].count("kept") == 1

def test_export_to_mt_bench(node, tmp_path):
    data, out = tmp_path/"question.jsonl", tmp_path/"mine.jsonl"
    write_rows(data, [{"question_id": 82, "category": "math", "turns": ["2+2?", "And 3+3?"], "reference": ["4", "6"]}, {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]}, {"question_id": 83, "category": "none", "turns": []}])
    said = works("export", node, "--to", "mt_bench", "--data", data, "--out", out, *FEW)
    made = read_rows(out)
    assert [r["question_id"] for r in made] == [81, 82] and all(r["model_id"] == "mine" and len(r["choices"][0]["turns"]) == 2 for r in made) and "dropped: 1 no turns" in said
    works("export", node, "--to", "mt_bench", "--data", data, "--out", tmp_path/"b/mine.jsonl", *FEW)
    assert [r["choices"] for r in read_rows(tmp_path/"b/mine.jsonl")] == [r["choices"] for r in made]

def test_export_to_reward_bench(node, tmp_path):
    kinds = [*SECTIONS["Chat"], "hep-cpp"]
    pd.DataFrame([dict(id=f"{k}{i}", prompt=f"{k} {i}?", chosen="yes" * (i + 1), rejected="no", subset=k) for k in kinds for i in range(3)]).to_parquet(tmp_path/"rb.parquet")
    for reward in ("generative", "implicit"):
        said = works("export", node, "--to", "reward_bench", "--data", tmp_path/"rb.parquet", "--out", tmp_path/f"{reward}.json", "--reward", reward)
        made, table = read_json(tmp_path/f"{reward}.json"), pd.read_parquet(tmp_path/f"{reward}.pairs.parquet")
        right = table[f"right_{reward}"].groupby(table.subset).mean()
        assert {k: made[k] for k in kinds} == pytest.approx(right.to_dict()) and len(table) == 18 and made["model"] == str(node)
        assert made["missing"] == ["Chat Hard", "Safety", "Reasoning"] and f"Chat: {made['Chat']:.3f}" in said and "missing: Chat Hard, Safety, Reasoning" in said

@pytest.mark.parametrize("to, rows, words", [
    ("alpaca_eval", [{"prompt": "Hi"}], ("alpaca_eval", "data.jsonl", "['prompt']", "instruction needed")),
    ("mt_bench", [{"turns": ["Hi"]}], ("mt_bench", "data.jsonl", "question_id needed")),
    ("mt_bench", [{"question_id": 1, "turns": ["Hi"]}] * 2, ("question_id 1 comes twice",)),
    ("reward_bench", [{"prompt": "Hi", "chosen": "x", "rejected": "y"}], ("reward_bench", "subset needed")),
    ("reward_bench", [{"prompt": "Hi", "chosen": "x", "rejected": "y", "subset": s} for s in ("hep-go", "")], ("data.jsonl, row 2", "no subset")),
    ("rewardbench", [{"prompt": "Hi"}], ("--to rewardbench", "reward_bench")),
])
def test_a_file_that_cannot_be_exported(tmp_path, to, rows, words):
    write_rows(tmp_path/"data.jsonl", rows)
    one_line(("export", TINY, "--to", to, "--data", tmp_path/"data.jsonl", "--out", tmp_path/"out.json"), *words)
    assert not (tmp_path/"out.json").exists()

@pytest.mark.parametrize("args, words", [(("--reward", "oracle"), ("'oracle'", "generative, implicit")), (("--limit", "-1"), ("--limit -1",)), (("--data", "absent.jsonl"), ("absent.jsonl", "no such file"))])
def test_an_export_that_cannot_be_met(tmp_path, args, words):
    one_line(("export", TINY, "--to", "reward_bench", "--data", "data/pairs.jsonl", "--out", tmp_path/"out.json", *args), *words)

@pytest.mark.parametrize("args, words", [
    (("--to", "reward_bench"), ("--to reward_bench", "--data")), (("--to", "merged", "--data", "x.jsonl", "--limit", "3"), ("--to merged takes no --data, --limit",)), (("--to", "dataset", "--set", "train.beta=1"), ("--to dataset takes no --set",)),
    (("--to", "mt_bench", "--data", "x.jsonl", "--push", "me/x"), ("--to mt_bench takes no --push",)), (("--to", "folder"), ("--to folder", "adapter, merged, dataset, alpaca_eval, mt_bench, reward_bench")), (("--to", "adapter"), ("not a run's model", "data/runs/smol/seed0/scir/m2")),
])
def test_an_option_that_a_target_does_not_take(tmp_path, args, words):
    one_line(("export", TINY, "--out", tmp_path/"out", *args), *words)
    assert not (tmp_path/"out").exists()

def test_a_benchmark_is_no_folder(tmp_path):
    one_line(("export", TINY, "--to", "reward_bench", "--data", "data/pairs.jsonl", "--out", tmp_path), "this is a folder")

def test_an_export_in_json(tmp_path):
    write_rows(tmp_path/"ae.jsonl", [{"instruction": "Name a bird."}])
    made = json.loads(works("export", TINY, "--to", "alpaca_eval", "--data", tmp_path/"ae.jsonl", "--out", tmp_path/"o.json", *FEW, "--json"))
    assert made["rows"] == 1 and made["file"] == str(tmp_path/"o.json")

def test_help_has_an_example_of_each():
    said = works("export", "--help")
    assert all(f"--to {to}" in said for to in FOLDERS | EXPORTS) and "scir judge --model" in " ".join(works("judge", "--help").split())


def test_fit_reward_says_how_good_it_is_and_is_a_reward_model(tmp_path):
    from scir.alignment import reward_scores
    done = CliRunner().invoke(app, ["fit-reward", "--model", "data/models/tiny-random", "--pairs", "data/pairs.jsonl", "--limit", "40", "--out", str(tmp_path / "reward")])
    assert done.exit_code == 0 and "pairs: 40" in done.output and "cross-validated: " in done.output
    assert len(reward_scores(str(tmp_path / "reward"), [("Q", "one"), ("Q", "two")])) == 2
    wrong = CliRunner().invoke(app, ["fit-reward", "--model", "data/models/tiny-random", "--pairs", "data/pairs.jsonl", "--split", "tests", "--out", str(tmp_path / "other")])
    assert wrong.exit_code == 1 and "--split tests" in wrong.output and not (tmp_path / "other").exists()
