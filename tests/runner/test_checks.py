"""What is checked before a run: the same by the run, by --dry-run and by the doctor."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from scir.cli import app
from scir.data.load import load_prompts
from scir.model.weights import load_base, tiny_model
from scir.recipe import RecipeError, load_recipe, parse_recipe
from scir.runner import checks
from scir.runner.checks import (
    RECIPE_CHECKS,
    RUN_CHECKS,
    adapter,
    context,
    data,
    decoding,
    hub_sources,
    memory_and_hours,
    planned,
    token_ids,
)
from scir.runner.run import check_data_and_model, prepare_recipe
from scir.store import write_rows


pytestmark = pytest.mark.usefixtures("at_root")


def tiny(*settings):
    return load_recipe("recipes/tiny.yaml", settings)


def saved(folder, kind="llama", **config):
    "A tiny model of another kind, with the tiny tokenizer."
    base, tokenizer = tiny_model()
    written = {"llama": base.config.to_dict(), "mixtral": dict(num_local_experts=2, num_experts_per_tok=1)}.get(
        kind, {}
    )
    same = {
        k: getattr(base.config, k)
        for k in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        )
    }
    made = AutoConfig.for_model(kind, **({k: v for k, v in written.items() if k != "model_type"} | same | config))
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"model.name={folder}"


def test_the_doctor_asks_all_that_a_run_asks():
    assert set(RUN_CHECKS) < set(RECIPE_CHECKS)


def test_a_run_says_what_its_adapter_reaches(capsys):
    check_data_and_model(tiny())
    assert "adapter: self_attn.q_proj x2" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [[{"prompt": "Only one."}], [{"messages": "of columns that nobody knows"}]])
def test_prompts_are_read_before_the_warm_start(tmp_path, rows):
    write_rows(tmp_path / "p.jsonl", rows)
    setting = f"data.prompts={tmp_path}/p.jsonl"
    assert [f.state for f in data(tiny(setting))] == ["fault"]
    with pytest.raises(RecipeError, match="data"):
        prepare_recipe(tiny(setting), tmp_path / "run")
    done = CliRunner().invoke(
        app, ["run", "recipes/tiny.yaml", "--set", setting, "--out", str(tmp_path / "run"), "--dry-run"]
    )
    assert done.exit_code == 1 and "data" in done.output and not (tmp_path / "run/manifest.json").exists()


def test_rows_that_no_stage_could_use_are_noticed(tmp_path):
    (found,) = data(tiny("data.max_prompt_tokens=30"))
    assert found.state == "fault" and "raise data.max_prompt_tokens" in found.finding
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "yes", "rejected": "no", "split": "test"}])
    assert "no row falls in the train split" in data(tiny(f"data.pairs={tmp_path}/pairs.jsonl"))[0].finding


@pytest.mark.parametrize("kind", ["llava", "t5"])
def test_a_model_that_is_not_causal_is_named_once_and_in_one_line(tmp_path, kind):
    AutoConfig.for_model(kind).save_pretrained(tmp_path / "model")
    tiny_model()[1].save_pretrained(tmp_path / "model")
    recipe = tiny(f"model.name={tmp_path}/model")
    with pytest.raises(RecipeError, match=f"^model .*: {kind} is not a causal language model") as e:
        prepare_recipe(recipe, tmp_path / "run")
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=f"{kind} is not a causal language model"):
        load_base(recipe.model)


def test_token_ids_beyond_the_embedding(tmp_path):
    assert token_ids(tiny()).state == "ok"
    found = token_ids(tiny(saved(tmp_path / "small", vocab_size=257, pad_token_id=None)))
    assert found.state == "fault" and "257 rows" in found.finding and "257 (<|end|>)" in found.finding
    assert token_ids(tiny(saved(tmp_path / "large", vocab_size=300))).state == "ok"


def test_a_context_is_compared_with_the_rows(tmp_path):
    "A limit that the rows do not reach is no fault; a labelled pair that does not fit is, and the fix is one."
    long = saved(tmp_path / "m", max_position_embeddings=700)
    assert context(tiny(long)).state == "ok" and "may have" not in context(tiny(long)).finding
    sampled = context(tiny(long, "sampling.max_new_tokens=400"))
    assert sampled.state == "warn" and context(tiny(long, sampled.fix.removeprefix("add --set "))).state == "ok"
    short = saved(tmp_path / "s", max_position_embeddings=300)
    found = context(tiny(short))
    assert found.state == "fault" and "300 tokens" in found.finding
    fix = [w for w in found.fix.split(", ")[0].split() if "=" in w]
    assert context(tiny(short, *fix)).state != "fault" and "keeps" in found.fix
    with pytest.raises(RecipeError, match="300 tokens.*add --set data.max_prompt_tokens"):
        check_data_and_model(tiny(short))


def test_a_model_that_cannot_be_sampled_is_refused_first(tmp_path):
    name = saved(tmp_path / "m", "lfm2", layer_types=["conv", "full_attention"])
    assert decoding(tiny(name)).state == "fault" and decoding(tiny()) is None
    with pytest.raises(RecipeError, match="keeps a state"):
        check_data_and_model(tiny(name))


def test_targets_that_reach_nothing_are_refused_first():
    assert adapter(tiny("lora.targets=[qproj]")).state == "fault" and adapter(tiny()).state == "ok"


def test_a_mixture_is_planned_without_a_fault(tmp_path, monkeypatch):
    recipe = tiny(saved(tmp_path / "m", "mixtral"))
    assert all(f.state != "fault" for f in memory_and_hours(recipe, probed=False))

    def broken(*a):
        raise RuntimeError("an operator without shapes")

    monkeypatch.setattr(checks, "stage_memory", broken)
    assert [(f.what, f.state) for f in planned(recipe, None, False)] == [("plan", "warn")]


def test_a_suffix_in_capitals_is_a_file(tmp_path):
    for source, name in (("data/prompts.jsonl", "P.JSONL"),):
        shutil.copy(source, tmp_path / name)
    assert (
        load_prompts(str(tmp_path / "P.JSONL")) == load_prompts("data/prompts.jsonl")
        and hub_sources(tiny("data.prompts=[P.JSONL, p.Csv]")) == []
    )


@pytest.mark.parametrize(
    "value, words",
    [
        (3, r"write \[3\] for the single seed 3, or \[0, 1, 2\] for 3 seeds"),
        (1, r"write \[1\] for the single seed 1$"),
        ("x", "not a list"),
    ],
)
def test_seeds_are_a_list(value, words):
    with pytest.raises(RecipeError, match=words):
        parse_recipe({"seeds": value})


def test_kernels_listen_on_socket_files_where_the_path_allows_it(tmp_path, monkeypatch):
    import tempfile
    from scir.runner.kernels import SocketManager

    manager = SocketManager(kernel_name="python3")
    folder = Path(manager.connection_file).parent
    assert (
        manager.transport == "ipc" and Path(manager.ip).parent == folder and folder.is_dir() and not manager.cache_ports
    )
    del manager
    assert not folder.exists()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 120)))
    (tmp_path / ("x" * 120)).mkdir()
    assert SocketManager(kernel_name="python3").transport == "tcp"
