"""What several tests need: commands from outside, texts, servers that are made up, comparisons."""

import json, os, subprocess, sys, threading, time
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from scir.model.decoding import generate
from scir.runner import state
from scir.stages.sample import sample
from scir.store import Prompt, Response, Score, digest, read_rows

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SCIR = str(BIN / "scir")
SMOLLM2 = ROOT / "data/models/smollm2-135m-instruct"
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
TEXTS = [
    ("Why is the sky blue?", "Air scatters blue light.", "no"),
    ("Hi", "Hello!", "Go away, please."),
    ("2+2?", "4", "5 or so"),
    ("Name a bird.", "Owl", "Cat"),
    ("é ü?", "naïve ☃", "plain"),
    ("Say a.", "a", "b" * 30),
    ("Sum up.", "x y z", "z"),
    ("Last one", "yes", "no no"),
]
TALK = ["Name a bird.", "An owl.", "Another, please.", "Rook", "é ☃?"]
PROMPTS = [
    Prompt(id=f"p{i}", prompt=t)
    for i, t in enumerate(["Hi", "A much longer question than the others?", "Why?", "é", "Count to three."])
]


def scir(*args, env=None):
    "A command of the shell, from the root of the checkout."
    return subprocess.run([SCIR, *map(str, args)], cwd=ROOT, env=env or ENV, capture_output=True, text=True)


def response(prompt_id="p", candidate=0, prompt="Q", text="x", ids=(1,), finished=True, seed=0):
    "An answer as a stage writes it."
    return Response(
        id=f"{prompt_id}/{candidate}",
        prompt_id=prompt_id,
        prompt=prompt,
        candidate=candidate,
        response=text,
        response_ids=list(ids),
        finished=finished,
        seed=seed,
    )


def scored_pair(**fields):
    "A pair with its margins; `fields` are those that a test is about."
    plain = {"id": "p/0-1", "prompt_id": "p", "prompt": "Q", "response_a": "a", "response_b": "b"}
    ids = {"ids_a": [1], "ids_b": [2], "logps": (0, 0), "reference_logps": (0, 0)}
    return Score(**plain | ids | {"order_margins": (1, -1), "verdict_mass": (1, 1)} | fields)


def single_line(error):
    return "\n" not in str(error.value)


def together(*words, processes=2, cwd=None):
    "A script in several processes; those that wait for each other in vain are ended after ten minutes."
    return subprocess.run(
        [
            "timeout",
            "600",
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
            *map(str, words),
        ],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=ENVIRONMENT,
    )


def difference(a, b):
    "The largest difference of numbers in two values of the same shape; infinite where anything else differs."
    if isinstance(a, float) or isinstance(b, float):
        return abs(a - b)
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return max((difference(a[k], b[k]) for k in a), default=0)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return max(map(difference, a, b), default=0)
    return 0 if a == b else float("inf")


def edited(sources, module, name):
    return sources | {module: f"{sources[module]}\n{name}.edited = True\n"}


def edit(monkeypatch, module, name):
    "As if a definition had one more line when this process started."
    monkeypatch.setattr(state, "SOURCES", edited(state.SOURCES, module, name))
    monkeypatch.setattr(state, "VERSION", digest(state.SOURCES))


def drawn(policy, tokenizer, recipe, folder, prompts=PROMPTS, seed=0, **spec):
    sample(
        partial(generate, policy, tokenizer),
        tokenizer,
        prompts,
        recipe.sampling.model_copy(update=spec),
        folder / "responses.jsonl",
        seed,
    )
    return read_rows(folder / "responses.jsonl", Response)


@contextmanager
def server(answer):
    "A server on a free port that replies to each request with `answer(n, body, headers)`: status, body, seconds to wait."
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append(body)
            status, text, wait = answer(len(seen), body, self.headers)
            time.sleep(wait)
            try:
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())
            except OSError:
                pass  # the client has hung up

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", seen
    finally:
        http.shutdown()
        http.server_close()


def said(text):
    return json.dumps(
        {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        }
    )
