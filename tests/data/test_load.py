import pandas as pd
import pytest

from scir.data.chat import Message
from scir.data.load import (
    bucket,
    evaluation_rows,
    in_split,
    load_instructions,
    load_pairs,
    load_prompts,
    merged,
    prompt_pool,
    read_source,
    split_of,
)
from scir.recipe import DataSpec, RecipeError, parse_recipe
from scir.stages.sft import seed_pairs
from scir.store import LabelledPair, Prompt

from helpers import single_line


def say(role, content):
    return {"role": role, "content": content}


# formats ------------------------------------------------------------------
OASST = [
    dict(message_id="m1", parent_id=None, text="Root?", role="prompter", lang="en"),
    dict(message_id="m2", parent_id="m1", text="Answer", role="assistant", lang="en"),
    dict(message_id="m3", parent_id="m2", text="Follow up?", role="prompter", lang="en"),
]


ULTRA = [
    dict(
        prompt="P?",
        prompt_id="h1",
        chosen=[say("user", "P?"), say("assistant", "good")],
        rejected=[say("user", "P?"), say("assistant", "bad")],
        messages=[say("user", "P?"), say("assistant", "good")],
        score_chosen=8.0,
        score_rejected=4.0,
    )
]


ALPACA = [dict(instruction="Do.", output="Done.", generator="text_davinci_003", dataset="helpful_base")]


BENCH = [
    dict(
        prompt="P?",
        chosen="good",
        rejected="bad",
        chosen_model="x",
        rejected_model="y",
        subset="alpacaeval-easy",
        id=30,
    )
]


HH = [
    dict(
        chosen="\n\nHuman: One?\n\nAssistant: Yes.\n\nHuman: Two?\n\nAssistant: good",
        rejected="\n\nHuman: One?\n\nAssistant: Yes.\n\nHuman: Two?\n\nAssistant: bad",
    )
]


SELF = [
    dict(instruction="Add.", instances=[dict(input="1 2", output="3"), dict(input="2 2", output="4")]),
    dict(instruction="Sing.", instances=[dict(input="", output="la")]),
]


MT = [dict(question_id=81, category="writing", turns=["First?", "Second?"])]


LLMBAR = [
    dict(prompt="P?", response_a="bad", response_b="good", label="b"),
    dict(prompt="Q?", response_a="fine", response_b="poor", label="A"),
]


TURNS = (
    Message(role="user", content="One?"),
    Message(role="assistant", content="Yes."),
    Message(role="user", content="Two?"),
)


@pytest.mark.parametrize(
    "rows, prompts",
    [
        (OASST, ["Root?"]),
        (ULTRA, ["P?"]),
        (ALPACA, ["Do."]),
        (BENCH, ["P?"]),
        (HH, [TURNS]),
        (SELF, ["Add.\n\n1 2", "Sing."]),
        (MT, ["First?"]),
        (LLMBAR, ["P?", "Q?"]),
        ([dict(instruction="I", input="x", output="o")], ["I\n\nx"]),
    ],
)
def test_prompts_of_known_formats(file, rows, prompts):
    found, dropped = load_prompts(file(rows))
    assert (
        [p.prompt for p in found] == prompts
        and sum(dropped.values()) == len(rows) - len(prompts)
        and len({p.id for p in found}) == len(found)
    )


@pytest.mark.parametrize(
    "rows, expected",
    [
        (ULTRA, [("P?", "good", "bad")]),
        (BENCH, [("P?", "good", "bad")]),
        (HH, [(TURNS, "good", "bad")]),
        (LLMBAR, [("P?", "good", "bad"), ("Q?", "fine", "poor")]),
    ],
)
def test_pairs_of_known_formats(file, rows, expected):
    found, dropped = load_pairs(file(rows))
    assert [(p.prompt, p.chosen, p.rejected) for p in found] == expected and not dropped


@pytest.mark.parametrize(
    "rows, expected",
    [
        (ALPACA, [("Do.", "Done.")]),
        (SELF, [("Add.\n\n1 2", "3"), ("Sing.", "la")]),
        (ULTRA, [("P?", "good")]),
        ([dict(prompt="P", response="R")], [("P", "R")]),
    ],
)
def test_instructions_of_known_formats(file, rows, expected):
    assert load_instructions(file(rows))[0] == expected


