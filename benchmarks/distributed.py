"""Several GPUs of one host against one: the same steps, how the time scales, and what of it is
communication.

    python benchmarks/distributed.py --processes 1 2 4 --output out  # as many GPUs, 4 minutes
    python benchmarks/distributed.py --processes 1 2 --output out --device cpu --small

Starts `torchrun` once for each number of processes and writes out/distributed.jsonl, a line for
each of

- "equality": fp32 steps of one process against those of several with the same global batch, all
  methods, DDP and FSDP2: the largest difference of a loss and of a trained number, and, as a scale,
  how far the numbers moved from their start.
- "start": seconds until a model of LLaMA-7B's shapes has its SORSA adapter, the decompositions
  shared out.
- "scaling": seconds a step of that model in bf16; weak: so many rows for each process, strong: so
  many in all. `efficiency` is against one process. `communication` is the time of NCCL's kernels,
  waiting for each other included, over that of the step. What of it hides behind computing costs
  nothing; what does cost shows in the efficiency.

Random weights, random tokens. Each process has one GPU.
"""

import argparse
import datetime
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contenders import ALL_LINEAR, QV
from peft import get_peft_model
from step import SHAPES, machine
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import svdtune

METHODS: dict[str, Callable[[dict], Any]] = {
    "sorsa": lambda shape: svdtune.SorsaConfig(r=min(16, shape["r"]), target_modules=ALL_LINEAR),
    "sara": lambda shape: svdtune.SaraConfig(threshold=0.02, target_modules=QV),
    "mosara": lambda shape: svdtune.MoSaraConfig(r=shape["top"], num_heads=5, target_modules=QV),
}
STRATEGIES = ("ddp", "fsdp2")
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 128}
EQUALITY = {"tiny": {"rows": 8, "length": 64, "steps": 50}, "smollm2-135m": {"rows": 8, "length": 128, "steps": 20}}


