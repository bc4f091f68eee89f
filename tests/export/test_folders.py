"""Adapters, merged models and preference sets as their readers see them: peft, transformers, datasets and trl."""

import pytest, torch

from scir.data.load import load_pairs
from scir.export.folders import export_adapter, export_dataset, export_merged, merged_weights, plain_chat, whole_folder
from scir.export.origin import origin
from scir.model.logprobs import encode_prompt, encode_response, encode_turns
from scir.model.weights import for_scoring, load_base, load_tokenizer
from scir.recipe import load_recipe
from scir.store import Score, read_rows, write_rows, write_text

from exported import NODE, logits, noted
from helpers import TALK, scored_pair


def test_an_adapter_loads_in_peft_without_us(shared, tiny_run, at_root):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    (folder, made), recipe = shared["adapter"], load_recipe(tiny_run / "recipe.yaml")
    theirs, ours = (
        AutoPeftModelForCausalLM.from_pretrained(folder),
        for_scoring(recipe.model, tiny_run / NODE / "adapter"),
    )
    assert (
        torch.allclose(logits(theirs), logits(ours), atol=1e-5)
        and (logits(theirs) - logits(load_base(recipe.model))).abs().max() > 0.01
    )
    assert all(
        (folder / f).read_bytes() == (tiny_run / NODE / "adapter" / f).read_bytes()
        for f in ("adapter_config.json", "adapter_model.safetensors")
    )
    talk = [{"role": "user", "content": "Hi"}]
    assert AutoTokenizer.from_pretrained(folder).apply_chat_template(talk, tokenize=False) == load_tokenizer(
        recipe.model
    ).apply_chat_template(talk, tokenize=False)
    assert made["files"] == sorted(f.name for f in folder.iterdir()) and "README.md" in made["files"]


def test_a_merged_model_is_its_adapter(shared, tiny_run, at_root):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, made = shared["merged"]
    ours = for_scoring(load_recipe(tiny_run / "recipe.yaml").model, tiny_run / NODE / "adapter")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert (
        theirs.dtype == torch.float32
        and made["dtype"] == "float32"
        and (logits(theirs) - logits(ours)).abs().max() < 1e-4
    )
    assert AutoTokenizer.from_pretrained(folder).chat_template and not [
        f for f in made["files"] if f.startswith("adapter")
    ]


def test_merging_is_in_float32_over_whole_weights(make_policy, recipe, tmp_path):
    "In bfloat16 small updates are lost one by one; over nf4 they would be added to the wrong weights."
    adapted = make_policy(scale=0.002)
    adapted.save_pretrained(tmp_path)
    whole = adapted.merge_and_unload().state_dict()
    for change in ({"dtype": "bfloat16"}, {"quantize": "nf4", "dtype": "bfloat16"}, {"quantize": "nf4"}):
        spec = recipe.model.model_copy(update=change)
        found = merged_weights(spec, tmp_path).state_dict()
        assert found.keys() == whole.keys() and all(
            torch.equal(v, whole[k].to(getattr(torch, spec.dtype))) for k, v in found.items()
        )


def test_a_base_models_template_is_exported(any_tokenizer):
    import copy

    t = copy.deepcopy(any_tokenizer)
    t.chat_template = None
    chat = lambda turns, system: (
        ([{"role": "system", "content": system}] if system else [])
        + [{"role": ("user", "assistant")[i % 2], "content": x} for i, x in enumerate(turns)]
    )
    cases = [(turns, system) for turns in (TALK[:1], TALK[:3], TALK) for system in (None, "Be brief.")]
    plain = [encode_turns(t, *c) for c in cases]
    t.chat_template = plain_chat()
    for c, ids in zip(cases, plain):
        assert t.apply_chat_template(chat(*c), add_generation_prompt=True, return_dict=False) == ids
        answered = t.apply_chat_template([*chat(*c), {"role": "assistant", "content": "An owl."}], return_dict=False)
        assert answered == ids + encode_response(t, "An owl.")