def test_id_and_subset_are_kept(file):
    (row,), _ = load_pairs(file(BENCH))
    assert row.id == "30" and row.subset == "alpacaeval-easy"


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_file_kinds_read_alike(tmp_path, suffix):
    table, path = pd.DataFrame(BENCH), tmp_path / f"rows.{suffix}"
    {
        "jsonl": lambda: table.to_json(path, orient="records", lines=True),
        "json": lambda: table.to_json(path, orient="records"),
        "csv": lambda: table.to_csv(path, index=False),
        "parquet": lambda: table.to_parquet(path),
    }[suffix]()
    assert load_pairs(str(path))[0] == [
        LabelledPair(id="30", prompt="P?", chosen="good", rejected="bad", subset="alpacaeval-easy")
    ]


def test_a_changed_file_is_read_anew(file):
    assert (
        load_prompts(file([{"prompt": "a"}]))[0][0].prompt == "a"
        and load_prompts(file([{"prompt": "b"}]))[0][0].prompt == "b"
    )


# bad sources --------------------------------------------------------------
@pytest.mark.parametrize(
    "text, name, says",
    [
        ("", "x.jsonl", "empty"),
        ("[]", "x.json", "x.json"),
        ("\n\n", "x.jsonl", "x.jsonl"),
        ('{"prompt": "a"}\n{"prompt": "b', "x.jsonl", "cannot be read"),
        ("not json", "x.json", "cannot be read"),
        ("prompt", "x.txt", "unknown file type"),
        ("PAR1 no", "x.parquet", "cannot be read"),
        ("prompt\n", "x.csv", "x.csv"),
    ],
)
def test_unusable_file_is_one_clear_line(file, text, name, says):
    with pytest.raises(ValueError, match=says) as e:
        load_prompts(file(text, name))
    assert single_line(e) and name in str(e.value)


def test_missing_file_is_named():
    for source in ("./nowhere.jsonl", "nowhere.csv", "/nowhere"):
        with pytest.raises(FileNotFoundError, match="nowhere") as e:
            read_source(source)
        assert single_line(e)


def test_unreachable_hub_set_is_one_line():
    with pytest.raises((ValueError, OSError), match="nobody/nothing") as e:
        load_prompts("nobody/nothing:test")
    assert single_line(e)


def test_wrong_columns_list_what_was_expected(file):
    for load in (load_prompts, load_pairs, load_instructions):
        with pytest.raises(ValueError, match=r"\['colour'\].*prompt") as e:
            load(file([{"colour": "red"}]))
        assert single_line(e)


@pytest.mark.parametrize("label", ["c", True, -1, 3, "gpt-4"])
def test_wrong_label_names_row_and_label(file, label):
    rows = [dict(prompt="P", response_a="x", response_b="y", label=l) for l in ("a", label)]
    with pytest.raises(ValueError, match="row 2: label .* is neither 'a' nor 'b'") as e:
        load_pairs(file(rows))
    assert single_line(e) and repr(label) in str(e.value)


def test_useless_rows_are_dropped_and_counted(file):
    rows = [
        dict(prompt=p, chosen=c, rejected=r)
        for p, c, r in [
            ("P", "x", "y"),
            (" ", "x", "y"),
            ("P", "", "y"),
            ("P", "same", "same "),
            ("P", "x", "y"),
            ("Q", None, "y"),
        ]
    ]
    found, dropped = load_pairs(file(rows))
    assert len(found) == 1 and dropped == {"empty": 2, "equal responses": 1, "duplicate": 1, "not text": 1}
    found, dropped = load_prompts(file([{"prompt": "a"}, {"prompt": ""}, {"prompt": "a"}, {"prompt": None}]))
    assert len(found) == 1 and dropped == {"empty": 1, "duplicate": 1, "not a prompt": 1}
    with pytest.raises(ValueError, match="no usable row.*'empty': 2"):
        load_prompts(file([{"prompt": ""}, {"prompt": "\t"}]))


@pytest.mark.parametrize(
    "label, says", [(9, "9 is neither 1 nor 2"), (0, "0 is neither 1 nor 2"), ("a", "'a' is neither 1 nor 2")]
)
def test_a_wrong_label_of_llmbar_is_not_taken_for_2(file, label, says):
    with pytest.raises(ValueError, match=f"row 2: label {says}"):
        load_pairs(
            file(
                [
                    dict(input="P", output_1="a", output_2="b", label=1),
                    dict(input="Q", output_1="a", output_2="b", label=label),
                ]
            )
        )


