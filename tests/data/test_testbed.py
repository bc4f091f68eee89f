"""The testbed of sentences with given words, its graders and yours, and the column `split` of data files."""

import json, random
from hashlib import sha256
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scir.cli import app
from scir.data.load import (
    better_side,
    evaluation_rows,
    find_grader,
    grade,
    in_split,
    load_pairs,
    load_prompts,
    prompt_pool,
    row_split,
    seed_prompts,
    split_of,
)
from scir.data.testbed import (
    ABOUT,
    GRADERS,
    RULES,
    content_words,
    faults,
    format_pairs,
    format_rule,
    given,
    given_words,
    pairs,
    prompts,
    sentences,
    topic_splits,
    vocabulary,
    words_of,
    write_testbed,
)
from scir.recipe import RecipeError, parse_recipe
from scir.runner.checks import check_recipe
from scir.stages.evaluate import file_pairs, graded_answers, score_summary
from scir.stages.sft import seed_pairs
from scir.store import Grade, Prompt

from helpers import ROOT, response


SPLITS = "train", "validation", "test"
ASKED = "Write one sentence that uses the words: river, stone, bridge."


pytestmark = pytest.mark.usefixtures("at_root")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("testbed")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(ROOT)
        return folder, write_testbed(folder)


def rows_of(file):
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


# topics, words, prompts, pairs ----------------------------------------------


def test_every_topic_is_in_one_split_whatever_the_order_of_the_file():
    topics = list(sentences())
    splits = topic_splits(topics)
    assert sorted(t for names in splits.values() for t in names) == sorted(topics) and all(splits.values())
    assert topic_splits(random.Random(1).sample(topics, len(topics))) == splits


def test_splits_ask_for_no_word_of_each_other():
    "Neither what may be asked for nor what is, in prompts and pairs."
    known = vocabulary(sentences())
    words = {s: {w for found in known[s].values() for w in found} for s in SPLITS}
    asked = {s: {w for p in [*prompts(60, s), *(r["prompt"] for r in pairs(s))] for w in given(p)} for s in SPLITS}
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not words[a] & words[b] and not asked[a] & asked[b]
    assert all(asked[s] and asked[s] <= words[s] for s in SPLITS)


def test_a_word_of_two_topics_stays_where_it_was_first():
    topics = {
        t: [f"The shared word of topic {t} meets unique{chr(97 + i)} things."] for i, t in enumerate("abcdefghij")
    }
    found = vocabulary(topics)
    assert [s for s in SPLITS if any("shared" in words for words in found[s].values())] == ["train"]


def test_prompts_are_distinct_and_the_same_every_time():
    found = prompts(50, "train")
    assert found == prompts(50, "train") != prompts(50, "train", seed=1) and prompts(80, "train")[:50] == found
    assert len({frozenset(given(p)) for p in found}) == 50 and all(len(set(given(p))) == 3 for p in found)


def test_a_pairs_better_side_is_the_graders():
    for split in SPLITS:
        rows = pairs(split)
        assert rows and {r["split"] for r in rows} == {split}
        for r in rows:
            assert given_words(r["prompt"], r["chosen"]) == 1 > given_words(r["prompt"], r["rejected"])


def test_a_pair_whose_sides_are_equally_good_is_left_out(monkeypatch):
    monkeypatch.setattr("scir.data.testbed.faulty_answer", lambda sentence, *rest: ("not at all", sentence))
    assert pairs("test") == []


def test_a_spoiled_answer_has_the_fault_that_it_is_named_after():
    names = {"cut off": "not finished", "two sentences": "more than one sentence", "repetition": "repetition"}
    rows = [r for s in SPLITS for r in pairs(s)]
    assert {r["how"] for r in rows} == {"one word missing", "two words missing", "another sentence", *names}
    for r in rows:
        if r["how"] in names:
            assert names[r["how"]] in faults(r["rejected"]), r
        elif "missing" in r["how"]:
            lacking = {"one": 1, "two": 2}[r["how"].split()[0]]
            assert given_words(r["prompt"], r["rejected"]) == pytest.approx(1 - lacking / 3), r