# preferences ----------------------------------------------------------------
def loaded(folder, cache):
    from datasets import load_dataset

    return load_dataset(str(folder), split="train", cache_dir=str(cache))


def test_a_preference_set_comes_back(shared, tiny_run, tmp_path):
    from huggingface_hub import DatasetCard

    folder, made = shared["dataset"]
    rows, back = read_rows(tiny_run / NODE / "preferences.jsonl"), loaded(folder, tmp_path).to_list()
    assert len(rows) == made["rows"] > 0 and [
        (r["prompt"][0]["content"], r["chosen"][0]["content"], r["rejected"][0]["content"], r["id"]) for r in back
    ] == [(r["prompt"], r["chosen"], r["rejected"], r["id"]) for r in rows]
    assert {m["role"] for r in back for m in r["prompt"]} == {"user"} and {
        m["role"] for r in back for k in ("chosen", "rejected") for m in r[k]
    } == {"assistant"}
    scores = {s.id: s for s in read_rows(tiny_run / "seed0/scir/m2" / "scores.jsonl", Score)}
    for r in back:
        s = scores[r["id"]]
        assert [abs(r[f"margin_{k}"]) for k in s.margins] == [abs(m) for m in s.margins.values()] and all(
            r[f"margin_{k}"] > 0 for k in s.margins
        )  # all agree with the choice
    d = DatasetCard.load(folder / "README.md").data
    assert (
        d.license == "unknown"
        and d.size_categories == ["n<1K"]
        and {f["name"] for f in d.dataset_info["features"]} == set(back[0])
    )
    pairs, dropped = load_pairs(str(folder / "data" / "train.parquet"))
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [
        (r["prompt"], r["chosen"], r["rejected"]) for r in rows
    ] and not any(dropped.values())


def test_agreed_pairs_of_a_warm_start(tiny_run, tmp_path, at_root):
    file = tiny_run / "seed0/m1/agreed.jsonl"
    made = export_dataset(str(file), tmp_path / "agreed", "cc-by-4.0")
    rows, back = read_rows(file), loaded(tmp_path / "agreed", tmp_path).to_list()
    assert (
        made["licence"] == "cc-by-4.0"
        and [[r["margin_generative"], r["margin_implicit"]] for r in back]
        == [[r["margin_generative"], r["margin_implicit"]] for r in rows]
        and "confidence" not in back[0]
    )
    assert "this model's own answers" in (tmp_path / "agreed" / "README.md").read_text()


def test_cream_may_favour_the_side_that_was_not_preferred(tokenizer, recipe):
    from scir.export.folders import LABELLERS
    from scir.stages.optimise import preference_rows, training_pairs

    score = scored_pair(response_a="preferred", response_b="other", margins={"implicit": 1.0, "generative": 1.0})
    for before, chosen in ((0.0, "other"), (-2.0, "preferred")):
        pairs, _ = training_pairs(
            tokenizer, [score], recipe.arm("cream"), {"p/0": {"previous": -1.0}, "p/1": {"previous": before}}
        )
        assert preference_rows(pairs, [score])[0]["chosen"] == chosen
    assert "preferred by the implicit reward, or the other side if" in LABELLERS["cream"]


