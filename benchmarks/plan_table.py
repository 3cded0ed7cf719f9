"""The tables of docs/planning.md: estimates beside measured steps, and what `svdtune plan` says of
large models.

    python benchmarks/plan_table.py

Reads the steps that benchmarks/step.py measured; nothing is run on a GPU.
"""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig
from svdtune.checkpoint import Checkpoint, open_shape
from svdtune.planning import (
    Setting,
    anatomy,
    cheapest,
    devices_needed,
    estimate,
    initialisation_bytes,
    plan,
)
from svdtune.planning.anatomy import Anatomy

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
ALL, QV = "all-linear", ["q_proj", "v_proj"]
CONFIGS = {"sara": SaraConfig, "mosara": MoSaraConfig, "sorsa": SorsaConfig, "lora": LoraConfig}
# File of results → contender → (method, rank, target modules): those that svdtune plan knows.
STEPS = {
    "step-llama-7b-h100.jsonl": {
        "sorsa-delta": ("sorsa", 128, ALL),
        "sorsa-delta-dropout": ("sorsa", 128, ALL),
        "sara-all": ("sara", 128, ALL),
        "sara-qv": ("sara", 9, QV),
        "mosara-qv-5-heads": ("mosara", 914, QV),
        "lora": ("lora", 128, ALL),
        "lora-qv-r8": ("lora", 8, QV),
    },
    "step-smollm2-h100.jsonl": {
        "sorsa-delta": ("sorsa", 64, ALL),
        "sara-qv": ("sara", 9, QV),
        "lora": ("lora", 64, ALL),
        "lora-qv-r8": ("lora", 8, QV),
    },
}
# (shape, devices, GiB of each, batch of a device, length)
MODELS = [
    ("llama-7b", 1, 24, 16, 512),
    ("llama-7b", 1, 80, 16, 512),
    ("llama-7b", 8, 80, 16, 512),
    ("llama-13b", 1, 80, 8, 2048),
    ("llama-13b", 8, 80, 8, 2048),
    ("llama-70b", 1, 80, 4, 2048),
    ("llama-70b", 2, 80, 4, 2048),
    ("llama-70b", 8, 80, 8, 2048),
    ("llama-70b", 64, 80, 8, 2048),
    ("llama-405b", 8, 80, 4, 2048),
    ("llama-405b", 8, 141, 4, 2048),
    ("llama-405b", 64, 80, 4, 2048),
]


def smollm2() -> Checkpoint:
    """SmolLM2-135M's shapes."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**sizes, vocab_size=49152, tie_word_embeddings=True, num_hidden_layers=30)
    with torch.device("meta"):
        return Checkpoint("smollm2-135m", LlamaForCausalLM(config), {}, 0)


def before(sizes: Anatomy, config: LlamaConfig, setting: Setting) -> float:
    """GiB by the formula that came before: no inputs of adapted layers, 20 H + 4 KV bytes of a
    layer, 10 bytes of a logit."""
    H, T = config.hidden_size, setting.tokens
    key_value = H * config.num_key_value_heads // config.num_attention_heads
    layers = sizes.depth * 2 * T * (8 * H + 2 * key_value + 3 * config.intermediate_size)
    factors = 16 * sizes.trained + 4 * sizes.frozen
    return (2 * sizes.parameters + factors + layers + 10 * T * config.vocab_size) / GIB


def against_steps() -> Iterator[str]:
    """A row a measured step."""
    yield "| shape | step | measured, GiB | estimated | off by | before |"
    yield "|---|---|---|---|---|---|"
    for file, contenders in STEPS.items():
        checkpoint = open_shape("llama-7b", layers=8) if "llama" in file else smollm2()
        for line in map(json.loads, (RESULTS / file).read_text().splitlines()):
            if line["contender"] not in contenders:
                continue
            method, r, targets = contenders[line["contender"]]
            sizes = anatomy(plan(checkpoint, CONFIGS[method](r=r, target_modules=targets)), checkpoint.model)
            setting = Setting(batch_size=line["batch"], length=line["length"])
            total, peak = estimate(sizes, setting).total / GIB, line["peak_gib"]
            old = before(sizes, checkpoint.model.config, setting) / peak - 1
            yield (
                f"| {line['shape']} | {line['contender']} | {peak:.2f} | {total:.2f} | {total / peak - 1:+.1%} | {old:+.1%} |"
            )


def of_models() -> Iterator[str]:
    """A row a model and machine: SORSA, r = 128, all linear layers."""
    yield "| model | devices | asked | a device | the cheapest that fits | a device | without offload, 4 bits |"
    yield "|---|---|---|---|---|---|---|"
    for name, devices, gib, batch, length in MODELS:
        checkpoint = open_shape(name)
        sizes = anatomy(plan(checkpoint, SorsaConfig(r=128, target_modules=ALL)), checkpoint.model)
        asked = Setting("ddp" if devices == 1 else "fsdp2", devices, batch, length)
        choice = cheapest(sizes, asked, gib * GIB)
        row = [name, f"{devices} × {gib} GiB", f"{batch} × {length}, {asked.strategy if devices > 1 else 'alone'}"]
        row.append(f"{estimate(sizes, asked).total / GIB:.1f}")
        if choice is None:
            row += ["none", ""]
        else:
            row += [in_words(asked, choice.setting), f"{choice.memory.total / GIB:.1f}"]
        dear = choice is None or {"offload", "4-bit"} & set(choice.why)
        row.append(f"{devices_needed(sizes, asked, gib * GIB)} devices" if dear else "as it is")
        yield f"| {' | '.join(row)} |"


def in_words(asked: Setting, chosen: Setting) -> str:
    """What was changed."""
    words = [f"batch {chosen.batch_size}"] if chosen.batch_size != asked.batch_size else []
    words += ["checkpointing"] if chosen.gradient_checkpointing else []
    words += [chosen.strategy] if chosen.strategy != asked.strategy else []
    words += ["offload"] if chosen.offload else []
    words += ["4-bit"] if chosen.dtype != asked.dtype else []
    return ", ".join(words) or "as asked"


def of_starting() -> Iterator[str]:
    """A row a model: what `svdtune init` needs at most."""
    yield "| model | bf16 weights, GiB | largest adapted weight | initialisation, at most, GiB |"
    yield "|---|---|---|---|"
    for name in ("llama-7b", "llama-13b", "llama-70b", "llama-405b"):
        checkpoint = open_shape(name)
        made = plan(checkpoint, SorsaConfig(r=128, target_modules=ALL))
        out, inside = max((site.shape for site in made.sites), key=prod)
        needed = initialisation_bytes(made, checkpoint.model) / GIB
        yield f"| {name} | {checkpoint.bytes / GIB:.1f} | {out} × {inside} | {needed:.1f} |"


if __name__ == "__main__":
    print("\n".join([*against_steps(), "", *of_models(), "", *of_starting()]))