# graders --------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, score",
    [
        ("The river ran past a stone under the bridge.", 1),
        ("The river ran past a stone under the hill.", 2 / 3),
        ("A Bridge stood there in the morning!", 1 / 3),
        ("The dog slept in the morning sun.", 0),
        ("  The RIVER ran past a stone under the bridge.\n", 1),
        ('"The river ran past a stone under the bridge."', 1),
        ("The rivers ran past stones under old bridges.", 0),
        ("The river ran past a stone under the bridge", 0),
        ("The river ran past a stone. It went under the bridge.", 0),
        ("River, stone, bridge.", 0),
        ("", 0),
        ("   ", 0),
        ("é ☃", 0),
        ("The river ran past a stone under the bridge:\nand on.", 0),
        ("The river river ran past a stone under the bridge.", 0),
        ("The river and the stone and the river and the bridge.", 0),
        ("The river " + "was long and cold and grey and " * 4 + "ran past a stone under the bridge.", 0),
    ],
)
def test_an_answer_counts_only_if_it_is_one_finished_sentence(answer, score):
    assert given_words(ASKED, answer) == pytest.approx(score)


def test_a_written_sentence_has_no_fault():
    for topic, found in sentences().items():
        for s in found:
            assert not faults(s) or not [w for w in content_words(s)][2:], (topic, s, faults(s))


def test_a_grader_knows_its_own_prompts_only():
    rule = ABOUT.format("rivers", next(iter(RULES)))
    assert (
        given_words("Name a river.", "The Nile.") is None
        and given_words(rule, "X.") is None
        and format_rule(ASKED, "X.") is None
        and format_rule("Name a river, in capital letters.", "NILE") is None
    )
    assert words_of("Don't stop - now!") == ["don't", "stop", "now"] and GRADERS == {
        "given_words": given_words,
        "format_rule": format_rule,
    }


@pytest.mark.parametrize("name", RULES)
def test_a_format_is_kept_or_not(name):
    sentence, (follow, follows) = "Yes, the old bridge stood over the river.", RULES[name]
    prompt = ABOUT.format("rivers", name)
    assert (
        format_rule(prompt, follow(sentence)) == 1
        and format_rule(prompt, f" {follow(sentence)}\n") == 1
        and format_rule(prompt, sentence) == 0
    )


def test_pairs_of_formats_are_right_by_their_grader_and_of_test_topics():
    rows = format_pairs()
    test = topic_splits(sentences())["test"]
    assert (
        rows
        and {r["split"] for r in rows} == {"test"}
        and all(any(f"the topic {t}," in r["prompt"] for t in test) for r in rows)
    )
    for r in rows:
        assert format_rule(r["prompt"], r["chosen"]) == 1 and format_rule(r["prompt"], r["rejected"]) == 0


