"""`svdtune plan` and `svdtune cache` end to end on a tiny model."""

import json

import pytest
from peft import LoraConfig
from typer.testing import CliRunner

from svdtune.cli import app
from svdtune.methods import SaraConfig
from svdtune.methods.sites import count
from svdtune.models import load
from svdtune.training.method import adapt
from svdtune.training.recipe import MethodSection, load_recipe
from tiny import tiny_llama


@pytest.fixture
def folder(tmp_path):
    tiny_llama(vocab_size=64).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_plan_writes_what_train_and_a_stock_lora_take(folder, tmp_path):
    result = run(
        "plan", folder, "--budget", "5%", "--json", tmp_path / "p" / "plan.json", "--chart", tmp_path / "k.svg"
    )
    assert result.exit_code == 0, result.output
    assert "q_proj" in result.output
    plan = json.loads((tmp_path / "p" / "plan.json").read_text())
    assert plan["share"] <= 0.05
    assert f"{plan['trained_parameters']:,}" in result.output
    assert SaraConfig(**MethodSection(**plan["method"]).options).rank_pattern == plan["method"]["rank_pattern"]
    assert LoraConfig(**plan["lora"]).rank_pattern == plan["method"]["rank_pattern"]
    assert plan["memory"]["total"] == sum(size for name, size in plan["memory"].items() if name != "total")
    assert (tmp_path / "k.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        (["--method", "lora", "--r", "2"], 2 * 2 * 2 * 64),
        (["--method", "sorsa", "--r", "2", "--target-modules", "q_proj"], 2 * 2 * 65),
        (
            ["--method", "sara", "--r", "2", "--target-modules", "q_proj,o_proj", "--method.exclude_modules", ".*1.*"],
            2 * 2 * 65,
        ),
        (["--method", "mosara", "--r", "3", "--method.num_heads", "4"], 4 * (4 * 3 + 32 + 3 + 4)),
        (["--method", "mosara", "--r", "3", "--method.num_heads", "4", "--method.gate", "none"], 4 * (4 * 3 + 32)),
    ],
)
def test_counts_of_every_method(folder, options, trained):
    result = run("plan", folder, *options)
    assert result.exit_code == 0, result.output
    assert f": {trained:,} trained parameters" in result.output


SHARDED = ["--method", "sorsa", "--r", "64", "--target-modules", "all-linear", "--devices", "8", "--strategy", "fsdp2"]


def test_what_does_not_fit_comes_with_the_cheapest_setting_that_does(tmp_path):
    file = tmp_path / "plan.json"
    result = run("plan", "llama-70b", *SHARDED, "--batch", "8", "--length", "2048", "--memory", "80", "--json", file)
    assert result.exit_code == 0, result.output
    plan = json.loads(file.read_text())
    assert plan["fits"] is False
    assert plan["memory"]["total"] > 80 * 2**30 > plan["cheapest"]["memory"]["total"]
    assert plan["cheapest"]["setting"] == plan["setting"] | {"gradient_checkpointing": True}
    assert list(plan["cheapest"]["why"]) == ["checkpointing"]
    assert plan["initialisation_memory"] > 2 * 8192 * 28672
    for text in ("does not fit into 80.00 GiB", "the cheapest that fits: 8 × 2048 tokens"):
        assert text in result.output


def test_what_fits_is_left_alone_and_what_cannot_says_so():
    fits = run("plan", "llama-7b", *SHARDED, "--memory", "80")
    assert "no cheaper setting is needed" in fits.output
    cannot = run("plan", "llama-405b", *SHARDED, "--memory", "4")
    assert cannot.exit_code == 0
    assert "nothing does: " in cannot.output


def test_a_shape_gives_no_ranks():
    result = run("plan", "llama-7b")
    assert result.exit_code == 2
    assert "give r instead" in result.output


def test_sara_has_the_papers_threshold_by_default(folder):
    assert "threshold 0.01" in run("plan", folder).output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--threshold", "0.1", "--r", "2"],
            "at most one of --threshold, --budget, --match-lora and --r; got --threshold and",
        ),
        (["--budget", "lots"], "neither a share"),
        (["--method", "sorsa"], "r = 64 is larger than layer"),
        (["--method", "full"], "full fine-tuning has none"),
        (["--method", "lorra"], "'lorra' is no method; did you mean lora?"),
        (["--num-heads", "3"], "--num-heads: unknown setting; did you mean method.num_heads?"),
        (["--gate", "none"], "--gate: unknown setting; did you mean method.gate?"),
        (["--thresh0ld", "0.1"], "--thresh0ld: unknown setting; did you mean threshold?"),
        (["--training.batch_size", "4"], "--training.batch_size: unknown setting; did you mean batch-size?"),
        (
            ["--method.nmu_heads", "3", "--method", "mosara"],
            "method.nmu_heads: unknown setting; did you mean num_heads?",
        ),
        (["--method.use_lambda", "5"], "method.use_lambda: expected a valid boolean; got 5"),
        (["--target-modules", "q_porj"], "no module is named 'q_porj' (target_modules); near matches: q_proj"),
        (["--r", "2", "--dtype", "int3"], "int3"),
        (["--r", "2", "--batch-size", "0"], "at least 1"),
        (["--r", "2", "--strategy", "fsdp"], "none of ddp"),
        (["--r", "2", "--quantize", "3bit"], "4bit or 8bit"),
        (["--r", "2", "--memory", "-1"], "GiB of one device"),
        (["--r", "2", "--offload"], "ddp keeps everything"),
        (["--r", "2", "--optimizer", "adamw_8bits"], "Transformers knows no optimizer 'adamw_8bits'"),
    ],
)
def test_user_errors_are_one_line(folder, options, message):
    result = run("plan", folder, *options)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_cache_lists_and_clears(folder, monkeypatch):
    assert "empty" in run("cache", "clear", "--yes").output
    run("plan", folder, "--threshold", "0.1", "--target-modules", "q_proj")
    assert "2 files" in run("cache", "list").output
    assert "removed 2 files" in run("cache", "clear", "--yes").output
    assert "0 files" in run("cache", "list").output
    monkeypatch.setenv("SVDTUNE_CACHE", "off")
    assert "off" in run("cache", "list").output


