"""Study files, read strictly: what they may not say, in which words that is told, and how grids
become arms."""

import re
from pathlib import Path

import pytest

import svdtune
from svdtune.errors import SvdtuneError
from svdtune.lab.study.spec import ArmSection, Contrast, Measure, Study, Tune, load_study

LORA = {"method": {"name": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]}}
TUNE = {"learning_rates": [1e-3, 1e-2]}


def refusal(file: Path) -> str:
    with pytest.raises(SvdtuneError) as caught:
        load_study(file)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"titel": "x"}, "titel: unknown setting; did you mean title?"),
        ({"titel": "x"}, "study.yaml has one problem:"),
        ({"title": None}, "title: expected a valid string; got None"),
        ({"title": ""}, "title: is empty; expected a text"),
        ({"tasks": {}}, "tasks: is empty; expected one entry or more"),
        ({"seeds": []}, "seeds: expected different seeds from 0 up, below 2³²; got []"),
        ({"seeds": [1, "2"]}, "seeds.1: expected a valid integer; got '2'"),
        ({"seeds": [1, 2, 1]}, "seeds: expected different seeds from 0 up, below 2³²; got [1, 2, 1]"),
        ({"seeds": [-1]}, "seeds: expected different seeds from 0 up, below 2³²; got [-1]"),
        ({"budgets": ["2 X"]}, "budgets: budget '2 X' is neither a share of all parameters"),
        ({"budgets": [0]}, "budgets: budget '0' is neither a share of all parameters"),
        ({"budgets": [True]}, "budgets: budget 'True' is neither a share"),
        ({"budgets": "1M"}, "budgets: expected a valid list; got '1M'"),
        ({"budgets": ["100%"]}, "nor a count ('500k', '1.5M')"),
        ({"baseline": "dora"}, "baseline: there is no arm 'dora'; there are lora"),
        ({"tune": {}}, "tune.learning_rates: is required"),
        ({"tune": TUNE | {"shares": 0.2}}, "tune.shares: unknown setting; did you mean share?"),
        ({"tune": TUNE | {"share": 1.0}}, "tune.share: expected less than 1; got 1.0"),
        ({"tune": {"learning_rates": []}}, "expected different learning rates above 0; got []"),
        ({"tune": {"learning_rates": [1e-3, 1e-3]}}, "expected different learning rates above 0; got [0.001, 0.001]"),
        ({"tune": {"learning_rates": [0.0]}}, "expected different learning rates above 0; got [0.0]"),
        (
            {"settings": {"trainig": {"epochs": 1}}},
            "arm lora on math: trainig: unknown setting; did you mean training?",
        ),
        ({"settings": {"evaluation": None}}, "arm lora on math: the recipe has no evaluation section, which says what"),
    ],
)
def test_what_a_study_may_not_say(write_study, settings: dict, message: str) -> None:
    assert message in refusal(write_study(**settings))


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (None, "arms: expected a section with an arm or more; got None"),
        ({}, "arms: is empty; expected one entry or more"),
        ([LORA], "arms: expected a section with an arm or more; got"),
        ({"lora": "lora"}, "arms.lora: expected a section with settings of its own; got 'lora'"),
        ({"lora": {"metod": {}}}, "arms.lora.metod: unknown setting; did you mean method?"),
        (
            {"lora": LORA | {"ranks": "best"}},
            "arms.lora.ranks: expected 'uniform', 'sara', 'random' or 'reverse'; got 'best'",
        ),
        ({"lora": {"method": {"name": "lorra"}}}, "arm lora on math: method.name"),
        ({"lora": {"method": {"name": "lora", "rnk": 3}}}, "arm lora on math: method.rnk: unknown setting"),
        (
            {"lora": LORA | {"settings": {"training": {"epochs": 1, "max_steps": 2}}}},
            "excludes training.max_steps; give one of them",
        ),
        ({"lora": LORA | {"learning_rates": [1e-3, 1e-2]}}, "choosing among several needs the section tune"),
        ({"lora": LORA | {"learning_rates": [-1e-3]}}, "arms.lora.learning_rates: expected different learning rates"),
        ({"lora": LORA | {"tuned_as": "sara"}}, "arms.lora.tuned_as: expected an arm that is tuned itself; got 'sara'"),
        (
            {"a": LORA | {"tuned_as": "b"}, "b": LORA | {"tuned_as": "a"}},
            "arms.a.tuned_as: expected an arm that is tuned",
        ),
        ({"a": LORA | {"tuned_as": "b"}, "b": {"untrained": True}}, "arms.a.tuned_as: expected an arm that is tuned"),
        (
            {"a": LORA | {"tuned_as": "b", "learning_rates": [1e-3]}, "b": LORA},
            "arms.a: tuned_as excludes learning_rates; give one of them",
        ),
        ({"base": LORA | {"untrained": True}}, "arms.base: an untrained arm has no method; take one of them out"),
        ({"base": {"untrained": True, "learning_rates": [1e-3]}}, "an untrained arm has no learning_rates"),
        ({"lora": LORA | {"grid": {"method.r": 3}}}, "arms.lora.grid.method.r: expected a valid list; got 3"),
        (
            {"lora": LORA | {"grid": {"method.r": []}}},
            "arms.lora.grid.method.r: expected different values, one or more",
        ),
        ({"lora": LORA | {"grid": {"method.r": [2, 2]}}}, "expected different values, one or more; got [2, 2]"),
        (
            {"lora": LORA | {"grid": {"method.r.x": [1]}}},
            "arms.lora.grid: method.r.x: method.r is 2 in the recipe, not a",
        ),
        (
            {"lora": LORA | {"settings": {"method": {"name": "sara"}}}},
            "arms.lora: method and settings.method are two methods; give one of them",
        ),
        (
            {"lora": {"grid": {"method.r": [1, 2]}}},
            "arms.lora: the grid's method.r needs a method section in the arm, with a name",
        ),
        ({"lora": LORA | {"grid": {"method.rnk": [1]}}}, "arm lora rnk=1 on math: method.rnk: unknown setting"),
        (
            {"lora r=1": LORA, "lora": LORA | {"grid": {"method.r": [1, 2]}}},
            "arms.lora: there are two arms 'lora r=1', grids expanded; rename one",
        ),
    ],
)
def test_what_an_arm_may_not_say(write_study, arms: object, message: str) -> None:
    assert message in refusal(write_study(arms=arms))


