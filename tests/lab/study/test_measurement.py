"""What a run predicts is measured while it trains, and the training does not notice."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

from svdtune.errors import SvdtuneError
from svdtune.lab.study.measurement import MeasurementCallback, losses, measured_rows
from svdtune.lab.study.page import write_page
from svdtune.lab.study.results import read_results
from svdtune.lab.study.runner import How, run_studies
from svdtune.lab.study.spec import Measure, load_study
from svdtune.models import load
from svdtune.system import read_objects
from svdtune.training import check_recipe, train
from svdtune.training.collection import read_extended
from svdtune.training.method import adapt
from tiny import moved

QV = {"target_modules": ["q_proj", "v_proj"]}
METHODS = {
    "lora": {"r": 2, "lora_dropout": 0.3, **QV},
    "dora": {"name": "lora", "r": 2, "use_dora": True, **QV},
    "pissa": {"name": "lora", "r": 2, "init_lora_weights": "pissa", **QV},
    "adalora": {"init_r": 3, "target_r": 2, **QV},
    "dylora": {"r": 4, **QV},
    "vera": {"r": 4, **QV},
    "ia3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "miss": {"r": 2, **QV},
    "sara": {"r": 2, "target_modules": "all-linear"},
    "sorsa": {"r": 2, "target_modules": "all-linear"},
    "mosara": {"r": 2, "target_modules": "all-linear"},
    "bottleneck": {"bottleneck_size": 2},
    "prefix_tuning": {"num_virtual_tokens": 2},
    "prompt_tuning": {"num_virtual_tokens": 2},
    "full": {},
}
SETS = {"answers": {"svamp": "svamp", "addsub": "addsub"}, "text": {"prose": {"source": "prose.jsonl"}}}


@pytest.fixture
def text(study_folder: Path) -> Path:
    rows = [
        {"prompt": "The old bridge ", "completion": f"was {n} years older than {'its ' * n}town."} for n in range(5)
    ]
    (study_folder / "prose.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return study_folder


def recipe_of(name: str, folder: str):
    settings = read_extended(Path("recipe.yaml"))
    settings["method"] = {"name": name} | METHODS[name]
    settings["training"] |= {"max_steps": 4} | ({"padding_free": False} if name == "prompt_tuning" else {})
    return check_recipe({**settings, "output": {"dir": folder}})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.family(3)
def test_a_run_that_is_measured_takes_the_same_steps_bit_for_bit(name: str, text: Path) -> None:
    """Dropout, random ranks and the order of the rows among them; the loss too."""
    alone = train(recipe_of(name, "alone"))
    callback = MeasurementCallback(recipe_of(name, "measured"), Measure(checkpoints=2, **SETS), Path("measured"))
    measured = train(recipe_of(name, "measured"), callbacks=[callback])
    before, after = weights(alone.adapter), weights(measured.adapter)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert alone.summary["loss"] == measured.summary["loss"]
    lines = read_objects(callback.path)
    assert [line["step"] for line in lines] == [0, 2, 4]
    moved = [np.mean(line["sets"]["prose"]["kl"]) for line in lines]
    assert moved[-1] > 1e-9, "the run moves the model"
    starts_apart = name in ("sara", "prefix_tuning", "prompt_tuning")
    assert starts_apart == (moved[0] > 1e-6), "only such an adapter moves the model before it trains"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["lora", "pissa", "sorsa", "full"])
def test_losses_are_those_of_each_item_alone(name: str, dtype: str, text: Path, tiny_folder: Path) -> None:
    """Against torch's cross entropy and KL divergence of one item at a time, without padding."""
    recipe = recipe_of(name, "run")
    loaded = load(tiny_folder, dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=getattr(torch, dtype)).eval()
    torch.manual_seed(0)
    model = adapt(
        loaded.model, METHODS[name].get("name", name), {k: v for k, v in METHODS[name].items() if k != "name"}
    ).eval()
    moved(model, 0.05)
    rows, _ = measured_rows(recipe, Measure(**SETS), loaded.tokenizer)
    near = 2e-2 if dtype == "bfloat16" else 2e-5
    for set_name, found in rows.items():
        is_text = set_name == "prose"
        values = losses(model, base if is_text else None, found, 0)
        assert values.keys() == ({"nll", "kl"} if is_text else {"nll"})
        for at, row in enumerate(found.take(list(range(len(found))))):
            ids, labels = (torch.tensor(row[key]) for key in ("input_ids", "labels"))
            with torch.no_grad():
                ours, theirs = (one(input_ids=ids[None]).logits[0, :-1].float() for one in (model, base))
            counted = labels[1:] != -100
            assert counted.all() == is_text
            expected = cross_entropy(ours[counted], labels[1:][counted])
            assert values["nll"][at] == pytest.approx(float(expected), rel=near, abs=near)
            if is_text:
                ps = (one.log_softmax(-1) for one in (ours, theirs))
                expected = kl_div(*ps, reduction="batchmean", log_target=True)
                assert values["kl"][at] == pytest.approx(float(expected), rel=near, abs=near)


