"""Label smoothing in a run: the loss that Trainer logs for an adapted model is the smoothed one of
the next token."""

import json
from pathlib import Path

import torch

from svdtune.data import encode_all, read_rows, to_examples
from svdtune.models import load
from svdtune.training import train
from svdtune.training.recipe import check_recipe


def test_the_first_loss_is_the_smoothed_one(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = check_recipe(
        {
            "model": {"name": str(tiny_folder), "dtype": "float32"},
            "method": {"name": "lora", "r": 2, "target_modules": ["q_proj"]},
            "data": {
                "train": {"source": "arithmetic", "limit": 1},
                "prompt": "question",
                "completion": "solution",
                "max_length": 512,
            },
            "training": {"learning_rate": 1e-3, "max_steps": 1, "label_smoothing": 0.1, "save_steps": None},
            "output": {"dir": str(tmp_path / "run")},
        }
    )
    train(recipe)
    logged = json.loads((tmp_path / "run" / "train_log.jsonl").read_text().splitlines()[0])["loss"]

    loaded = load(tiny_folder, dtype="float32")
    examples = to_examples(read_rows("arithmetic", limit=1), "question", "solution")
    [row], _ = encode_all(examples, loaded.tokenizer, 512)
    with torch.no_grad():
        logits = loaded.model(torch.tensor([row["input_ids"]])).logits[0, :-1]
    labels = torch.tensor(row["labels"][1:])
    kept = labels != -100
    losses = -torch.log_softmax(logits, -1)[kept]
    expected = 0.9 * losses.gather(1, labels[kept, None]).mean() + 0.1 * losses.mean()
    assert abs(logged - expected.item()) < 2e-4  # Transformers 4 logs four digits
