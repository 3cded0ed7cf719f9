"""A model's body in two graphs: on a CPU with a stand-in for CUDA's, which keeps what it promises
and no more."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import get_peft_model
from test_compilation import METHODS, adapted, batch, graphs, recipe_of
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from svdtune import SorsaConfig, regularize
from svdtune.errors import SvdtuneError
from svdtune.training.arguments import training_arguments
from svdtune.training.compilation import compiled_blocks
from svdtune.training.cuda_graph import recorded_body
from tiny import tiny_llama

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def stand_in(part: nn.Module, sample: tuple[Tensor, ...], *, allow_unused_input: bool) -> Any:
    """`torch.cuda.make_graphed_callables` without CUDA: what it takes, gives and accumulates lies
    where the first pass had it, and Python runs at no replay but what records nothing."""
    surface = (*sample, *part.parameters())
    wanted = [x for x in surface if x.requires_grad]
    run, buffers, kept = part.forward, {}, {}

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            with torch.no_grad():
                for own, given in zip(sample, inputs, strict=False):
                    own.copy_(given)
            with torch.enable_grad():
                kept["y"] = run(*sample)
            return kept["y"].detach()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            for x, found in zip(wanted, torch.autograd.grad(kept["y"], wanted, dy, allow_unused=True), strict=True):
                if found is not None:
                    buffers[x] = buffers[x].copy_(found) if x in buffers else found.clone()
            return tuple(buffers[x].detach() if x in buffers else None for x in surface)

    run(*sample)  # warm
    return lambda *inputs: Replay.apply(*inputs, *part.parameters())


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)


def on(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def losses(model: Any, steps: int, keep: Any = None) -> list[float]:
    """Of each pass, two to a step: clipped, regularized, from batches of different rows."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    regularize(optimizer, model)
    found = []
    for step in range(steps):
        if keep is not None:
            keep.on_step_begin()
        for part in range(2):
            loss = model(**on(batch((step + part) % 4))).loss / 2
            loss.backward()
            found.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if keep is not None:
            keep.on_step_end()
        if step == steps // 2:
            model.set_adapter("other")
            model(**on(batch(0)))
            model.set_adapter("default")
    return torch.stack(found).tolist()


@pytest.mark.parametrize(
    ("method", "steps"),  # the quick half records alone
    [("sorsa", 5), *(pytest.param(method, 53, marks=pytest.mark.slow) for method in METHODS)],
)
def test_steps_compiled_and_recorded_have_the_losses_of_those_as_written(method: str, steps: int) -> None:
    torch.manual_seed(0)
    model = adapted(method).to(DEVICE)
    model.add_adapter("other", METHODS[method](r=2, target_modules=["q_proj"]))
    start = {name: x.clone() for name, x in model.state_dict().items()}
    wanted = losses(model, steps)
    assert wanted[-2] < wanted[0]  # of the same rows
    model.load_state_dict(start)
    together = getattr(model.base_model, "together", None)  # which works ahead of the body
    torch._dynamo.utils.counters.clear()
    compiled = compiled_blocks(model, one_shape=True, backend="aot_eager") if steps > 5 else nullcontext()
    with compiled as keep, recorded_body(model) as recorded:
        assert together is None or together.enabled is False
        assert losses(model, steps, keep) == pytest.approx(wanted, rel=1e-4)
    assert recorded.aside == 1  # the other adapter's pass
    assert graphs() == (0 if keep is None else 2)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert "forward" not in model.get_base_model().model.__dict__


