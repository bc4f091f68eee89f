"""Cards: a run's own numbers, and nothing that tells where it was made."""

from pathlib import Path

import pytest, yaml

from scir.export.cards import eval_results, model_card, format_measure
from scir.export.folders import export_adapter, export_merged
from scir.export.origin import Origin, lineage, origin
from scir.model.weights import load_base, load_tokenizer
from scir.recipe import dump_recipe, load_recipe
from scir.store import read_json, write_json, write_text

from exported import NODE, logits, noted
from helpers import ROOT


def texts(folder):
    return {f.name: f.read_text() for f in Path(folder).rglob("*") if f.suffix in (".md", ".json", ".jinja")}


@pytest.mark.parametrize(
    "to, library, relation", [("adapter", "peft", "adapter"), ("merged", "transformers", "finetune")]
)
def test_a_card_holds_the_runs_own_numbers(shared, tiny_run, to, library, relation):
    from huggingface_hub import ModelCard

    card, found = (
        ModelCard.load(shared[to][0] / "README.md"),
        read_json(tiny_run / NODE / "evaluation" / "metrics.json")["sets"],
    )
    d = card.data
    assert (d.license, d.base_model, d.base_model_relation, d.library_name, d.pipeline_tag) == (
        "apache-2.0",
        "tiny-random",
        relation,
        library,
        "text-generation",
    )
    assert {"scir", "dpo"} < set(d.tags) and d.datasets is None and d.model_name == "tiny-seed0-scir-m3"
    kept = {
        r.metric_name.split(",")[0].replace(" ", "_"): (r.dataset_name, r.metric_type, r.metric_value)
        for r in d.eval_results
    }
    assert (
        set(kept)
        == {
            k
            for k in found["held-out"]
            if k.startswith(("accuracy", "inconsistency")) and k != "inconsistency_labelled"
        }
        and len(kept) > 5
    )
    for k, (name, kind, value) in kept.items():
        assert (
            name == "held-out"
            and kind == k.split("_")[0]
            and value == pytest.approx(found["held-out"][k]["value"], abs=1e-4)
        )
    for k, r in (
        (k, r) for m in found.values() for k, r in m.items() if isinstance(r, dict) and r.get("value") is not None
    ):
        assert format_measure(k, r) in card.text
    assert (
        "| DPO's beta | 5.0 |" in card.text
        and "| iteration | M_3 |" in card.text
        and "| seed | 0 |" in card.text
        and "2502.08922" in card.text
        and "| reference policy | the SFT model, from which M_1 was trained |" in card.text
    )
    recipe = load_recipe(tiny_run / "recipe.yaml")
    written = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert written["train"] == recipe.arm("scir").model_dump(mode="json") and written["lora"] == recipe.lora.model_dump(
        mode="json"
    )
    done = read_json(tiny_run / "manifest.json")["steps"][f"optimise:{NODE}"]["summary"]
    assert (
        f"{done['pairs']} pairs, {done['steps']} optimizer steps" in card.text
        and f"{done['retained']:.1%}" in card.text
    )


@pytest.mark.parametrize(
    "pairs, named",
    [
        (("org/x",), "org/x"),
        (("org/x:one", "org/x:two"), "org/x"),
        (("mine.jsonl", "org/x"), "held-out"),
        (("org/x", "org/y"), "held-out"),
        (("mine.jsonl",), "held-out"),
    ],
)
def test_a_set_is_the_hubs_only_where_all_of_it_is(tiny_run, pairs, named):
    o = origin(str(tiny_run / NODE))
    found = eval_results(
        Origin(o.run, o.node, o.recipe.model_copy(update={"data": o.recipe.data.model_copy(update={"pairs": pairs})}))
    )
    assert len(found) > 5 and {(r.dataset_type, r.dataset_name) for r in found} == {(named, "held-out")}


def test_the_code_on_the_card_runs(shared, at_root):
    from huggingface_hub import ModelCard

    for to in ("adapter", "merged"):
        code = ModelCard.load(shared[to][0] / "README.md").text.split("```python\n")[1].split("```")[0]
        known = {}
        exec(code.replace(f'"{to}"', repr(str(shared[to][0]))), known)
        assert logits(known["model"]).shape == (1, 7, len(known["tokenizer"]))


def test_nothing_tells_where_it_was_made(shared, tiny_run):
    for folder, _ in shared.values():
        for name, text in texts(folder).items():
            assert not any(
                p in text
                for p in (
                    str(ROOT),
                    str(tiny_run),
                    str(tiny_run.parent),
                    str(folder.parent),
                    str(Path.home()) + "/",
                    "local_files_only",
                )
            ), name


@pytest.fixture
def elsewhere(recipe, make_policy, tmp_path):
    "A run whose model and data are somewhere on the machine; trained, not evaluated."
    base = tmp_path / "secret-project" / "my-model"
    load_base(recipe.model).save_pretrained(base)
    load_tokenizer(recipe.model).save_pretrained(base)
    d = recipe.data.model_copy(
        update={
            "prompts": (f"{tmp_path}/secret-project/ask.jsonl", "org/asked:filtered"),
            "pairs": ("../secret-project/known.csv", "other/known/default"),
            "labelled_sets": {"bench": ("allenai/reward-bench:filtered",)},
        }
    )
    run = tmp_path / "runs" / "mine"
    write_text(
        run / "recipe.yaml",
        dump_recipe(
            recipe.model_copy(
                update={"name": "mine", "model": recipe.model.model_copy(update={"name": str(base)}), "data": d}
            )
        ),
    )
    make_policy().save_pretrained(run / "seed0/dice/m2/adapter")
    noted(run, "optimise", "seed0/dice/m2", "adapter")
    return str(run / "seed0/dice/m2"), base