@pytest.mark.parametrize(
    ("scored", "split", "held_out", "refused"),
    [
        (["svamp"], None, {"source": "svamp", "split": "heldout"}, True),
        (["svamp"], None, {"source": "svamp", "split": "all"}, True),
        (["sara_math"], "unseen", {"source": "aqua", "split": "heldout"}, True),
        (["svamp"], None, {"source": "aqua", "split": "heldout"}, False),
        (["svamp"], None, "sara_math", False),
        (["e2e_bleu"], None, {"source": "e2e", "split": "test"}, True),
        (["e2e_bleu"], "valid", {"source": "e2e", "split": "valid"}, True),
        (["e2e_bleu"], None, {"source": "e2e", "split": "valid"}, False),
        (["gsm8k"], None, "gsm8k", False),
        (["gsm8k"], None, "held.jsonl", False),
    ],
)
def test_the_search_must_not_see_what_is_scored(write_study, scored, split, held_out, refused: bool) -> None:
    data = {"train": "sara_math", "prompt": "instruction", "completion": "output", "eval": held_out}
    evaluation = {"data": scored, "split": split}
    # The same for a study's recipe and for what a single arm makes of it.
    for settings in (
        {"settings": {"data": data, "evaluation": evaluation}},
        {"arms": {"lora": LORA | {"settings": {"data": data, "evaluation": evaluation}}}},
    ):
        file = write_study(**settings, tune=TUNE)
        if refused:
            assert "arm lora on math: data.eval is what the runs are scored on; the search for" in refusal(file)
        else:
            load_study(file)


def test_all_problems_are_told_at_once(write_study) -> None:
    told = refusal(write_study(titel="x", arms={"a": {"metod": {}}, "b": {"ranks": 3}}, seeds=[1, 1], budgets=["x"]))
    assert "has 5 problems" in told
    named = set(re.findall(r"^  ([\w.]+):", told, re.MULTILINE))
    assert named == {"arms.a.metod", "arms.b.ranks", "budgets", "seeds", "titel"}
    arms = {"a": LORA | {"tuned_as": "c"}, "b": {"method": {"name": "lora", "rnk": 1}}}
    told = refusal(write_study(tasks={"math": "recipe.yaml", "code": "code.yaml"}, arms=arms, baseline="d"))
    assert "study.yaml has 4 problems:" in told
    for part in (
        "baseline: there is no arm 'd'",
        "arms.a.tuned_as: ",
        "arm b on math: method.rnk",
        "tasks.code: there is",
    ):
        assert part in told


def test_what_several_arms_share_is_told_once(write_study) -> None:
    told = refusal(write_study(arms={"a": LORA, "b": LORA}, settings={"training": {"batch_size": 0}}))
    assert told.count("training.batch_size") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no study file study.yaml"),
        ("", "study.yaml holds no settings: expected title, question, tasks"),
        ("- a\n", "study.yaml holds no settings: expected title"),
        ("title: [", "study.yaml line 1 is not valid YAML"),
        ("title: a\ntitle: b\n", "study.yaml line 2 is not valid YAML: found duplicate key"),
        ("title: a\n", "tasks: is required"),
    ],
)
def test_files_that_hold_no_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("study.yaml").write_text(text)
    assert message in refusal(Path("study.yaml"))


