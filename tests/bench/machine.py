"""The machine of a measurement; stored with the numbers, which depend on it."""

import platform, time
from importlib.metadata import version

import torch


def machine() -> dict:
    "The machine and the versions of the main packages."
    on_gpu = torch.cuda.is_available()
    known = hasattr(torch.cpu, "get_capabilities")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "gpu_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        "cpu": torch.cpu.get_capabilities().get("cpu_name") if known else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": {p: version(p) for p in ("torch", "transformers", "peft", "trl", "bitsandbytes")},
    }
