"""Recipes: strict, all problems at once, each with its path and the nearest right name."""

import copy
from pathlib import Path
from typing import Any

import pytest

from svdtune.errors import SvdtuneError, SvdtuneWarning
from svdtune.training.recipe import check_recipe, dump_recipe, load_recipe, parse_overrides, recipe_of
from svdtune.training.yaml_files import read_yaml


def settings(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model": {"name": "some/model"},
        "method": {"name": "sorsa", "r": 8},
        "data": {"train": "rows.jsonl"},
        "training": {"learning_rate": 1e-4},
        "output": {"dir": "runs/a"},
    }
    for path, value in changes.items():
        section, _, name = path.partition("__")
        if name:
            base[section][name] = value
        else:
            base[section] = value
    return base


def problems(raw: dict[str, Any]) -> list[str]:
    with pytest.raises(SvdtuneError) as caught:
        check_recipe(raw, "x.yaml")
    return [line.strip() for line in str(caught.value).splitlines()]


@pytest.mark.filterwarnings("ignore:.*Using default")  # of PEFT's own, for EVA's and CorDA's settings
@pytest.mark.parametrize("init", ["eva", "corda"])
def test_a_start_from_data_that_no_run_takes_is_refused(init: str) -> None:
    """A run would train from another start than the recipe names."""
    raw = settings(method={"name": "lora", "r": 8, "init_lora_weights": init})
    assert f"method.init_lora_weights: {init!r} starts from data that PEFT's " in " ".join(problems(raw))
    raw["method"]["init_lora_weights"] = True
    assert check_recipe(raw).method.name == "lora"


def test_all_problems_come_at_once_each_with_path_and_nearest_name() -> None:
    raw = settings(
        model__dtyp="bfloat16",
        method={"name": "sorsa", "r": 8, "threshold": 0.5, "gama": 1e-4, "dropout": "much"},
        data__max_length="long",
        training={"lr": 1, "epochs": 1, "max_steps": 5, "batch_size": 0, "r": 4, "precision": "fp8"},
        outputs={},
    )
    assert problems(raw) == [
        "x.yaml has 12 problems:",
        "model.dtyp: unknown setting; did you mean dtype?",
        "data.max_length: expected a valid integer; got 'long'",
        "training.batch_size: expected greater than or equal to 1; got 0",
        "training.learning_rate: is required",
        "training.precision: expected 'fp32', 'bf16' or 'fp16'; got 'fp8'",
        "training.lr: unknown setting; did you mean learning_rate?",
        "training.r: unknown setting; there are " + ", ".join(check_recipe(settings()).training.model_dump()),
        "outputs: unknown setting; did you mean output?",
        "method.gama: unknown setting; did you mean gamma?",
        "method.dropout: expected a valid number; got 'much'",
        "method: SorsaConfig: `r` (8) and `threshold` (0.5) both set the ranks; give one of them",
        "training.epochs: excludes training.max_steps; give one of them",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "sorza"}}, "method.name: 'sorza' is no method; did you mean sorsa?"),
        ({"method": {"name": "lora", "lora_aplha": 4}}, "method.lora_aplha: unknown setting; did you mean lora_alpha?"),
        ({"method": {"name": "lora", "r": "8x"}}, "method.r: expected a valid integer; got '8x'"),
        ({"method": {"name": "lora", "peft_type": "LORA"}}, "method.peft_type: unknown setting"),
        ({"method": {"name": "full", "r": 8}}, "method.r: full fine-tuning has no setting but target_modules"),
        (
            {"method": {"name": "adalora", "init_r": 6, "target_r": 4}, "training__label_smoothing": 0.1},
            "training.label_smoothing: takes the place of the model's own loss, and AdaLoRA's regularizer with it",
        ),
        ({"method": {"name": "full", "target_modules": "q_proj"}}, "expected a list of module names"),
        ({"method": {"name": "sara", "threshold": 1.5}}, "method: SaraConfig: `threshold` must lie in (0, 1]"),
        ({"method": "sara"}, "method: expected a section with settings of its own; got 'sara'"),
        ({"training__warmup": 2.5}, "training.warmup: expected a share below 1 or a whole number of steps; got 2.5"),
        ({"training__learning_rate": True}, "training.learning_rate: expected a valid number; got True"),
        ({"training__learning_rate": float("inf")}, "training.learning_rate: expected a finite number; got inf"),
        ({"training__eval_steps": 5}, "training.eval_steps: needs data.eval"),
        ({"data__template": "Q:"}, "data.template: expected plain, chat, llm_adapters, "),
        ({"data__max_len": 5}, "data.max_len: unknown setting; did you mean max_length?"),
        ({"data__loss": "all"}, "data.loss: unknown setting; did you mean loss_on?"),
        ({"training__dir": "x"}, "training.dir: unknown setting; did you mean output.dir?"),
    ],
)
def test_a_problem(changes: dict[str, Any], message: str) -> None:
    assert message in "\n".join(problems(settings(**changes)))


