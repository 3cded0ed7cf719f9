"""One training step: svdtune's methods beside PEFT's, the frozen base's floor and the papers'
literal form, in one run.

    python benchmarks/step.py --shape llama-7b --out step.jsonl              # a GPU with 80 GB
    python benchmarks/step.py --shape smollm2-135m --scenario compiled       # launch bound
    python benchmarks/step.py --shape tiny --device cpu                      # any machine
    python benchmarks/step_table.py                                          # all shapes, one table

Prints one JSON line a contender. All of them see the same base weights, batches, optimizer (fused
AdamW) and precision (bf16 base, fp32 adapters, bf16 autocast; fp32 throughout on a CPU). The floor
is a frozen base: forward and the gradients of the inputs, no optimizer. `over_floor` divides by the
floor measured in the same run; `memory_over_floor_gib` subtracts its peak. `--contenders` picks
some; `--list` names them. Those that end in nf4 have a base in 4 bits, and need bitsandbytes.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
from svdtune.training.compilation import any_number_of_rows, blocks_of, compiled_blocks
from svdtune.training.packing import ROW_LENGTHS, TOKENS, PackingCollator
from svdtune.training.row_attention import attention_by_rows


def shape(hidden: int, intermediate: int, heads: int, key_value_heads: int, vocabulary: int, **settings) -> dict:
    """A Llama's sizes; `settings` are its layers, batch, length, rank r, SARA's k at q and v,
    Mo-SARA's k (top), and `tied` where its head is the embeddings."""
    model = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads}
    model |= {"num_key_value_heads": key_value_heads, "vocab_size": vocabulary}
    return {"model": model | {"tie_word_embeddings": settings.pop("tied", False)}, **settings}


