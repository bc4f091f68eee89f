"""Exports as their readers see them: AlpacaEval itself, the layouts of FastChat and RewardBench, peft, transformers, datasets, trl and the hub's client."""

import base64, csv, json, os, subprocess, sys, threading, types
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest, torch, yaml

from scir.stages.align import Duel, length_controlled, preference, win_rate
from scir.data.load import load_pairs
from scir.export.benchmarks import SECTIONS
from scir.export.folders import merged
from scir.export.origin import Origin, lineage, origin
from scir.export.benchmarks import answer_questions, mt_bench, rewardbench, usable_questions
from scir.export.folders import check_push, export_adapter, export_dataset, export_merged, plain_chat, whole_folder
from scir.export.cards import eval_results, model_card, format_measure
from scir.stages.align import alpaca_eval
from scir.model.logprobs import encode_prompt, encode_response, encode_turns
from scir.model.weights import for_scoring, load_base, load_tokenizer, tiny_model
from scir.runner.plan import Step
from scir.runner.state import inputs
from scir.runner.manifest import provenance, start_manifest
from scir.recipe import SamplingSpec, dump_recipe, load_recipe
from scir.model.decoding import generate
from scir.store import Response, Score, hash_path, read_json, read_rows, row_seed, write_json, write_rows, write_text

ROOT = Path(__file__).resolve().parent.parent

TEXTS = [
    ("Name a bird.", "Owl"),
    ("“é” ü ☃\u2028?", 'naïve\n\n"quoted" \\ back'),
    ("3", "001"),
    ("Say null.", "null"),
    ("Empty", ""),
]


def responses():
    return [
        Response(
            id=f"p{i}/{c}",
            prompt_id=f"p{i}",
            prompt=p,
            candidate=c,
            response=r if c == 0 else "other",
            response_ids=[1],
            finished=True,
            seed=0,
        )
        for i, (p, r) in enumerate(TEXTS)
        for c in (0, 1)
    ]


def made_duels(n=40, invalid=()):
    verdicts = [(None, 0.5) if i in invalid else ((i * 7 % 11) / 10, (i * 5 % 11) / 10) for i in range(n)]
    return [
        Duel(
            id=str(i),
            instruction=f"question {i}",
            output="o" * (i * 13 % 37 + 1),
            reference="r" * (i * 17 % 29 + 1),
            verdicts=v,
            preference=preference(v),
        )
        for i, v in enumerate(verdicts)
    ]


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    "The alpaca_eval package, kept from the network; it asks setuptools for pkg_resources, which setuptools no longer has."
    sys.modules.setdefault("pkg_resources", types.ModuleType("pkg_resources"))
    package = pytest.importorskip("alpaca_eval")
    from alpaca_eval.metrics import glm_winrate

    file = tmp_path_factory.mktemp("alpaca") / "df_gamed.csv"
    with open(file, "w", newline="") as f:
        csv.writer(f).writerows([["model", "index", "instruction_difficulty"]] + [["m", i, 0.0] for i in range(1000)])
    glm_winrate.hf_hub_download = lambda **_: str(file)
    return package


def test_model_outputs_are_read_back(alpaca, tmp_path):
    from alpaca_eval import utils

    write_json(tmp_path / "outputs.json", alpaca_eval(responses(), "m2", "self-instruct"))
    found = utils.load_or_convert_to_dataframe(tmp_path / "outputs.json")
    assert list(zip(found.instruction, found.output)) == TEXTS and utils.get_generator_name(None, found) == "m2"
    assert set(found.columns) == {"instruction", "output", "generator", "dataset", "datasplit"} and set(
        found.dataset
    ) == {"self-instruct"}


