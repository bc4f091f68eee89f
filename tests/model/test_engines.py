"""Engines: whatever decodes, the same rows come of the same seeds. vLLM and its server are stand-ins here that decode as we do, and say what they were asked; one test needs the real one."""

import ast, json, os, sys, threading, types
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest, torch

import scir.model.engines as engines
from scir.runner.checks import engine as engine_here, open_recipe
from scir.method.labels import vote
from scir.model.decoding import Pool, _decoded
from scir.model.engines import (
    adapter_name,
    check_engine,
    lora_room,
    open_engine,
    room,
    serve_line,
    stop_ids,
)
from scir.model.weights import for_sampling, load_tokenizer
from scir.recipe import ModelSpec, RecipeError, SamplingSpec, load_recipe, parse_recipe
from scir.runner.plan import Step
from scir.runner.checks import check_recipe
from scir.runner.state import inputs
from scir.stages.files import STAGES
from scir.stages.sample import sample, sample_file
from scir.store import Prompt, Response, read_rows, write_rows

from helpers import SMOLLM2, response


PROMPTS = [
    Prompt(id=f"p{i}", prompt=t)
    for i, t in enumerate(["Hi", "A much longer question than the others?", "Why?", "é", "Count to three."])
]
CODE = Path(engines.__file__).parent.parent
ENDS = list(range(0, 250, 10))


def by(recipe, engine, **sampling):
    return recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"engine": engine, **sampling})})


@pytest.fixture(scope="module")
def adapter(make_policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    make_policy(0.3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ending(recipe, tmp_path_factory):
    "The recipe with a model whose generation config lets a tenth of the ids end a response, and would bend how they are drawn."
    from transformers import GenerationConfig
    import shutil

    folder = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(recipe.model.name, folder)
    GenerationConfig(eos_token_id=ENDS, do_sample=True, top_k=3, repetition_penalty=1.5).save_pretrained(folder)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(folder)})})


def said(recipe, adapter, folder, prompts=PROMPTS, seed=0):
    "The bytes of responses.jsonl."
    tokenizer = load_tokenizer(recipe.model)
    with open_engine(recipe, tokenizer, adapter) as engine:
        sample(engine, tokenizer, prompts, recipe.sampling, folder / "responses.jsonl", seed)
    return (folder / "responses.jsonl").read_bytes()


def decoded(model, prompt, seed, how):
    "A response as ours would be, asked for by vLLM's names."
    spec = SamplingSpec(temperature=how["temperature"], top_p=how["top_p"], max_new_tokens=how["max_tokens"])
    assert (
        how["top_k"] == how["min_p"] == how["presence_penalty"] == how["frequency_penalty"] == 0
        and how["repetition_penalty"] == 1
    )
    (r,) = _decoded(Pool(model, spec, set(how["stop_token_ids"])), [("x", prompt, seed)], 1)
    return r.ids


# a server --------------------------------------------------------------------


class Loaded(ThreadingHTTPServer):
    "vLLM's server as far as it is asked: lists models, loads adapters by path, completes ids. `fault(n, path, body)` may answer (status, text) in its place."

    def __init__(self, spec, fault=lambda n, path, body: None, ids=True, loads_adapters=True):
        super().__init__(("127.0.0.1", 0), Talk)
        self.spec, self.fault, self.ids, self.loads_adapters = spec, fault, ids, loads_adapters
        self.seen, self.models, self.lock, self.most, self.now = (
            [],
            {"served": for_sampling(spec)},
            threading.Lock(),
            0,
            0,
        )

    def answer(self, path, body):
        if path == "/v1/models":
            return 200, {
                "data": [
                    {
                        "id": name,
                        "object": "model",
                        "root": self.spec.name if name == "served" else "x",
                        "parent": None if name == "served" else "served",
                    }
                    for name in self.models
                ]
            }
        if path == "/v1/load_lora_adapter":
            if not self.loads_adapters:
                return 404, {"detail": "Not Found"}
            if "lora_name" not in body or body["lora_name"] in self.models:
                return 400, {"error": {"message": "already loaded, or no name"}}
            self.models[body["lora_name"]] = for_sampling(self.spec, body["lora_path"])
            return 200, "Success"
        ids = decoded(self.models[body["model"]], body["prompt"], body["seed"], body)
        return 200, {
            "id": "x",
            "object": "text_completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
                | ({"token_ids": ids, "prompt_token_ids": body["prompt"]} if self.ids else {})
            ],
        }


