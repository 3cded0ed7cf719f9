"""`svdtune train` under every ready configuration of Accelerate, against one GPU: losses and the
adapter that is saved.

    python benchmarks/distributed_runs.py --processes 2 --output out  # two GPUs, some three minutes
    python benchmarks/distributed_runs.py --processes 2 --output out --configs ddp --device cpu

Trains all three methods for ten steps in fp32 on a tiny random Llama, with the same rows a step,
and writes out/runs.jsonl: for each configuration and method the largest difference of a loss and of
a number in the adapter's file, or what went wrong.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from step import machine
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "accelerate"
METHODS = {
    "sorsa": "{name: sorsa, r: 8, target_modules: all-linear}",
    "sara": "{name: sara, threshold: 0.1}",
    "mosara": "{name: mosara, r: 16, num_heads: 3}",
}
RECIPE = """\
model: {{name: {model}, dtype: float32}}
method: {method}
data: {{train: {{source: arithmetic, limit: 62}}, prompt: question, completion: solution, max_length: 256}}
training: {{max_steps: 10, batch_size: {batch}, learning_rate: 1.0e-3, precision: fp32, logging_steps: 1, save_steps: 5}}
output: {{dir: {output}}}
"""


def make_model(folder: Path) -> None:
    """A random Llama of four blocks and a tokenizer of bytes."""
    tokens = ["<|end|>", "<|pad|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(made),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    made.save_pretrained(folder)


def run(launcher: list[str], output: Path, method: str, batch: int, model: Path) -> str | None:
    """Train; what went wrong, None if nothing did."""
    recipe = output.with_suffix(".yaml")
    recipe.write_text(RECIPE.format(model=model, method=METHODS[method], batch=batch, output=output))
    root = str(CONFIGS.parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
    command = [*launcher, "-m", "svdtune", "train", str(recipe), "--overwrite"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return None if done.returncode == 0 else done.stderr[-1500:]


def losses(folder: Path) -> list[float]:
    """Of every step of a run."""
    return [json.loads(line)["loss"] for line in (folder / "train_log.jsonl").read_text().splitlines()]


def compared(one: Path, other: Path) -> dict[str, float]:
    """How far two finished runs are apart."""
    tensors, others = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    if tensors.keys() != others.keys():
        return {"error": f"the adapters have other tensors: {sorted(tensors.keys() ^ others.keys())[:5]}"}
    pairs = zip(losses(one), losses(other), strict=True)
    return {
        "steps": len(losses(one)),
        "loss_difference": max(abs(a - b) for a, b in pairs),
        "factor_difference": max(float((tensors[name] - others[name]).abs().max()) for name in tensors),
    }


def main() -> None:
    """Parse, run one process and then every configuration, write the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, choices=(2, 4))
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--configs", nargs="+", default=["ddp", "fsdp2", "fsdp2-offload"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    make_model(output / "model")
    about = machine(arguments.device) | {"processes": arguments.processes}
    with (output / "runs.jsonl").open("w") as file:
        for method in arguments.methods:
            failed = run([sys.executable], output / f"one-{method}", method, 4, output / "model")
            for config in arguments.configs:
                launcher = [
                    sys.executable,
                    "-m",
                    "accelerate.commands.launch",
                    "--config_file",
                    str(CONFIGS / f"{config}.yaml"),
                ]
                launcher += ["--num_processes", str(arguments.processes)]
                if arguments.device == "cpu":
                    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                    launcher += [f"--nproc-per-node={arguments.processes}"]
                folder = output / f"{config}-{method}"
                wrong = failed or run(launcher, folder, method, 4 // arguments.processes, output / "model")
                found = {"error": wrong} if wrong else compared(output / f"one-{method}", folder)
                line = about | {"what": "run", "config": config, "method": method} | found
                file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