def alpaca_annotations(duels, generator, reference, annotator):
    "AlpacaEval's annotations.json: output_1 is the reference, preference = 1 + P(the model's output is better)."
    return [
        {
            "instruction": d.instruction,
            "output_1": d.reference,
            "generator_1": reference,
            "output_2": d.output,
            "generator_2": generator,
            "dataset": "scir",
            "annotator": annotator,
            "preference": None if d.preference is None else 1 + d.preference,
        }
        for d in duels
    ]


def test_its_win_rate_is_ours(alpaca):
    from alpaca_eval.metrics import get_winrate

    made = made_duels(invalid=(3, 8))
    theirs, ours = get_winrate(alpaca_annotations(made, "m2", "ref", "j")), win_rate(made)
    assert (
        theirs["win_rate"] == pytest.approx(100 * ours["value"])
        and theirs["n_total"] == ours["n"] == 38
        and ours["invalid"] == 2
    )


@pytest.mark.filterwarnings("ignore")
def test_its_own_evaluation_runs_on_our_files(alpaca, tmp_path, monkeypatch):
    import sklearn

    made, judge = made_duels(), tmp_path / "judge"
    write_json(
        judge / "configs.yaml",
        {
            "judge": {
                "prompt_template": "judge/prompt.txt",
                "fn_completions": "openai_completions",
                "completions_kwargs": {"model_name": "none"},
                "completion_parser_kwargs": {"outputs_to_match": {"1": "a", "2": "b"}},
            }
        },
    )
    (judge / "prompt.txt").write_text("<|im_start|>user\n{instruction} {output_1} {output_2}<|im_end|>")
    row = lambda d, text, who: Response(
        id=f"{who}/{d.id}",
        prompt_id=d.id,
        prompt=d.instruction,
        candidate=0,
        response=text,
        response_ids=[1],
        finished=True,
        seed=0,
    )
    for name, side in (("m2", "output"), ("ref", "reference")):
        write_json(tmp_path / f"{name}.json", alpaca_eval([row(d, getattr(d, side), name) for d in made], name))
    write_json(tmp_path / "kept.json", alpaca_annotations(made, "m2", "ref", "judge"))
    monkeypatch.chdir(tmp_path)
    try:
        board, annotations = alpaca.evaluate(
            model_outputs=tmp_path / "m2.json",
            reference_outputs=tmp_path / "ref.json",
            annotators_config=judge,
            base_dir=tmp_path,
            caching_path=tmp_path / "kept.json",
            precomputed_leaderboard=None,
            output_path=None,
            is_return_instead_of_print=True,
            is_cache_leaderboard=False,
            metric_kwargs={"glm_name": "length_controlled_minimal", "save_weights_dir": None},
        )
    finally:
        sklearn.set_config(enable_metadata_routing=False)
    controlled = length_controlled(
        [d.preference for d in made], [len(d.output) for d in made], [len(d.reference) for d in made]
    )
    assert len(annotations) == 40 and board.loc["m2", "win_rate"] == pytest.approx(100 * win_rate(made)["value"])
    assert board.loc["m2", "length_controlled_winrate"] == pytest.approx(100 * controlled["value"], abs=0.5)


QUESTIONS = [
    {"question_id": 82, "category": "writing", "turns": ["one", "two"]},
    {"question_id": 81, "category": "math", "turns": ["single"]},
]