class Talk(BaseHTTPRequestHandler):
    def do_POST(self):
        at, body = self.server, json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or "{}")
        with at.lock:
            at.seen.append((self.path, body, self.headers.get("authorization")))
            asked, at.now = len(at.seen), at.now + 1
            at.most = max(at.most, at.now)
        status, text = at.fault(asked, self.path, body) or at.answer(self.path, body)
        with at.lock:
            at.now -= 1
        text = (text if isinstance(text, str) else json.dumps(text)).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST

    def log_message(self, *_):
        pass


@contextmanager
def serving(recipe, **kw):  # recipe by this server, server
    at = Loaded(recipe.model, **kw)
    threading.Thread(target=at.serve_forever, daemon=True).start()
    try:
        yield by(recipe, f"http://127.0.0.1:{at.server_port}/v1"), at
    finally:
        at.shutdown()
        at.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(engines, "RETRIES", 0)
    monkeypatch.setattr(engines, "PATIENCE", 20.0)
    for k in [k for k in os.environ if k.lower() in ("http_proxy", "https_proxy", "all_proxy")]:
        monkeypatch.delenv(k)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def completions(at):
    return [body for path, body, _ in at.seen if path == "/v1/completions"]


@pytest.mark.parametrize("whose", ["base", "adapter"])
def test_a_server_that_decodes_as_we_do_makes_the_same_file(ending, adapter, tmp_path, whose):
    folder = adapter if whose == "adapter" else None
    ours = said(ending, folder, tmp_path / "ours")
    with serving(ending) as (recipe, at):
        assert said(recipe, folder, tmp_path / "theirs") == ours
        assert {b["model"] for b in completions(at)} == {adapter_name(adapter) if folder else "served"} and len(
            completions(at)
        ) == 15
        assert at.most <= recipe.sampling.batch_size
    rows = read_rows(tmp_path / "ours/responses.jsonl", Response)
    assert {r.finished for r in rows} == {True, False} and all(
        (r.response_ids[-1] in {*ENDS, 257}) == r.finished and not set(r.response_ids[:-1]) & {*ENDS, 257} for r in rows
    )


def test_another_adapter_has_another_name_and_one_that_is_there_is_not_loaded_again(
    recipe, adapter, make_policy, tmp_path
):
    "A server reads an adapter again from the path that it was given, so the same one elsewhere is another."
    import shutil

    other = tmp_path / "other"
    make_policy(0.3, seed=1).save_pretrained(other)
    assert (
        adapter_name(shutil.copytree(other, tmp_path / "copy"))
        != adapter_name(other)
        == adapter_name(os.path.relpath(other))
    )
    with serving(recipe) as (theirs, at):
        first = said(theirs, adapter, tmp_path / "a")
        assert (
            said(theirs, other, tmp_path / "b")
            == said(recipe, other, tmp_path / "ours")
            != first
            == said(theirs, adapter, tmp_path / "c")
        )
        loads = [(b["lora_name"], b["lora_path"]) for path, b, _ in at.seen if path == "/v1/load_lora_adapter"]
        assert loads == [(adapter_name(f), str(f)) for f in (adapter, other)] and adapter_name(adapter) != adapter_name(
            other
        )


def test_of_two_processes_one_loads_the_adapter(recipe, adapter, tmp_path):
    late = lambda n, path, body: (
        (400, "already")
        if path == "/v1/load_lora_adapter" and at.models.setdefault(body["lora_name"], at.models["served"])
        else None
    )
    with serving(recipe, fault=late) as (theirs, at):
        assert said(theirs, adapter, tmp_path)