def test_what_changed_runs_as_written() -> None:
    model = adapted("sorsa").to(DEVICE)
    model.add_adapter("other", SorsaConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "sorsa_U.other" in name:
                p.mul_(2)
    cases = {
        "another batch": lambda: model(**on(batch(0, sequences=1))),
        "another argument": lambda: model(**on(batch(0)), logits_to_keep=0, output_attentions=False),
        "another adapter": lambda: model(**on(batch(0))),
    }
    with recorded_body(model) as recorded:
        model(**on(batch(0))).loss.backward()
        model(**on(batch(1))).loss.backward()
        assert recorded.aside == 0
        for count, (name, run) in enumerate(cases.items(), 1):
            if name == "another adapter":
                model.set_adapter("other")
            found = run().loss
            assert recorded.aside == count, name
            with torch.no_grad():  # as written always
                assert float(found.detach()) == pytest.approx(float(run().loss), rel=1e-5), name
        model.eval()
        model(**on(batch(3)))
        assert recorded.aside == len(cases)


def test_where_rows_begin_may_be_told_in_more_or_fewer_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of no token fill it up."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    seen = []

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, cu_seq_lens_q: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            seen.append(cu_seq_lens_q.tolist())
            return Output(last_hidden_state=self.weight * cu_seq_lens_q.sum())

    class Output(dict[str, Tensor]):
        pass

    model: Any = nn.Module()
    model.body, model.base_model_prefix = Body(), "body"
    with recorded_body(model) as recorded:
        for starts in ([0, 3, 8], [0, 2, 3, 4, 8], list(range(70))):
            model.body(cu_seq_lens_q=torch.tensor(starts))
    assert [len(one) for one in seen] == [64, 64, 64, 70]
    assert seen[-2] == [0, 2, 3, 4, *[8] * 60]
    assert recorded.aside == 1


def test_what_cannot_be_recorded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(SvdtuneError, match=r"Linear names none in base_model_prefix\. Set training\.compile: true"),
        recorded_body(nn.Linear(2, 2)),
    ):
        pass
    model = get_peft_model(tiny_llama(), SorsaConfig(r=2, target_modules=["q_proj"])).train().to(DEVICE)
    with (
        recorded_body(model),
        pytest.raises(SvdtuneError, match="is called with attention_mask, of which a graph cannot"),
    ):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long, device=DEVICE), attention_mask={"full_attention": None})
    with (
        recorded_body(model),
        pytest.raises(SvdtuneError, match="recorded in a CUDA graph: beside last_hidden_state it ret"),
    ):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long, device=DEVICE), output_hidden_states=True)
    model.get_base_model().model.__dict__["forward"] = lambda *args: None
    with recorded_body(model), pytest.raises(SvdtuneError, match="with 1 arguments that have no name"):
        model.get_base_model().model(torch.zeros(1))


def test_a_short_first_batch_decides_nothing() -> None:
    """A resumed run may begin with an epoch's last."""
    model = adapted("sorsa").to(DEVICE)
    with recorded_body(model, resumed=True) as recorded:
        for sequences in (1, 2, 2, 2, 1):
            model(**on(batch(0, sequences=sequences))).loss.backward()
        assert recorded.aside == 2  # the first and the last


def test_a_body_that_is_given_its_tokens_by_place_is_recorded() -> None:
    config = GPTNeoXConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, use_cache=False
    )
    model = get_peft_model(GPTNeoXForCausalLM(config), SorsaConfig(r=2, target_modules=["query_key_value"]))
    ids = torch.arange(8, device=DEVICE)[None]
    wanted = model.train().to(DEVICE)(input_ids=ids, labels=ids).loss
    with recorded_body(model) as recorded:
        found = [model(input_ids=ids, labels=ids).loss for _ in range(3)]
        assert recorded.aside == 0
    for loss in found:
        torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"packing": False}, "training.compile: graph needs training.packing: true"),
        ({"packing": True, "gradient_checkpointing": True}, "training.gradient_checkpointing: reads the random state"),
    ],
    ids=["unpacked", "checkpointed"],
)
def test_what_excludes_a_graph(training: dict[str, Any], words: str) -> None:
    with pytest.raises(SvdtuneError, match=words):
        recipe_of(compile="graph", **training)


def test_a_graph_needs_a_gpu_and_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(compile="graph", packing=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SvdtuneError, match="graph needs a CUDA device, which records"):
        training_arguments(recipe, 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SvdtuneError, match="records the step of one process"):
        training_arguments(recipe, 8)