def test_a_local_base_is_named_not_located(elsewhere, tmp_path):
    model, base = elsewhere
    for to, make in (("adapter", export_adapter), ("merged", export_merged)):
        made = make(model, tmp_path / "out" / to)
        said = {
            k: v for k, v in texts(tmp_path / "out" / to).items() if k != "adapter_config.json"
        }  # peft finds the base by it
        assert made["licence"] == "unknown" and not any(
            str(tmp_path) in t or "secret-project" in t for t in said.values()
        )
        assert (
            "base_model: my-model\n" in said["README.md"]
            and "license: unknown\n" in said["README.md"]
            and "Not evaluated." in said["README.md"]
        )
        assert (
            "- org/asked\n- other/known\n" in said["README.md"]
            and "ask.jsonl" in said["README.md"]
            and "model-index" not in said["README.md"]
            and "- dice\n" in said["README.md"]
        )


def test_the_licence_is_the_bases_or_the_one_asked_for(elsewhere, tmp_path):
    model, base = elsewhere
    spec = origin(model).recipe.model
    assert lineage(spec) == {"base_model": "my-model"}
    write_text(
        base / "README.md",
        "---\nlicense: other\nlicense_name: my-terms\nlicense_link: https://example.com/terms\nmodel-index: broken\n---\n# It",
    )
    write_text(base / "LICENSE.txt", "terms")
    assert lineage(spec) == {
        "base_model": "my-model",
        "license": "other",
        "license_name": "my-terms",
        "license_link": "https://example.com/terms",
    }
    assert (
        export_merged(model, tmp_path / "a")["licence"] == "other"
        and "license_name: my-terms" in texts(tmp_path / "a")["README.md"]
        and (tmp_path / "a" / "LICENSE.txt").read_text() == "terms"
    )
    assert (
        export_adapter(model, tmp_path / "b", "mit")["licence"] == "mit"
        and "my-terms" not in texts(tmp_path / "b")["README.md"]
    )
    assert lineage(spec.model_copy(update={"name": "nobody/has-this"})) == {"base_model": "nobody/has-this"}


@pytest.mark.parametrize(
    "source, row, hub",
    [
        ("org/taught:train", "org/taught:train", ["org/asked", "org/taught", "other/known"]),
        ("/home/me/secret/taught.jsonl", "taught.jsonl", ["org/asked", "other/known"]),
        (None, None, ["org/asked", "other/known"]),
    ],
)
def test_instructions_are_among_the_data(elsewhere, source, row, hub):
    o = origin(elsewhere[0])
    card = model_card(
        Origin(
            o.run,
            o.node,
            o.recipe.model_copy(update={"data": o.recipe.data.model_copy(update={"instructions": source})}),
        ),
        "merged",
        "x",
    )
    assert (
        card.data.datasets == hub
        and (f"| instructions | {row} |" in card.text) == bool(row)
        and "secret" not in card.text
    )


def test_nf4_and_bfloat16_are_said(elsewhere):
    o = origin(elsewhere[0])
    o = Origin(
        o.run,
        o.node,
        o.recipe.model_copy(
            update={
                "model": o.recipe.model.model_copy(
                    update={"name": "org/base", "revision": "v2", "quantize": "nf4", "dtype": "bfloat16"}
                )
            }
        ),
    )
    card = model_card(o, "merged", "me/x")
    assert (
        card.data.base_model == "org/base"
        and "revision v2" in card.text
        and "trained over nf4" in card.text
        and "saved in bfloat16" in card.text
        and 'from_pretrained("me/x")' in card.text
    )
    assert "machine" not in model_card(o, "adapter", "me/x").text and "nf4" in model_card(o, "adapter", "me/x").text


@pytest.mark.parametrize(
    "judge, said",
    [
        ("reward:/home/me/secret/reward-model", "reward-model"),
        ("http://10.0.0.7:8000/v1", "a model on a server"),
        ("org/judge", "org/judge"),
    ],
)
def test_a_win_rate_is_told_and_its_judge_not_located(tiny_run, tmp_path, judge, said):
    from scir.export.cards import win_rate_sentence

    for f in ("recipe.yaml", "manifest.json", f"{NODE}/evaluation/metrics.json"):
        write_text(tmp_path / f, (tiny_run / f).read_text())
    assert win_rate_sentence(origin(str(tmp_path / NODE))) == ""
    write_json(
        tmp_path / NODE / "alignment" / "metrics.json",
        {
            "win_rate": 0.4,
            "win_rate_low": 0.3,
            "win_rate_high": 0.52,
            "win_rate_n": 37,
            "judge": judge,
            "reference": "m1",
        },
    )
    assert win_rate_sentence(origin(str(tmp_path / NODE))) == ""
    noted(tmp_path, "align", NODE, "alignment/metrics.json")
    text = model_card(origin(str(tmp_path / NODE)), "merged", "x").text
    assert (
        f"Win rate against M_1's answers: 40.0% [30.0%, 52.0%], n=37, judged by {said}." in text
        and "secret" not in text
        and "10.0.0.7" not in text
    )