def test_a_grid_becomes_an_arm_for_each_value(write_study) -> None:
    grid = {"method.lora_alpha": [2, 4], "training.warmup": [0.0, 0.5]}
    arm = LORA | {"grid": grid, "settings": {"training": {"weight_decay": 0.1}}}
    study, tasks = load_study(write_study(arms={"lora": arm, "plain": LORA}, baseline="lora lora_alpha=4 warmup=0.5"))
    assert list(study.arms) == [
        *(f"lora lora_alpha={alpha} warmup={warmup}" for alpha in (2, 4) for warmup in (0.0, 0.5)),
        "plain",
    ]
    last = study.arms["lora lora_alpha=4 warmup=0.5"]
    assert last.method == LORA["method"] | {"lora_alpha": 4}
    assert last.settings == {"training": {"weight_decay": 0.1, "warmup": 0.5}}
    assert "output" not in tasks["math"]


def test_an_arm_may_name_its_model_in_one_word(write_study, tiny_folder: Path) -> None:
    study, _ = load_study(write_study(arms={"lora": LORA | {"settings": {"model": str(tiny_folder)}}}))
    assert study.arms["lora"].settings == {"model": str(tiny_folder)}


DOCS = Path(svdtune.__file__).parent.parent / "docs" / "studies.md"


def test_the_documented_study_loads(study_folder: Path) -> None:
    example, *additions = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    for text in (example, *(example + more for more in additions)):
        (study_folder / "first.yaml").write_text(text)
        study, _ = load_study(study_folder / "first.yaml")
        assert list(study.arms) == ["base", "lora", "sara"]


SECTIONS = {
    "key": Study,
    "an arm's key": ArmSection,
    "a key of `tune`": Tune,
    "a key of `measure`": Measure,
    "a contrast's key": Contrast,
}


@pytest.mark.parametrize(("head", "section"), SECTIONS.items(), ids=["study", "arm", "tune", "measure", "contrast"])
def test_every_setting_is_documented(head: str, section: type[Study]) -> None:
    table = DOCS.read_text().split(f"| {head} | |\n", 1)[1].split("\n\n", 1)[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(section.model_fields)


@pytest.mark.parametrize(
    ("contrasts", "message"),
    [
        ([{"arm": "dora", "against": "lora"}], "contrasts.0: there is no arm 'dora'; there are lora"),
        ([{"arm": "lora", "against": "lora"}], "contrasts.0: 'lora' is compared with itself; name other arms"),
        ([{"arm": "lora", "against": "dora", "on": "kl"}], "contrasts.0: kl is not measured; add measure.text"),
        ([{"arm": "lora", "against": "dora"}] * 5, "contrasts"),
    ],
    ids=["unknown", "itself", "unmeasured", "many"],
)
def test_a_contrast_that_cannot_be_computed_is_refused(write_study, contrasts, message) -> None:
    with pytest.raises(SvdtuneError, match=re.escape(message)):
        load_study(write_study(measure={"answers": {"svamp": "svamp"}}, contrasts=contrasts))


def test_a_contrast_at_equal_loss_needs_checkpoints(write_study) -> None:
    measure = {"answers": {"svamp": "svamp"}, "text": {"addsub": "addsub"}, "checkpoints": 2}
    wanted = [{"arm": "lora", "against": "dora", "on": "kl at equal loss"}]
    message = "kl at equal loss needs 3 checkpoints or more; measure.checkpoints is 2"
    with pytest.raises(SvdtuneError, match=message):
        load_study(write_study(measure=measure, contrasts=wanted))


def test_a_plan_is_known_by_its_contrasts_and_what_they_are_measured_on(write_study) -> None:
    arms = {"lora": LORA, "sara": LORA}
    measure = {"answers": {"svamp": "svamp"}}

    def plan(**settings):
        study, _ = load_study(write_study(arms=arms, **settings))
        return study.plan

    one = [{"arm": "sara", "against": "lora"}]
    assert plan(measure=measure) is None
    plans = [plan(measure=measure, contrasts=one), plan(measure=measure, contrasts=one, title="Another")]
    assert plans[0] == plans[1]
    assert plan(measure=measure, contrasts=[one[0] | {"margin": 0.01}]) != plans[0]
    assert plan(measure=measure | {"items": 2}, contrasts=one) != plans[0]