def test_a_dying_server_loses_no_row_and_the_same_rows_come_in_the_end(recipe, adapter, tmp_path):
    ours, state = said(recipe, adapter, tmp_path / "ours"), {"well": False}
    with serving(recipe, fault=lambda n, path, body: None if state["well"] or n < 9 else (500, "{}")) as (theirs, at):
        with pytest.raises(ValueError, match="no answer: InternalServerError 500; responses so far are kept") as e:
            said(theirs, adapter, tmp_path / "theirs")
        assert "\n" not in str(e.value) and not (tmp_path / "theirs/responses.jsonl").exists()
        kept = len(read_rows(tmp_path / "theirs/responses.partial.jsonl"))
        state["well"], before = True, len(completions(at))
        assert (
            said(theirs, adapter, tmp_path / "theirs") == ours
            and 0 < kept < 15
            and len(completions(at)) == before + 15 - kept
        )


@pytest.mark.parametrize(
    "fault", [(429, '{"error": "slow down"}'), (503, "{}"), (200, "<html>"), (200, '{"choices": []}'), (200, "null")]
)
def test_a_busy_or_garbled_server_is_asked_again(recipe, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(engines, "RETRIES", 2)
    ours, first = said(recipe, None, tmp_path / "ours", PROMPTS[:1]), []
    with serving(
        recipe,
        fault=lambda n, path, body: fault if path == "/v1/completions" and not first and not first.append(n) else None,
    ) as (theirs, at):
        assert said(theirs, None, tmp_path / "theirs", PROMPTS[:1]) == ours and len(completions(at)) == 4


@pytest.mark.parametrize(
    "fault, words",
    [
        ((400, "{}"), "refused: BadRequestError 400"),
        ((401, "{}"), "answers 401; check the"),
        ((404, "{}"), "answers 404"),
        ((200, "{"), "no answer: not a completion"),
    ],
)
def test_what_stays_wrong_is_one_line(recipe, tmp_path, fault, words):
    with serving(recipe, fault=lambda n, path, body: fault if path == "/v1/completions" else None) as (theirs, at):
        with pytest.raises(ValueError, match=words) as e:
            said(theirs, None, tmp_path)
    assert str(e.value).startswith(f"sampling.engine {theirs.sampling.engine}: ") and "\n" not in str(e.value)


def test_text_without_ids_is_refused(recipe, tmp_path):
    with serving(recipe, ids=False) as (theirs, at):
        with pytest.raises(ValueError, match="returns text but no token ids.*sampling.engine=transformers") as e:
            said(theirs, None, tmp_path)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompt_token_ids": [1]}, r"the prompt ids it read \(1\) differ"),
        ({"token_ids": [70, 71]}, "was cut after 2 of 8 tokens.*max_model_len"),
        ({"token_ids": []}, "cut after 0 of 8"),
    ],
)
def test_what_a_server_adds_or_cuts_is_not_trained_on(recipe, tmp_path, change, words):
    def bent(n, path, body):
        if path != "/v1/completions":
            return None
        status, reply = at.answer(path, body)
        reply["choices"][0].update(change)
        return status, reply

    with serving(recipe, fault=bent) as (theirs, at):
        with pytest.raises(ValueError, match=words):
            said(theirs, None, tmp_path)


def test_a_server_that_loads_no_adapters_is_one_line_with_the_way_out(recipe, adapter, tmp_path):
    with serving(recipe, loads_adapters=False) as (theirs, at):
        with pytest.raises(
            ValueError,
            match="does not load the adapter .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve .* --enable-lora --max-lora-rank 8",
        ) as e:
            said(theirs, adapter, tmp_path)
        assert "\n" not in str(e.value) and not completions(at)


def test_another_model_is_not_taken_for_ours(recipe, tmp_path):
    listed = lambda *cards: lambda n, path, body: (200, {"data": list(cards)}) if path == "/v1/models" else None
    a, b = {"id": "a", "root": "a"}, {"id": "b", "root": recipe.model.name}
    for cards, name in (
        ((a, b), "b"),
        ((a,), "a"),
        ((a, {"id": "scir-1", "root": "x", "parent": "a"}), "a"),
        (({"id": recipe.model.name}, a), recipe.model.name),
    ):
        with (
            serving(recipe, fault=listed(*cards)) as (theirs, at),
            engines.connect(theirs.sampling.engine, 5) as client,
        ):
            assert engines.list_served(client, theirs)[0] == name
    for cards, words in (
        ((a, {"id": "c"}), r"none of \['a', 'c'\] is .*; start a server with: "),
        ((), r"none of \[\] is"),
    ):
        with serving(recipe, fault=listed(*cards)) as (theirs, at):
            with pytest.raises(ValueError, match=words):
                said(theirs, None, tmp_path)