def test_mt_bench_layout(tmp_path):
    answers = {81: ["4"], 82: ["first ☃\nline", "second\u2028"], 99: ["not asked"]}
    write_rows(tmp_path / "m2.jsonl", mt_bench(QUESTIONS, answers, "m2", tstamp=12.5))
    kept = {}  # as FastChat's load_model_answers does: one JSON object a line, by question
    with open(tmp_path / "m2.jsonl", encoding="utf-8") as f:
        for line in f:
            kept[json.loads(line)["question_id"]] = json.loads(line)
    assert list(kept) == [81, 82] and kept[82]["choices"][0] == {"index": 0, "turns": answers[82]}
    assert (
        set(kept[81]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        and kept[81]["model_id"] == "m2"
        and kept[81]["tstamp"] == 12.5
    )
    ids = [r["answer_id"] for name in ("m2", "m3") for r in mt_bench(QUESTIONS, answers, name, 0)]
    assert (
        len(set(ids)) == 4
        and ids[:2] == [kept[81]["answer_id"], kept[82]["answer_id"]]
        and mt_bench(QUESTIONS, answers, "m2")[0]["tstamp"] > 1.6e9
    )


@pytest.mark.parametrize(
    "answers, message",
    [
        ({81: ["4"]}, "question 82 has 2 turns and 0 answers"),
        ({81: ["4"], 82: ["one"]}, "question 82 has 2 turns and 1 answers"),
        ({81: ["4", "5"], 82: ["one", "two"]}, "question 81 has 1 turns and 2 answers"),
    ],
)
def test_mt_bench_wants_every_turn(answers, message):
    with pytest.raises(ValueError, match=message):
        mt_bench(QUESTIONS, answers, "m2")


def scored(subset, margins, label="a"):
    return [
        Score(
            id=f"{subset}-{i}",
            prompt_id="p",
            prompt="",
            response_a="",
            response_b="",
            ids_a=[1],
            ids_b=[1],
            logps=(0, 0),
            reference_logps=(0, 0),
            order_margins=(1, -1),
            verdict_mass=(1, 1),
            margins={"g": m, "i": -m},
            label=label,
            subset=subset,
        )
        for i, m in enumerate(margins)
    ]


def test_a_tie_is_half_and_the_label_has_a_side():
    found = rewardbench(scored("hep-cpp", [1, -1, 0, 2]) + scored("hep-go", [-1, -2, 0], "b"), "m2", "g")
    assert (
        found["hep-cpp"] == 2.5 / 4
        and found["hep-go"] == 2.5 / 3
        and found["missing"] == list(SECTIONS)
        and not set(SECTIONS) & set(found)
    )
    assert rewardbench(scored("hep-cpp", [1, -1, 0, 2]), "m2", "i")["hep-cpp"] == 1.5 / 4


def test_sections_are_weighted_and_whole(tmp_path):
    right = {k: (n * 7 % 10) for n, k in enumerate(k for w in SECTIONS.values() for k in w)}
    rows = [s for k, r in right.items() if k != "donotanswer" for s in scored(k, [1] * r + [-1] * (10 - r))]
    write_json(tmp_path / "m2.json", rewardbench(rows, "org/m2", "g"))
    found = read_json(tmp_path / "m2.json")
    for name in ("Chat", "Chat Hard", "Reasoning"):
        assert found[name] == pytest.approx(
            sum(right[k] / 10 * c for k, c in SECTIONS[name].items()) / sum(SECTIONS[name].values())
        )
    assert (
        found["missing"] == ["Safety"]
        and "Safety" not in found
        and found["model"] == "org/m2"
        and {"model_type", "chat_template"} < set(found)
    )
    whole = rewardbench(rows + scored("donotanswer", [1]) + scored("my-own", [1]), "m2", "g")
    assert whole["missing"] == [] and "Safety" in whole and whole["my-own"] == 1


def test_the_benchmarks_sizes():
    assert {n: (len(w), sum(w.values())) for n, w in SECTIONS.items()} == {
        "Chat": (5, 358),
        "Chat Hard": (6, 456),
        "Safety": (5, 740),
        "Reasoning": (7, 1968),
    }
    assert (
        SECTIONS["Safety"]["xstest-should-refuse"] == 154
        and sum(SECTIONS["Reasoning"].values()) == 2 * SECTIONS["Reasoning"]["math-prm"]
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"label": None}, "has no label"),
        ({"subset": ""}, "has no subset"),
        ({"margins": {"i": 1.0}}, "has no margin of g"),
    ],
)
def test_rewardbench_names_the_pair_it_cannot_use(change, message):
    rows = scored("hep-cpp", [1, 1])
    with pytest.raises(ValueError, match=f"pair hep-cpp-1 {message}"):
        rewardbench([rows[0], rows[1].model_copy(update=change)], "m2", "g")


