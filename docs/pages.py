"""What pages hold that is made from the repository's files: tables of kept runs, the recipe's schema, the index of names."""
import ast, json, re, sys
from pathlib import Path

import pandas as pd
import yaml

from build import ROOT, definitions, guides, library, module_of, plain
sys.path.insert(0, str(ROOT))
from scir.recipe import ARMS, Recipe, field_names, load_recipe

KEPT = ROOT/"docs"/"results"
STANDINGS = {"P": "stated by the paper", "S": "second-hand", "D": "ours"}


def table(columns: list, rows: list) -> str:
    """A Markdown table; cells are Markdown."""
    return "\n".join("| " + " | ".join(map(str, r)) + " |" for r in [columns, ["---"] * len(columns), *rows])


# Kept runs

def kept(run: str, name: str) -> pd.DataFrame: return pd.read_csv(KEPT/run/f"{name}.csv", dtype=str).fillna("")


def result_table() -> str:
    """The main quantities of the last models, of the sets that are labelled by the seed pairs' sources, and of own answers."""
    t = kept("smol-full", "inconsistency").merge(kept("smol-full", "reward_models"), on=["set", "model"], how="left").fillna("-")
    t = t[t.model.isin(["M_1 = sft", "srlm M_3", "dice M_3", "scir M_3"]) & ~t.set.str.startswith("llmbar")]
    columns = ["set", "model", "inconsistency", "judge right", "implicit right"]
    return table(columns, t[columns].map(plain).values)


def verdicts() -> str:
    """How many of the rules were met, and of those about contradictions."""
    claims = kept("smol-full", "claims")
    count = lambda t: (len(t), *((t.verdict == v).sum() for v in ("met", "not met", "not decided")))
    every, half = count(claims), count(claims[claims.claim.str.contains("at most half as often")])
    return (f"Of {every[0]} rules that were asked, {every[1]} were met, {every[2]} were not, and {every[3]} were left open. "
            f"Of the {half[0]} among them that ask SCIR's models to contradict each other at most half as often as another arm's, {half[1]} were met, {half[2]} were not, and {half[3]} were left open.")


def manifests(run: str) -> list: return [json.loads(f.read_text()) for f in sorted((KEPT/run).glob("manifest*.json"))]


def hours(manifest: dict) -> float: return sum(s["seconds"] for s in manifest["steps"].values()) / 3600


def measured(run: str) -> str:
    """What the manifests of a kept run say about it."""
    found = manifests(run)
    steps = [s for m in found for s in m["steps"].values()]
    machine, day = steps[0]["machine"], max(s["finished"] for s in steps)[:10]
    took = " and ".join(filter(None, [", ".join(f"{hours(m):.2f}" for m in found[:-1]), f"{hours(found[-1]):.2f}"]))
    beside = ", run side by side" if len(found) > 1 else ""
    return f"*Measured* {day}: {took} hours of stages ({len(found)} seed{'s' * (len(found) > 1)}{beside}), {machine['cores']} cores ({machine['processor']}), {machine['gpu'] or 'no GPU'}, torch {steps[0]['versions']['torch']}."


def stages(run: str) -> str:
    """Minutes by stage, of every seed."""
    found = manifests(run)
    sums = [pd.Series({k: s["seconds"] / 60 for k, s in m["steps"].items()}).groupby(lambda k: k.split(":")[0], sort=False).sum() for m in found]
    return table(["stage", *(f"minutes, seed {m['seeds'][0]}" for m in found)], [[f"`{s}`", *(f"{x.get(s, 0):.1f}" for x in sums)] for s in sums[0].index])


def report(run: str) -> str:
    """A kept report as a page: figures with their captions, which lead to their full size for having a width; files beside them; no table of contents, for room."""
    text = (KEPT/run/"results.md").read_text()
    text = re.sub(r"!\[(.*?)\]\((\S+)\)\n\n\*(.*?)\*$", lambda m: f"```{{figure}} {run}/{m[2]}\n:alt: {m[1]}\n:width: 100%\n:figclass: wide\n\n{m[3]}\n```", text, flags=re.M)
    files = ", ".join(f"[{f.name}]({run}/{f.name})" for f in sorted((KEPT/run).iterdir()) if f.suffix in (".csv", ".json", ".yaml"))
    title = f"---\nhide-toc: true\n---\n\n# Report: {run}\n\nAs `scir report` wrote it, unchanged. {measured(run)} Its files: {files}.\n\n"
    return title + text


# Recipes

def recipe(name: str) -> str:
    """A recipe's file, folded."""
    text = (ROOT/"recipes"/f"{name}.yaml").read_text()
    return f"<details><summary>recipes/{name}.yaml</summary>\n\n```yaml\n{text}```\n\n</details>"