def test_items_are_drawn_alike_and_what_is_trained_on_is_refused(text: Path, tiny_folder: Path) -> None:
    tokenizer = load(tiny_folder).tokenizer
    recipe = recipe_of("lora", "run")
    section = Measure(items=2, **SETS)
    drawn = [measured_rows(recipe, section, tokenizer)[0] for _ in range(2)]
    assert {name: len(rows) for name, rows in drawn[0].items()} == {"svamp": 2, "addsub": 2, "prose": 2}
    for name, rows in drawn[0].items():
        assert [rows[at] for at in range(2)] == [drawn[1][name][at] for at in range(2)]
    seen = Measure(answers={"seen": {"source": "sara_math", "split": "train"}})
    with pytest.raises(SvdtuneError, match="seen"):
        measured_rows(recipe, seen, tokenizer)


def test_a_study_without_answers_measures_every_run(text: Path, write_study) -> None:
    arms = {"lora": {"method": {"name": "lora", "r": 2, **QV}}, "base": {"untrained": True}}
    measure = SETS | {"checkpoints": 3}
    file = write_study(arms=arms, measure=measure, generate=False, seeds=[1, 2])
    (path,) = run_studies({"study": load_study(file)}, Path("out"), How())
    runs = read_results(path).runs
    assert [run.status for run in runs] == ["finished"] * 3
    for run in runs:
        assert run.scores == {}
        assert run.measured is not None
        assert run.measured.steps == ([0] if run.arm == "base" else [0, 1, 2, 3])
        kl = run.measured.sets["prose"]["kl"]
        assert len(kl.items) == 5
        assert np.mean(kl.items) == pytest.approx(kl.path[-1], rel=1e-3)
        assert (kl.path[-1] > 0) == (run.arm == "lora")
        assert (run.saved_bytes is None) == (run.arm == "base")
    assert not list(Path("out").rglob("predictions.jsonl"))


def test_what_is_too_long_to_be_measured_is_told(text: Path, write_study) -> None:
    with (text / "prose.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "On and ", "completion": "on " * 300}) + "\n")
    measure = {"answers": SETS["answers"], "text": SETS["text"]}
    file = write_study(arms={"lora": {"method": {"name": "lora", "r": 2, **QV}}}, measure=measure, generate=False)
    (path,) = run_studies({"study": load_study(file)}, Path("out"), How())
    (run,) = read_results(path).runs
    assert run.measured is not None
    assert run.measured.left_out == {"prose": 1}
    write_page(path, path.parent)
    assert "addsub (3), prose (5; 1 longer than data.max_length)" in (path.parent / "README.md").read_text()


def test_arms_that_would_be_measured_on_other_items_are_refused(text: Path, write_study) -> None:
    """They are paired, and a longer data.max_length leaves out fewer of them."""
    lora = {"method": {"name": "lora", "r": 2, **QV}}
    short = {**lora, "settings": {"data": {"max_length": 128}}}
    load_study(write_study(arms={"lora": lora, "short": short}))
    said = (
        r"differ in data\.max_length on math \(lora 256, short 128\), so that other items would fit .* all of them one"
    )
    with pytest.raises(SvdtuneError, match=said):
        load_study(write_study(arms={"lora": lora, "short": short}, measure=SETS))


def test_what_is_not_measured_keeps_the_key_of_a_published_run(text: Path, write_study) -> None:
    from svdtune.lab.study.grid import cells

    def key(**settings) -> str:
        (cell,) = cells(*load_study(write_study(**settings)))
        return cell.finals([1e-3], [1])[0].key

    keys = [key(), key(generate=True), key(generate=False), key(measure=SETS), key(measure=SETS | {"items": 2})]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


def test_a_name_in_both_kinds_is_refused(text: Path, write_study) -> None:
    both = {"answers": {"svamp": "svamp"}, "text": {"svamp": "svamp"}}
    with pytest.raises(SvdtuneError, match="expected different names in answers and text; got svamp in both"):
        load_study(write_study(measure=both))
