"""One training step: svdtune's methods beside PEFT's, the frozen base's floor and the papers'
literal form, in one run.

    python benchmarks/step.py --shape llama-7b --out step.jsonl              # a GPU with 80 GB
    python benchmarks/step.py --shape smollm2-135m --scenario graph          # launch bound
    python benchmarks/step.py --shape tiny --device cpu                      # any machine
    python benchmarks/step_table.py                                          # all shapes, one table

Prints one JSON line a contender. All of them see the same base weights, batches, optimizer (fused
AdamW) and precision (bf16 base, fp32 adapters, bf16 autocast; fp32 throughout on a CPU). The floor
is a frozen base: forward and the gradients of the inputs, no optimizer. `over_floor` divides by the
floor measured in the same run; `memory_over_floor_gib` subtracts its peak. `--contenders` picks
some; `--list` names them. Those that end in nf4 and int4 have a base in 4 bits, and need
bitsandbytes and torchao.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from contenders import QUANTIZED, Contender, contenders
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import svdtune
from svdtune.methods import compute
from svdtune.training.compilation import any_number_of_rows, compiled_blocks
from svdtune.training.cuda_graph import recorded_body
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
    "graph": "compiled, and the body recorded in CUDA graphs",
    "packed-graph": "the same, packed",
    "model-compiled": "the model as a whole through torch.compile",
}


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
        self.recorded = arguments.scenario.endswith("graph")
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
        model = self.base() if contender.bits is None else QUANTIZED[contender.bits][1](self.base())
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
        kind, graphs = self.arguments.scenario, None
        with ExitStack() as stack:
            # a recording asks no tensor whether a mask is needed: it would form one
            if self.packed or self.recorded:
                stack.enter_context(attention_by_rows(model))
            if kind == "model-compiled":
                model = torch.compile(model)
            elif kind not in ("eager", "packed"):
                graphs = stack.enter_context(compiled_blocks(model, one_shape=True))
            body = stack.enter_context(recorded_body(model)) if self.recorded else None
            yield model, graphs
        if body is not None and body.aside:
            raise RuntimeError(f"{body.aside} passes were not replayed, but ran as written")

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
        if self.recorded and optimizer is None:
            # a recording has gradients of what it is given, and the floor of nothing else
            inputs = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
            del inputs["input_ids"]
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
    missing = {bits: package for bits, (package, _) in QUANTIZED.items() if not find_spec(package)}
    everything = {c.name for c in known if c.bits not in missing}
    for contender in known:
        if contender.name not in {"floor", *(arguments.contenders or everything)}:
            continue
        try:
            if contender.bits in missing:
                raise RuntimeError(f"{missing[contender.bits]} is not installed")
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
