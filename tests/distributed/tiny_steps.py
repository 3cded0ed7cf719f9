"""A training loop of one's own on a tiny Llama, by one process or by several: what the processes of
these tests run."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import svdtune

ROWS, LENGTH, VOCABULARY = 8, 12, 64
METHODS: dict[str, Callable[[], Any]] = {
    "sorsa": lambda: svdtune.SorsaConfig(r=5, target_modules="all-linear"),
    "sara": lambda: svdtune.SaraConfig(threshold=0.3, target_modules=["q_proj", "v_proj", "down_proj"]),
    "mosara": lambda: svdtune.MoSaraConfig(threshold=0.5, num_heads=3, target_modules=["q_proj", "v_proj"]),
}


def tiny(seed: int = 0) -> nn.Module:
    """A random Llama of two blocks."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def shard(model: nn.Module) -> nn.Module:
    """The model under FSDP2, a block at a time."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [*model.base_model.model.model.layers, model]:
        shard_on_cpu(module, mesh=mesh)
    return model


def shard_on_cpu(modules: Any, **settings: Any) -> Any:
    """`fully_shard` with the mean of gradients, for which torch 2.8's gloo takes their sum."""
    sharded = fully_shard(modules, **settings)
    for module in sharded if isinstance(sharded, list) else [sharded]:
        module.set_force_sum_reduction_for_comms(True)
    return sharded


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "one": lambda model: model,
    "ddp": DistributedDataParallel,
    "fsdp2": shard,
}


def train(method: str, strategy: str, steps: int) -> dict[str, Any]:
    """Losses, penalties and trained factors of some steps on batches of `ROWS` rows, shared out
    among the processes."""
    torch.manual_seed(1)  # random starts draw from here
    model = get_peft_model(tiny(), METHODS[method]())
    wrapped = WRAPPERS[strategy](model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    hook = svdtune.regularize(optimizer, model)
    processes, index = (1, 0) if strategy == "one" else (dist.get_world_size(), dist.get_rank())
    own = slice(index * ROWS // processes, (index + 1) * ROWS // processes)
    data = torch.Generator().manual_seed(2)
    losses, penalties = [], []
    for _ in range(steps):
        tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=data)[own]
        loss = wrapped(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_processes(loss.detach(), processes))
        penalties.append(None if hook.last is None else float(hook.last))
    return {"losses": losses, "penalties": penalties, "factors": whole_parameters(model)}


def mean_over_processes(value: Tensor, processes: int) -> float:
    if processes > 1:
        dist.all_reduce(value)
    return float(value) / processes


def whole_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every trained parameter, put together again."""
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def start(folder: Path, index: int, processes: int) -> None:
    """Join the other processes, which meet in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=index,
        world_size=processes,
        timeout=datetime.timedelta(hours=1),
    )