def test_replayed_pairs_and_sides(tiny_run, tmp_path):
    "A pair chosen on side b, and one that no model scored."

    run = tmp_path / "tiny"
    for f in ("recipe.yaml", "manifest.json", "seed0/m1/scores.jsonl"):
        write_text(run / f, (tiny_run / f).read_text())
    s = read_rows(run / "seed0/m1/scores.jsonl", Score)[0]
    write_rows(
        run / "seed0/srlm/m2/preferences.jsonl",
        [
            {"id": s.id, "prompt": s.prompt, "chosen": s.response_b, "rejected": s.response_a, "confidence": 1.0},
            {"id": "q1", "prompt": "2+2?", "chosen": "4", "rejected": "5", "confidence": 1.0},
        ],
    )
    with pytest.raises(
        ValueError, match="seed0/srlm/m2/preferences.jsonl has changed since it was written; run `scir run` first"
    ):
        export_dataset(str(run / "seed0/srlm/m2"), tmp_path / "out")
    noted(run, "optimise", "seed0/srlm/m2", "preferences.jsonl")
    export_dataset(str(run / "seed0/srlm/m2"), tmp_path / "out")
    first, second = loaded(tmp_path / "out", tmp_path)
    assert [first[f"margin_{k}"] for k in s.margins] == [-m for m in s.margins.values()] and second[
        "margin_implicit"
    ] is None
    said = (tmp_path / "out" / "README.md").read_text()
    assert (
        "2 preference pairs. 1 are the previous model's own answers" in said
        and "preferred by the judge" in said
        and "1 are labelled seed pairs from data/pairs.jsonl" in said
    )


@pytest.mark.filterwarnings("ignore")
def test_trl_trains_on_it_as_it_is(shared, tiny_run, tmp_path, at_root):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    folder, pairs = shared["merged"][0], loaded(shared["dataset"][0], tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    args = DPOConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        learning_rate=1e-3,
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder), args=args, train_dataset=pairs, processing_class=tokenizer
    )
    row, seen = pairs[0], trainer.train_dataset[0]
    answer = encode_response(tokenizer, row["chosen"][0]["content"])
    assert (
        seen["prompt_ids"] == encode_prompt(tokenizer, row["prompt"][0]["content"])
        and seen["chosen_ids"][: len(answer)] == answer
    )
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    assert trainer.state.global_step == 1 and any(
        not torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items()
    )


# folders and the hub --------------------------------------------------------
def test_a_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(RuntimeError):
        with whole_folder(tmp_path / "new" / "x") as tmp:
            write_text(tmp / "f", "half")
            raise RuntimeError
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty") as tmp:
        write_text(tmp / "f", "whole")
    assert (tmp_path / "empty" / "f").read_text() == "whole"
    write_text(tmp_path / "file", "mine")
    for taken in ("empty", "file"):
        with pytest.raises(ValueError, match="give a new or empty folder"):
            with whole_folder(tmp_path / taken):
                pass
    assert (tmp_path / "file").read_text() == "mine" and sorted(f.name for f in tmp_path.iterdir()) == [
        "empty",
        "file",
        "new",
    ]


def test_the_current_folder_is_refused(tiny_run, tmp_path, monkeypatch):
    "A built-in base would be made below it, and pushed."
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="give a subfolder"):
        export_dataset(str(tiny_run / NODE), ".")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported(tiny_run, tmp_path, at_root):
    (tmp_path / "adapter").mkdir()
    write_text(tmp_path / "run" / "recipe.yaml", (tiny_run / "recipe.yaml").read_text())
    write_rows(tmp_path / "run" / "seed0/srlm/m2" / "preferences.jsonl", [])
    noted(tmp_path / "run", "optimise", "seed0/srlm/m2", "preferences.jsonl")
    for model, words in (
        ("data/models/tiny-random", "not a model of a run"),
        (tiny_run / "seed0/m0", "M_0 is the base model"),
        (tiny_run / "seed0/scir/m9", "no adapter there"),
        (tmp_path / "adapter", "not a model of a run"),
    ):
        for make in (export_adapter, export_merged):
            with pytest.raises((ValueError, FileNotFoundError), match=words):
                make(str(model), tmp_path / "out")
    for model, words in (
        (tiny_run / "seed0/m1", "give the agreed.jsonl"),
        (tiny_run / "seed0/m1/scores.jsonl", "preferences.jsonl or agreed.jsonl"),
        (tmp_path / "run" / "seed0/srlm/m2", "no pairs to export"),
    ):
        with pytest.raises(ValueError, match=words):
            export_dataset(str(model), tmp_path / "out")
    assert not (tmp_path / "out").exists() and origin(str(tiny_run / NODE / "adapter")) == origin(str(tiny_run / NODE))