MINE = """
def short(prompt, answer): return None if "?" in prompt else 1 - min(len(answer), 10) / 10
def wild(prompt, answer): return len(answer)
def nan(prompt, answer): return float("nan")
value = 3
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return lambda name: f"{tmp_path}/mine.py:{name}"


def test_a_grader_of_ones_own(mine):
    short = find_grader(mine("short"))
    assert short("P", "abc") == pytest.approx(0.7) and find_grader("given_words") is given_words
    assert better_side(short, "P", "abc", "abcd") == "a" and better_side(short, "P", "abcd", "abc") == "b"
    assert (
        better_side(short, "P", "abc", "xyz") is None and better_side(short, "P?", "abc", "abcd") is None
    )  # a tie; it cannot tell


@pytest.mark.parametrize("name", ["wild", "nan"])
def test_a_score_out_of_range_is_refused(mine, name):
    for ask in (lambda f: grade(f, "P", "abc"), lambda f: better_side(f, "P", "abc", "")):
        with pytest.raises(
            ValueError, match=f"data.grader: {name} returned (3|nan) for 'abc'; return a score from 0 to 1, or None"
        ) as e:
            ask(find_grader(mine(name)))
        assert "\n" not in str(e.value)


def test_a_grader_that_is_not_there_is_refused_before_a_run(mine):
    for name, words in (
        ("nobody", "no such function; name one of given_words, format_rule, or FILE.py:FUNCTION"),
        (mine("nobody"), "no such function"),
        (mine("value"), "no such function"),
        ("absent.py:f", "absent.py is not a file"),
    ):
        with pytest.raises(RecipeError, match=words) as e:
            check_recipe(parse_recipe({"data": {"grader": name}}))
        assert "\n" not in str(e.value) and f"data.grader {name}" in str(e.value)
    for name in ("format_rule", mine("short")):
        check_recipe(parse_recipe({"data": {"grader": name}}))
    with pytest.raises(RecipeError, match="seed_prompts needs a grader"):
        parse_recipe({"data": {"seed_prompts": 3}})


def test_scores_of_answers_and_their_summary(mine):
    of = lambda i, text, prompt="P": response(str(i), prompt=prompt, text=text)
    grades = graded_answers([of(0, ""), of(1, "abc"), of(2, "a", "P?"), of(3, "a" * 10)], mine("short"))
    assert grades == [
        Grade(id="0/0", prompt_id="0", score=1),
        Grade(id="1/0", prompt_id="1", score=0.7),
        Grade(id="2/0", prompt_id="2", score=None),
        Grade(id="3/0", prompt_id="3", score=0),
    ]
    found = score_summary(grades)
    assert (
        found["score"] == pytest.approx(1.7 / 3)
        and found["success"]["value"] == pytest.approx(1 / 3)
        and found["success"]["n"] == 3
        and score_summary(grades[2:3]) == {}
    )


# files ----------------------------------------------------------------------


def test_the_files_are_the_same_every_time_and_hashed(made, tmp_path):
    folder, sums = made
    assert write_testbed(tmp_path) == sums and {f.name for f in folder.iterdir()} == {*sums, "SHA256SUMS"} == {
        "prompts.jsonl",
        "pairs.jsonl",
        "format.jsonl",
        "SHA256SUMS",
    }
    assert {
        line.split("  ")[1]: line.split("  ")[0] for line in (folder / "SHA256SUMS").read_text().splitlines()
    } == sums
    assert all(sha256((folder / name).read_bytes()).hexdigest() == h for name, h in sums.items())


@pytest.mark.skipif(not (ROOT / "data/testbed/prompts.jsonl").exists(), reason="data/testbed was not written yet")
def test_the_files_in_the_repository_are_those_that_are_made(made):
    for name in ("prompts.jsonl", "pairs.jsonl", "format.jsonl", "SHA256SUMS"):
        assert (ROOT / "data/testbed" / name).read_bytes() == (made[0] / name).read_bytes(), name


def test_the_files_are_read_with_their_splits(made):
    asked, dropped = load_prompts(str(made[0] / "prompts.jsonl"))
    assert not dropped and {s: len(in_split(asked, s)) for s in SPLITS} == {
        "train": 2000,
        "validation": 400,
        "test": 400,
    }
    rows, dropped = load_pairs(str(made[0] / "pairs.jsonl"))
    assert not dropped and {r.split for r in rows} == {*SPLITS} and all(r.subset for r in rows)
    assert not load_pairs(str(made[0] / "format.jsonl"))[1]


def test_the_command_writes_them_and_says_their_hashes(made, tmp_path):
    done = CliRunner().invoke(app, ["testbed", "--out", str(tmp_path / "bed")])
    assert done.exit_code == 0 and done.stdout.splitlines()[:3] == [f"{h}  {name}" for name, h in made[1].items()]
    told = json.loads(CliRunner().invoke(app, ["testbed", "--out", str(tmp_path / "bed"), "--json"]).stdout)
    assert told == {"folder": str(tmp_path / "bed"), "sha256": made[1]}
    (tmp_path / "file").write_text("mine")
    refused = CliRunner().invoke(app, ["testbed", "--out", str(tmp_path / "file")])
    assert refused.exit_code == 2 and "is a file" in refused.stderr and (tmp_path / "file").read_text() == "mine"


# the column `split` ---------------------------------------------------------


@pytest.fixture
def sources(tmp_path):
    "Rows whose splits are not those of their hashes."
    other = {s: SPLITS[(SPLITS.index(s) + 1) % 3] for s in SPLITS}

    def written(name, rows, column=True):
        rows = [r | ({"split": other[split_of(r["prompt"])]} if column else {}) for r in rows]
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
        return str(tmp_path / name)

    pair = lambda i: {"prompt": f"pair {i}", "chosen": f"yes {i}", "rejected": f"no {i}"}
    return {
        "prompts": written("prompts.jsonl", [{"prompt": f"prompt {i}"} for i in range(80)]),
        "pairs": written("pairs.jsonl", [pair(i) for i in range(80)]),
        "other": written("other.jsonl", [pair(i) for i in range(80, 120)]),
        "plain": written("plain.jsonl", [pair(i) for i in range(200, 240)], column=False),
    }


def spec(sources, **more):
    return parse_recipe(
        {"data": {"prompts": sources["prompts"], "pairs": sources["pairs"], "held_out_prompts": 3, **more}}
    )


@pytest.mark.parametrize("evaluate_on", ["test", "validation"])
def test_a_rows_own_split_decides(sources, tokenizer, evaluate_on):
    recipe = spec(
        sources, evaluate_on=evaluate_on, labelled_sets={"other": sources["other"], "plain": sources["plain"]}
    )
    own = {r["prompt"]: r["split"] for name in ("prompts", "pairs", "other") for r in rows_of(sources[name])}
    sets = {name: [r.prompt for r in rows] for name, (rows, _) in evaluation_rows(recipe.data).items()}
    for name, of in (("held-out", "pairs"), ("other", "other")):
        assert sorted(sets[name]) == sorted(r["prompt"] for r in rows_of(sources[of]) if r["split"] == evaluate_on)
    assert len(sets["plain"]) == 40  # no column, no seed source: all of it
    assert {own[p.prompt] for p in seed_pairs(tokenizer, recipe)[0]} == {"train"} and len(
        seed_pairs(tokenizer, recipe)[0]
    ) == sum(r["split"] == "train" for r in rows_of(sources["pairs"]))
    train, held, _ = prompt_pool(recipe.data)
    assert (
        {own[p.prompt] for p in train} == {"train"}
        and {own[p.prompt] for p in held} == {evaluate_on}
        and len(held) == 3
    )
    assert len(train) == sum(r["split"] == "train" for r in rows_of(sources["prompts"]))


def test_seed_prompts_are_none_that_a_round_is_trained_on(sources):
    plain, some = spec(sources).data, spec(sources, seed_prompts=5, grader="given_words", prompt_limit=7).data
    first, rest = seed_prompts(some), prompt_pool(some)[0]
    assert (
        len(first) == 5
        and len(rest) == 7
        and first + rest == prompt_pool(plain)[0][:12]
        and prompt_pool(some)[1] == prompt_pool(plain)[1]
        and seed_prompts(plain) == []
    )
    with pytest.raises(ValueError, match="lower data.held_out_prompts or data.seed_prompts"):
        prompt_pool(spec(sources, seed_prompts=80, grader="given_words").data)


def test_a_file_is_judged_by_its_own_splits(sources, tokenizer):
    recipe = spec(sources)
    for split in SPLITS:
        assert {p.prompt for p in file_pairs(tokenizer, sources["pairs"], recipe, split=split)[0]} == {
            r["prompt"] for r in rows_of(sources["pairs"]) if r["split"] == split
        }


def test_rows_without_a_split_go_by_their_hash(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": f"p{i}", "split": s}) + "\n" for i, s in enumerate([None, "", "test"]))
    )
    rows = load_prompts(str(tmp_path / "p.jsonl"))[0]
    assert [r.split for r in rows] == [None, None, "test"] and [row_split(r) for r in rows] == [
        split_of("p0"),
        split_of("p1"),
        "test",
    ]
    assert row_split(Prompt(id="1", prompt="p0", split="validation")) == "validation"


def test_a_split_that_nobody_knows_is_one_line_with_its_row(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "split": "train"}\n{"prompt": "b", "split": "dev"}\n')
    with pytest.raises(ValueError, match="row 2: split 'dev' is not one of train, validation, test") as e:
        load_prompts(str(tmp_path / "p.jsonl"))
    assert "\n" not in str(e.value)


def test_an_empty_answer_keeps_to_no_format():
    assert format_rule(ABOUT.format("harbor", "without any comma"), " ") == 0


def test_a_grader_that_cannot_be_run_is_one_line(tmp_path):
    (tmp_path / "broken.py").write_text("def score(prompt, answer: return 1\n")
    with pytest.raises(RecipeError, match=r"broken\.py cannot be run: SyntaxError") as e:
        find_grader(f"{tmp_path / 'broken.py'}:score")
    assert len(str(e.value).splitlines()) == 1


def test_no_test_prompt_was_used_while_settings_were_chosen(made):
    asked = {r.prompt for r in in_split(load_prompts(str(made[0] / "prompts.jsonl"))[0], "test")}
    assert len(asked) == 400 and not asked & set(prompts(400, "test"))