def test_full_fine_tuning_of_float16_weights_under_fp16_is_refused() -> None:
    raw = settings(method={"name": "full"}, model__dtype="float16", training__precision="fp16")
    assert problems(raw)[1].startswith("training.precision: fp16 cannot train weights stored in float16")


def test_whole_numbers_do_for_floats_and_bare_texts_for_sections() -> None:
    recipe = check_recipe(settings(model="some/model", training__learning_rate=1, training__epochs=2))
    assert recipe.model.name == "some/model"
    assert recipe.data.train[0].source == "rows.jsonl"
    assert (recipe.training.learning_rate, recipe.training.epochs) == (1.0, 2.0)


QUOTED = {
    "training__max_steps": ("3", 3),
    "training__learning_rate": ("1e-3", 1e-3),
    "data__max_length": ("0x20", 32),
    "data__train": ({"source": "rows.jsonl", "limit": "5"}, {"source": "rows.jsonl", "limit": 5}),
    "data__eval": ({"own": {"source": "a.jsonl", "limit": "7"}}, {"own": {"source": "a.jsonl", "limit": 7}}),
    "method": ({"name": "sara", "threshold": "0.1"}, {"name": "sara", "threshold": 0.1}),
}


@pytest.mark.parametrize("changed", QUOTED)
def test_a_number_in_quotes_is_read_with_a_note(changed: str) -> None:
    quoted, plain = QUOTED[changed]
    given = settings(**{changed: quoted})
    before = copy.deepcopy(given)
    with pytest.warns(SvdtuneWarning, match="' is in quotes; it is read as the number ") as said:
        recipe = check_recipe(given)
    assert (recipe, given, len(said)) == (check_recipe(settings(**{changed: plain})), before, 1)


def test_quotes_stay_where_a_text_is_meant_or_the_number_does_not_fit() -> None:
    assert check_recipe(settings(model="123")).model.name == "123"
    with pytest.warns(SvdtuneWarning, match="training.max_steps: '1.5' is in quotes; it is read as the number 1.5"):
        assert "training.max_steps: expected a valid integer" in problems(settings(training__max_steps="1.5"))[1]
    assert problems(settings(training__max_steps="1_0"))[1].endswith("expected a valid integer; got '1_0'")


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "ia3"])
def test_methods_of_peft_take_the_same_path(name: str) -> None:
    method = {"name": "lora", "use_dora": True} if name == "dora" else {"name": name}
    assert check_recipe(settings(method={**method, "target_modules": ["q_proj"]})).method.name == method["name"]


