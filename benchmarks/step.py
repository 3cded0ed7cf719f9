"""One training step: svdtune's methods beside PEFT's, the frozen base's floor and the papers'
literal form, in one run.

    python benchmarks/step.py --shape llama-7b --out step.jsonl              # a GPU with 80 GB
    python benchmarks/step.py --shape smollm2-135m --compile                 # launch bound
    python benchmarks/step.py --shape tiny --device cpu                      # any machine

Prints one JSON line a contender. All of them see the same base weights, batches, optimizer (fused
AdamW) and precision (bf16 base, fp32 adapters, bf16 autocast; fp32 throughout on a CPU). The floor
is a frozen base: forward and the gradients of the inputs, no optimizer. `over_floor` divides by the
floor measured in the same run; `memory_over_floor_gib` subtracts its peak. `--contenders` picks
some; `--list` names them.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import svdtune
from svdtune.methods import compute
from svdtune.methods.mosara import reference as mosara_reference
from svdtune.methods.sara import reference as sara_reference
from svdtune.methods.sorsa import reference as sorsa_reference

SHAPES = {
    "llama-7b": {
        "model": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000},
        "layers": 8,
        "batch": 16,
        "length": 512,
        "r": 128,
        "k": 9,
        "top": 914,
    },
    "llama-1b": {
        "model": {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
        },
        "layers": 22,
        "batch": 16,
        "length": 512,
        "r": 64,
        "k": 9,
        "top": 400,
    },
    "smollm2-135m": {
        "model": {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
        "layers": 30,
        "batch": 16,
        "length": 256,
        "r": 64,
        "k": 9,
        "top": 150,
    },
    "tiny": {
        "model": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 512},
        "layers": 4,
        "batch": 8,
        "length": 128,
        "r": 16,
        "k": 9,
        "top": 100,
    },
}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = ["q_proj", "v_proj"]


@dataclass
class Contender:
    """One line of the table: how a base model becomes the thing that is trained."""

    name: str
    config: Callable[[dict], peft.PeftConfig] | None = None
    prepare: Callable[[nn.Module], nn.Module] = field(default=lambda model: model)
    regularized: bool = False
    trains: bool = True


def frozen(model: nn.Module) -> nn.Module:
    """The floor: nothing trained, gradients flowing to the embeddings' outputs."""
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model


def literal(model: nn.Module) -> nn.Module:
    """The model with every adapted layer computing its paper's equation as written."""
    for layer in model.modules():
        if not hasattr(layer, "fused"):
            continue

        def fused(x: Tensor, weight: Tensor, bias: Tensor | None, *_: object, layer: nn.Module = layer) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            if layer.method == "sorsa":
                y = sorsa_reference.sorsa_linear(flat, weight, bias, *layer.product("default"))
            elif layer.method == "sara":
                y = sara_reference.sara_linear(flat, weight, bias, *layer.product("default")[:3])
            else:
                y = mosara_reference.mosara_linear(flat, weight, bias, *layer._tensors("default"))
            return y.view(*x.shape[:-1], -1)

        layer.fused = fused
    return model


def contenders() -> list[Contender]:
    """Every line, the floor first and last: the two floors show how far the machine drifted in
    between."""

    def lora(**settings):
        return lambda shape: peft.LoraConfig(r=shape["r"], lora_alpha=shape["r"], target_modules=ALL_LINEAR, **settings)

    def sorsa(**settings):
        return lambda shape: svdtune.SorsaConfig(r=shape["r"], target_modules=ALL_LINEAR, **settings)

    return [
        Contender("floor", prepare=frozen, trains=False),
        Contender("sorsa-delta", sorsa(), regularized=True),
        Contender("sorsa-delta-without-regularizer", sorsa(gamma=0.0)),
        Contender("sorsa-delta-dropout", sorsa(dropout=0.05), regularized=True),
        Contender("sorsa-literal", sorsa(), literal, regularized=True),
        Contender("lora", lora()),
        Contender("lora-dropout", lora(lora_dropout=0.05)),
        Contender("pissa", lora(init_lora_weights="pissa_niter_16")),
        Contender("dora", lora(use_dora=True)),
        Contender(
            "adalora",
            lambda shape: peft.AdaLoraConfig(
                init_r=shape["r"], target_r=shape["r"], total_step=10**6, target_modules=ALL_LINEAR
            ),
        ),
        Contender("full", trains=True),
        Contender("lora-qv-r8", lambda shape: peft.LoraConfig(r=8, lora_alpha=8, target_modules=QV)),
        Contender("sara-qv", lambda shape: svdtune.SaraConfig(r=shape["k"], target_modules=QV)),
        Contender(
            "vera-qv-r1024",
            lambda shape: peft.VeraConfig(r=min(1024, 4 * shape["top"]), target_modules=QV),
        ),
        Contender(
            "mosara-qv-5-heads", lambda shape: svdtune.MoSaraConfig(r=shape["top"], num_heads=5, target_modules=QV)
        ),
        Contender("sara-all", lambda shape: svdtune.SaraConfig(r=shape["r"], target_modules=ALL_LINEAR)),
        Contender("floor-again", prepare=frozen, trains=False),
    ]


