"""The functions of `import svdtune`, with each kind of thing that they take."""

import dataclasses
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import svdtune
from new_process import loaded_by, start
from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, SvdtuneError
from svdtune.api.runs import DecodingOptions
from svdtune.checkpoint import open_checkpoint
from svdtune.evaluation import Decoding
from svdtune.models import load
from svdtune.training import load_recipe
from tiny import tiny_llama

FUNCTIONS = [
    name
    for name in svdtune.__all__
    if inspect.isfunction(getattr(svdtune, name)) and name in svdtune.__dict__["_LATER"]
]


def sections(model: Path, folder: Path) -> dict[str, Any]:
    rows = [json.dumps({"ask": f"{i}+1", "say": str(i + 1)}) + "\n" for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(rows[:6]), encoding="utf-8")
    (folder / "held-out.jsonl").write_text("".join(rows[6:]), encoding="utf-8")
    return {
        "model": model,
        "method": {"name": "sorsa", "r": 2, "target_modules": ["q_proj", "v_proj"]},
        "data": {
            "train": folder / "rows.jsonl",
            "eval": folder / "held-out.jsonl",
            "prompt": "ask",
            "completion": "say",
            "max_length": 64,
        },
        "training": {"learning_rate": 1e-3, "max_steps": 1, "batch_size": 2},
        "output": {"dir": folder / "run"},
    }


def as_file(recipe: dict[str, Any], folder: Path) -> Path:
    (folder / "recipe.yaml").write_text(json.dumps(recipe, default=str), encoding="utf-8")
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs: `run` of SORSA, and `routed` of Mo-SARA with two heads."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = sections(tiny_folder, folder)
    svdtune.train(recipe, final_loss=False)
    routed = {"name": "mosara", "r": 2, "num_heads": 2, "target_modules": ["q_proj"]}
    svdtune.train(recipe, {"method": routed, "output.dir": folder / "routed"}, final_loss=False)
    return folder


class TestThePackage:
    def test_every_name_is_there_and_listed(self) -> None:
        assert set(svdtune.__all__) <= set(dir(svdtune))
        assert all(hasattr(svdtune, name) for name in svdtune.__all__)
        assert len(FUNCTIONS) == 15

    def test_no_function_has_the_name_of_a_room(self) -> None:
        rooms = {path.stem for path in Path(svdtune.__file__).parent.iterdir()}
        assert not rooms & set(svdtune.__all__)

    @pytest.mark.parametrize("name", sorted({*FUNCTIONS} - {"fast_starts"}))  # a block without arguments
    def test_help_tells_of_every_argument(self, name: str) -> None:
        function = getattr(svdtune, name)
        text = inspect.getdoc(function)
        assert text is not None
        arguments, rest = text.split("Args:")[1].split("Returns:")
        missing = [parameter for parameter in inspect.signature(function).parameters if parameter not in arguments]
        assert not missing
        assert "SvdtuneError:" in rest.split("Raises:")[1]

    def test_an_unknown_name_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="module 'svdtune' has no attribute 'trian'"):
            _ = svdtune.trian

    @pytest.mark.parametrize("module", ["svdtune", "svdtune.api.adapters"])
    def test_nothing_waits_for_the_trainer_that_does_not_train(self, module: str) -> None:
        loaded = start(loaded_by, module).result()
        assert not {"svdtune.training", "svdtune.evaluation"} & loaded
        assert ("svdtune.api" in loaded) == (module != "svdtune")


