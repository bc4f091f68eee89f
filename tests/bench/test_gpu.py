"""`make gpu-check` at toy size on the CPU, so that it works the first time somebody has a GPU."""

import json

from scir.runner.planner import MEASURED

from .gpu import check, table


def test_small_check_runs_every_part_and_writes_the_table(tmp_path):
    found = check(tmp_path, small=True, model=None, seconds=900)
    assert [p.get("error") for p in found["parts"].values()] == [None, None]
    steps = found["parts"]["random-small"]["stages"]
    assert {s["step"].split(":")[0] for s in steps} >= set(MEASURED)
    for s in steps:
        assert (s["planned_bytes"] is not None) == (s["step"].split(":")[0] in MEASURED)
        assert s["peak_bytes"] > 1e8 and s["seconds"] > 0
    sampled = [s["tokens_per_second"] for s in steps if s["step"].startswith("sample")]
    assert len(sampled) == 1 and sampled[0] > 0
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    assert (tmp_path / "gpu.md").read_text() == table(found)
    assert (tmp_path / "gpu.md").read_text().count("| random-small |") == len(steps)


def test_a_part_without_time_left_is_reported(tmp_path):
    found = check(tmp_path, small=True, model=None, seconds=5)
    assert {p["error"] for p in found["parts"].values()} == {"not run: no time left"}
    assert "**failed**: not run" in (tmp_path / "gpu.md").read_text()


def test_a_part_that_runs_out_of_time_is_stopped_and_the_next_one_runs(tmp_path):
    found = check(tmp_path, small=True, model=None, seconds=13)
    assert found["parts"]["tiny-bfloat16"]["error"].startswith("stopped after 1")
    assert found["parts"]["random-small"]["error"] == "not run: no time left"
