"""Goes through svdtune's core in one process, for `test_without_lab.py`:
`python core_alone.py MODEL FOLDER`.

Prints one line for each thing it did, and ends with the first that does not do what it should.
"""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiny import tiny_llama

MISSING = "; those of the papers belong to svdtune.lab, which is not installed"
ROWS = [{"question": f"{i} + 1?", "solution": f"#### {i + 1}", "answer": str(i + 1)} for i in range(8)]


def run(*words: str, says: str = "", refused: bool = False) -> None:
    from svdtune.cli import app

    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == (2 if refused else 0), (words, result.output, result.exception)
    output = " ".join((result.stderr if refused else result.stdout).split())
    assert says in output, (words, says, output)
    print(*words[:1], "refused" if refused else "done", says)


def methods() -> None:
    from peft import get_peft_model

    from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError

    for config in (SaraConfig(r=2), MoSaraConfig(r=2), MoSaraConfig(r=2, gate="none"), SorsaConfig(r=2)):
        model = get_peft_model(tiny_llama(), config)
        model(**tiny_llama().dummy_inputs).logits.sum().backward()
        print(config.method, "done")
    with pytest.raises(SvdtuneError, match=f"`gate` must be one of softmax, none{MISSING}; got 'top1'"):
        MoSaraConfig(gate="top1")


def functions(model: str, folder: Path) -> None:
    import svdtune

    plan = svdtune.plan(model, svdtune.SaraConfig(target_modules=["q_proj"]), budget="3%")
    svdtune.start(model, plan.config, folder / "begun")
    print("functions", svdtune.export_lora(folder / "begun", folder / "begun-lora").ranks)
    scores = svdtune.evaluate(model, "arithmetic", limit=2, max_new_tokens=2, output=folder / "scores")
    assert scores["arithmetic"].n == 2


def verbs(model: str, folder: Path) -> None:
    rows, held_out, run_folder = folder / "rows.jsonl", folder / "held_out.json", folder / "run"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:6]), encoding="utf-8")
    held_out.write_text(json.dumps(ROWS[6:]), encoding="utf-8")
    recipe = {
        "model": model,
        "method": {"name": "sorsa", "r": 2, "target_modules": ["q_proj"]},
        "data": {"train": str(rows), "eval": str(held_out), "prompt": "question", "completion": "solution"},
        "training": {"learning_rate": 1e-3, "max_steps": 2, "batch_size": 2},
        "output": {"dir": str(run_folder)},
    }
    recipe["data"] |= {"answer": "answer", "max_length": 256}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    given = str(folder / "recipe.yaml")
    run("--help", says="Train an adapter as a recipe says.")
    run("data", "check", str(rows), says="6 rows")
    run("data", "list", says=f"no data set is known by name{MISSING}")
    new = folder / "new.yaml"
    words = ("--prompt", "question", "--completion", "solution", "--output", str(new))
    run("new", model, str(rows), *words, says=f"train it with: svdtune train {new}")
    run("plan", model, "--method", "sara", "--budget", "3%", says="trained")
    run("init", model, "--r", "2", "--output", str(folder / "started"), says="trained")
    run("train", given, says="trained 2 steps in")
    for task in ("number", "exact"):
        run("evaluate", str(run_folder), "--task", task, "--max-new-tokens", "2", says="accuracy (strict)")
    run("generate", str(run_folder), "1 + 1?", "--max-new-tokens", "2")
    run("merge", str(run_folder), "--output", str(folder / "merged"))
    run("export", str(run_folder), "--output", str(folder / "lora"), says="LoRA of rank 4")
    run("combine", f"{run_folder}=0.5", f"{folder / 'started'}=0.5", "--output", str(folder / "combined"))
    run("analyze", str(run_folder))
    run("report", str(run_folder))
    run("cache", "list", says="files")

    # What is the laboratory's is refused with a word on it.
    run("study", "any.yaml", refused=True, says="there is no verb 'study'; there are demo, new, recipes, ")
    for task in ("gsm8k", "lm-eval:arc_easy"):
        says = f"there is no task '{task}'; choose one of: number, letter, choice, exact{MISSING}"
        run("evaluate", model, "--task", task, refused=True, says=says)
    for setting, says in (
        ("--method={name: dylora}", f"'dylora' is no method{MISSING}"),
        ("--evaluation={data: [svamp]}", f"'svamp' is no data set that is scored; there are none{MISSING}"),
        (
            "--data.template=sorsa_train",
            f"expected plain, chat, or a text with {{prompt}} in it; got 'sorsa_train'{MISSING}",
        ),
    ):
        run("train", given, setting, "--output.dir", str(folder / "other"), refused=True, says=says)
    bottleneck = folder / "bottleneck"
    bottleneck.mkdir()
    (bottleneck / "adapter_config.json").write_text(json.dumps({"peft_type": "BOTTLENECK"}), encoding="utf-8")
    run("generate", model, "hi", "--adapter", str(bottleneck), refused=True, says=MISSING[2:])


if __name__ == "__main__":
    import svdtune

    assert Path(svdtune.__file__).parent.parent == Path(sys.argv[2]), svdtune.__file__
    methods()
    functions(sys.argv[1], Path(sys.argv[2]))
    verbs(sys.argv[1], Path(sys.argv[2]))
    assert not [name for name in sys.modules if name.startswith("svdtune.lab")]