@pytest.mark.parametrize(
    "row, reason",
    [
        (dict(turns="First?"), "malformed"),
        (dict(turns=[]), "malformed"),
        (dict(turns=[5]), "not text"),
        (dict(turns=["\ud800"]), "not Unicode"),
        (dict(turns=["a\ude00b"]), "not Unicode"),
    ],
)
def test_odd_prompts_are_dropped_under_their_reason(file, row, reason):
    rows, dropped = load_prompts(file([dict(turns=["Good?"]), row]))
    assert [r.prompt for r in rows] == ["Good?"] and dropped == {reason: 1}
    with pytest.raises(ValueError, match="no usable row") as e:
        load_prompts(file([row]))
    assert ("first malformed one is row 1" in str(e.value)) == (reason == "malformed")


def test_numbers_and_missing_marks_are_texts_in_a_csv(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,chosen,rejected\n2+2?,4,5\nAvailable?,NA,null\n")
    rows, dropped = load_pairs(str(tmp_path / "x.csv"))
    assert [(r.chosen, r.rejected) for r in rows] == [("4", "5"), ("NA", "null")] and dropped == {}


@pytest.mark.parametrize(
    "text, says",
    [
        ("prompt,chosen,rejected\nextra,p,c,r\n", "line 2: 4 fields where the header has 3"),
        ("prompt,chosen,rejected\np,c\n", "line 2: 2 fields"),
        ('prompt,chosen,rejected\na,b,c\n"p,c', "line 3: unexpected end"),
        ("prompt,prompt,chosen,rejected\np,q,c,r\n", "names a column twice"),
    ],
)
def test_a_csv_whose_columns_shift_is_refused(tmp_path, text, says):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=says):
        load_pairs(str(tmp_path / "x.csv"))


@pytest.mark.parametrize("field", ["id", "subset", "how"])
def test_ids_and_subsets_are_unicode_too(file, field):
    rows, dropped = load_pairs(
        file(
            [
                dict(prompt="P", chosen="a", rejected="b", **{field: "x"}),
                dict(prompt="Q", chosen="a", rejected="b", **{field: "\ud800"}),
            ]
        )
    )
    assert [r.prompt for r in rows] == ["P"] and dropped == {"not Unicode": 1}


@pytest.mark.parametrize(
    "text, says",
    [
        (b"\xff\xfe", "not UTF-8 (byte 0); save it as UTF-8"),
        (b'{"prompt": "a"}\n{"prompt": "b', "line 2"),
        (b'{"prompt": "a"}\n[1]\n', "row 2 is not an object"),
        (b"\0\0\n", "line 1"),
    ],
)
def test_a_broken_line_is_named(tmp_path, text, says):
    (tmp_path / "x.jsonl").write_bytes(text)
    with pytest.raises(ValueError) as e:
        load_prompts(str(tmp_path / "x.jsonl"))
    assert says in str(e.value) and "\n" not in str(e.value)


def test_rows_with_the_same_id_do_not_merge(file):
    "Responses and scores are filed under these ids."
    try:
        found, _ = load_prompts(file([{"id": "1", "prompt": "a"}, {"id": "1", "prompt": "b"}]))
    except ValueError as e:
        assert "id" in str(e)
    else:
        assert len({p.id for p in found}) == len(found)


