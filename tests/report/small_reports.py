"""Small reports: pairs from strings of + and -, models, answers and steps."""

from functools import cache

import numpy as np
import pandas as pd

from scir.report import claims, gather as gathering
from scir.report.gather import AT, Gathered
from scir.statistics import derive


NAMES = ["generative", "implicit"]


FIGURES = {
    "headline",
    "inconsistency",
    "own_accuracy",
    "retained",
    "joint_panel",
    "joint_own",
    "length",
    "splits_held-out",
    "calibration_held-out",
    "calibration_panel",
    "training",
    "flip_rate",
}


def pairs(arm, iteration, judge, implicit, set="held-out", seed=0, run="r", label="a", prompts=None, mass=0.9):
    "A row per pair from strings of + and -; a number is the margin itself. Side a is right."
    value = lambda v: {"+": 1.0, "-": -1.0}.get(v, v)
    return pd.DataFrame(
        [
            {
                "run": run,
                "seed": seed,
                "arm": arm,
                "iteration": iteration,
                "set": set,
                "id": f"i{k}",
                "prompt": (prompts or [f"p{k}" for k in range(len(judge))])[k],
                "subset": "",
                "label": label,
                "tokens_a": 4 + k % 3,
                "tokens_b": 5,
                "m_ab": value(j),
                "m_ba": -value(j),
                "mass": mass,
                "likelihood": 1.0,
                "generative": value(j),
                "implicit": value(i),
            }
            for k, (j, i) in enumerate(zip(judge, implicit, strict=True))
        ]
    )


def model(arm, iteration, seed=0, run="r", **kw):
    trained = {"retained": None, "steps": None} if iteration < 2 else {"retained": 0.5, "steps": 4}
    return {
        "run": run,
        "seed": seed,
        "arm": arm,
        "iteration": iteration,
        "mean_tokens": 20.0,
        "finished": 1.0,
        "empty": 0,
        "distinct_2": 0.5,
        "pairs": 8,
        **trained,
        "win_rate": None,
        "win_rate_low": None,
        "win_rate_high": None,
        "length_controlled": None,
    } | kw


def answers(arm, iteration, scores, seed=0, run="r", **kw):  # one answer per prompt
    score = np.array([np.nan if s is None else s for s in scores], float)
    success = np.where(np.isnan(score), np.nan, score == 1)
    return pd.DataFrame(
        {
            "run": run,
            "seed": seed,
            "arm": arm,
            "iteration": iteration,
            "id": [f"p{k}/0" for k in range(len(scores))],
            "prompt": [f"p{k}" for k in range(len(scores))],
            "tokens": 20,
            "finished": True,
            "score": score,
            "success": success,
            "bigrams": 19,
            "new_bigrams": 15,
        }
        | kw
    )


def gathered(*frames, models=None, steps=None, answered=()):
    d = pd.concat(frames, ignore_index=True)
    models = models or [model(a, t, s, r) for r, s, a, t in d[AT].drop_duplicates().itertuples(index=False)]
    answered = (
        pd.concat(answered, ignore_index=True) if len(answered) else pd.DataFrame(columns=[*AT, *gathering.ANSWER])
    )
    steps = pd.DataFrame(steps or [], columns=None if steps else [*AT, "step"])
    return Gathered(derive(gathering.with_own(d), NAMES), pd.DataFrame(models), steps, answered, NAMES)


def both(n, wrong=0, apart=0):  # judge and implicit; the first `wrong` both wrong, then `apart` the judge only
    return "-" * (wrong + apart) + "+" * (n - wrong - apart), "-" * wrong + "+" * (n - wrong)


def verdicts(g):  # (claim's letter, set) -> verdict
    t = claims.claims(claims.claim_numbers(g))
    return {(r["claim"].split(".")[0], s): r[s] for r in t.to_dict("records") for s in t.columns[1:]}


EFFECT = {
    "sft": (1, 3.0, 0.4, 0.3),
    "srlm": (2, 1.5, 0.7, 0.45),
    "scir": (2, 0.3, 1.2, 0.75),
    "scir-no-consistency": (2, 1.2, 0.8, 0.5),
    "scir-no-confidence": (2, 0.3, 0.6, 0.7),
    "scir-no-gate": (2, 0.6, 0.5, 0.6),
    "scir-static": (2, 1.3, 1.0, 0.6),
}  # apart, knowing, success


@cache
def made(seed, effect, prompts=60, per=3, seeds=2):
    "Margins around a hidden truth, two of three pairs labelled; without an effect, models differ in noise only."
    rng, frames, answered, models = np.random.default_rng(seed), [], [], []
    for s, (arm, (t, *what)) in ((s, n) for s in range(seeds) for n in EFFECT.items()):
        apart, knows, success = what if effect else EFFECT["sft"][1:]
        for name in ("held-out", "panel", *["own"] * (t > 1)):
            truth = np.random.default_rng([seed, s, len(name)] + [len(arm)] * (name == "own")).choice(
                [-1, 1], prompts * per
            )
            shared = rng.normal(0, 1, prompts * per)
            judge, implicit = (knows * truth + shared + apart * rng.normal(0, 1, prompts * per) for _ in range(2))
            d = pairs(arm, t, judge, implicit, set=name, seed=s, prompts=[f"p{k // per}" for k in range(prompts * per)])
            label = np.where(truth > 0, "a", "b").astype(object)
            label[::3] = None
            frames.append(d.assign(label=label))
        answered.append(answers(arm, t, rng.random(prompts) < success, seed=s))
        models.append(model(arm, t, s, correct_labels=knows / 1.3 if effect else rng.random()))
    return gathered(*frames, models=models, answered=answered)


def steps(arm, iteration, retained, seed=0, **kw):
    return [
        {
            "run": "r",
            "seed": seed,
            "arm": arm,
            "iteration": iteration,
            "step": i + 1,
            "retained": r,
            "loss_dpo": 0.7,
            "loss_consistency": 0.0,
            "loss_confidence": 0.6,
        }
        | kw
        for i, r in enumerate(retained)
    ]
