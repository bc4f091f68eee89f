"""The document of a report, and what is kept with it."""

import json, shutil

import numpy as np
import pandas as pd
import pytest

from scir.recipe import all_nodes, dump_recipe, parse_recipe
from scir.report import claims, document, gather as gathering, tables as tabling
from scir.report.document import tables
from scir.report.gather import gather
from scir.store import Grade, Score, write_json, write_rows, write_text

from helpers import response
from small_reports import FIGURES, made, steps


def test_the_first_screen_is_above_the_appendix():
    g = made(1, effect=True)
    made_tables = tables(g)
    text = document.document(
        made_tables,
        claims.headline(g),
        document.size_text(g, made_tables["summary"]),
        [("headline", "headline", ""), ("joint_own", "joint_own", "")],
    )
    top, rest = text.split("## Appendix\n")
    assert (
        top.index("![How often the judge") < top.index(claims.headline(g)[0]) < top.index("## Claims")
        and "joint_own" not in top
    )
    assert sum(line.startswith("| --- |") for line in top.splitlines()) == 1
    assert "2 seeds; pairs per seed: own 180 (120 labelled), panel 180 (120 labelled)" in rest
    assert "Fewer than three" not in top
    assert "\n| claim | overall | own | panel | held-out |\n" in top
    assert "nan" not in text and "None" not in text


def test_every_figure_has_a_caption():
    for name in (*FIGURES, "training_ablations", "joint_held-out"):
        assert document.caption(name)
    assert document.caption("retained") != document.caption("inconsistency")
    assert document.caption("joint_panel").startswith("Judge against implicit")


RECIPE = {"name": "made", "arms": ["srlm", "scir", "scir-no-gate"], "iterations": 1}


def scores(shift, n=8, label="a", **more):
    return [
        Score(
            id=f"i{k}",
            prompt_id=f"p{k % 4}",
            prompt=f"Say {k % 4}.",
            response_a="x",
            response_b="y",
            ids_a=[1] * (3 + k),
            ids_b=[1] * 5,
            logps=(-3.0 - k, -4.0),
            reference_logps=(-3.0, -4.0),
            order_margins=(k - 3.5 + shift, 3.0 - k),
            verdict_mass=(0.9, 0.8),
            margins={"generative": k - 3.3 + shift, "implicit": shift * (2.9 - k) / 7, **more},
            label=label,
        )
        for k in range(n)
    ]


def responses(node, n=8):
    "Two answers to each of four prompts; the first of a trained model is perfect."
    rows = [response(f"p{k % 4}", k // 4, f"Say {k % 4}.", ids=[1, 2, 3 + k], finished=k != 3) for k in range(n)]
    good = [k < 4 and node.count("/") == 2 for k in range(n)]
    return rows, [Grade(id=r.id, prompt_id=r.prompt_id, score=1.0 if ok else 0.5) for r, ok in zip(rows, good)]


def write_evaluation(folder, k, node, recipe, graded):
    own = {"own": "a" if graded else None} if not node.endswith("m1") else {}
    sets = {"held-out": "a", "panel": "a" if graded else None} | own
    for name, label in sets.items():
        rows = scores(k * 0.7, label=label, **{r: 1.0 for r in recipe.rewards[2:]})
        if name != "held-out":
            rows[0].label = None
        write_rows(folder / f"{name}.jsonl", rows)
    said, grades = responses(node)
    write_rows(folder / "responses.jsonl", said)
    if graded:
        write_rows(folder / "grades.jsonl", grades)
    write_json(
        folder / "metrics.json",
        {
            "answers": {"mean_tokens": 20.0 + k, "finished": 0.5, "empty": 0, "distinct_2": 0.5},
            "sets": {s: {} for s in sets},
        },
    )


def make_run(folder, graded=True, **kw):
    recipe = parse_recipe(RECIPE | kw)
    write_text(folder / "recipe.yaml", dump_recipe(recipe))
    summary = {"pairs": 8, "retained": 0.5, "steps": 2} | ({"correct_labels": 0.75} if graded else {})
    write_json(
        folder / "manifest.json",
        {"steps": {f"optimise:{n}": {"summary": summary} for n in all_nodes(recipe) if n.count("/") == 2}},
    )
    for k, node in enumerate(all_nodes(recipe)):
        arm, t = gathering.coordinates(folder, node)["arm"], gathering.coordinates(folder, node)["iteration"]
        write_evaluation(folder / node / "evaluation", k, node, recipe, graded)
        if t > 1:
            write_rows(
                folder / node / "metrics.jsonl",
                [
                    {
                        k: v
                        for k, v in row.items()
                        if k in ("step", "retained", "loss_dpo", "loss_consistency", "inconsistency")
                    }
                    for row in steps(arm, t, [0.5, 0.7], **{"inconsistency": 0.4} if arm != "srlm" else {})
                ],
            )
            write_json(
                folder / node / "alignment" / "metrics.json",
                {
                    "win_rate": 0.5 + k / 100,
                    "win_rate_low": 0.4,
                    "win_rate_high": 0.7,
                    "win_rate_n": 9,
                    "length_controlled": None,
                    "judge": "j",
                    "reference": "m1",
                },
            )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "made")
    document.report(folder)
    return folder


@pytest.fixture
def quick(monkeypatch):
    "Figures are drawn, but written as an empty file."
    monkeypatch.setattr(document, "save_figure", lambda fig, path: path.with_suffix(".png").touch())


def kept_files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in (".csv", ".md", ".png", ".parquet")}


