"""Files of benchmarks as their readers see them: AlpacaEval itself, the layouts of FastChat and RewardBench."""

import json
from functools import partial

import pytest

from scir.export.benchmarks import (
    SECTIONS,
    answer_questions,
    mt_bench,
    rewardbench,
    usable_questions,
)
from scir.model.decoding import generate
from scir.model.logprobs import encode_turns
from scir.model.weights import tiny_model
from scir.recipe import SamplingSpec
from scir.stages.align import Duel, alpaca_eval, length_controlled, preference, win_rate
from scir.store import read_json, row_seed, write_json, write_rows

from helpers import response, scored_pair


TEXTS = [
    ("Name a bird.", "Owl"),
    ("“é” ü ☃\u2028?", 'naïve\n\n"quoted" \\ back'),
    ("3", "001"),
    ("Say null.", "null"),
    ("Empty", ""),
]


def responses():
    return [response(f"p{i}", c, p, r if c == 0 else "other") for i, (p, r) in enumerate(TEXTS) for c in (0, 1)]


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
    row = lambda d, text: response(d.id, prompt=d.instruction, text=text)
    for name, side in (("m2", "output"), ("ref", "reference")):
        write_json(tmp_path / f"{name}.json", alpaca_eval([row(d, getattr(d, side)) for d in made], name))
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
        scored_pair(id=f"{subset}-{i}", margins={"g": m, "i": -m}, label=label, subset=subset)
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
