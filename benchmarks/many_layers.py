"""How long an adapter takes to be put on a model of many layers, and to be loaded onto one.

The layers are tiny, so that what is measured is the work for each of them and not their arithmetic.
Both times should double where the layers do. They are CPU seconds of the process, so that what else
the machine does does not count.

    python benchmarks/many_layers.py --layers 1000 2000
"""

import argparse
import tempfile
import time
import warnings

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig

CONFIGS = {"LoRA": LoraConfig, "SARA": SaraConfig, "Mo-SARA": MoSaraConfig, "SORSA": SorsaConfig}


def network(layers: int, width: int) -> nn.Module:
    """Blocks of one linear layer each in one list."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width)) for _ in range(layers)))


def seconds(config: type[PeftConfig], layers: int, width: int) -> tuple[float, float]:
    """CPU seconds to put an adapter on, and to load it onto another copy."""
    model = network(layers, width)
    started = time.process_time()
    adapted = get_peft_model(model, config(r=2, target_modules=r"\d+\.0"))
    made = time.process_time() - started
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        model = network(layers, width)
        started = time.process_time()
        PeftModel.from_pretrained(model, folder)
        return made, time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1000, 2000])
    parser.add_argument("--width", type=int, default=8)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    seconds(SorsaConfig, 2, options.width)  # imports and caches
    print("| method | layers | put on, s | loaded, s |\n|---|---|---|---|")
    for name, config in CONFIGS.items():
        for layers in options.layers:
            made, loaded = seconds(config, layers, options.width)
            print(f"| {name} | {layers:,} | {made:.1f} | {loaded:.1f} |", flush=True)


if __name__ == "__main__":
    main()