def share(model: nn.Module, what: str) -> None:
    """Let svdtune's layers share a pass wholly, by groups with one input alone, or not at all."""
    together = getattr(getattr(model, "base_model", None), "together", None)
    if together is not None and what == "off":
        together.enabled = False
    elif what == "groups":
        compute.together.SMALL_LAYER = 0


class Run:
    """One shape on one device: builds each contender from the same base and times its steps."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.shape = arguments, SHAPES[arguments.shape]
        self.device = torch.device(arguments.device)
        self.cuda = self.device.type == "cuda"
        self.batch = arguments.batch or self.shape["batch"]
        self.length = arguments.length or self.shape["length"]
        self.floor: dict[str, float] = {}
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.shape["model"]["vocab_size"]
        self.tokens = torch.randint(0, vocabulary, (4, self.batch, self.length), generator=generator).to(self.device)

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(
            **self.shape["model"],
            num_hidden_layers=self.arguments.layers or self.shape["layers"],
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        with self.device:
            model = LlamaForCausalLM(config)
        return model.to(torch.bfloat16 if self.cuda else torch.float32).train()

    def autocast(self):
        return torch.autocast("cuda", torch.bfloat16) if self.cuda else nullcontext()

    def measure(self, contender: Contender) -> dict:
        """Build, warm up and time one contender. A contender that cannot run gives a line that says
        why."""
        gc.collect()
        model = self.base()
        torch.manual_seed(1)
        if contender.config is not None:
            model = peft.get_peft_model(model, contender.config(self.shape))
        model = contender.prepare(model)
        share(model, self.arguments.together)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = None
        if contender.trains:
            optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
            if contender.regularized:
                svdtune.regularize(optimizer, model)
        called = torch.compile(model) if self.arguments.compile else model
        losses, times = [], []
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for step in range(self.arguments.warmup + self.arguments.steps):
            loss, seconds = self.step(called, optimizer, self.tokens[step % len(self.tokens)])
            losses.append(loss)
            if step >= self.arguments.warmup:
                times.append(seconds)
        seconds = statistics.median(times)
        line = {
            "contender": contender.name,
            "seconds": seconds,
            "spread": [min(times), max(times)],
            "tokens_per_second": self.batch * self.length / seconds,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if self.cuda else None,
            "trained": sum(p.numel() for p in parameters) if contender.trains else 0,
            "losses": [float(loss) for loss in losses[:20]],
        }
        if not self.floor:
            self.floor = line
        line["over_floor"] = seconds / self.floor["seconds"]
        if self.cuda:
            line["memory_over_floor_gib"] = line["peak_gib"] - self.floor["peak_gib"]
        return line

    def step(self, model: nn.Module, optimizer, tokens: Tensor) -> tuple[Tensor, float]:
        if self.cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
        else:
            begin = time.perf_counter()
        with self.autocast():
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if not self.cuda:
            return loss.detach(), time.perf_counter() - begin
        end.record()
        torch.cuda.synchronize()
        return loss.detach(), begin.elapsed_time(end) / 1000


def machine(device: str) -> dict:
    """What the numbers depend on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "processor": platform.machine(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "svdtune": svdtune.__version__,
    }


def main() -> None:
    """Parse, run each contender, print its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contenders", nargs="+", help="names to run, the floor always; default: all")
    parser.add_argument("--list", action="store_true", help="name the contenders and stop")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--together",
        choices=["all", "groups", "off"],
        default="all",
        help="what layers share in a pass (methods/compute)",
    )
    parser.add_argument("--out", type=Path, help="append the lines to this file too")
    arguments = parser.parse_args()
    known = contenders()
    if arguments.list:
        print("\n".join(contender.name for contender in known))
        return
    if unknown := set(arguments.contenders or ()) - {contender.name for contender in known}:
        sys.exit(f"unknown contenders: {', '.join(sorted(unknown))}; --list names them")
    run, about = Run(arguments), machine(arguments.device)
    about |= {
        "shape": arguments.shape,
        "batch": run.batch,
        "length": run.length,
        "compile": arguments.compile,
        "together": arguments.together,
    }
    for contender in known:
        wanted = arguments.contenders is None or contender.name in arguments.contenders or contender.name == "floor"
        if not wanted:
            continue
        try:
            line = run.measure(contender)
        # out of memory, or a method that refuses the shape: the others still run
        except Exception as error:
            line = {"contender": contender.name, "error": f"{type(error).__name__}: {error}"[:300]}
        line = about | line
        print(json.dumps(line), flush=True)
        if arguments.out is not None:
            with arguments.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if run.cuda:
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
