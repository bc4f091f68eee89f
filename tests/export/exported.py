"""What the tests of exported models share."""

import torch

from scir.recipe import load_recipe
from scir.runner.manifest import provenance
from scir.runner.plan import Step
from scir.runner.state import inputs
from scir.store import hash_path, read_json, write_json


NODE = "seed0/scir/m3"


IDS = torch.tensor([[256, 5, 17, 99, 3, 42, 8]])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def noted(run, stage, node, *files):
    "Have the manifest say that a step is done, with the settings of the run's recipe."
    manifest = {"steps": {}} | read_json(run / "manifest.json", {})
    read = {
        k: v
        for k, v in inputs(load_recipe(run / "recipe.yaml"), run, Step(stage, node)).items()
        if k.startswith("field ")
    }
    old = manifest["steps"].get(f"{stage}:{node}", {"inputs": {}, "outputs": {}, "summary": {}} | provenance())
    manifest["steps"][f"{stage}:{node}"] = old | {
        "inputs": old["inputs"] | read,
        "outputs": old["outputs"] | {f"{node}/{f}": hash_path(run / node / f) for f in files},
    }
    write_json(run / "manifest.json", manifest)
