"""A run's scores stand in its adapter's card, once each."""

import json

from svdtune.evaluation.score_table import add_scores
from svdtune.methods.files.card import add_section

INTERVAL = {"level": 0.95, "low": 0.4, "high": 0.6}
RESULTS = {
    "test-number": {
        "n": 1319,
        "strict": {"correct": 660, "accuracy": 0.5, "interval": INTERVAL},
        "paper": {"correct": 673, "accuracy": 0.51, "interval": INTERVAL},
        "metrics": {},
    },
    "e2e": {"n": 10, "strict": None, "paper": None, "metrics": {"BLEU": {"value": 0.25, "interval": INTERVAL}}},
}


def test_scores(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    add_section(adapter, "Training", "On rows.")
    add_scores(tmp_path, adapter)
    assert "Scores" not in (adapter / "README.md").read_text()
    for name, result in RESULTS.items():
        (tmp_path / "evaluations" / name).mkdir(parents=True)
        (tmp_path / "evaluations" / name / "result.json").write_text(json.dumps(result))
        add_scores(tmp_path, adapter)
    text = (adapter / "README.md").read_text()
    assert text.count("## Scores") == 1
    assert "| test-number | 1,319 | accuracy (strict) | 50.0% | 40.0% to 60.0% |" in text
    assert "| test-number | 1,319 | accuracy (paper) | 51.0% | 40.0% to 60.0% |" in text
    assert "| e2e | 10 | BLEU | 0.2500 | 0.4000 to 0.6000 |" in text
    assert "On rows." in text