def test_results_hold_every_table_figure_and_caption(run):
    out = run / "report"
    text = (out / "results.md").read_text()
    for name in (
        "claims",
        "claim_numbers",
        "inconsistency",
        "reward_models",
        "policy",
        "alignment",
        "ablation",
        "comparisons",
        "reported",
    ):
        t = pd.read_csv(out / f"{name}.csv", dtype=str, keep_default_na=False)
        assert len(t) and all(str(r.iloc[0]) in text for _, r in t.iterrows()), name
        if name != "comparisons":
            assert "| " + " | ".join(t.columns) + " |" in text, name
    assert document.CAPTION in text
    assert all(
        (out / f"{n}.png").stat().st_size > 5000 and (out / f"{n}.svg").exists() and f"]({n}.png)" in text
        for n in FIGURES
    )
    images = [line for line in text.splitlines() if line.startswith("![")]
    assert (
        text.startswith("![How often the judge")
        and "(headline.png)" in images[0]
        and "(inconsistency.png)" in images[1]
    )
    assert sorted(p.stem for p in out.glob("*.png")) == sorted(i.split("](")[1][:-5] for i in images)


def test_the_headline_is_printed_last(run, tmp_path, capsys, quick):
    document.report(run, tmp_path / "out")
    said = capsys.readouterr().out.splitlines()
    assert said == claims.headline(gather([run])) == (tmp_path / "out/headline.txt").read_text().splitlines()
    assert len(said) == 3


def test_graded_answers_are_gathered_and_kept(run):
    g, kept = gather([run]), pd.read_parquet(run / "report/answers.parquet")
    pd.testing.assert_frame_equal(g.answers, kept)
    assert len(kept) == 8 * 5
    assert kept.groupby("arm").success.mean().to_dict() == {
        "base": 0,
        "sft": 0,
        "srlm": 0.5,
        "scir": 0.5,
        "scir-no-gate": 0.5,
    }
    assert (
        set(kept.prompt) == set(g.pairs.prompt) and g.models.set_index("arm").correct_labels.to_dict()["scir"] == 0.75
    )
    policy = pd.read_csv(run / "report/policy.csv").set_index("model")
    assert policy.loc["scir M_2", "strict success"].startswith("50% [")
    assert policy.loc["scir M_2", "correct labels"] == "75%" and policy.loc["M_1", "correct labels"] == "-"


def test_a_run_without_a_grader(tmp_path, quick):
    made = make_run(tmp_path / "plain", graded=False)
    document.report(made)
    numbers = pd.read_csv(made / "report/claim_numbers.csv")
    assert not {"h", "i"} & set(numbers.claim) and set(numbers[numbers.claim == "e"].set) == {"held-out"}
    assert {"own", "panel"} <= set(numbers[numbers.claim == "a"].set)
    assert pd.read_csv(made / "report/policy.csv")["strict success"].eq("-").all()
    assert "On the set held-out" in (made / "report/headline.txt").read_text()


def test_numbers_are_the_files(run):
    s = pd.read_csv(run / "report/summary.csv").set_index(["arm", "iteration", "set"])
    d = [x for x in scores(2 * 0.7)]  # base, m1, srlm
    apart = [(x.margins["generative"] > 0) != (x.margins["implicit"] > 0) for x in d]
    row = s.loc[("srlm", 2, "panel")]
    assert row.inconsistency == np.mean(apart) and row.inconsistency_prompts == 4 and row.labelled == 7
    assert row.inconsistency_labelled == np.mean(apart[1:])
    assert row.accuracy_generative == np.mean([x.margins["generative"] > 0 for x in d[1:]])
    assert pd.read_csv(run / "report/alignment.csv").set_index("model").loc["srlm M_2", "win rate"] == "52% [40, 70]"


def test_a_kept_report_makes_the_same_again(run, tmp_path):
    before, bare = kept_files(run / "report"), tmp_path / "bare"
    shutil.copytree(run, bare)
    shutil.rmtree(bare / "seed0")
    document.report(bare)
    after = kept_files(bare / "report")
    assert set(after) == set(before)
    assert {n for n in before if before[n] != after[n] and not n.endswith(".parquet")} == set()


def test_a_folder_of_tables_and_recipe_is_enough(run, tmp_path, quick):
    before, flat = kept_files(run / "report"), tmp_path / "flat"
    shutil.copytree(run / "report", flat)
    shutil.copy(run / "recipe.yaml", flat)
    document.report(flat, tmp_path / "again")
    assert all(kept_files(tmp_path / "again")[n] == b for n, b in before.items() if n.endswith((".csv", ".md")))


