"""What SFT learns from."""

from scir.recipe import parse_recipe
from scir.stages.sft import good_answers, seed_pairs
from scir.store import write_rows


def test_good_answers_are_the_chosen_sides_or_instructions(tmp_path, tokenizer):
    row = lambda i, chosen: {
        "prompt": f"p{i}",
        "chosen": chosen,
        "rejected": f"bad {chosen}",
        "split": "test" if i == 9 else "train",
    }
    write_rows(
        tmp_path / "pairs.jsonl",
        [row(0, "good"), row(0, "good") | {"rejected": "worse"}, row(1, "fine"), row(1, "fair"), row(9, "held")],
    )
    recipe = parse_recipe({"data": {"pairs": f"{tmp_path}/pairs.jsonl"}})
    found, _ = good_answers(tokenizer, recipe)
    assert (
        sorted((p.prompt, p.response_a) for p in found) == [("p0", "good"), ("p1", "fair"), ("p1", "fine")]
        and len(seed_pairs(tokenizer, recipe)[0]) == 4
    )
    write_rows(
        tmp_path / "more.jsonl",
        [
            {"instruction": "p9", "output": "x"},
            {"instruction": "q", "output": "y"},
            {"instruction": "long", "output": "z" * 600},
        ],
    )
    found, dropped = good_answers(
        tokenizer,
        parse_recipe({"data": {"pairs": f"{tmp_path}/pairs.jsonl", "instructions": f"{tmp_path}/more.jsonl"}}),
    )
    assert [(p.prompt, p.response_a) for p in found] == [("q", "y")] and dropped["in an evaluation set"] == dropped[
        "too long"
    ] == 1
