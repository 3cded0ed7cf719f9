"""The blocks of a model, compiled while a run trains: one graph for all, the same losses, and the
same model afterwards."""

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.scheduler import NopKernelSchedulerNode

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig
from svdtune.errors import SvdtuneError
from svdtune.training.compilation import ENOUGH_STEPS, blocks_of, compiled_blocks, compiles
from svdtune.training.packing import ROW_LENGTHS, TOKENS, PackingCollator
from svdtune.training.recipe import Recipe, check_recipe
from tiny import tiny_gpt2, tiny_llama

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = {"sara": SaraConfig, "mosara": MoSaraConfig, "sorsa": SorsaConfig, "lora": LoraConfig}


def adapted(method: str, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_llama(num_hidden_layers=3, num_key_value_heads=2).to(dtype)
    return get_peft_model(model, METHODS[method](r=4, target_modules=LINEAR)).train()


def batch(seed: int, sequences: int = 2) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(sequences):
        ids = torch.randint(1, 60, (16,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": ids, ROW_LENGTHS: [5 + seed, 11 - seed]})
    made = PackingCollator(0, multiple_of=1, length=16)(rows)
    del made[TOKENS]
    return made


def step(model: Any, seed: int, sequences: int = 2) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch(seed, sequences)).loss
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def recipe_of(**training: Any) -> Recipe:
    return check_recipe(
        {
            "model": {"name": "m"},
            "method": {"name": "sorsa", "r": 2, "target_modules": ["q_proj"]},
            "data": {"train": "arithmetic"},
            "training": {"max_steps": 1, "learning_rate": 1e-3, **training},
            "output": {"dir": "runs/x"},
        }
    )


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=[pytest.mark.slow] if name != "sorsa" else []) for name in METHODS],
)
def test_all_blocks_share_one_graph_and_give_the_same_step(method: str) -> None:
    model = adapted(method)
    names = [name for name, _ in model.named_parameters()]
    wanted = [step(model, seed) for seed in range(2)]
    torch._dynamo.utils.counters.clear()
    with compiled_blocks(model, one_shape=True, backend="aot_eager") as keep:
        with torch.no_grad():
            model(**batch(4, sequences=3))  # as an evaluation before training does
        assert graphs() == 0
        for seed, (loss, gradients) in enumerate(wanted):
            keep.on_step_begin()
            found, got = step(model, seed)
            keep.on_step_end()
            assert found == pytest.approx(loss, rel=1e-5)
            for one, other in zip(got, gradients, strict=True):
                assert torch.allclose(one, other, atol=1e-5 * float(other.abs().max() + 1e-3))
            assert graphs() == 2  # the first block's input needs no gradient
            assert not torch._dynamo.utils.counters["graph_break"]
        assert [name for name, _ in model.named_parameters()] == names
        # An epoch's last batch, and an evaluation, are smaller and without gradients: as written.
        step(model, 2, sequences=1)
        model.eval()
        with torch.no_grad():
            model(**batch(3))
        assert graphs() == 2
    assert not any(module._compiled_call_impl for module in model.modules())
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_resumed_run_that_begins_with_a_short_batch_compiles_the_next() -> None:
    model = adapted("sorsa")
    torch._dynamo.utils.counters.clear()
    with compiled_blocks(model, one_shape=True, resumed=True, backend="aot_eager") as keep:
        for sequences in (1, 2, 2, 3):
            keep.on_step_begin()
            step(model, 0, sequences=sequences)
            keep.on_step_end()
        assert graphs() == 4  # two of the short one, two of all that follow; the last ran as written


def kernels(method: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many kernels a compiled block launches beside the matrix products, forward and back."""
    found: list[int] = []

    def count(self: Any) -> None:
        none = NopKernelSchedulerNode  # a place alone: what is joined there was written into it
        found.append(sum(not node.is_extern() and not isinstance(node, none) for node in self.nodes))
        raise RuntimeError("counted")  # no code is needed

    def compiler(graph: Any, inputs: Any) -> Any:
        with pytest.raises(RuntimeError, match="counted"):
            compile_fx_inner(graph, inputs)
        return make_boxed_func(graph.forward)

    monkeypatch.setattr("torch._inductor.scheduler.Scheduler.codegen", count)
    backend = aot_autograd(
        fw_compiler=compiler,
        bw_compiler=compiler,
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    model = adapted(method, torch.bfloat16)  # factors stay in fp32
    x = torch.randn(4, 128, model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    positions = model.get_base_model().model.rotary_emb(x, torch.arange(128)[None])
    block = torch.compile(blocks_of(model)[0], backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x, position_embeddings=positions)
    (y if isinstance(y, torch.Tensor) else y[0]).sum().backward()
    return found


@pytest.mark.slow
def test_a_compiled_block_launches_no_more_kernels_than_loras(monkeypatch: pytest.MonkeyPatch) -> None:
    lora, sorsa = (kernels(method, monkeypatch) for method in ("lora", "sorsa"))
    assert sorsa[0] < lora[0]
    # a CPU rounds and widens each layer's dV, which a GPU's product leaves in fp32
    assert sum(sorsa) - len(LINEAR) <= sum(lora)


def test_blocks_are_the_outermost_lists_of_like_modules() -> None:
    llama = tiny_llama(num_hidden_layers=3)
    assert blocks_of(llama) == list(llama.model.layers)
    gpt2 = tiny_gpt2(n_layer=2)
    assert blocks_of(get_peft_model(gpt2, SorsaConfig(r=2, target_modules=["c_fc"]))) == list(gpt2.transformer.h)
    experts = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)] * 2)}) for _ in range(2))
    assert blocks_of(nn.ModuleDict({"layers": experts})) == list(experts)
    alone = nn.Linear(2, 2)
    assert blocks_of(alone) == [alone]


@pytest.mark.parametrize("choice", ["yes", 1, None, "always"])
def test_when_to_compile_is_one_of_four(choice: Any) -> None:
    with pytest.raises(SvdtuneError, match=r"training\.compile: .*expected true, false, auto or graph; got "):
        recipe_of(compile=choice)


@pytest.mark.parametrize(
    ("compile_", "packing", "gpu", "steps", "expected"),
    [
        ("auto", True, True, ENOUGH_STEPS, True),
        ("auto", True, True, ENOUGH_STEPS - 1, False),
        ("auto", False, True, ENOUGH_STEPS, False),
        ("auto", True, False, ENOUGH_STEPS, False),
        (True, False, False, 1, True),
        (False, True, True, 10**6, False),
    ],
)
def test_where_a_run_compiles(
    monkeypatch: pytest.MonkeyPatch, compile_: Any, packing: bool, gpu: bool, steps: int, expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert compiles(recipe_of(compile=compile_, packing=packing), steps) is expected