def test_yaml_is_1_2(tmp_path: Path) -> None:
    assert read_yaml("a: 1e-3\nb: no\nc: 010", "x") == {"a": 1e-3, "b": "no", "c": 10}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nmodel: b\n", r"line 2 is not valid YAML: found duplicate key"),
        ("model: [a\n", r"line 2 is not valid YAML"),
        ("- a\n", "holds no settings: expected the sections model, method, data, training, evaluation, output"),
        ("", "holds no settings"),
        ("model:\n\tname: a\n", r"line 2 is not valid YAML: .*indent with spaces, not tabs"),
        ("model: a\n~: b\n", r"the name ~ in line 2 is not a text; put it in quotes if it is meant"),
        ("model: a\n? [b]\n: c\n", r"the name that is a sequence in line 2 is not a text"),
        (
            "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 40)),
            r"is not a recipe: expected at most 100,000 values, at most 30 deep",
        ),
        ("model: &a [*a]\n", r"is not a recipe: expected at most 100,000 values, at most 30 deep"),
        ("[" * 5000, r"is not a recipe|is not valid YAML"),
        ("model: " + "1" * 5000, r"is not valid YAML: Exceeds the limit .*put texts in quotes"),
        ("model: 2020-99-99", "method: is required"),
        ("model: !!python/object/apply:os.system [ls]", "has the tag 'python/object/apply:os.system', which is none"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(SvdtuneError, match=message):
        load_recipe(path)


def test_too_many_values_are_refused_before_the_text_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdtune.training.yaml_files._MOST_VALUES", 100)
    assert read_yaml("a: [" + "1, " * 90 + "1]", "r.yaml") == {"a": [1] * 91}
    with pytest.raises(SvdtuneError, match="expected at most 100 values"):
        read_yaml("a: [" + "1, " * 2000 + "}", "r.yaml")


def test_anchors_that_repeat_each_other_do_not_fill_the_memory(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    with pytest.raises(SvdtuneError, match="anchors that contain each other"):
        load_recipe(tmp_path / "r.yaml")


def test_a_recipe_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes("model: é\n".encode("latin-1"))
    with pytest.raises(SvdtuneError, match=r"r\.yaml is not UTF-8 at byte 8; save it as UTF-8"):
        load_recipe(tmp_path / "r.yaml")


def test_a_recipe_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(SvdtuneError, match="there is no recipe"):
        load_recipe(tmp_path / "gone.yaml")


def test_overrides_go_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(dump_recipe(check_recipe(settings())))
    words = [
        "--method.r",
        "64",
        "--training.learning_rate=1e-3",
        "--data.eval.source",
        "test.jsonl",
        "--data.answer",
        "null",
    ]
    recipe = load_recipe(path, words)
    assert recipe.method.options["r"] == 64
    assert recipe.training.learning_rate == 1e-3
    assert recipe.data.eval[""].source == "test.jsonl"
    assert recipe.data.answer is None
    whole = load_recipe(path, ["--method", "{name: sara, threshold: 0.02}"])
    assert (whole.method.name, whole.method.options) == ("sara", {"threshold": 0.02})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method.r"], "--method.r has no value"),
        (["--method.r", "--seed", "3"], "--method.r has no value: expected --method.r VALUE"),
        (["--rezume"], "--rezume has no value: expected --SECTION.SETTING VALUE, where model, .*sections"),
        (["method.r", "5"], "'method.r' is not an override: expected --SECTION.SETTING VALUE"),
        (["--a", "[1"], "--a line 1 is not valid YAML"),
    ],
)
def test_words_that_are_no_override(words: list[str], message: str) -> None:
    with pytest.raises(SvdtuneError, match=message):
        list(parse_overrides(words))


def test_overrides_of_sections_take_the_place_of_what_they_exclude() -> None:
    changed = recipe_of(settings(training__epochs=3), {"training.max_steps": 2}).training
    assert (changed.epochs, changed.max_steps) == (None, 2)


def test_an_override_below_a_value_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("data: {train: rows.jsonl}\n")
    with pytest.raises(
        SvdtuneError, match=r"--data.train.limit: data.train is 'rows.jsonl' in the recipe, not a section"
    ):
        load_recipe(path, ["--data.train.limit", "3"])


def test_a_dumped_recipe_is_the_same_recipe() -> None:
    recipe = check_recipe(settings(training__max_steps=5, method={"name": "sara", "rank_pattern": {"q_proj": 3}}))
    assert check_recipe(read_yaml(dump_recipe(recipe), "x")) == recipe


def test_one_tracker_or_reward_may_be_a_word() -> None:
    recipe = check_recipe(settings(training__report_to="wandb"))
    assert recipe.training.report_to == ["wandb"]
    recipe = check_recipe(settings(training__task="grpo", training__rewards="number"))
    assert recipe.training.rewards == ["number"]
    assert problems(settings(training__report_to=3))[1].startswith("training.report_to: expected")


@pytest.mark.parametrize(
    "given",
    [
        {"training__trl": {"bf16_full_eval": True}},
        {"training__trl": {"neftune_noise_alpha": -1}},
        {"training__schedule": "reduce_lr_on_plateau", "training__warmup": 2},
    ],
)
def test_a_run_that_was_begun_may_have_what_is_refused_by_now(given: dict[str, Any]) -> None:
    with pytest.raises(SvdtuneError):
        check_recipe(settings(**given))
    check_recipe(settings(**given), begun=True)
