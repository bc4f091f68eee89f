"""Every layout of the table in docs/howto/pairs.md, and what is refused or dropped."""

import json, re

import pytest

from scir.data.chat import Message, as_text, conversation, first_turn, messages
from scir.data.load import load_instructions, load_pairs, load_prompts, prompt_pool, shown_first, split_of
from scir.recipe import DataSpec
from scir.store import LabelledPair, digest, read_rows, write_rows

from helpers import ROOT


def say(*turns):
    return [{"role": {"s": "system", "u": "user", "a": "assistant"}[t[0]], "content": t[2:]} for t in turns]


def talk(*turns):
    return tuple(Message(**m) for m in say(*turns))


@pytest.fixture
def file(tmp_path):
    def write(*rows, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
        return str(tmp_path / name)

    return write


PARTS = lambda text: [{"type": "text", "text": text}]
QUESTION = say("u:Hi?", "a:Yes.", "u:Fruit?")
TALK = talk("u:Hi?", "a:Yes.", "u:Fruit?")
BRIEF = talk("s:Be brief.", "u:Fruit?")
AB = dict(response_a="salt", response_b="fig")
LAYOUTS = {  # name in the table -> (row, prompt); the better answer is `fig`, the other one is `salt`
    "prompt, chosen, rejected as text": (dict(prompt="Fruit?", chosen="fig", rejected="salt"), "Fruit?"),
    "a system column": (dict(system="Be brief.", prompt="Fruit?", chosen="fig", rejected="salt"), BRIEF),
    "prompt as messages": (dict(prompt=say("s:Be brief.", "u:Fruit?"), chosen="fig", rejected="salt"), BRIEF),
    "chosen, rejected as messages": (dict(prompt=QUESTION, chosen=say("a:fig"), rejected=say("a:salt")), TALK),
    "whole conversations beside their prompt": (
        dict(prompt="Hi?", chosen=QUESTION + say("a:fig"), rejected=QUESTION + say("a:salt")),
        TALK,
    ),
    "whole conversations without prompt": (
        dict(chosen=QUESTION + say("a:fig"), rejected=QUESTION + say("a:salt")),
        TALK,
    ),
    "content as text parts": (
        dict(
            prompt=[dict(role="user", content=PARTS("Fruit?"))],
            chosen=[dict(role="assistant", content=PARTS("fig"))],
            rejected=[dict(role="assistant", content=PARTS("salt"))],
        ),
        "Fruit?",
    ),
    "messages as JSON": (
        dict(prompt=json.dumps(QUESTION), chosen=json.dumps(say("a:fig")), rejected=json.dumps(say("a:salt"))),
        TALK,
    ),
    "conversations with from, value": (
        dict(
            system="Be brief.",
            conversations=[{"from": "human", "value": "Fruit?"}],
            chosen={"from": "gpt", "value": "fig"},
            rejected={"from": "gpt", "value": "salt"},
        ),
        BRIEF,
    ),
    "another name for the prompt": (dict(system="Be brief.", question="Fruit?", chosen="fig", rejected="salt"), BRIEF),
    "instruction and input": (
        dict(instruction="Name one.", input="Fruit?", output_1="salt", output_2="fig", preference=2),
        "Name one.\n\nFruit?",
    ),
    "transcripts": (
        dict(
            chosen="\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: Fruit?\n\nAssistant: fig",
            rejected="\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: Fruit?\n\nAssistant: salt",
        ),
        TALK,
    ),
    "a transcript as prompt": (
        dict(prompt="\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: Fruit?\n\nAssistant:", chosen="fig", rejected="salt"),
        TALK,
    ),
    "two answers and a label": (dict(prompt="Fruit?", **AB, label="b"), "Fruit?"),
    "numbered answers": (dict(question="Fruit?", response_0="salt", response_1="fig", better_response_id=1), "Fruit?"),
    "whole conversations and a winner": (
        dict(conversation_a=QUESTION + say("a:salt"), conversation_b=QUESTION + say("a:fig"), winner="model_b"),
        TALK,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read_as_its_columns_say(file, name):
    row, prompt = LAYOUTS[name]
    (pair,), dropped = load_pairs(file(row))
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, "fig", "salt") and dropped == {}
    assert [p.prompt for p in load_prompts(file(row))[0]] == [prompt]
    if "chosen" in row:
        assert load_instructions(file(row))[0] == [(prompt, "fig")]


def test_the_table_of_layouts_is_complete():
    table = re.findall(r"^\| ([^|]+?) \| `", (ROOT / "docs/howto/pairs.md").read_text(), re.MULTILINE)
    assert table == list(LAYOUTS)


@pytest.mark.parametrize(
    "labels",
    [
        ("a", "b"),
        ("A", "B"),
        (0, 1),
        ("1", "2"),
        (1.0, 2.0),
        ("model_a", "model_b"),
        ("response_a", "response_b"),
        ("[[A]]", "[[B]]"),
    ],
)
def test_a_label_names_the_better_side(file, labels):
    source = file(*[dict(prompt=f"P{i}", response_a="x", response_b="y", label=l) for i, l in enumerate(labels)])
    found, dropped = load_pairs(source)
    assert [(p.chosen, p.rejected) for p in found] == [("x", "y"), ("y", "x")] and dropped == {}
    assert shown_first(source) == {("P0", "x", "y")}


@pytest.mark.parametrize("labels", [(1, 1), (0, 1, 2), (0, 2)])
def test_numbers_that_count_from_nowhere_are_refused(file, labels):
    rows = [dict(prompt=f"P{i}", response_a="x", response_b="y", label=l) for i, l in enumerate(labels)]
    with pytest.raises(ValueError, match="could count from 0 or from 1; write a and b"):
        load_pairs(file(*rows))


def test_ties_and_missing_labels_are_counted(file):
    rows = [
        dict(prompt=f"P{i}", **AB, label=l) for i, l in enumerate(["a", "tie", "tie (bothbad)", "Both bad", None, ""])
    ]
    found, dropped = load_pairs(file(*rows))
    assert [p.prompt for p in found] == ["P0"] and dropped == {"tie": 3, "no label": 2}
    assert len(load_prompts(file(*rows))[0]) == 6  # a tie is a prompt


GOOD = dict(prompt="Good?", chosen="fine", rejected="poor")
BAD = {
    "answer not by the assistant": dict(
        chosen=say("u:Fruit?", "a:fig", "u:Thanks!"), rejected=say("u:Fruit?", "a:salt", "u:No.")
    ),
    "conversations differ before the last answer": dict(
        chosen=say("u:Fruit?", "a:fig"), rejected=say("u:Fruit?", "a:Which?", "u:Any.", "a:salt")
    ),
    "prompt does not end with a user turn": dict(prompt=say("u:Fruit?", "a:Which?"), chosen="fig", rejected="salt"),
    "turns do not alternate": dict(prompt=say("u:Hi.", "u:Fruit?"), chosen="fig", rejected="salt"),
    "prompt is not in the conversation": dict(
        prompt="Bird?", chosen=say("u:Fruit?", "a:fig"), rejected=say("u:Fruit?", "a:salt")
    ),
    "two system messages": dict(
        system="Be long.", prompt=say("s:Be brief.", "u:Fruit?"), chosen="fig", rejected="salt"
    ),
    "unknown role": dict(prompt=[dict(role="tool", content="x"), *say("u:Fruit?")], chosen="fig", rejected="salt"),
    "not messages": dict(prompt="Fruit?", chosen=["fig"], rejected=["salt", "sand"]),
    "messages not in JSON": dict(prompt=str(QUESTION), chosen="fig", rejected="salt"),
    "no prompt": dict(chosen="fig", rejected="salt"),
    "not text": dict(
        prompt=[dict(role="user", content=[dict(type="image", image="x")])], chosen="fig", rejected="salt"
    ),
    "empty": dict(prompt=say("u:Hi?", "a: ", "u:Fruit?"), chosen="fig", rejected="salt"),
    "not Unicode": dict(prompt=say("u:\ud800", "a:Yes.", "u:Fruit?"), chosen="fig", rejected="salt"),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_row_that_cannot_be_used_is_dropped_under_its_reason(file, reason):
    first = {k: say("u:Good?", f"a:{GOOD[k]}") for k in ("chosen", "rejected")} if "prompt" not in BAD[reason] else GOOD
    found, dropped = load_pairs(file(first, BAD[reason]))
    assert [(p.prompt, p.chosen) for p in found] == [("Good?", "fine")] and dropped == {reason: 1}
    assert reason in (ROOT / "nbs/data/03_load.ipynb").read_text()


UNKNOWN = [
    dict(history="Fruit?", human_ref_A="fig", human_ref_B="salt", labels=1),
    dict(prompt="Fruit?", answers=[dict(answer="fig", rank=1)], turns=1),
    dict(context=say("u:Fruit?"), response1="fig", response2="salt", overall_preference=-2),
    dict(question="Fruit?", chosen={"text": "fig"}, rejected={"text": "salt"}),
    dict(question="Fruit?", response_j="fig", response_k="salt"),
    dict(prompt="Fruit?", completion="fig", label=True),
    dict(prompt="Fruit?", chosen=["fig"], rejected=["salt", "sand"]),
    dict(chosen="fig", rejected="salt"),
]


@pytest.mark.parametrize("row", UNKNOWN, ids=lambda r: "+".join(r))
def test_an_unknown_layout_is_refused_in_one_line_with_the_known_ones(file, row):
    with pytest.raises(ValueError, match="known layouts: chosen and rejected; or response_a") as e:
        load_pairs(file(row))
    assert "\n" not in str(e.value) and all(c in str(e.value) for c in row)


@pytest.mark.parametrize(
    "more, says",
    [
        (dict(question="Fruit?", context="A market."), "context could each be the prompt"),
        (dict(prompt="Fruit?", history=[["a", "b"]]), "column history is not read"),
        (dict(prompt="Fruit?", context="A market."), "column context is not read"),
    ],
)
def test_columns_that_change_the_question_are_not_ignored(file, more, says):
    with pytest.raises(ValueError, match=says) as e:
        load_pairs(file(dict(more, chosen="fig", rejected="salt")))
    assert "\n" not in str(e.value)


# conversations ------------------------------------------------------------


def test_one_user_turn_is_a_text_however_it_is_written(file):
    texts, chats = (
        dict(prompt="Fruit?", chosen="fig", rejected="salt"),
        dict(chosen=say("u:Fruit?", "a:fig"), rejected=say("u:Fruit?", "a:salt")),
    )
    (a,), (b,) = load_pairs(file(texts))[0], load_pairs(file(chats))[0]
    assert (
        a == b == LabelledPair(id=digest("Fruit?", "fig", "salt"), prompt="Fruit?", chosen="fig", rejected="salt")
        and a.id == "b2295f5b8ca42ec4"
    )
    assert conversation(talk("u:Fruit?")) == "Fruit?" == as_text("Fruit?") and messages("Fruit?") == say("u:Fruit?")


def test_white_space_around_a_prompt_does_not_part_it_from_its_conversations(file):
    (row,), _ = load_pairs(
        file(dict(prompt="Fruit? ", chosen=say("u:Fruit?", "a:fig"), rejected=say("u:Fruit?", "a:salt")))
    )
    assert row.prompt == "Fruit?"


def test_a_conversation_has_an_id_a_hash_and_a_file_of_its_own(tmp_path):
    row = LabelledPair(id="1", prompt=TALK, chosen="fig", rejected="salt")
    for rows in ([row], [{"id": "1", "prompt": TALK, "chosen": "fig", "rejected": "salt"}]):  # as a type, and as a dict
        write_rows(tmp_path / "x.jsonl", rows)
        assert (
            read_rows(tmp_path / "x.jsonl", LabelledPair) == [row]
            and read_rows(tmp_path / "x.jsonl")[0]["prompt"] == QUESTION
        )
    assert (
        digest(TALK) == digest(tuple(QUESTION)) != digest("Fruit?")
        and len({TALK, talk("u:Hi?", "a:Yes.", "u:Fruit?")}) == 1
    )
    assert as_text(TALK) == "User: Hi?\n\nAssistant: Yes.\n\nUser: Fruit?" and messages(TALK) == QUESTION


def test_continuations_stay_together(file):
    for i in range(20):
        assert split_of(f"q{i}") == split_of(talk(f"u:q{i}", "a:x", "u:y")) == split_of(talk("s:z", f"u:q{i}"))
    rows = [dict(prompt=f"q{i}") for i in range(12)] + [dict(prompt=say(f"u:q{i}", "a:x", "u:more")) for i in range(12)]
    pairs = file(
        *[dict(prompt=say(f"u:other {i}", "a:x", "u:y"), chosen="a", rejected="b") for i in range(40)],
        dict(prompt=say("u:q3", "a:x", "u:y"), chosen="a", rejected="b"),
        name="pairs.jsonl",
    )
    train, held, dropped = prompt_pool(
        DataSpec(
            prompts=file(*rows),
            pairs=pairs,
            held_out_prompts=5,
            labelled_sets={"known": file(dict(prompt="q3", chosen="a", rejected="b"), name="set.jsonl")},
        )
    )
    assert dropped["in an evaluation set"] == 2 and not {first_turn(p.prompt) for p in train} & {
        first_turn(p.prompt) for p in held
    }
