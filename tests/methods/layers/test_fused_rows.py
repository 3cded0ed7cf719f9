"""The rows of fused projections that each model type reads as q, k and v."""

import pytest
import torch
from peft import get_peft_model
from test_peft_verbs import TOKENS, logits
from test_slices import MODELS, fused_name, model_of
from torch import nn

from svdtune import SaraConfig
from svdtune.methods.layers.rows import Rows, in_a_row, known_parts
from svdtune.spectra import base_weight


def attention(model, kind: str) -> tuple[nn.Module, str]:
    """The first attention layer, and the fused projection's name in the model."""
    name = next(name for name, _ in model.named_modules() if name.rpartition(".")[2] == fused_name(kind))
    return model.get_submodule(name.rpartition(".")[0]), name


def outputs_of(module: nn.Module, run) -> torch.Tensor:
    found = []
    handle = module.register_forward_hook(lambda m, a, output: found.append(output))
    run()
    handle.remove()
    return found[0][0] if isinstance(found[0], tuple) else found[0]


@pytest.mark.parametrize("kind", MODELS)
class TestTheRowsOfEveryModelType:
    """Where a model reads its queries, keys and values, found out by what changing them does."""

    def changed(self, kind, part, position, zeroed=None):
        """Positions of the attention's output that change with `part` of the projection's output at
        one position."""
        model = model_of(kind)
        attn, name = attention(model, kind)
        rows = known_parts(model, name)[part]
        if zeroed is not None:
            none = known_parts(model, name)[zeroed]
            mask = torch.ones(none.groups * none.width)
            none.of(mask, -1).zero_()
            model.get_submodule(name).register_forward_hook(lambda module, arguments, output: output * mask)
        before = outputs_of(attn, lambda: logits(model))

        def nudge(module, arguments, output):
            output = output.clone()
            rows.of(output, -1)[:, position] += torch.linspace(-3, 3, rows.stop - rows.start)
            return output

        model.get_submodule(name).register_forward_hook(nudge)
        after = outputs_of(attn, lambda: logits(model))
        return [i for i in range(TOKENS.shape[1]) if not torch.allclose(before[:, i], after[:, i], atol=1e-7)]

    def test_a_query_acts_at_its_own_position_a_key_and_a_value_later_too(self, kind):
        assert self.changed(kind, "q", 3) == [3]
        assert self.changed(kind, "k", 3) == list(range(3, TOKENS.shape[1]))
        assert self.changed(kind, "v", 3) == list(range(3, TOKENS.shape[1]))

    def test_it_is_the_values_that_are_mixed(self, kind):
        """With all values zero, keys change nothing. With all keys zero, values still do."""
        assert self.changed(kind, "k", 3, zeroed="v") == []
        assert self.changed(kind, "v", 3, zeroed="k") == list(range(3, TOKENS.shape[1]))

    def test_the_slices_make_up_the_weight(self, kind):
        model = model_of(kind)
        _, name = attention(model, kind)
        weight = base_weight(model.get_submodule(name))
        marks = torch.zeros(len(weight))
        for rows in known_parts(model, name).values():
            rows.of(marks, 0).add_(1)
        assert torch.equal(marks, torch.ones(len(weight)))


def test_a_custom_model_gives_its_own_rows():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_proj = nn.Linear(8, 24)

        def forward(self, x):
            return self.in_proj(x)

    rows = {"in_proj": {"q": [2, 12, 0, 4]}}
    model = get_peft_model(Attention(), SaraConfig(r=2, target_modules=["in_proj"], fused_slices=rows))
    x = torch.randn(3, 8)
    changed = (model(x) - model.get_base_model().in_proj.base_layer(x)).abs().sum(0) > 0
    assert changed.tolist() == ([True] * 4 + [False] * 8) * 2


def test_rows():
    parts = in_a_row(2, q=3, k=1)
    assert parts == {"q": Rows(2, 4, 0, 3), "k": Rows(2, 4, 3, 4)}
    weight = torch.arange(8.0)[:, None].expand(8, 2)
    assert parts["k"].matrix(weight)[:, 0].tolist() == [3, 7]
    assert parts["q"].matrix(weight)[:, 0].tolist() == [0, 1, 2, 4, 5, 6]