def test_several_runs_side_by_side(run, tmp_path, quick):
    other = make_run(tmp_path / "other", name="other", arms=["scir"], seeds=[0, 1])
    document.report([run, other], tmp_path / "out")
    out = tmp_path / "out"
    for name in ("inconsistency", "reward_models", "alignment", "comparisons", "claims", "claim_numbers", "policy"):
        assert set(pd.read_csv(out / f"{name}.csv").run) == {"made", "other"}, name
    assert (out / "made-inconsistency.png").exists() and (out / "other-inconsistency.png").exists()
    assert (out / "results.md").read_text().count("![Inconsistency by iteration") == 2
    assert (out / "made-headline.png").exists()
    alone, side = pd.read_csv(run / "report/claims.csv"), pd.read_csv(out / "claims.csv").query("run == 'made'")
    side = side.drop(columns="run").reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, side)


def test_runs_of_one_name_are_seeds(run, tmp_path):
    second = make_run(tmp_path / "second", seeds=[1])
    g = gather([run, second])
    assert set(g.models.seed) == {0, 1}
    assert tabling.summary(g).set_index(["arm", "set"]).loc[("scir", "panel"), "seeds"] == 2
    with pytest.raises(ValueError, match="run made, seed 0: M_0 is in two of the folders") as e:
        gather([run, run])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "prepare, said",
    [
        (lambda p: p.mkdir(), "not a run directory"),
        (lambda p: write_text(p / "recipe.yaml", dump_recipe(parse_recipe(RECIPE))), "no evaluated model"),
    ],
)
def test_errors_name_the_folder(tmp_path, prepare, said):
    prepare(tmp_path / "x")
    with pytest.raises(ValueError, match=said) as e:
        document.report(tmp_path / "x")
    assert str(tmp_path / "x") in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "x/report").exists()


def test_runs_that_do_not_fit(run, tmp_path):
    with pytest.raises(ValueError, match="--out"):
        document.report([run, run])
    third = make_run(tmp_path / "third", rewards=["generative", "implicit", "pointwise"], name="third")
    with pytest.raises(ValueError, match="different reward models"):
        document.report([run, third], tmp_path / "out")


def test_what_is_missing_is_said_and_old_figures_go(run, tmp_path, capsys):
    again = shutil.copytree(run, tmp_path / "again")
    document.report(again)
    assert gathering.unevaluated(again) == "" and (again / "report/joint_panel.png").exists()
    gone = sorted(again.glob("seed*/*/m2"))[-1]
    shutil.rmtree(gone)
    for f in again.glob("seed*/**/evaluation/panel.jsonl"):
        f.unlink()
    for f in again.glob("seed*/**/evaluation/metrics.json"):
        found = json.loads(f.read_text())
        found["sets"].pop("panel")
        write_json(f, found)
    (again / "report/mine.png").write_text("not the report's")
    with open(again / "report/results.md", "a") as f:
        f.write("![](mine.png)")
    document.report(again)
    line = f"again: not evaluated, so missing from the tables: {gone.relative_to(again).as_posix()}."
    assert line in capsys.readouterr().out and line in (again / "report/results.md").read_text()
    assert not list((again / "report").glob("joint_panel.*")) and (again / "report/mine.png").exists()
    assert (again / "report/joint_held-out.png").exists()


@pytest.mark.parametrize("pairs", ["labelled", "plain"])
def test_a_kept_report_without_grades(run, tmp_path, quick, pairs):
    "A run without a grader has no scores, no labelled pairs of its own answers and no correct_labels."
    old = shutil.copytree(run / "report", tmp_path / "old")
    shutil.copy(run / "recipe.yaml", old)
    answers = pd.read_parquet(old / "answers.parquet").assign(score=np.nan, success=np.nan)
    answers.to_parquet(old / "answers.parquet")
    d = pd.read_parquet(old / "pairs.parquet")
    d = d[d.set != "own"] if pairs == "labelled" else d[d.set != "own"].assign(label=None)
    d.to_parquet(old / "pairs.parquet")
    pd.read_parquet(old / "models.parquet").drop(columns="correct_labels").to_parquet(old / "models.parquet")
    document.report(old, tmp_path / "out")
    letters = set(pd.read_csv(tmp_path / "out/claim_numbers.csv").claim)
    assert "a" in letters and not {"h", "i"} & letters and ("e" in letters) == (pairs == "labelled")


def test_m0_has_no_implicit_reward(run, tmp_path):
    "M_0 is its own reference; rounding is not a margin."
    shutil.copytree(run / "report", tmp_path / "kept")
    shutil.copy(run / "recipe.yaml", tmp_path / "kept")
    rows = pd.read_parquet(tmp_path / "kept/pairs.parquet")
    noise = np.where(rows.arm == "base", 0.02, rows.implicit)
    rows.assign(implicit=noise).to_parquet(tmp_path / "kept/pairs.parquet")
    found = tabling.summary(gather([tmp_path / "kept"]))
    base = found[found.arm == "base"]
    assert len(base) and base[["inconsistency", "rank_correlation"]].isna().all(axis=None)
    assert found[found.arm == "sft"].inconsistency.notna().all()