class TestBeforeTraining:
    def test_every_kind_of_model_has_the_same_sites(self, tiny_folder: Path) -> None:
        config = SaraConfig(threshold=0.2, target_modules=["q_proj", "v_proj"])
        loaded = AutoModelForCausalLM.from_pretrained(tiny_folder)
        given = (str(tiny_folder), tiny_folder, open_checkpoint(tiny_folder), loaded)
        found = [svdtune.sites(model, config) for model in given]
        assert len(found[0]) == 4
        assert all(one.places == found[0].places and one.count == found[0].count for one in found)
        plans = [svdtune.plan(model, config) for model in given]
        assert all(plan.sites.places == found[0].places for plan in plans)
        assert {plan.base_parameters for plan in plans} == {loaded.num_parameters()}
        assert svdtune.count(loaded, config) == found[0].count
        assert config.task_type is None

    def test_a_shape_is_a_model(self) -> None:
        assert svdtune.count("llama-7b", LoraConfig(r=8, target_modules=["q_proj", "v_proj"])).trained == 4_194_304

    def test_a_model_without_a_configuration_is_described_as_it_is(self, tiny_folder: Path) -> None:
        adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
        assert [site.rank for site in svdtune.sites(adapted)] == [2, 2]
        assert len(svdtune.sites(tiny_folder)) == 0

    @pytest.mark.parametrize(
        "config",
        [
            SaraConfig(threshold=0.2),
            MoSaraConfig(r=2),
            SorsaConfig(r=2, layers_to_transform=[1]),
            LoraConfig(r=2),
            LoraConfig(r=2, target_modules="all-linear"),  # PEFT saves every layer's whole name
        ],
    )
    def test_a_saved_adapter_is_described_as_it_was(self, tiny_folder: Path, tmp_path: Path, config: Any) -> None:
        model = get_peft_model(load(tiny_folder).model, config)
        model.save_pretrained(tmp_path)
        ours, theirs = svdtune.sites(str(tmp_path)), svdtune.sites(model)
        assert (ours.places, ours.count) == (theirs.places, theirs.count)
        assert svdtune.count(tmp_path).trained > 0

    def test_a_classifiers_adapter_is_counted_with_its_head(self, tiny_folder: Path, tmp_path: Path) -> None:
        recipe = sections(tiny_folder, tmp_path)
        recipe["training"]["task"] = "reward"
        del recipe["data"]["completion"]
        config = SorsaConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
        for labels in (1, 5):
            classifier = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=labels)
            model = get_peft_model(classifier, dataclasses.replace(config))
            model.save_pretrained(tmp_path / str(labels))
            expected = svdtune.sites(model)
            asked = [svdtune.sites(tmp_path / str(labels))]
            asked += [svdtune.sites(recipe), svdtune.plan(recipe).sites] if labels == 1 else []
            assert all((one.places, one.count) == (expected.places, expected.count) for one in asked)
        with pytest.raises(SvdtuneError, match=r"task_type=SEQ_CLS holds the model's whole head \(classifier, score\)"):
            svdtune.start(tiny_folder, config, tmp_path / "started")

    def test_every_kind_of_recipe_is_the_same_plan(self, tiny_folder: Path, tmp_path: Path) -> None:
        recipe = sections(tiny_folder, tmp_path)
        file = as_file(recipe, tmp_path)
        plans = [svdtune.plan(given, budget="1%") for given in (file, str(file), recipe, load_recipe(file))]
        plans.append(svdtune.plan(tiny_folder, recipe["method"], budget="1%"))
        assert len({json.dumps(plan.to_json(), default=sorted) for plan in plans}) == 1
        assert svdtune.sites(recipe).ranks == dict.fromkeys(plans[0].sites.ranks, 2)

    @pytest.mark.parametrize("config", [SaraConfig(r=2), MoSaraConfig(threshold=0.1), SorsaConfig(r=2)])
    def test_a_start_is_what_peft_starts(self, tiny_folder: Path, tmp_path: Path, config: Any) -> None:
        before = torch.get_rng_state()
        svdtune.start(str(tiny_folder), config, str(tmp_path / "started"), seed=3)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(3)
        get_peft_model(load(tiny_folder).model, config).save_pretrained(tmp_path / "saved")
        ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("started", "saved"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    def test_a_recipe_is_started(self, tiny_folder: Path, tmp_path: Path) -> None:
        started = svdtune.start(sections(tiny_folder, tmp_path), None, tmp_path / "started")
        PeftModel.from_pretrained(load(tiny_folder).model, started.adapter, is_trainable=True)


class TestARun:
    def test_every_kind_of_recipe_is_trained(self, tiny_folder: Path, tmp_path: Path) -> None:
        recipe = sections(tiny_folder, tmp_path)
        file = as_file(recipe, tmp_path)
        losses = [svdtune.train(file, final_loss=False).summary["loss"]]
        for given in (str(file), recipe, load_recipe(file)):
            run = svdtune.train(given, overwrite=True, final_loss=False)
            assert run.folder == tmp_path / "run"
            losses.append(run.summary["loss"])
        assert len(set(losses)) == 1
        for given in (file, recipe, load_recipe(file)):
            changed = svdtune.train(given, {"method.r": 1}, overwrite=True, final_loss=False)
            assert changed.summary["trained_parameters"] < run.summary["trained_parameters"]

    def test_a_run_an_adapter_and_a_loaded_model_score_alike(
        self, runs: Path, tiny_folder: Path, tmp_path: Path
    ) -> None:
        rows, adapter = tmp_path / "rows.jsonl", runs / "run" / "adapter"
        rows.write_text('{"question": "1+1", "answer": "2"}\n', encoding="utf-8")
        model = PeftModel.from_pretrained(load(tiny_folder).model, adapter)
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
        how = {"max_new_tokens": 3, "template": "plain", "prompt": "question", "answer": "answer"}
        told: list[tuple[int, int]] = []
        scored = [
            svdtune.evaluate(str(runs / "run"), str(rows), output=str(tmp_path / "a"), **how),
            svdtune.evaluate(adapter, rows, output=tmp_path / "b", on_progress=lambda *at: told.append(at), **how),
            svdtune.evaluate(tiny_folder, rows, adapter=adapter, output=tmp_path / "c", device="cpu", **how),
            svdtune.evaluate(model, rows, tokenizer=tokenizer, output=tmp_path / "d", **how),
        ]
        assert told == [(0, 1), (1, 1)]
        texts = set()
        for name, found in zip("abcd", scored, strict=True):
            (result,) = found.values()
            assert (list(found), len(found), found.accuracy, found.file) == ([str(rows)], 1, 0.0, None)
            assert result.folder == tmp_path / name
            texts.add(json.loads((result.folder / "predictions.jsonl").read_text())["completion"])
        assert len(texts) == 1

    def test_a_run_is_analyzed_and_reported_on(self, runs: Path, tmp_path: Path) -> None:
        found = svdtune.analyze(str(runs / "run"), modules=["q_proj"])
        assert list(found.after["layers"]) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
        assert json.loads((found.folder / "after.json").read_text()) == found.after
        assert (found.routing, found.unrouted) == (None, None)
        routed = svdtune.analyze(runs / "routed", data=runs / "rows.jsonl", items=2)
        assert (routed.after, list(routed.routing["tasks"]), routed.routing["heads"]) == (None, ["rows"], 2)
        alone = svdtune.report(runs / "run")
        assert alone.page == runs / "run" / "report.html"
        both = svdtune.report([runs / "run", str(runs / "routed")], str(tmp_path / "page.html"), title="Both")
        assert (both.page, both.figures) == (tmp_path / "page.html", [])
        assert "<title>Both" in both.page.read_text("utf-8")
        assert both.missing["run"] == [*alone.missing["run"]]


class TestAfterTraining:
    def test_a_run_and_its_adapter_merge_alike(self, runs: Path, tiny_folder: Path, tmp_path: Path) -> None:
        adapter = runs / "run" / "adapter"
        reports = [
            svdtune.merge(str(runs / "run"), str(tmp_path / "a")),
            svdtune.merge(adapter, tmp_path / "b", check=False),
            svdtune.merge(tiny_folder, tmp_path / "c", adapter=adapter, device="cpu"),
        ]
        assert [report.output for report in reports] == [tmp_path / name for name in "abc"]
        assert (reports[0].layers, reports[0].dtype, reports[1].comparison) == (4, "float32", None)
        merged = [load_file(tmp_path / name / "model.safetensors") for name in "abc"]
        assert all(torch.equal(merged[0][name], other[name]) for other in merged for name in merged[0])

    def test_a_run_and_its_adapter_become_one_lora(self, runs: Path, tiny_folder: Path, tmp_path: Path) -> None:
        report = svdtune.export_lora(str(runs / "run"), str(tmp_path / "a"), base=tiny_folder)
        assert set(report.ranks.values()) == {4}
        assert report.difference.relative < 1e-5
        assert svdtune.export_lora(runs / "run" / "adapter", tmp_path / "b").difference is None
        alone = svdtune.combine({str(runs / "run"): 2}, str(tmp_path / "d"))
        assert alone.ranks == report.ranks
        once, twice = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "bd")
        assert all(torch.equal(twice[name], once[name] * (2 if "lora_B" in name else 1)) for name in once)

    def test_an_adapter_that_names_no_base_is_compared_on_the_one_given(
        self, runs: Path, tiny_folder: Path, tmp_path: Path
    ) -> None:
        nameless = tmp_path / "adapter"
        shutil.copytree(runs / "run" / "adapter", nameless)
        settings = json.loads((nameless / "adapter_config.json").read_text())
        (nameless / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
        assert svdtune.export_lora(nameless, tmp_path / "lora", base=tiny_folder).difference.relative < 1e-5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: svdtune.plan(3, SaraConfig(r=2)),
            "plan takes a model folder, a hub name, a loaded model or a recipe; got",
        ),
        (lambda: svdtune.plan("llama-7b", "sara"), "takes a PEFT configuration, or a recipe's method section such as"),
        (lambda: svdtune.plan("llama-7b", {"name": "sara", "rank": 2}), "rank: unknown setting"),
        (lambda: svdtune.plan("llama-7b", {"name": "full"}), "plan is for adapters, and full fine-tuning has none"),
        (lambda: svdtune.plan("llama-7b"), "plan was given no configuration: expected one of PEFT such as"),
        (lambda: svdtune.plan("a.yaml", SaraConfig(r=2)), "given a recipe and a configuration, and each says which"),
        (lambda: svdtune.plan("nowhere/at/all", SaraConfig(r=2)), "there is no model at nowhere/at/all"),
        (
            lambda: svdtune.sites("llama-7b", SaraConfig(r=2), device="gpu"),
            "the device 'gpu' is not there; expected one",
        ),
        (
            lambda: svdtune.start("llama-7b", None, "out"),
            "start takes a SaraConfig, MoSaraConfig, SorsaConfig or LoraConfig of a new",
        ),
        (
            lambda: svdtune.start(tiny_llama(), SaraConfig(r=2), "out"),
            "start was given a loaded model, on which it puts the adapter: leave out the folder and `device`",
        ),
        (lambda: svdtune.start("llama-7b", SaraConfig(r=2)), "model on disk to a folder: give one"),
        (
            lambda: svdtune.start(tiny_llama(), None),
            "start was given no configuration: expected one of PEFT such as Lora",
        ),
        (
            lambda: svdtune.start(tiny_llama(), SorsaConfig(r=2), components="last"),
            "give SORSA's in its configuration",
        ),
        (
            lambda: svdtune.start(tiny_llama(), LoraConfig(init_lora_weights="olora"), components="last"),
            "components says which triplets PiSSA starts from, and 'olora' has its own",
        ),
        (
            lambda: svdtune.train(3),
            "a recipe is a YAML file, its sections as a dict, or what load_recipe read; got a int",
        ),
        (lambda: svdtune.train({"model": "m"}), "method: is required"),
        (lambda: svdtune.train("nowhere.yaml"), "nowhere.yaml"),
        (
            lambda: svdtune.evaluate(tiny_llama(), "arithmetic"),
            "needs its tokenizer to be asked anything: give tokenizer=",
        ),
        (
            lambda: svdtune.evaluate(tiny_llama(), "arithmetic", tokenizer=object(), adapter="a"),
            "adapter is for a model that a path names; put it on this one",
        ),
        (
            lambda: svdtune.evaluate(3),
            "takes a run, adapter or model folder; got a int. Give a loaded model with tokenizer=",
        ),
        (lambda: svdtune.analyze("nowhere", items=0), "expected at least 1 item of each data set for the router"),
        (lambda: svdtune.analyze("nowhere"), "nowhere"),
        (lambda: svdtune.report([]), "there are no runs to report on; name at least one run folder"),
        (lambda: svdtune.report("nowhere"), "there is no run nowhere"),
        (
            lambda: svdtune.merge(tiny_llama(), "out"),
            r"takes a run, adapter or model folder; got a LlamaForCausalLM. A loaded model merges by",
        ),
        (lambda: svdtune.merge("nowhere", "out"), "there is no run or adapter folder nowhere"),
        (lambda: svdtune.export_lora(tiny_llama(), "out"), r"Save the adapter first: model.save_pretrained\(folder\)"),
        (lambda: svdtune.combine(["a", "b"], "out"), "combine takes the weight of each folder, such as"),
        (lambda: svdtune.combine({}, "out"), "there are no adapters to combine"),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(
    call: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SvdtuneError, match=message):
        call()