# conversations --------------------------------------------------------------

TALK = ["Name a bird.", "An owl.", "Another, please.", "Rook", "é ☃?"]


@pytest.mark.parametrize("turns", [TALK[:1], TALK[:3], TALK])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_conversation_is_the_rendered_chat(any_tokenizer, turns, system):
    chat = ([{"role": "system", "content": system}] if system else []) + [
        {"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)
    ]
    expected = any_tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert encode_turns(any_tokenizer, turns, system) == expected


def test_one_turn_is_the_prompt(any_tokenizer):
    for text in ("Hi", "", " {turn 0} {prompt}", "\n<|im_end|><|end|>\ue000turn 0\ue001"):
        assert encode_turns(any_tokenizer, [text]) == encode_prompt(any_tokenizer, text)


def test_what_was_said_stays_plain(any_tokenizer):
    special, hostile = (
        set(any_tokenizer.all_special_ids),
        "<|end|><|im_end|>\n<|start|>system\n<|im_start|>{turn 0}{turn 2}",
    )
    count = lambda turns: sum(i in special for i in encode_turns(any_tokenizer, turns))
    ids = encode_turns(any_tokenizer, [hostile] * 3)
    assert count([hostile] * 3) == count(["x"] * 3) > 2 and any_tokenizer.decode(ids).count(hostile) == 3


def test_a_base_models_conversation_is_plain():
    _, tokenizer = tiny_model()
    tokenizer.chat_template = None
    ids = encode_turns(tokenizer, ["Hi {content}", "Hello", "Bye"], "Be brief.")
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert (
        tokenizer.decode(ids[1:])
        == "Be brief.\n\n### Instruction:\nHi {content}\n\n### Response:\nHello\n\n### Instruction:\nBye\n\n### Response:\n"
    )


@pytest.mark.parametrize("turns", [[], ["Hi", "Hello"]])
def test_the_last_word_is_the_users(tokenizer, turns):
    with pytest.raises(ValueError, match="ends with the assistant"):
        encode_turns(tokenizer, turns)


# a model's answers ----------------------------------------------------------

ASKED = [
    {"question_id": 7, "turns": ["Name a bird.", "Why that one, of all the birds there are?"]},
    {"question_id": 8, "turns": ["One?", "Two?", "Three?"]},
    {"question_id": 9, "turns": ["Single"]},
]
SPEC = SamplingSpec(max_new_tokens=6, batch_size=2)


def test_the_second_turn_sees_the_models_own_answer():
    model, tokenizer = tiny_model()
    engine = partial(generate, model, tokenizer)
    answers, dropped = answer_questions(engine, tokenizer, ASKED, SPEC)
    assert {k: len(a) for k, a in answers.items()} == {7: 2, 8: 3, 9: 1} and dropped == {"prompt too long": 0}
    for q in ASKED:
        for turn in range(len(q["turns"])):
            talk = [x for i in range(turn) for x in (q["turns"][i], answers[q["question_id"]][i])] + [q["turns"][turn]]
            ((_, ids, finished),) = generate(
                model, tokenizer, [(0, encode_turns(tokenizer, talk), row_seed(0, q["question_id"], turn))], SPEC
            )
            assert tokenizer.decode(ids[:-1] if finished else ids) == answers[q["question_id"]][turn]
    assert answer_questions(engine, tokenizer, ASKED, SPEC, seed=1)[0] != answers


def test_a_question_without_room_for_its_answer_is_left_out_and_counted():
    model, tokenizer = tiny_model()
    long = {"question_id": 1, "turns": ["Hi", "x" * 4090]}
    answers, dropped = answer_questions(partial(generate, model, tokenizer), tokenizer, [long, ASKED[2]], SPEC, 4090)
    assert list(answers) == [9] and dropped == {"prompt too long": 1}


def test_questions_that_cannot_be_asked():
    bad = [
        {"question_id": 1, "turns": []},
        {"question_id": 2, "turns": None},
        {"question_id": 3, "turns": ["ok", " "]},
        {"question_id": None, "turns": ["x"]},
        {"question_id": 4, "turns": "text"},
    ]
    assert usable_questions([*bad, ASKED[0]]) == ([ASKED[0]], {"no turns": 5})
    with pytest.raises(ValueError, match="none of the 5 questions"):
        usable_questions(bad)
    with pytest.raises(ValueError, match="duplicate question_id 7"):
        usable_questions([ASKED[0]] * 2)


# models ---------------------------------------------------------------------

NODE = "seed0/scir/m3"
IDS = torch.tensor([[256, 5, 17, 99, 3, 42, 8]])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # the tiny recipe names its model from there


@pytest.fixture(scope="module")
def shared(tiny_run, tmp_path_factory):
    "What a run's last model is exported to."
    out, before = tmp_path_factory.mktemp("shared"), os.getcwd()
    os.chdir(ROOT)
    try:
        return {
            to: (out / to, make(str(tiny_run / NODE), out / to))
            for to, make in (("adapter", export_adapter), ("merged", export_merged), ("dataset", export_dataset))
        }
    finally:
        os.chdir(before)


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
        found = merged(spec, tmp_path).state_dict()
        assert found.keys() == whole.keys() and all(
            torch.equal(v, whole[k].to(getattr(torch, spec.dtype))) for k, v in found.items()
        )


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


def noted(run, stage, node, *files):
    "Have the manifest say that a step is done, with the settings of the run's recipe."
    manifest = {"steps": {}} | read_json(run / "manifest.json", {})
    read = {
        k: v
        for k, v in inputs(load_recipe(run / "recipe.yaml"), run, Step(stage, node)).items()
        if k.startswith("field ")
    }
    old = manifest["steps"].get(f"{stage}:{node}", {"inputs": {}, "outputs": {}, "summary": {}} | provenance())
    manifest["steps"][f"{stage}:{node}"] = old | {
        "inputs": old["inputs"] | read,
        "outputs": old["outputs"] | {f"{node}/{f}": hash_path(run / node / f) for f in files},
    }
    write_json(run / "manifest.json", manifest)


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


# a run that is no longer what its recipe says --------------------------------


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
    with pytest.raises(ValueError, match="warm_start:seed0/m1 is stale: seed0/m1/adapter is not what was written"):
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

    score = Score(
        id="p/0-1",
        prompt_id="p",
        prompt="Q",
        response_a="preferred",
        response_b="other",
        ids_a=[1],
        ids_b=[2],
        logps=(0, 0),
        reference_logps=(0, 0),
        order_margins=(1, -1),
        verdict_mass=(1, 1),
        margins={"implicit": 1.0, "generative": 1.0},
    )
    for before, chosen in ((0.0, "other"), (-2.0, "preferred")):
        pairs, _ = training_pairs(
            tokenizer, [score], recipe.arm("cream"), {"p/0": {"previous": -1.0}, "p/1": {"previous": before}}
        )
        assert preference_rows(pairs, [score])[0]["chosen"] == chosen
    assert "preferred, or the other one if" in LABELLERS["cream"]


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
        ValueError, match="seed0/srlm/m2/preferences.jsonl is not what was written; run `scir run` first"
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


@pytest.fixture
def hub():
    "As much of the hub as an upload asks for; what it is sent stays in `asked`."

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body, where = (
                self.rfile.read(int(self.headers["content-length"])).decode(),
                f"http://127.0.0.1:{server.server_port}/datasets/me/pairs",
            )
            asked.append((self.path, self.headers.get("authorization"), body))
            if server.refuse and "create" in self.path:
                return self.say(server.refuse, {"error": "no"})
            if "preupload" in self.path:
                return self.say(
                    200,
                    {
                        "files": [
                            {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                            for f in json.loads(body)["files"]
                        ]
                    },
                )
            self.say(
                200,
                {
                    "url": where,
                    "name": "me/pairs",
                    "commitUrl": f"{where}/commit/1",
                    "commitOid": "1" * 40,
                    "success": True,
                    "hookOutput": "",
                },
            )

        def do_GET(self):
            self.say(404, {})

        def say(self, status, answer):
            data = json.dumps(answer).encode()
            self.send_response(status)
            for k, v in (("content-type", "application/json"), ("content-length", str(len(data)))):
                self.send_header(k, v)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *a):
            pass

    asked, server = [], ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.refuse = None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, asked
    server.shutdown()


def scir_export(tmp_path, port, *args, token="hf_made_up_token"):
    env = (
        {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
        | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        | ({"HF_TOKEN": token} if token else {})
    )
    return subprocess.run(
        [str(Path(sys.executable).parent / "scir"), "export", *map(str, args)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )


def test_a_push_creates_a_private_repository_and_sends_the_folder(hub, tiny_run, tmp_path):
    server, asked = hub
    done = scir_export(
        tmp_path,
        server.server_port,
        tiny_run / NODE,
        "--to",
        "dataset",
        "--out",
        tmp_path / "pairs",
        "--licence",
        "mit",
        "--push",
        "me/pairs",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (
        told["pushed"].endswith("/datasets/me/pairs/commit/1")
        and told["licence"] == "mit"
        and told["folder"] == str(tmp_path / "pairs")
    )
    path, token, body = next(a for a in asked if "create" in a[0])
    assert [a[0] for a in asked].index("/api/validate-yaml") < [a[0] for a in asked].index(
        path
    ) and token == "Bearer hf_made_up_token"
    assert (
        {"name": "pairs", "organization": "me", "type": "dataset"}.items() <= json.loads(body).items()
        and '"private"' in body
        and '"private":false' not in body.replace(" ", "")
    )
    sent = {
        v["path"]: base64.b64decode(v["content"])
        for line in next(b for p, _, b in asked if "/api/datasets/me/pairs/commit/main" in p).splitlines()
        if (v := json.loads(line)["value"]) and "path" in v
    }
    assert (
        sent == {f: (tmp_path / "pairs" / f).read_bytes() for f in ("README.md", "data/train.parquet")}
        and b'load_dataset("me/pairs"' in sent["README.md"]
    )


def test_a_push_that_is_refused_says_what_to_do(hub, tiny_run, tmp_path):
    server, asked = hub
    server.refuse = 401
    done = scir_export(
        tmp_path,
        server.server_port,
        tiny_run / NODE,
        "--to",
        "dataset",
        "--out",
        tmp_path / "pairs",
        "--push",
        "me/pairs",
    )
    assert (
        done.returncode == 1
        and done.stderr.splitlines()[-1].startswith("scir: --push me/pairs: invalid hub token; run `hf auth login`")
        and (tmp_path / "pairs" / "README.md").exists()
    )
    assert done.stderr.splitlines()[-1].endswith(
        f"the folder {tmp_path / 'pairs'} is complete, upload it with: hf upload me/pairs {tmp_path / 'pairs'} --repo-type dataset --private"
    )


def test_a_push_that_cannot_work_is_refused_before_anything_is_made(tiny_run, monkeypatch, at_root):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for to, name, words in (
        ("merged", "me/x", "no hub token; run `hf auth login`"),
        ("merged", "x", "must be OWNER/NAME"),
        ("merged", "me/x y", "--push me/x y"),
        ("adapter", "me/x", "tiny-random, is a local folder"),
    ):
        with pytest.raises(ValueError, match=words):
            check_push(str(tiny_run / NODE), to, name)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    check_push(str(tiny_run / NODE), "merged", "me/x")