def test_a_model_that_is_taken_for_ours_is_said(recipe, tmp_path, capsys):
    for name, said_so in (("served", False), ("other", True)):
        card = {"id": name, "root": recipe.model.name if name == "served" else "x"}
        with serving(recipe, fault=lambda n, path, body: (200, {"data": [card]}) if path == "/v1/models" else None) as (
            theirs,
            at,
        ):
            at.models["other"] = at.models["served"]
            said(theirs, None, tmp_path / name)
        assert (
            f"{name} (the server's only model; assumed to be {recipe.model.name}" in capsys.readouterr().out
        ) == said_so


def test_the_line_that_starts_a_server_names_what_the_recipe_does():
    model = {"name": "a/b", "revision": "v1", "dtype": "bfloat16", "quantize": "nf4", "trust_remote_code": True}
    assert serve_line(parse_recipe({"model": model, "lora": {"r": 24}})).endswith(
        " vllm serve a/b --enable-lora --max-lora-rank 32 --revision v1 --dtype bfloat16 --quantization bitsandbytes --trust-remote-code"
    )


def test_nobody_there_is_one_line(recipe, tmp_path):
    with serving(recipe) as (theirs, at):
        pass
    with pytest.raises(ValueError, match="no answer: APIConnectionError; start a server with: ") as e:
        said(theirs, None, tmp_path)
    assert "\n" not in str(e.value)


def test_the_key_goes_to_the_server_and_into_no_file(recipe, adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with serving(recipe) as (theirs, at):
        said(theirs, adapter, tmp_path)
        assert {key for *_, key in at.seen} == {"Bearer sk-very-secret"}
    assert "very-secret" not in "".join(f.read_text() for f in tmp_path.rglob("*") if f.is_file())


# vLLM --------------------------------------------------------------------------


@pytest.fixture
def vllm(monkeypatch):
    "A stand-in for the package; what it was asked is in `vllm.asked`."
    top, request, asked = (
        types.ModuleType("vllm"),
        types.ModuleType("vllm.lora.request"),
        types.SimpleNamespace(started=[], calls=[], ended=0),
    )

    class LLM:
        def __init__(self, **kw):
            asked.started.append(kw)
            self.llm_engine = types.SimpleNamespace(
                engine_core=types.SimpleNamespace(shutdown=lambda: setattr(asked, "ended", asked.ended + 1))
            )

        def generate(self, prompts, params, *, lora_request=None, use_tqdm=True):
            asked.calls.append((prompts, params, lora_request))
            kw = asked.started[-1]
            model = for_sampling(
                ModelSpec(name=kw["model"], dtype=kw["dtype"]), lora_request and lora_request.lora_path
            )
            rows = [
                decoded(model, p["prompt_token_ids"], how["seed"], how) for p, how in zip(prompts, params, strict=True)
            ]
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(ids))]) for ids in rows]

    top.__spec__, top.asked, top.LLM, top.SamplingParams, top.TokensPrompt = (
        ModuleSpec("vllm", None),
        asked,
        LLM,
        dict,
        dict,
    )
    request.LoRARequest = lambda name, number, path: types.SimpleNamespace(
        lora_name=name, lora_int_id=number, lora_path=path
    )
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    for name, module in (("vllm", top), ("vllm.lora", types.ModuleType("vllm.lora")), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, module)
    return top