def recipe(folder, tmp_path, **changes):
    """A recipe file; planning reads none of its data."""
    settings = {
        "model": {"name": str(folder), "dtype": "float16"},
        "method": {"name": "sara", "threshold": 0.3, "use_lambda": False, "bias": "all", "target_modules": ["q_proj"]},
        "data": {"train": "rows.jsonl", "max_length": 96},
        "training": {
            "batch_size": 3,
            "gradient_accumulation": 2,
            "gradient_checkpointing": True,
            "learning_rate": 1e-3,
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(settings | changes))  # JSON is YAML
    return path


@pytest.mark.parametrize(
    "words", [[], ["--method.rank_pattern", "{q_proj: 5}"], ["--method", "{name: lora, r: 3, use_dora: true}"]]
)
def test_a_recipe_is_planned_as_it_is_trained(tiny_folder, tmp_path, words):
    path, file = recipe(tiny_folder, tmp_path), tmp_path / "plan.json"
    result = run("plan", path, *words, "--json", file)
    assert result.exit_code == 0, result.output
    made = json.loads(file.read_text())
    method = load_recipe(path, words).method
    trained, _, total = count(adapt(load(tiny_folder).model, method.name, method.options))
    assert (made["trained_parameters"], made["share"]) == (trained, trained / total)
    step = {"batch_size": 3, "length": 96, "accumulation": 2, "gradient_checkpointing": True, "dtype": "float16"}
    assert made["setting"] == made["setting"] | step
    again = made["method"]
    assert count(adapt(load(tiny_folder).model, again.pop("name"), again))[0] == trained


def test_options_stand_for_what_a_recipe_says(tiny_folder, tmp_path):
    file = tmp_path / "plan.json"
    path = recipe(tiny_folder, tmp_path, model=str(tiny_folder))
    options = [
        "--batch",
        "2",
        "--no-gradient-checkpointing",
        "--training.gradient_accumulation",
        "4",
        "--budget",
        "700",
    ]
    assert run("plan", path, *options, "--json", file).exit_code == 0
    made = json.loads(file.read_text())
    assert made["trained_parameters"] <= 700
    step = {"batch_size": 2, "length": 96, "accumulation": 4, "gradient_checkpointing": False, "dtype": "float32"}
    assert made["setting"] == made["setting"] | step


@pytest.mark.parametrize(("name", "bytes_each"), [("adamw_bnb_8bit", 2.03125), ("galore_adamw", 8)])
def test_moments_are_counted_by_the_optimizer(tiny_folder, tmp_path, name, bytes_each):
    """Of a recipe as of an option; where a number's bytes are not known, the plan says what it
    counts."""
    model, path = str(tiny_folder), recipe(tiny_folder, tmp_path, model=str(tiny_folder))
    found = [
        run("plan", path, "--training.optimizer", name, "--json", "-"),
        run("plan", model, "--r", "2", "--optimizer", name, "--json", "-"),
    ]
    for result in found:
        made = json.loads(result.stdout)
        assert made["memory"]["optimizer"] == int(bytes_each * made["trained_parameters"])
    said = run("plan", model, "--r", "2", "--optimizer", name).output
    assert f", {name}: " in said
    assert (f"what {name} keeps for a number is not known" in said) == (name == "galore_adamw")


def test_a_method_without_ranks_is_planned(folder, tmp_path):
    file = tmp_path / "plan.json"
    result = run("plan", folder, "--method", "prompt_tuning", "--method.num_virtual_tokens", "5", "--json", file)
    assert result.exit_code == 0, result.output
    assert f"{5 * 32} trained parameters in 0 modules" in result.output
    assert "prompt_tuning was not measured; its memory is counted as LoRA's" in result.output
    made = json.loads(file.read_text())
    assert (made["lora"], made["layers"], made["initialisation_memory"]) == (None, [], None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method.nmu_heads", "3"], "method.nmu_heads: unknown setting; there are"),
        (["--trainign.epochs", "3"], "--trainign.epochs: unknown setting"),
        (["--num-heads", "3"], "--num-heads: unknown setting; did you mean method.num_heads?"),
        (["--training.epochs", "3", "--training.max_steps", "2"], "training.epochs: excludes training.max_steps"),
        (["--r", "3"], "`r` (3) and `threshold` (0.3) both set the ranks"),
    ],
)
def test_a_recipes_mistakes_are_one_message(tiny_folder, tmp_path, words, message):
    result = run("plan", recipe(tiny_folder, tmp_path), *words)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
