"""A task of lm-evaluation-harness on a model with one of our adapters, against the sums of its own
logits."""

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from svdtune import SorsaConfig, SvdtuneError
from svdtune.lab.harness import harness_model, run_harness
from svdtune.models import LoadedModel, load
from tiny import moved

# the harness and what it imports warn of many things
pytestmark = pytest.mark.filterwarnings("ignore")

QUESTIONS = [{"question": f"{a}+{b}=", "choices": [str(a + b), "cat"], "answer": 0} for a in range(3) for b in range(3)]


@pytest.fixture
def adapted(tiny_folder: Path) -> LoadedModel:
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    loaded = load(tiny_folder)
    model = get_peft_model(loaded.model, SorsaConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    moved(model, 0.3)
    return LoadedModel(model.eval(), loaded.tokenizer, "adapted")


def log_likelihood(loaded: LoadedModel, context: str, continuation: str) -> float:
    tokens = loaded.tokenizer.encode(context + continuation)
    start = len(loaded.tokenizer.encode(context))
    with torch.no_grad():
        scores = loaded.model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    return sum(float(scores[i - 1, tokens[i]]) for i in range(start, len(tokens)))


def test_likelihoods_are_those_of_the_adapted_model(adapted: LoadedModel):
    from lm_eval.api.instance import Instance

    pairs = [("2+2=", "4"), ("a much longer question", " and answer"), ("x", "y")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    found = harness_model(adapted, batch_size=2).loglikelihood(requests, disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([log_likelihood(adapted, *pair) for pair in pairs], abs=1e-4)
    with adapted.model.disable_adapter():
        assert log_likelihood(adapted, *pairs[0]) != pytest.approx(found[0][0], abs=1e-3)


@pytest.mark.slow
def test_a_whole_task(adapted: LoadedModel, tmp_path: Path):
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    table = run_harness(adapted, [task], tmp_path / "out", batch_size=4)
    right = [
        log_likelihood(adapted, row["question"], row["choices"][0])
        > log_likelihood(adapted, row["question"], row["choices"][1])
        for row in QUESTIONS
    ]
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["results"]["sums"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert "sums" in table


@pytest.mark.slow
def test_a_task_that_it_does_not_know_is_one_clear_error(adapted: LoadedModel, tmp_path: Path):
    with pytest.raises(SvdtuneError, match="lm-eval could not run no_such_task"):
        run_harness(adapted, ["no_such_task"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
