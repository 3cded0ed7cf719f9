"""What a run is scored with: the trained model in float32 or as its recipe says, merged where it
can be."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from svdtune.lab.study.worker import to_answer
from svdtune.models import LoadedModel, load
from svdtune.training.method import adapt
from svdtune.training.recipe import load_recipe
from tiny import moved

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "small-math.yaml"
QV = {"target_modules": ["q_proj", "v_proj"]}
METHODS = {
    "lora": {"r": 2, **QV},
    "sara": {"r": 2, **QV},
    "sorsa": {"r": 2, **QV},
    "mosara": {"r": 2, **QV},
    "bottleneck": {"bottleneck_size": 2},
    "prefix_tuning": {"num_virtual_tokens": 2},
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_run_is_scored_with_what_was_trained(name: str, dtype: str | None, tiny_folder: Path) -> None:
    """bfloat16 weights, a float32 adapter: as if float32 weights of the same values had the adapter
    on them; in bfloat16 rounded once, after that."""
    recipe = load_recipe(RECIPE)
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"dtype": dtype})})
    torch.manual_seed(0)
    loaded = load(tiny_folder, dtype="bfloat16")
    model = adapt(loaded.model, name, METHODS[name]).eval()
    moved(model, 0.05)
    ids = torch.randint(0, 100, (2, 9))
    with torch.no_grad():
        expected = deepcopy(model).float()(input_ids=ids).logits
        found = to_answer(LoadedModel(model, loaded.tokenizer, loaded.name), recipe).model
        near = {"rtol": 0.1, "atol": 0.1} if dtype else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(found(input_ids=ids).logits, expected, check_dtype=False, **near)
    assert isinstance(found, PeftModel) == (name in ("mosara", "bottleneck", "prefix_tuning"))
    assert {parameter.dtype for parameter in found.parameters()} == {getattr(torch, dtype or "float32")}
