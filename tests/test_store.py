"""Files of rows: any text survives, a kill at any byte costs a row, and a damaged line is named."""

import pytest

from scir.store import (
    Journal,
    Prompt,
    Response,
    atomic_path,
    digest,
    hash_path,
    read_json,
    read_rows,
    row_seed,
    write_json,
    write_rows,
    write_text,
)

from helpers import response, single_line


def row(i=0, text="x"):
    return response(candidate=i, prompt="é?", text=text, ids=(1, 2), seed=row_seed(0, i))


@pytest.mark.parametrize(
    "text", ["plain", "two\nlines\r\n", "\u2028 \u2029 \x85", "\x00\x0b\x0c\x1c\x1e", "naïve ☃ 𝄞", "\ufffd\ufeff"]
)
def test_any_text_survives_the_file(tmp_path, text):
    rows = [row(0, text), row(1, text + "!")]
    write_rows(tmp_path / "r.jsonl", rows)
    assert read_rows(tmp_path / "r.jsonl", Response) == rows and [
        r["response"] for r in read_rows(tmp_path / "r.jsonl")
    ] == [text, text + "!"]


def test_truncated_line_names_file_and_line(tmp_path):
    write_rows(tmp_path / "r.jsonl", [row(0), row(1)])
    write_text(tmp_path / "r.jsonl", (tmp_path / "r.jsonl").read_text()[:-20])
    for kind in (Response, dict):
        with pytest.raises(ValueError, match=r"r\.jsonl, line 2") as e:
            read_rows(tmp_path / "r.jsonl", kind)
        assert single_line(e)


def test_row_of_another_kind_names_file_and_line(tmp_path):
    write_rows(tmp_path / "r.jsonl", [{"id": "1", "prompt": "x", "more": 1}])
    with pytest.raises(ValueError, match=r"r\.jsonl, line 1: not a Prompt row") as e:
        read_rows(tmp_path / "r.jsonl", Prompt)
    assert single_line(e)


def test_missing_rows_name_the_file():
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl.*stage"):
        read_rows("nowhere.jsonl")


@pytest.mark.parametrize("cut", [1, 5, -1])
def test_journal_survives_a_kill_at_any_byte(tmp_path, cut):
    journal = Journal(tmp_path / "r.jsonl", Response)
    for i in range(3):
        journal.add(row(i))
    journal.file.close()
    data = journal.part.read_bytes()
    last = data[:-1].rindex(b"\n") + 1
    journal.part.write_bytes(
        data[: data.index("é".encode(), last) + 1] if cut == 5 else data[: last + 1] if cut == 1 else data[:-1]
    )  # 5: within a letter
    again = Journal(tmp_path / "r.jsonl", Response)
    assert again.done == {"p/0", "p/1"} and not (tmp_path / "r.jsonl").exists()
    again.add(row(2))
    assert again.finish(["p/2", "p/0", "p/1"]) == read_rows(tmp_path / "r.jsonl", Response) == [row(2), row(0), row(1)]
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


def test_failed_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    with pytest.raises(KeyError):
        with atomic_path(tmp_path / "x.json") as tmp:
            tmp.write_text("half")
            raise KeyError
    assert read_json(tmp_path / "x.json") == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_hashes_tell_contents_and_names_apart(tmp_path):
    for folder, name, text in (("a", "x", "1"), ("b", "x", "1"), ("c", "y", "1"), ("d", "x", "2")):
        write_text(tmp_path / folder / name, text)
    a, b, c, d = (hash_path(tmp_path / f) for f in "abcd")
    assert (
        a == b
        and len({a, c, d, hash_path(tmp_path / "none")}) == 4
        and digest({"x": 1, "y": 2}) == digest({"y": 2, "x": 1}) != digest({"x": 2, "y": 1})
    )


def test_row_seeds_are_fixed_and_apart():
    assert (
        row_seed(0, "p", 1) == row_seed(0, "p", 1)
        and len({row_seed(s, p, c) for s in range(3) for p in "abc" for c in range(3)}) == 27
    )
    assert all(0 <= row_seed(0, i) < 2**63 for i in range(50))