def test_splits_are_disjoint_by_prompt_and_fixed(file):
    rows = [Prompt(id=str(i), prompt=f"prompt {i % 150}") for i in range(300)]
    parts = {s: {r.prompt for r in in_split(rows, s)} for s in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 150 and all(parts.values())
    assert (
        bucket("prompt 1") == bucket("prompt 1")
        and split_of("prompt 1") in parts
        and len(in_split(rows, "train", 5)) == 5
    )
    assert [r.prompt for r in in_split(rows, "train", 9)] == [
        r.prompt for r in in_split(rows[::-1], "train", 9)
    ]  # whatever the file's order


def test_held_out_prompts_are_not_trained_on(file):
    source = file([{"prompt": f"p{i}"} for i in range(20)])
    pairs = file([{"prompt": f"other {i}", "chosen": "a", "rejected": "b"} for i in range(20)], "pairs.jsonl")
    spec = lambda n, limit=None, labelled=(): DataSpec(
        prompts=source, pairs=pairs, held_out_prompts=n, prompt_limit=limit, labelled_sets=dict(labelled)
    )
    train, held, _ = prompt_pool(spec(6, 9))
    assert len(train) == 9 and len(held) == 6 and not {p.id for p in train} & {p.id for p in held}
    assert prompt_pool(spec(6, 3))[1] == held
    with pytest.raises(ValueError, match="none left") as e:
        prompt_pool(spec(20))
    assert single_line(e)
    known = file(
        [{"prompt": p.prompt, "chosen": "a", "rejected": "b"} for p in train[:4]], "set.jsonl"
    )  # evaluation prompts never train
    rest, _, dropped = prompt_pool(spec(6, None, {"known": known}))
    assert dropped["in an evaluation set"] == 4 and not {p.prompt for p in rest} & {p.prompt for p in train[:4]}


def labelled(n, name):
    return [{"prompt": f"{name} {i}", "chosen": "a", "rejected": "b"} for i in range(n)]


def test_several_sources_are_read_as_one(file):
    one, other = file(labelled(5, "x"), "1.jsonl"), file(labelled(2, "x") + labelled(3, "y"), "2.jsonl")
    rows, dropped = merged(load_pairs, (one, other))
    assert [r.prompt for r in rows] == [f"x {i}" for i in range(5)] + [f"y {i}" for i in range(3)] and dropped == {
        "duplicate": 2
    }
    clash = [file([{"id": "7", "prompt": p}], f"{p}.jsonl") for p in "ab"]
    with pytest.raises(ValueError, match="'7'.*a.jsonl.*b.jsonl") as e:
        merged(load_prompts, clash)
    assert single_line(e)


def test_a_named_seed_source_is_evaluated_on_its_test_split_alone(file):
    ours, theirs, other, more = (file(labelled(60, n), f"{n}.jsonl") for n in ("ours", "theirs", "other", "more"))
    spec = DataSpec(pairs=[ours, theirs], labelled_sets={"named": theirs, "whole": [other, more]})
    found = {name: {r.prompt for r in rows} for name, (rows, _) in evaluation_rows(spec).items()}
    test = lambda source: {r.prompt for r in in_split(load_pairs(source)[0], "test")}
    assert found == {
        "held-out": test(ours),
        "named": test(theirs),
        "whole": {f"{n} {i}" for n in ("other", "more") for i in range(60)},
    } and all(found.values())
    assert {r.prompt for r in evaluation_rows(DataSpec(pairs=[ours, theirs]))["held-out"][0]} == test(ours) | test(
        theirs
    )
    mixed = {
        r.prompt
        for r in evaluation_rows(DataSpec(pairs=[ours, theirs], labelled_sets={"mixed": [theirs, other]}))["mixed"][0]
    }
    assert mixed == test(theirs) | {f"other {i}" for i in range(60)}
    with pytest.raises(RecipeError, match="none is held out") as e:
        parse_recipe({"data": {"pairs": ours, "labelled_sets": {"named": ours}}})
    assert single_line(e) and "max_prompt_tokens" not in str(e.value)
    few = file([r for r in labelled(60, "few") if split_of(r["prompt"]) == "train"], "few.jsonl")
    with pytest.raises(ValueError, match="set named: no row of .*few.jsonl falls in the test split") as e:
        evaluation_rows(DataSpec(pairs=[ours, few], labelled_sets={"named": few}))
    assert single_line(e)


def test_training_takes_every_seed_source_and_no_evaluation_prompt(file, tokenizer):
    ours, theirs = (file(labelled(60, n), f"{n}.jsonl") for n in ("ours", "theirs"))
    shared = file([r for r in labelled(60, "theirs") if split_of(r["prompt"]) == "train"][:3], "shared.jsonl")
    trained = lambda **kw: seed_pairs(tokenizer, parse_recipe({"data": {"pairs": [ours, theirs], "labelled_sets": kw}}))
    pairs, dropped = trained()
    assert {p.prompt for p in pairs} == {
        r.prompt for s in (ours, theirs) for r in in_split(load_pairs(s)[0], "train")
    } and dropped == {}
    fewer, dropped = trained(named=theirs, shared=shared)
    assert (
        len(fewer) == len(pairs) - 3
        and dropped == {"in an evaluation set": 3}
        and not {p.prompt for p in fewer} & {r.prompt for r in load_pairs(shared)[0]}
    )