class Worker:
    """One process of a launch: measures its part, the first of them writes it down."""

    def __init__(self, arguments: argparse.Namespace):
        self.small, self.layers = arguments.small, arguments.layers
        self.cuda = arguments.device == "cuda"
        self.index, self.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
        self.output = Path(arguments.output)
        settings = {"device_id": self.device} if self.cuda else {}
        timeout = datetime.timedelta(seconds=90)
        dist.init_process_group("nccl" if self.cuda else "gloo", timeout=timeout, **settings)
        self.strategies = STRATEGIES if self.count > 1 else ("one",)
        self.mesh = init_device_mesh(arguments.device, (self.count,))

    def run(self) -> None:
        """Everything, in order; what fails in all processes is written down, and the rest goes
        on."""
        steps = {}
        for shape, settings in EQUALITY.items():
            for method in METHODS:
                for strategy in self.strategies:
                    about = {"what": "equality", "shape": shape, "method": method, "strategy": strategy}
                    found = self.guarded(about, self.equality, shape, settings, method, strategy)
                    steps[shape, method, strategy] = found
        if self.index == 0:
            torch.save(steps, self.output / f"steps-{self.count}.pt")
        self.guarded({"what": "scaling"}, self.scaling)
        dist.destroy_process_group()

    def guarded(self, about: dict, work: Callable, *arguments: Any) -> Any:
        try:
            return work(*arguments)
        except Exception as error:
            self.write(about | {"error": f"{type(error).__name__}: {error}"[:500]})
            return None
        finally:
            gc.collect()
            if self.cuda:
                torch.cuda.empty_cache()

    def write(self, line: dict) -> None:
        if self.index == 0:
            with (self.output / f"lines-{self.count}.jsonl").open("a") as file:
                file.write(json.dumps({"processes": self.count} | line) + "\n")

    def model(self, shape: dict, layers: int, dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        settings = SMALL if self.small else shape["model"]
        config = LlamaConfig(
            **settings, num_hidden_layers=layers, use_cache=False, bos_token_id=None, eos_token_id=None
        )
        with self.device:
            return LlamaForCausalLM(config).to(dtype).train()

    def wrapped(self, model: nn.Module, strategy: str) -> nn.Module:
        if strategy == "ddp":
            return DistributedDataParallel(model, device_ids=[self.device] if self.cuda else None)
        if strategy == "fsdp2":
            for block in model.base_model.model.model.layers:
                fully_shard(block, mesh=self.mesh)
            return fully_shard(model, mesh=self.mesh)
        return model

    def own(self, tokens: Tensor) -> Tensor:
        """This process's rows of a global batch."""
        return tokens.chunk(self.count)[self.index].to(self.device)

    # Equality

    def equality(self, name: str, settings: dict, method: str, strategy: str) -> dict:
        shape = SHAPES[name]
        model = self.model(shape, 2 if self.small else shape["layers"], torch.float32)
        torch.manual_seed(1)
        small = {"r": 4, "top": 12}
        model = get_peft_model(model, METHODS[method](shape | (small if self.small else {})))
        first = whole(model)
        called = self.wrapped(model, strategy)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        svdtune.regularize(optimizer, model)
        data, losses = torch.Generator().manual_seed(2), []
        vocabulary = model.config.vocab_size
        for _ in range(5 if self.small else settings["steps"]):
            tokens = torch.randint(0, vocabulary, (settings["rows"], settings["length"]), generator=data)
            loss = self.step(called, trained, optimizer, self.own(tokens), torch.float32)
            dist.all_reduce(loss)
            losses.append(float(loss) / self.count)
        last = whole(model)
        moved = max(float((last[key] - first[key]).abs().max()) for key in last)
        return {"losses": losses, "factors": last, "moved": moved}

    def step(
        self, model: nn.Module, trained: list, optimizer: torch.optim.Optimizer, tokens: Tensor, dtype: torch.dtype
    ) -> Tensor:
        with torch.autocast(self.device.type, dtype) if dtype != torch.float32 else nullcontext():
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    # Scaling

    def scaling(self) -> None:
        shape = SHAPES["llama-7b"]
        dtype = torch.bfloat16 if self.cuda else torch.float32
        model = self.model(shape, 1 if self.small else self.layers, dtype)
        self.synchronize()
        began = time.perf_counter()
        config = svdtune.SorsaConfig(r=8 if self.small else shape["r"], target_modules=ALL_LINEAR)
        model = get_peft_model(model, config)
        self.synchronize()
        about = {"shape": "llama-7b", "layers": self.layers}
        self.write({"what": "start", **about, "seconds": time.perf_counter() - began})
        for strategy in self.strategies:
            called = self.wrapped(model, strategy)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
            hook = svdtune.regularize(optimizer, model)
            for kind, rows in (("weak", 8 * self.count), ("strong", 16)):
                if rows % self.count:
                    continue
                length = 16 if self.small else 512
                tokens = torch.randint(
                    0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(3)
                )
                seconds, sent, peak = self.timed(called, trained, optimizer, self.own(tokens), dtype)
                self.write(
                    {"what": "scaling", **about, "strategy": strategy, "kind": kind, "rows": rows, "length": length}
                    | {"seconds": seconds, "tokens_per_second": rows * length / seconds}
                    | {"communication_seconds": sent, "communication": sent / seconds, "peak_gib": peak}
                )
            hook.remove()
            del called, optimizer, trained
            gc.collect()

    def timed(self, model: nn.Module, trained: list, optimizer: Any, tokens: Tensor, dtype: torch.dtype) -> tuple:
        """(median seconds of a step, those of its communication kernels, GiB at the peak)."""
        warmup, counted = (1, 2) if self.small else (4, 10)
        for _ in range(warmup):
            self.step(model, trained, optimizer, tokens, dtype)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(counted):
            self.synchronize()
            began = time.perf_counter()
            self.step(model, trained, optimizer, tokens, dtype)
            self.synchronize()
            times.append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else None
        profiled = 1 if self.small else 3
        with profile(activities=[ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU]) as profiler:
            for _ in range(profiled):
                self.step(model, trained, optimizer, tokens, dtype)
            self.synchronize()
        return statistics.median(times), sum(self.communication(profiler)) / profiled, peak

    def communication(self, profiler: profile) -> Iterator[float]:
        for event in profiler.key_averages():
            if self.cuda and event.key.startswith("ncclDevKernel"):
                yield event.self_device_time_total / 1e6
            elif not self.cuda and event.key.startswith("gloo:"):
                yield event.cpu_time_total / 1e6

    def synchronize(self) -> None:
        """Wait for the GPU, and for the other processes."""
        if self.cuda:
            torch.cuda.synchronize()
        dist.barrier()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, put together, under the names they have without a wrapper."""
    return {
        name.removeprefix("module."): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().cpu().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def compared(one: dict, other: dict) -> dict[str, float]:
    """How far two runs of the same steps are apart."""
    pairs = zip(one["losses"], other["losses"], strict=True)
    apart = [float((one["factors"][key] - factor).abs().max()) for key, factor in other["factors"].items()]
    return {
        "steps": len(one["losses"]),
        "first_loss": one["losses"][0],
        "last_loss": one["losses"][-1],
        "loss_difference": max(abs(a - b) for a, b in pairs),
        "factor_difference": max(apart),
        "factors_moved": one["moved"],
    }


def launch(arguments: argparse.Namespace) -> None:
    """Run each number of processes, then bring the lines together."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    for path in (*arguments.output.glob("lines-*.jsonl"), *arguments.output.glob("steps-*.pt")):
        path.unlink()
    environment = os.environ | {"SVDTUNE_CACHE": "off", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
    for count in arguments.processes:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__]
        command += ["--worker", "--output", str(arguments.output), "--device", arguments.device]
        command += ["--layers", str(arguments.layers), *(["--small"] if arguments.small else [])]
        began = time.perf_counter()
        started = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            status = started.wait(arguments.limit)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            status = "timed out"
        print(f"{count} processes: {time.perf_counter() - began:.0f} s, status {status}", flush=True)
    about = machine(arguments.device) | {"devices_here": torch.cuda.device_count()}
    lines = [about | line for line in gathered(arguments)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (arguments.output / "distributed.jsonl").write_text(text)
    print(text)


def gathered(arguments: argparse.Namespace) -> Iterator[dict]:
    """The lines of all launches, with what only several of them together say."""
    runs = {}
    alone: dict[str, float] = {}
    for count in arguments.processes:
        path = arguments.output / f"lines-{count}.jsonl"
        for text in path.read_text().splitlines() if path.exists() else ():
            line = json.loads(text)
            if line["what"] == "scaling" and "error" not in line:
                if count == 1:
                    alone[line["kind"]] = line["tokens_per_second"]
                if line["kind"] in alone:
                    line["efficiency"] = line["tokens_per_second"] / count / alone[line["kind"]]
            yield line
        path.unlink(missing_ok=True)
        saved = arguments.output / f"steps-{count}.pt"
        if saved.exists():
            runs[count] = torch.load(saved)
            saved.unlink()
    for count, run in runs.items():
        for (shape, method, strategy), found in run.items():
            one = runs.get(1, {}).get((shape, method, "one"))
            if count > 1 and one is not None and found is not None:
                about = {"what": "equality", "shape": shape, "method": method, "strategy": strategy}
                yield {"processes": count} | about | compared(one, found)


def main() -> None:
    """Parse, and be the launcher or a worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=4, help="of the model whose scaling is measured")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that one number of processes may take")
    parser.add_argument("--small", action="store_true", help="tiny models and few steps: does it run?")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    Worker(arguments).run() if arguments.worker else launch(arguments)


if __name__ == "__main__":
    main()