def standing() -> str:
    """Every field of a recipe with its standing, section by section."""
    out, rows = [], [(n, f, f.json_schema_extra or {}) for n, f in field_names().items()]
    counts = pd.Series([x.get("standing", "D") for *_, x in rows]).value_counts()
    out.append(f"{len(rows)} fields: " + ", ".join(f"{counts.get(k, 0)} {v} (**{k}**)" for k, v in STANDINGS.items()) + ".")
    for section in dict.fromkeys(n.rpartition(".")[0] for n, *_ in rows):
        said = Recipe.model_fields[section].annotation.__doc__ if section else "One experiment."
        part = [(f"`{n}`", code(f.default), x.get("unit", ""), f"**{x.get('standing', 'D')}**", plain(f.description)) for n, f, x in rows if n.rpartition(".")[0] == section]
        out.append(f"## {section or 'The whole'}\n\n{plain(said)}\n\n" + table(["field", "default", "unit", "standing", "meaning"], part))
    return "\n\n".join(out)


def code(value) -> str:
    """A default, short."""
    text = " ".join(str(list(value) if isinstance(value, tuple) else value).split()).replace("|", "\\|")
    return "none" if value is None else f"`{text}`" if 0 < len(text) <= 60 else f"`{text[:50]}`…" if text else "empty"


def arms() -> str:
    """The arms and what each changes."""
    shown = lambda changes: ", ".join(f"`{k}: {str(v).lower() if isinstance(v, bool) else v}`" for k, v in (changes or {}).items()) or "stays at M_1"
    return table(["arm", "what it changes in `train`"], [(f"`{a}`", shown(c)) for a, c in ARMS.items()])


# What the large recipe should need: arithmetic on its fields

SHAPE = {"layers": 32, "width": 4096, "key_value": 1024, "inner": 14336, "vocabulary": 32000}  # Mistral-7B, as its paper gives it (arXiv:2310.06825)
ASSUMED = {"prompt": 150, "response": 256, "frame": 40, "decoded": 500, "read": 6000, "trained": 1500, "seed pairs": 1400}


def linears(s: dict) -> list:
    """Sizes in and out of the linear maps of one layer."""
    w, kv, inner = s["width"], s["key_value"], s["inner"]
    return [(w, w), (w, kv), (w, kv), (w, w), (w, inner), (w, inner), (inner, w)]


def memory(r: Recipe, s: dict) -> list:  # (what, arithmetic, GB)
    """Memory of each part, GB."""
    weights = s["layers"] * sum(i * o for i, o in linears(s))
    lora = s["layers"] * sum(r.lora.r * (i + o) for i, o in linears(s))
    whole, longest = r.data.max_prompt_tokens + r.sampling.max_new_tokens, r.data.max_prompt_tokens + 2 * r.sampling.max_new_tokens + ASSUMED["frame"]
    tokens = 2 * r.train.batch_size * (whole + longest)
    cached, inside = r.sampling.batch_size * whole, 2 * (8 * s["width"] + 4 * s["inner"]) + 4 * (6 * s["width"] + s["inner"])
    return [("weights in nf4", f"{weights / 1e9:.2f} billion in linear maps x 4.13 bits", weights * 4.13 / 8),
            ("embedding and head, bfloat16", f"2 x {s['vocabulary']} x {s['width']} x 2 bytes", 4 * s["vocabulary"] * s["width"]),
            ("adapter, its gradient, AdamW's two moments, float32", f"{lora / 1e6:.0f} million x 16 bytes", lora * 16),
            ("kept activations (one hidden state a layer)", f"{tokens} tokens x {s['layers']} layers x {s['width']} x 2 bytes", tokens * s["layers"] * s["width"] * 2),
            ("one layer computed again", f"{2 * r.train.batch_size * longest} tokens x {inside / 1e3:.0f} kB", 2 * r.train.batch_size * longest * inside),
            ("keys and values while sampling", f"{cached} tokens x {s['layers']} layers x 2 x {s['key_value']} x 2 bytes", cached * s["layers"] * 4 * s["key_value"])]