@pytest.mark.parametrize("whose", ["base", "adapter"])
def test_vllm_is_given_ids_seeds_ends_and_the_adapter(ending, adapter, vllm, tmp_path, monkeypatch, whose):
    folder = adapter if whose == "adapter" else None
    monkeypatch.setattr(engines, "BATCHES", 2)
    assert said(by(ending, "vllm"), folder, tmp_path / "theirs") == said(ending, folder, tmp_path / "ours")
    (started,) = vllm.asked.started
    assert started == {
        "model": ending.model.name,
        "revision": None,
        "tokenizer_revision": None,
        "dtype": "float32",
        "quantization": None,
        "load_format": "safetensors",
        "trust_remote_code": False,
        "max_num_seqs": 4,
        "max_model_len": -1,
        **({"enable_lora": True, "max_lora_rank": 8} if folder else {}),
    }  # the adapter's rank is 4
    assert [len(prompts) for prompts, *_ in vllm.asked.calls] == [8, 7] and vllm.asked.ended == 1
    for prompts, params, lora in vllm.asked.calls:
        assert (lora and (lora.lora_name, lora.lora_path)) == (folder and (adapter_name(folder), str(folder)))
        assert all(p["detokenize"] is False and p["stop_token_ids"] == sorted({*ENDS, 257}) for p in params)
    seeds = [p["seed"] for _, params, _ in vllm.asked.calls for p in params]
    assert seeds == [r.seed for r in read_rows(tmp_path / "ours/responses.jsonl", Response)] and len(set(seeds)) == 15


def test_vllm_is_ended_when_decoding_fails(recipe, vllm, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm.LLM, "generate", lambda *a, **kw: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        said(by(recipe, "vllm"), None, tmp_path)
    assert vllm.asked.ended == 1 and os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


def test_rows_that_vllm_gave_before_a_kill_are_kept(recipe, vllm, tmp_path, monkeypatch):
    ours, generate = said(recipe, None, tmp_path / "ours"), vllm.LLM.generate
    monkeypatch.setattr(engines, "BATCHES", 1)
    with monkeypatch.context() as m:
        m.setattr(
            vllm.LLM,
            "generate",
            lambda self, *a, **kw: generate(self, *a, **kw) if len(vllm.asked.calls) < 2 else stop(),
        )
        with pytest.raises(KeyboardInterrupt):
            said(by(recipe, "vllm"), None, tmp_path / "theirs")
    assert len(read_rows(tmp_path / "theirs/responses.partial.jsonl")) == 8
    assert (
        said(by(recipe, "vllm"), None, tmp_path / "theirs") == ours
        and sum(len(prompts) for prompts, *_ in vllm.asked.calls) == 15
    )


def stop():
    raise KeyboardInterrupt


@pytest.mark.parametrize("r, n", [(1, 1), (2, 8), (16, 16), (24, 32), (512, 512), (600, 600)])
def test_vllm_has_room_for_certain_ranks(r, n):
    assert lora_room(r) == n


@pytest.mark.gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and find_spec("vllm") and SMOLLM2.exists()), reason="needs a GPU, vLLM and SmolLM2"
)
def test_real_vllm(tmp_path):
    "Rows are complete and repeat; at a low temperature most begin as ours do."
    from scir.model.weights import load_base, new_adapter

    recipe = parse_recipe(
        {
            "model": {"name": str(SMOLLM2), "dtype": "bfloat16"},
            "sampling": {"candidates": 2, "max_new_tokens": 24, "temperature": 0.01},
        }
    )
    policy = new_adapter(load_base(recipe.model), recipe.lora)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.02)
    policy.save_pretrained(tmp_path / "adapter")
    del policy
    rows = {}
    for name, engine in (("ours", "transformers"), ("theirs", "vllm"), ("again", "vllm")):
        said(by(recipe, engine), tmp_path / "adapter", tmp_path / name)
        rows[name] = read_rows(tmp_path / name / "responses.jsonl", Response)
    said(by(recipe, "vllm"), None, tmp_path / "base")
    assert (
        rows["theirs"] == rows["again"]
        and [r.id for r in rows["ours"]] == [r.id for r in rows["theirs"]]
        and [r.seed for r in rows["ours"]] == [r.seed for r in rows["theirs"]]
    )
    assert sum(a.response_ids[:4] == b.response_ids[:4] for a, b in zip(rows["ours"], rows["theirs"])) > 7
    assert [r.response_ids for r in read_rows(tmp_path / "base/responses.jsonl", Response)] != [
        r.response_ids for r in rows["theirs"]
    ]


