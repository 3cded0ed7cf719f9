"""Generating with an unmerged adapter, one sequence at a time: milliseconds a token beside the base
model and PEFT's LoRA.

    python benchmarks/decode.py --shape llama-7b --out decode.jsonl

Greedy, with a KV cache, bf16 base, no autocast; the median of `--repeats` runs of `--tokens`
tokens. One JSON line a contender.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import peft
import torch
from contenders import contenders
from step import SHAPES, Run, machine, words

CONTENDERS = ("floor", "sorsa-delta", "lora", "lora-qv-r8", "sara-qv", "mosara-qv-5-heads")


def main() -> None:
    """Build each contender, generate, print its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    given = ["--shape", arguments.shape, "--device", arguments.device, "--batch", "1", "--length", "32"]
    run = Run(words().parse_args(given))
    base_ms = None
    for contender in contenders():
        if contender.name not in CONTENDERS:
            continue
        model = run.base().eval()
        if contender.config is not None:
            model = peft.get_peft_model(model, contender.config(run.shape)).eval()
        times = []
        for _ in range(arguments.repeats + 1):
            begin = time.perf_counter()
            model.generate(
                input_ids=run.tokens[0], max_new_tokens=arguments.tokens, min_new_tokens=arguments.tokens,
                do_sample=False,
                use_cache=True, pad_token_id=0,
            )  # fmt: skip
            times.append((time.perf_counter() - begin) / arguments.tokens * 1000)
        milliseconds = statistics.median(times[1:])
        base_ms = base_ms or milliseconds
        line = machine(arguments.device) | {
            "shape": arguments.shape,
            "contender": "base" if contender.name == "floor" else contender.name,
            "ms_per_token": milliseconds,
            "over_base": milliseconds / base_ms,
        }
        print(json.dumps(line), flush=True)
        if arguments.out is not None:
            with arguments.out.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