def effort(r: Recipe) -> list:  # (stage, arithmetic, million tokens, tokens/s)
    """Tokens by stage."""
    a, prompts, n = ASSUMED, r.data.prompt_limit, r.sampling.candidates
    pairs, both, orders = prompts * (r.sampling.pairs_per_prompt or n * (n - 1) // 2), 2 * (a["prompt"] + a["response"]), 2 * (a["prompt"] + 2 * a["response"] + a["frame"])
    own = sum(x != "sft" for x in r.arms)
    models, rounds = 1 + own * (r.iterations - 1), r.iterations
    tested = 2 + own * rounds
    return [("warm start", f"{a['seed pairs']} pairs x ({both} + {orders})", a["seed pairs"] * (both + orders), a["trained"]),
            ("sample", f"{models} models x {prompts} prompts x {n} answers x {a['response']}", models * prompts * n * a["response"], a["decoded"]),
            ("judge", f"{models} models x ({pairs} pairs x {orders} + {prompts * n} answers x {both // 2} x 2)", models * (pairs * orders + prompts * n * both), a["read"]),
            ("optimise, scir", f"{rounds} rounds x {pairs} pairs x ({both} + {orders})", rounds * pairs * (both + orders), a["trained"]),
            ("optimise, srlm", f"{rounds} rounds x {prompts} pairs x {both}", rounds * prompts * both, a["trained"]),
            ("evaluate: answers", f"{tested} models x {r.data.held_out_prompts} prompts x 2 x {a['response']}", tested * r.data.held_out_prompts * 2 * a["response"], a["decoded"]),
            ("evaluate: pairs", f"{tested} models x {2 * r.data.test_limit + r.data.held_out_prompts} pairs x ({both} + {orders})", tested * (2 * r.data.test_limit + r.data.held_out_prompts) * (both + orders), a["read"])]


def plan() -> str:
    """Memory and hours of recipes/mistral-7b.yaml, with the arithmetic."""
    r = load_recipe(ROOT/"recipes"/"mistral-7b.yaml")
    parts = [(w, how, b / 1e9) for w, how, b in memory(r, SHAPE)]
    train, sample = sum(g for *_, g in parts[:5]), parts[0][2] + parts[1][2] + parts[2][2] / 4 + parts[5][2]
    work, a = effort(r), ASSUMED
    total = sum(t / rate for *_, t, rate in work) / 3600
    return "\n\n".join([
        table(["memory", "arithmetic", "GB"], [(w, how, f"{g:.1f}") for w, how, g in parts]),
        f"Together {train:.0f} GB while training (all but the last line) and {sample:.0f} GB while sampling (weights, adapter, keys and values), and beside it what the driver, the allocator and a head's chunk of logits take: 2 to 4 GB, a guess.",
        f"Assumed, not measured: prompts of {a['prompt']} tokens, answers of {a['response']} (half of the limit), {a['frame']} for the judge's frame, {a['seed pairs']} seed pairs; on a data-centre GPU (A100 or H100) {a['decoded']} tokens/s decoded, {a['read']} read, {a['trained']} trained (forward twice and backward).",
        table(["stage", "arithmetic", "million tokens", "tokens/s, assumed", "hours"], [(w, how, f"{t / 1e6:.1f}", rate, f"{t / rate / 3600:.1f}") for w, how, t, rate in work]),
        f"Together {total:.0f} hours. Half the rates double it; answers that fill the limit nearly do."])


# Names

def api() -> str:
    """All public names, module by module."""
    out = []
    for path in library():
        module = module_of(path)
        rows = [(f"{{py:obj}}`{d['name']} <{module}.{d['name']}>`", {"data": "value"}.get(d["kind"], d["kind"]), plain((doc(d).split("\n") or [""])[0])) for d in definitions(path)]
        out.append(f"## {module}\n\nFrom `nbs/{path.name}`.\n\n" + table(["name", "is a", "what"], rows))
    return "\n\n".join(out)


def doc(d: dict) -> str:
    """A definition's docstring, of a value the comment beside it."""
    return (ast.get_docstring(d["node"]) or "") if d["kind"] != "data" else d["notes"].get(d["node"].end_lineno, "")


def picture(wide: str, narrow: str) -> str:
    """A drawing, and another one for a phone; the style sheet shows one of them."""
    drawn = "".join(f"<div class=\"picture {kind}\">\n{(ROOT/'docs'/name).read_text()}</div>\n" for kind, name in (("wide", wide), ("narrow", narrow)))
    return f"```{{raw}} html\n{drawn}```"


def howtos() -> str:
    """The how-to pages, the everyday ones first."""
    first = ["model", "prompts", "pairs", "reward", "judge", "outside-judge"]
    return "\n".join(f"howto/{n}" for n in sorted((f.stem for f in (ROOT/"docs"/"howto").glob("*.md")), key=lambda n: (first.index(n) if n in first else len(first), n)))


def extra() -> dict:  # page -> text
    """Pages that stand nowhere else."""
    log = ROOT/"CHANGELOG.md"
    return {f"results/{run}.md": report(run) for run in ("smol-full", "smol")} | ({"changelog.md": log.read_text()} if log.exists() else {})


MADE = {f.__name__: f for f in (result_table, verdicts, measured, stages, recipe, standing, arms, plan, api, picture, howtos)}
MADE |= {"guides": lambda: "\n".join(f.stem for f in guides()), "changelog": lambda: "changelog" if (ROOT/"CHANGELOG.md").exists() else ""}