def test_an_engine_is_started_when_there_is_something_to_decode(recipe, tokenizer, vllm, tmp_path, monkeypatch):
    "Not for rows that an earlier try made; but by all of several processes that share the layers."
    said(recipe, None, tmp_path)
    os.replace(tmp_path / "responses.jsonl", tmp_path / "responses.partial.jsonl")
    said(by(recipe, "vllm"), None, tmp_path)
    assert not vllm.asked.started and len(read_rows(tmp_path / "responses.jsonl")) == 15
    monkeypatch.setattr(engines, "sharded", lambda: True)
    with open_engine(by(recipe, "vllm"), tokenizer) as engine:
        assert not list(engine([], recipe.sampling)) and not list(engine([], recipe.sampling))
    assert len(vllm.asked.started) == vllm.asked.ended == 1


def test_pickled_weights_are_handed_to_nobody(recipe, adapter, vllm, tokenizer, tmp_path):
    import shutil

    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with serving(recipe) as (theirs, at):
        for r in (by(recipe, "vllm"), theirs):
            with pytest.raises(ValueError, match="pickled weights are not read"):
                said(r, folder, tmp_path / "out")
        assert not vllm.asked.started and not [1 for path, *_ in at.seen if "lora" in path]


# the recipe's engine --------------------------------------------------------------


@pytest.mark.parametrize(
    "value, words",
    [
        ("vlm", "transformers, vllm, or a server's URL"),
        ("ftp://x", "server's URL"),
        ("", "server's URL"),
        ("http://user:pw@host/v1", "set the key in OPENAI_API_KEY"),
        ("https://host/v1?key=sk-1", "OPENAI_API_KEY"),
    ],
)
def test_what_is_no_engine(value, words):
    with pytest.raises(RecipeError, match=words) as e:
        parse_recipe({"sampling": {"engine": value}})
    assert "\n" not in str(e.value) and "pw" not in str(e.value) and "sk-1" not in str(e.value)


@pytest.mark.skipif(bool(find_spec("vllm")), reason="vLLM is installed")
def test_an_engine_that_is_not_installed_is_said_before_a_run_and_by_the_doctor(recipe, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"needs vllm; pip install 'scir\[vllm\]'"):
        check_recipe(by(recipe, "vllm"))
    with pytest.raises(RecipeError, match="needs vllm"), open_engine(by(recipe, "vllm"), None):
        pass
    four = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantize": "nf4"})})
    with pytest.raises(RecipeError, match="needs vllm and vllm_bnb_plugin; "):
        check_engine(by(four, "vllm"))
    monkeypatch.chdir(tmp_path)
    _, (found,) = open_recipe("recipes/tiny.yaml", ("sampling.engine=vllm",))
    assert (
        found.state == "fault" and found.fix == "pip install 'scir[vllm]'" and engine_here(by(recipe, "vllm")) is None
    )