SHAPES = {
    "llama-7b": shape(4096, 11008, 32, 32, 32000, layers=8, batch=16, length=512, r=128, k=9, top=914),
    "llama-3-8b": shape(4096, 14336, 32, 8, 128256, layers=8, batch=8, length=1024, r=16, k=9, top=914),
    "llama-3b": shape(3072, 8192, 24, 8, 128256, tied=True, layers=28, batch=8, length=512, r=64, k=9, top=600),
    "llama-1b": shape(2048, 5632, 32, 4, 32000, layers=22, batch=16, length=512, r=64, k=9, top=400),
    "smollm2-135m": shape(576, 1536, 9, 3, 49152, tied=True, layers=30, batch=16, length=256, r=64, k=9, top=150),
    "tiny": shape(256, 512, 4, 4, 512, layers=4, batch=8, length=128, r=16, k=9, top=100),
}
SCENARIOS = {
    "eager": "as written",
    "compiled": "block by block with one shape, as svdtune.training does it",
    "packed": "rows of any length one after another in one sequence, each attended to by itself",
    "packed-compiled": "both",
    "model-compiled": "the model as a whole through torch.compile",
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
    nf4: bool = False


def frozen(model: nn.Module) -> nn.Module:
    """The floor: nothing trained, gradients flowing to the embeddings' outputs."""
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model


def in_nf4(model: nn.Module) -> nn.Module:
    """The model with the linear layers of its blocks in 4 bits, as Transformers loads them for
    QLoRA."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for block in blocks_of(model):
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                weight = layer.weight.data
                new = Linear4bit(
                    weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, quant_type="nf4"
                )
                new.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=new)
                block.set_submodule(name, new.to(weight.device))
    model.is_loaded_in_4bit = True  # by which PEFT's LoRA knows
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

    def sara(shape):
        return svdtune.SaraConfig(r=shape["r"], target_modules=ALL_LINEAR)

    def mosara(shape):
        return svdtune.MoSaraConfig(r=shape["top"], num_heads=5, target_modules=QV)

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
        Contender("mosara-qv-5-heads", mosara),
        Contender("sara-all", sara),
        Contender("floor-nf4", prepare=frozen, trains=False, nf4=True),
        Contender("lora-nf4", lora(), nf4=True),
        Contender("sorsa-delta-nf4", sorsa(), regularized=True, nf4=True),
        Contender("sara-all-nf4", sara, nf4=True),
        Contender("mosara-qv-5-heads-nf4", mosara, nf4=True),
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
        self.arguments = arguments
        self.shape = SHAPES[arguments.shape] | ({"r": arguments.r} if arguments.r else {})
        self.device = torch.device(arguments.device)
        self.cuda = self.device.type == "cuda"
        self.batch = arguments.batch or self.shape["batch"]
        self.length = arguments.length or self.shape["length"]
        self.floor: dict[str, float] = {}
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.shape["model"]["vocab_size"]
        self.tokens = torch.randint(0, vocabulary, (4, self.batch, self.length), generator=generator).to(self.device)
        self.packed = arguments.scenario.startswith("packed")
        self.batches = [self.inputs(tokens) for tokens in self.tokens]

    def inputs(self, tokens: Tensor) -> dict[str, Any]:
        """What a model is given of tokens [batch, length], none of them padding; packed, three rows
        to a sequence."""
        if not self.packed:
            return {"input_ids": tokens, "labels": tokens}
        parts = [self.length // 2, self.length // 3]
        parts.append(self.length - sum(parts))
        rows = [{"input_ids": row, "labels": row, ROW_LENGTHS: parts} for row in tokens.tolist()]
        found = PackingCollator(0, flat=True, length=self.length)(rows)
        del found[TOKENS]
        return {name: x.to(self.device) if isinstance(x, Tensor) else x for name, x in found.items()}

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
        torch.compiler.reset()  # one process keeps few graphs of one block's code
        model = in_nf4(self.base()) if contender.nf4 else self.base()
        began = time.perf_counter()
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
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with self.scenario(model) as (called, graphs):
            losses, times, first = self.steps(called, optimizer, graphs)
        seconds = statistics.median(times)
        line = {
            "contender": contender.name,
            "seconds": seconds,
            "spread": [min(times), max(times)],
            "seconds_to_first_step": first - began,
            "tokens_per_second": self.batch * self.length / seconds,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if self.cuda else None,
            "trained": sum(p.numel() for p in parameters) if contender.trains else 0,
            "losses": [float(loss) for loss in losses],
        }
        if not self.floor:
            self.floor = line
        line["over_floor"] = seconds / self.floor["seconds"]
        if self.cuda:
            line["memory_over_floor_gib"] = line["peak_gib"] - self.floor["peak_gib"]
        return line

    @contextmanager
    def scenario(self, model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
        """What is called in place of the model, and what tells the compiler of steps or None."""
        kind = self.arguments.scenario
        with attention_by_rows(model) if self.packed else nullcontext():
            if kind.endswith("compiled") and kind != "model-compiled":
                with compiled_blocks(model, one_shape=True) as graphs:
                    yield model, graphs
            else:
                yield torch.compile(model) if kind == "model-compiled" else model, None

    def steps(self, model: nn.Module, optimizer, graphs) -> tuple[list[Tensor], list[float], float]:
        """The losses of all steps, the seconds of those after the warm-up, and when the first had
        ended."""
        losses, times, first = [], [], 0.0
        for step in range(self.arguments.warmup + self.arguments.steps):
            if graphs is not None:
                graphs.on_step_begin()
            loss, seconds = self.step(model, optimizer, self.batches[step % len(self.batches)])
            if graphs is not None:
                graphs.on_step_end()
            losses.append(loss)
            first = first or time.perf_counter()
            if step >= self.arguments.warmup:
                times.append(seconds)
        return losses, times, first

    def step(self, model: nn.Module, optimizer, inputs: dict[str, Any]) -> tuple[Tensor, float]:
        any_number_of_rows(inputs)
        if self.cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
        else:
            begin = time.perf_counter()
        with self.autocast():
            loss = model(**inputs).loss
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


def words() -> argparse.ArgumentParser:
    """The arguments of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scenario", choices=SCENARIOS, default="eager", help=str(SCENARIOS))
    parser.add_argument("--contenders", nargs="+", help="names to run, the floor always; default: all")
    parser.add_argument("--list", action="store_true", help="name the contenders and stop")
    parser.add_argument("--r", type=int, help="rank of those that adapt all linear layers; default: the shape's")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument(
        "--together",
        choices=["all", "groups", "off"],
        default="all",
        help="what layers share in a pass (methods/compute)",
    )
    parser.add_argument("--out", type=Path, help="append the lines to this file too")
    return parser


def main() -> None:
    """Parse, run each contender, print its line."""
    arguments, known = words().parse_args(), contenders()
    if arguments.list:
        print("\n".join(contender.name for contender in known))
        return
    if unknown := set(arguments.contenders or ()) - {contender.name for contender in known}:
        sys.exit(f"unknown contenders: {', '.join(sorted(unknown))}; --list names them")
    run, about = Run(arguments), machine(arguments.device)
    about |= {name: getattr(arguments, name) for name in ("shape", "scenario", "together")}
    about |= {"batch": run.batch, "length": run.length, "r": run.shape["r"]}
    everything = {c.name for c in known if not c.nf4 or find_spec("bitsandbytes")}
    for contender in known:
        if contender.name not in {"floor", *(arguments.contenders or everything)}:
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
