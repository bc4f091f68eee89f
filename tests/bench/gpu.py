"""Ten minutes on one GPU, without a network: `make gpu-check`. `--small` runs the same at toy size, also on a CPU.

Every part runs in its own process, so the others still run if one fails or takes too long.
The results are written after each part: FOLDER/gpu.json (everything) and FOLDER/gpu.md (the table).
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from .machine import machine

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "gpu"
SHAPES = {  # hidden size, MLP size, layers, attention heads, key-value heads
    "7b": (4096, 14336, 32, 32, 8),
    "small": (64, 128, 2, 4, 2),
}
ONE_ROUND = {
    "iterations": 1,
    "arms": ["scir"],
    "data.prompt_limit": 16,
    "data.held_out_prompts": 4,
    "data.pair_limit": 16,
    "data.test_limit": 8,
    "data.prompts": "data/prompts.jsonl",
    "data.pairs": "data/pairs.jsonl",
    "data.labelled_sets": {},
    "sampling.max_new_tokens": 64,
    "train.accumulation": 1,
}


def random_model(shape: str) -> Path:
    "A Llama of that shape with random bfloat16 weights and a byte tokenizer, written as an ordinary model folder."
    from transformers import LlamaConfig, LlamaForCausalLM

    from scir.model.weights import tiny_tokenizer

    folder = BUILD / f"random-{shape}"
    if (folder / "config.json").exists():
        return folder
    hidden, mlp, layers, heads, kv_heads = SHAPES[shape]
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=32000 if shape == "7b" else len(tokenizer),
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    tokenizer.save_pretrained(folder)
    model.cpu().save_pretrained(folder)
    return folder


def scir_run(name: str, recipe: str, settings: dict) -> tuple:  # the recipe as run, its manifest
    "One `scir run` from an empty folder, then `scir verify`; their output goes to BUILD/NAME.log."
    from scir.recipe import load_recipe

    out = BUILD / "runs" / name
    shutil.rmtree(out, ignore_errors=True)
    scir = [sys.executable, "-c", "from scir.cli import app; app()"]
    overrides = [x for k, v in settings.items() for x in ("--set", f"{k}={json.dumps(v)}")]
    with (BUILD / f"{name}.log").open("w") as log:
        for command in (["run", f"recipes/{recipe}.yaml", "--out", str(out), *overrides], ["verify", str(out)]):
            done = subprocess.run([*scir, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            if done.returncode:
                raise RuntimeError(f"scir {command[0]} exited with {done.returncode}; see {log.name}")
    return load_recipe(out / "recipe.yaml"), json.loads((out / "manifest.json").read_text())


def tokens_sampled(step: dict) -> float | None:
    "Tokens that a sampling step generated, from its summary."
    summary = step["summary"]
    return summary["responses"] * summary["mean_tokens"] if "mean_tokens" in summary else None


def stages_of(recipe, manifest: dict, planned: bool) -> list:
    "One row per step: seconds, peak memory beside the planner's, tokens per second where it samples."
    from scir.runner.planner import MEASURED, counted_sizes, peak

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = counted_sizes(recipe) if planned else None
    rows = []
    for key, step in manifest["steps"].items():
        stage = key.split(":")[0]
        tokens = tokens_sampled(step) if stage == "sample" else None
        rows.append(
            {
                "step": key,
                "seconds": step["seconds"],
                "peak_bytes": step["peak_bytes"],
                "planned_bytes": peak(stage, recipe, sizes, kind) if planned and stage in MEASURED else None,
                "tokens_per_second": round(tokens / step["seconds"], 1) if tokens else None,
            }
        )
    return rows


def tiny(quantize: str | None, **fewer) -> dict:
    "The tiny recipe, every stage, in bfloat16 or with 4-bit weights."
    name = f"tiny-{quantize or 'bfloat16'}"
    settings = {"name": name, "model.dtype": "bfloat16", "model.quantize": quantize, **fewer}
    recipe, manifest = scir_run(name, "tiny", settings)
    return {"stages": stages_of(recipe, manifest, planned=False)}


def shaped(shape: str, quantize: str | None = None) -> dict:
    "One round of SCIR with a random model of that shape and the mistral recipe's adapter and batches."
    name = f"random-{shape}"
    settings = {"name": name, "model.name": str(random_model(shape)), "model.quantize": quantize, **ONE_ROUND}
    if not torch.cuda.is_available():
        settings |= {"train.optimizer": "adamw_torch", "model.dtype": "float32"}
    recipe, manifest = scir_run(name, "mistral-7b", settings)
    return {"stages": stages_of(recipe, manifest, planned=True)}


def real(model: str) -> dict:
    "The demo with a real model: the largest in data/models, or the folder that --model names."
    recipe, manifest = scir_run("real", "smol", {"name": "real", "model.name": model})
    return {"model": model, "stages": stages_of(recipe, manifest, planned=True)}


def speed(group: str) -> dict:
    "One group of the bench's figures, two repeats."
    from scir.recipe import load_recipe

    from .speed import Workload, bench

    return bench(Workload(load_recipe(ROOT / "recipes/smol.yaml"), repeats=2), only=group)


def largest_model() -> str:
    "The largest real model folder under data/models, else the packaged one."
    found = [f for f in (ROOT / "data/models").glob("*/*.safetensors") if "tiny" not in f.parent.name]
    return str(max(found, key=lambda f: f.stat().st_size).parent) if found else "smollm2-135m-instruct"


def parts(small: bool, model: str | None) -> dict:  # name -> (call, seconds it may take)
    "What is run, in this order: what matters most comes first."
    if small:
        few = {"iterations": 1, "arms": ["scir"]}
        return {"tiny-bfloat16": (partial(tiny, None, **few), 300), "random-small": (partial(shaped, "small"), 300)}
    return {
        "tiny-bfloat16": (partial(tiny, None), 90),
        "tiny-nf4": (partial(tiny, "nf4"), 90),
        "random-7b-nf4": (partial(shaped, "7b", "nf4"), 240),
        "real": (partial(real, model or largest_model()), 180),
        "speed-sampling": (partial(speed, "sampling"), 120),
        "speed-judge": (partial(speed, "judge"), 60),
        "speed-training": (partial(speed, "training"), 120),
    }


def in_child(name: str, small: bool, model: str | None, limit: float) -> dict:
    "One part in a process of its own: what it found, or `error`, and its seconds."
    out, started = BUILD / f"{name}.json", time.time()
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.bench.gpu", "--part", name]
    command += ["--small"] * small + (["--model", model] if model else [])
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        lines = child.communicate(timeout=limit)[1].strip().splitlines()
        found = json.loads(out.read_text()) if out.exists() else {"error": lines[-1] if lines else "ended silently"}
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # its `scir run` too
        child.wait()
        found = {"error": f"stopped after {limit:.0f} s"}
    return found | {"seconds": round(time.time() - started, 1)}


def in_gigabytes(size: int | None) -> str:
    return f"{size / 1e9:.2f}" if size else ""


def table(found: dict) -> str:
    "The results as Markdown: one row per step, then the bench's figures."
    m = found["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    lines = [f"{m['date']}, {m['gpu'] or 'no GPU'}, {versions}; {found['seconds']:.0f} s in all.", ""]
    lines += ["| part | step | seconds | peak GB | planned GB | tokens/s |", "|---|---|---|---|---|---|"]
    for name, part in found["parts"].items():
        if "error" in part:
            lines.append(f"| {name} | **failed**: {part['error']} | {part['seconds']} | | | |")
        for s in part.get("stages", []):
            memory = f"{in_gigabytes(s['peak_bytes'])} | {in_gigabytes(s['planned_bytes'])}"
            lines.append(f"| {name} | {s['step']} | {s['seconds']} | {memory} | {s['tokens_per_second'] or ''} |")
    figures = {k: f for part in found["parts"].values() for k, f in part.get("figures", {}).items()}
    if figures:
        lines += ["", "| figure | ratio | target | |", "|---|---|---|---|"]
        lines += [
            f"| `{k}` | {f['ratio']:.3g} | {f['target']} | {'met' if f['met'] else '**missed**'} |"
            for k, f in figures.items()
        ]
    return "\n".join(lines) + "\n"


def check(folder: Path, small: bool, model: str | None, seconds: float) -> dict:
    "Run every part that still fits into `seconds`, writing what is known after each."
    started, found = time.time(), {"machine": machine(), "parts": {}}
    BUILD.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, limit) in parts(small, model).items():
        left = seconds - (time.time() - started)
        found["parts"][name] = (
            in_child(name, small, model, min(limit, left))
            if left > 10
            else {"error": "not run: no time left", "seconds": 0}
        )
        found["seconds"] = round(time.time() - started, 1)
        print(f"{name}: {found['parts'][name].get('error', 'done')}, {found['parts'][name]['seconds']} s", flush=True)
        (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        (folder / "gpu.md").write_text(table(found))
    return found


def main():
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/gpu", help="folder for gpu.json and gpu.md")
    parser.add_argument("--small", action="store_true", help="toy sizes, also without a GPU")
    parser.add_argument("--model", help="folder of a real model for the demo; default: the largest in data/models")
    parser.add_argument("--seconds", type=float, default=570, help="time for everything")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.part:
        call, _ = parts(a.small, a.model)[a.part]
        (BUILD / f"{a.part}.json").write_text(json.dumps(call()))
        return
    if not (a.small or torch.cuda.is_available()):
        sys.exit("gpu-check: PyTorch sees no NVIDIA GPU; --small runs the same at toy size on the CPU")
    found = check(a.out, a.small, a.model, a.seconds)
    print(table(found))
    sys.exit(1 if any("error" in p for p in found["parts"].values()) else 0)


if __name__ == "__main__":
    main()
