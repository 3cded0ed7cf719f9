"""Training curves of one real model: svdtune's layers beside the papers' equations as written, over
the same batches.

    python benchmarks/curves.py --model smollm2-135m --method sorsa --steps 200 --out curves.jsonl

Both start from one adapter and see the same rows of worded arithmetic, the same optimizer and the
same regularizer; fp32, or bf16 autocast with `--autocast`. On a GPU the fast side works as it does
in training (layers together); on a CPU that is asked for with `--together`. A third curve is the
control: the literal form again, its factors perturbed by 1e-7 at the start. Training multiplies
rounding errors with every step, so that is how far two runs of one program can drift apart. Prints
one JSON line: all losses, their largest relative difference in the first ten steps, the mean loss
of the last half.
"""

import argparse
import copy
import json
import statistics
from contextlib import nullcontext
from pathlib import Path

import peft
import torch
from contenders import literal
from step import machine
from torch import Tensor, nn

import svdtune
from svdtune.data import Collator, encode_all, read_rows, to_examples
from svdtune.models import load

CONFIGS = {
    "sorsa": lambda: svdtune.SorsaConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    "sara": lambda: svdtune.SaraConfig(threshold=0.05, target_modules="all-linear", task_type="CAUSAL_LM"),
    "mosara": lambda: svdtune.MoSaraConfig(threshold=0.3, num_heads=5, task_type="CAUSAL_LM"),
}


def curve(model: nn.Module, batches: list[dict[str, Tensor]], autocast: bool, device: str) -> list[float]:
    """The loss at every step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4, weight_decay=0.0)
    svdtune.regularize(optimizer, model)
    losses = []
    for batch in batches:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device, torch.bfloat16) if autocast else nullcontext():
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def drift(losses: list[float], reference: list[float]) -> float:
    """The largest relative difference of the first ten losses."""
    return max(abs(a - b) / b for a, b in zip(losses[:10], reference[:10], strict=True))


def main() -> None:
    """Train all three, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", choices=CONFIGS, default="sorsa")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    loaded = load(arguments.model, dtype="float32")
    examples = to_examples(read_rows("arithmetic", limit=arguments.steps * arguments.batch), "question", "solution")
    template = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    rows, _ = encode_all(examples, loaded.tokenizer, 512, template=template)
    collate = Collator(loaded.tokenizer.pad_token_id)
    size = arguments.batch
    batches = [collate(rows[i * size : (i + 1) * size]) for i in range(arguments.steps)]
    torch.manual_seed(0)
    fast = peft.get_peft_model(loaded.model, CONFIGS[arguments.method]()).to(arguments.device).train()
    slow = literal(copy.deepcopy(fast))
    control = literal(copy.deepcopy(fast))
    with torch.no_grad():
        for parameter in control.parameters():
            if parameter.requires_grad:
                parameter *= 1 + 1e-7 * torch.randn_like(parameter)
    if arguments.together:
        fast.base_model.together.enabled = True
    models = {"fast": fast, "literal": slow, "control": control}
    curves = {name: curve(model, batches, arguments.autocast, arguments.device) for name, model in models.items()}
    line = machine(arguments.device) | {
        "model": arguments.model,
        "method": arguments.method,
        "autocast": arguments.autocast,
        "steps": arguments.steps,
        "first_ten_fast": drift(curves["fast"], curves["literal"]),
        "first_ten_control": drift(curves["control"], curves["literal"]),
        "last_half": {name: statistics.mean(losses[len(losses) // 2 :]) for name, losses in curves.items()},
        **curves,
    }
    print(json.dumps(line))
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