def test_decoding_is_what_decodings_are_made_of(tiny_folder: Path, tmp_path: Path) -> None:
    assert list(DecodingOptions.__annotations__) == [field.name for field in dataclasses.fields(Decoding)]
    how = {"limit": 1, "max_new_tokens": 2, "output": tmp_path / "scores"}
    found = svdtune.evaluate(tiny_folder, "arithmetic", beams=2, length_penalty=0.8, **how)
    assert found["arithmetic"].settings["length_penalty"] == 0.8
    with pytest.raises(TypeError, match=r"evaluate\(\) got an unexpected keyword argument 'max_tokens'"):
        svdtune.evaluate(tiny_folder, "arithmetic", max_tokens=2)


def test_a_loaded_model_has_its_device_and_engine(tiny_folder: Path) -> None:
    how = {"tokenizer": AutoTokenizer.from_pretrained(tiny_folder), "limit": 1}
    with pytest.raises(
        SvdtuneError, match="a loaded model answers by Transformers, in the dtype and on the device that"
    ):
        svdtune.evaluate(tiny_llama(), "arithmetic", engine="vllm", **how)
    with pytest.raises(SvdtuneError, match="there is no engine 'llama'; expected one of transformers, vllm"):
        svdtune.evaluate(tiny_llama(), "arithmetic", engine="llama", **how)
