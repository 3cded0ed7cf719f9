"""PEFT's method_comparison/MetaMathQA/run.py with svdtune's methods registered, and SORSA's
regularizer in its loop.

    cd peft/method_comparison/MetaMathQA
    python .../run.py -v experiments/sorsa/llama-3.2-3B-rank32
"""

import importlib
import runpy
import sys
from typing import Any

import torch

import svdtune  # registers the methods


def main() -> None:
    """Run the run.py of the working directory, with this program's arguments."""
    sys.path[0] = ""  # its modules lie beside it
    utils: Any = importlib.import_module("utils")
    made = utils.get_optimizer_and_scheduler

    def regularized(model: torch.nn.Module, **settings: Any) -> tuple[torch.optim.Optimizer, Any]:
        optimizer, scheduler = made(model, **settings)
        if any(config.peft_type == "SORSA" for config in getattr(model, "peft_config", {}).values()):
            svdtune.regularize(optimizer, model)
        return optimizer, scheduler

    utils.get_optimizer_and_scheduler = regularized
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main()