def test_vllm_has_one_process(recipe, vllm, monkeypatch):
    check_engine(by(recipe, "vllm"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_engine(by(recipe, "transformers"))
    with pytest.raises(RecipeError, match="one process only; leave out --processes, or start a server"):
        check_engine(by(recipe, "vllm"))


def test_numbers_that_vllm_has_not_are_refused_before_a_run(recipe, vllm, monkeypatch):
    check_engine(by(recipe, "vllm"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_engine(by(recipe, "transformers", temperature=0.001))
    with pytest.raises(RecipeError, match="16 bits only, and model.dtype is float32"):
        check_engine(by(recipe, "vllm"))
    half = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16"})})
    check_engine(by(half, "vllm", temperature=2))
    for value in (0.009, 2.1):
        with pytest.raises(RecipeError, match=rf"^sampling.temperature {value}: .* 0.01 to 2; "):
            check_engine(by(half, "vllm", temperature=value))


def test_the_doctor_asks_the_server(recipe):
    assert engine_here(recipe) is None
    with serving(recipe) as (theirs, at):
        found = engine_here(theirs)
        assert (
            found.state == "ok" and "serves served and loads adapters" in found.finding and set(at.models) == {"served"}
        )
    with serving(
        recipe,
        fault=lambda n, path, body: (200, {"data": [{"id": "mine", "root": "x"}]}) if path == "/v1/models" else None,
    ) as (theirs, at):
        found = engine_here(theirs)
        assert (
            found.state == "warn"
            and f"serves mine (the server's only model; assumed to be {recipe.model.name}" in found.finding
            and found.fix.endswith(f"--served-model-name {recipe.model.name}")
        )
    with serving(recipe, loads_adapters=False) as (theirs, at):
        assert (
            engine_here(theirs) == engine_here(theirs)._replace(state="fault", fix=serve_line(theirs))
            and "does not load adapters" in engine_here(theirs).finding
        )
    gone = engine_here(theirs)
    assert (
        gone.state == "fault"
        and gone.finding.endswith("no answer: APIConnectionError")
        and gone.fix == serve_line(theirs)
    )


def test_all_that_is_sampled_goes_through_the_engine():
    "Nobody else loads a model to decode with, or decodes; `planner` measures our own."
    uses = {
        f.stem
        for f in CODE.glob("**/*.py")
        for n in ast.walk(ast.parse(f.read_text()))
        if isinstance(n, ast.ImportFrom) and {"for_sampling", "generate"} & {a.name for a in n.names}
    }
    assert uses == {"engines", "planner"}


@pytest.mark.parametrize("stage", ["sample", "label", "evaluate", "align"])
def test_another_engine_is_another_try(stage, tmp_path):
    recipe = parse_recipe({"arms": ["srlm-pointwise"], "alignment": {"judge": "tiny-random"}})
    read = [
        inputs(by(recipe, engine), tmp_path, Step(stage, "seed0/m1"))["field sampling.engine"]
        for engine in ("transformers", "vllm")
    ]
    assert read == ["transformers", "vllm"]


def test_votes_come_from_a_server_as_from_here(recipe, adapter, tmp_path, tokenizer):
    rows = [response(candidate=c, text=f"text {c}") for c in range(3)]
    spec, texts = recipe.labels.model_copy(update={"votes": 2, "vote_tokens": 5}), []
    with serving(recipe) as (theirs, at):
        for r, name in ((recipe, "ours"), (theirs, "theirs")):
            with open_engine(r, tokenizer, adapter) as engine:
                vote(engine, tokenizer, rows, spec, None, 4, tmp_path / f"{name}.jsonl")
            texts.append((tmp_path / f"{name}.jsonl").read_bytes())
        assert texts[0] == texts[1] and len(completions(at)) == 6 and {b["max_tokens"] for b in completions(at)} == {5}


def test_a_file_of_prompts_is_answered_by_a_server(recipe, tmp_path):
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": p.prompt} for p in PROMPTS])
    with serving(recipe) as (theirs, at):
        for r, name in ((recipe, "ours"), (theirs, "theirs")):
            sample_file(r, None, str(tmp_path / "prompts.jsonl"), tmp_path / f"{name}.jsonl", candidates=1)
    assert (tmp_path / "ours.jsonl").read_bytes() == (tmp_path / "theirs.jsonl").read_bytes()


def test_a_run_sampled_by_a_server_has_the_same_files(tiny_run, tmp_path):
    "Stages of a run: M_0's and M_1's answers, and the responses that the judge reads."
    import shutil

    run = shutil.copytree(tiny_run, tmp_path / "run")
    recipe = load_recipe(run / "recipe.yaml")
    kept = {
        f: (run / f).read_bytes()
        for f in (
            "seed0/m1/evaluation/responses.jsonl",
            "seed0/m0/evaluation/responses.jsonl",
            "seed0/m1/responses.jsonl",
        )
    }
    with serving(recipe) as (theirs, at):
        for f in kept:
            (run / f).unlink()
            STAGES["evaluate" if "evaluation" in f else "sample"].run(
                theirs, run, f.removesuffix("/responses.jsonl").removesuffix("/evaluation")
            )
        assert len({b["model"] for b in completions(at)}) == 2
    assert {f: (run / f).read_bytes() for f in kept} == kept


def test_room_for_an_answer(recipe):
    assert room(recipe.model, SamplingSpec(max_new_tokens=96)) == 4000
    with pytest.raises(ValueError, match="lower sampling.max_new_tokens"):
        room(recipe.model, SamplingSpec(max_new_tokens=4096))


def test_what_ends_a_response_is_known_without_the_model(ending, tokenizer, tmp_path):
    import shutil

    assert stop_ids(ending.model, tokenizer) == {*ENDS, 257}
    bare = shutil.copytree(ending.model.name, tmp_path / "bare")
    (bare / "generation_config.json").unlink()
    assert stop_ids(ModelSpec(name=str(bare)), tokenizer) == {257}
