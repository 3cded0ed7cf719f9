"""The recipes that ship: each is valid, its method fits its model's architecture, and it has the
paper's values."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    dynamic_module_utils,
)

import finch
from runs import go, log_of
from svdtune.checkpoint import open_checkpoint
from svdtune.data.catalogue import CATALOGUE
from svdtune.methods.sites import count, sites
from svdtune.training.method import FULL, adapt, build_config
from svdtune.training.recipe import load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
PATHS = sorted(path for path in RECIPES.rglob("*.yaml") if not path.name.startswith("_"))

_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
}
_SIZES |= {"num_key_value_heads": 1, "head_dim": 128}
# One layer of every architecture that the recipes name, wide enough for r = 128.
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "smollm2": LlamaConfig(**_SIZES),
    "mistral": MistralConfig(**_SIZES),
    "gemma": GemmaConfig(**_SIZES),
    "gpt2": GPT2Config(n_embd=256, n_layer=1, n_head=2, vocab_size=32, n_positions=64),
    "gpt-j": GPTJConfig(n_embd=256, n_layer=1, n_head=2, vocab_size=32, n_positions=64, rotary_dim=32),
    "finch": finch.FinchConfig(hidden_size=256, num_hidden_layers=1, vocab_size=32),
}


def names(folder: str) -> set[str]:
    return {path.stem for path in PATHS if path.parent.name == folder}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_its_method_fits_the_model(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.output.dir == f"runs/{path.stem}"
    (train,) = recipe.data.train
    source = train.source
    if source in CATALOGUE:
        assert (train.split or "train") in CATALOGUE[source].splits
    assert recipe.evaluation is None or (recipe.evaluation.known and not recipe.evaluation.sources)
    if recipe.method.name == FULL:
        return
    kind = next(kind for kind in ARCHITECTURES if kind in recipe.model.name.lower().replace("_", "-"))
    model = adapt(AutoModelForCausalLM.from_config(ARCHITECTURES[kind]), recipe.method.name, recipe.method.options)
    if recipe.method.name == "prefix_tuning":
        assert model.get_nb_trainable_parameters()[0] > 0
        return
    wanted = recipe.method.options.get("target_modules", ["q_proj", "v_proj"])
    if wanted == "all-linear":
        wanted = RWKV6
    assert {site.module.rpartition(".")[2] for site in sites(model)} >= set(wanted)


RWKV6 = {"receptance", "key", "value", "gate", "output"}  # of time mixing; channel mixing has three of the names


def finch_folder(folder: Path, *, weights: bool, **sizes: int) -> Path:
    """A folder like the published one of RWKV-6, with code that Transformers lacks; 7B unless
    told."""
    config = finch.FinchConfig(**sizes, architectures=["FinchForCausalLM"])
    config.auto_map = {"AutoConfig": "finch.FinchConfig", "AutoModelForCausalLM": "finch.FinchForCausalLM"}
    (finch.FinchForCausalLM(config) if weights else config).save_pretrained(folder)
    shutil.copy(finch.__file__, folder)
    return folder


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place of this test for the code that comes with models."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


def test_rwkv6_has_the_papers_176_million_at_the_published_shapes(tmp_path: Path, modules: None) -> None:
    folder = finch_folder(tmp_path / "7b", weights=False, num_hidden_layers=1)  # of 32 that are alike
    checkpoint = open_checkpoint(folder, weights=False, trust_remote_code=True)
    for name in ("sorsa", "lora", "pissa", "adalora"):
        method = load_recipe(RECIPES / "sorsa" / f"rwkv6-7b-math-{name}.yaml").method
        found = count(checkpoint, build_config(method.name, method.options))
        assert round(32 * found.trained / 1e6) == 176


@pytest.mark.parametrize("method", ["sorsa", "adalora"])
def test_rwkv6_trains_by_its_recipe_with_the_code_of_the_models_folder(
    method: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, modules: None
) -> None:
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "head_size": 32,
        "vocab_size": len(tiny_tokenizer),
        "eos_token_id": 0,
    }
    folder = finch_folder(tmp_path / "tiny", weights=True, **sizes)
    tiny_tokenizer.save_pretrained(folder)
    words = {
        "model.name": str(folder),
        "data.train": "{source: arithmetic, limit: 4}",
        "data.prompt": "question",
        "data.completion": "solution",
        "training.gradient_accumulation": "1",
        "training.logging_steps": "1",
        "output.dir": str(tmp_path / "run"),
        "evaluation": "null",
    }
    path = RECIPES / "sorsa" / f"rwkv6-7b-math-{method}.yaml"
    run, _ = go(load_recipe(path, [f"--{name}={value}" for name, value in words.items()]))
    assert [line["loss"] > 0 for line in log_of(run)] == [True, True]
    assert json.loads((run / "training.json").read_text())["adapted_modules"] == 8


def test_every_row_of_the_tables_that_peft_can_train_has_a_recipe() -> None:
    math = {f"{model}-math-{method}" for model in ("llama-7b", "llama-13b", "gpt-j-6b") for method in _SARA_TABLE_1}
    commonsense = {f"{model}-commonsense-{m}" for model in ("llama-7b", "llama-13b") for m in (*_SARA_TABLE_1, "dora")}
    e2e = {f"gpt2-medium-e2e-{method}" for method in ("adalora", "lora", "vera", "mosara", "sara")}
    ablations = {f"llama-7b-math-{ablation}" for ablation in _SARA_TABLE_4}
    assert names("sara") == math | commonsense | e2e | ablations
    models = ("llama2-7b", "rwkv6-7b", "mistral-7b", "gemma-7b")
    methods = ("lora", "pissa", "adalora", "sorsa", "full")
    table_1 = {f"{model}-{task}-{m}" for model in models for m in methods for task in ("math", "code")}
    analysis = {f"llama2-7b-analysis-{m}" for m in ("full", "lora", "sorsa", "sorsa-without-regularizer")}
    assert names("sorsa") == (table_1 - {"rwkv6-7b-math-full", "rwkv6-7b-code-full"}) | analysis


_SARA_TABLE_1 = ("prefix", "lora", "mosara", "sara")
_SARA_TABLE_4 = (
    "sara-without-lambda",
    "sara-zero-v",
    "sara-without-lambda-zero-v",
    "mosara-without-v",
    "mosara-v-in-front",
)


@pytest.mark.parametrize("path", sorted((RECIPES / "sorsa").glob("*-sorsa.yaml")), ids=lambda path: path.stem)
def test_tables_2_and_3_of_sorsa(path: Path) -> None:
    recipe = load_recipe(path)
    llama, analysis = "llama2" in path.stem, "analysis" in path.stem
    training = recipe.training
    assert training.batch_size * training.gradient_accumulation == 128
    assert (training.epochs, training.weight_decay, training.warmup, training.schedule) == (1, 0.0, 0.03, "cosine")
    assert (training.learning_rate, training.precision, training.tf32) == (3e-5, "bf16", True)
    assert training.max_grad_norm == (0 if analysis else 1.0)
    assert (recipe.model.dtype, recipe.data.max_length, recipe.data.loss_on) == ("float32", 512, "response")
    assert recipe.data.train[0].limit == 100_000
    assert recipe.method.options["r"] == (128 if llama else 64)
    assert recipe.method.options["gamma"] == (5e-4 if analysis else 4e-4)
    expected = ["humaneval"] if "-code-" in path.stem else ["gsm8k", "math"]
    assert [dataset.name for dataset in recipe.evaluation.known] == expected


@pytest.mark.parametrize(
    ("name", "rate", "options"),
    [
        ("llama-7b-math-sara", 1e-3, {"threshold": 0.01}),
        ("llama-7b-math-mosara", 3e-2, {"threshold": 0.5, "num_heads": 5}),
        ("llama-7b-math-lora", 3e-4, {"r": 10, "lora_alpha": 20}),
        ("llama-7b-commonsense-sara", 1e-3, {"threshold": 0.09, "dropout": 0.05}),
        ("llama-13b-commonsense-sara", 1e-3, {"threshold": 0.075}),
        ("llama-7b-commonsense-mosara", 3e-2, {"threshold": 0.5, "num_heads": 5}),
        ("gpt2-medium-e2e-sara", 8e-3, {"threshold": 0.012}),
        ("gpt2-medium-e2e-mosara", 7e-2, {"threshold": 0.5, "num_heads": 3}),
        ("gpt2-medium-e2e-vera", 1e-1, {"r": 1024}),
        ("llama-7b-math-mosara-without-v", 3e-2, {"num_heads": 10, "use_v": False}),
        ("llama-7b-math-sara-without-lambda-zero-v", 1e-3, {"use_lambda": False, "init": "zero_v"}),
    ],
)
def test_tables_4_to_7_of_sara(name: str, rate: float, options: dict[str, float]) -> None:
    recipe = load_recipe(RECIPES / "sara" / f"{name}.yaml")
    assert recipe.training.learning_rate == rate
    assert recipe.method.options.items() >= options.items()
    e2e = "e2e" in name
    training = recipe.training
    assert (training.schedule, training.batch_size, training.warmup, training.epochs) == (
        ("linear", 16, 500, 5) if e2e else ("linear", 16, 100, 3)
    )
    assert (training.weight_decay, training.label_smoothing, training.seed) == ((0.01, 0.1, 314) if e2e else (0, 0, 42))
