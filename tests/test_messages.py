"""Every sentence of a refusal stands, in part, in a test; those that no other test is about are
called forth here.

The search looks for three words in a row of a message among the texts of the tests, and leaves out
messages of shorter pieces.
"""

import ast
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import svdtune
from svdtune import SvdtuneError
from svdtune.checkpoint import Checkpoint, gguf, open_checkpoint
from svdtune.checkpoint.names import match_names
from svdtune.checkpoint.tensors import Stored
from svdtune.checkpoint.writer import TensorWriter
from svdtune.cli import app
from svdtune.data.catalogue import scored
from svdtune.evaluation import vllm
from svdtune.evaluation.generation import Decoding
from svdtune.export import merge_checkpoint
from svdtune.export.source import attach_adapter
from svdtune.lab.data import gsm_symbolic
from svdtune.linalg import Spectrum, rank_at_threshold, spectrum, top_factors
from svdtune.methods import injection
from svdtune.methods.files.adapter import read_adapter
from svdtune.methods.start import disk
from svdtune.planning import draw_chart, plan
from svdtune.spectra import base_weight, factors
from svdtune.training import arguments, method
from svdtune.training.method import build_config
from svdtune.training.recipe import load_recipe

ROOT, TESTS = Path(svdtune.__file__).parent, Path(__file__).parent
WORDS = 3
# Nothing short of a broken machine or another system brings these forth.
OUT_OF_REACH = {
    "lab/nlg/java.py": "a Java that fails, or a pycocoevalcap that lacks files",
    "lab/sandbox/supervise.py": "a system without Landlock and seccomp",
    "export/source.py": "a hub that refuses",
    "training/trainer.py": "FSDP",
    "methods/sorsa/zero.py": "DeepSpeed",
}


def messages(tree: ast.AST) -> Iterator[tuple[int, list[str]]]:
    """(line, constant pieces) of every message that is given to a SvdtuneError where it is
    raised."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            name = ast.unparse(node.exc.func)
            if name == "SvdtuneError" or name.endswith("SvdtuneError"):
                pieces = [part for part in ast.walk(node.exc.args[0]) if isinstance(part, ast.Constant)]
                yield node.lineno, [part.value for part in pieces if isinstance(part.value, str)]


def words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.replace("\\", "").lower())


def runs(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + WORDS]) for i in range(len(found) - WORDS + 1)}


def literals(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_message_stands_in_a_test() -> None:
    told = set().union(*(runs(text) for path in TESTS.rglob("*.py") for text in literals(path)))
    untold = []
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name in OUT_OF_REACH:
            continue
        for line, pieces in messages(ast.parse(path.read_text(encoding="utf-8"))):
            found = set().union(*map(runs, pieces))
            if found and not found & told:
                untold.append(f"{name}:{line}: {' … '.join(pieces)}")
    assert untold == [], "messages without a test of their text"


def adapter_folder(folder: Path) -> Path:
    svdtune.SorsaConfig(r=2, task_type="CAUSAL_LM").save_pretrained(str(folder))
    return folder


def circle(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"extends: {path.name}\n")
    return path


def copied(file: Path) -> None:
    stored = Stored(Path(__file__), "a", "F32", (2,), 10**9, 8)
    with TensorWriter(file, {"a": stored}, {}) as written:
        written.write("a", stored)


def small() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Decoding(samples=0), "expected samples and beams of at least 1 and nothing below 0"),
        (lambda: Decoding(top_p=0, temperature=1), "expected top_p above 0 and at most 1, got 0"),
        (lambda: Decoding(samples=2), "without a temperature above 0 all completions of a prompt are the same"),
        (lambda: Decoding(beams=2, temperature=1), "beam search draws nothing; leave out the beams or the temperature"),
        (lambda: Decoding(length_penalty=2), "a length penalty is for beam search; set beams above 1"),
        (lambda: scored("alpaca"), "'alpaca' is no data set that is scored; there are "),
        (
            lambda: top_factors(torch.ones(3, 3), 4),
            r"r = 4 is outside 1 … 3, the ranks that a weight \(3, 3\) can have",
        ),
        (
            lambda: top_factors(torch.ones(3, 3).int(), 1),
            "must be floating point, not torch.int32; dequantize it first",
        ),
        (lambda: factors({}, {"a": 1}), "ranks name weights that were not given: a"),
        (lambda: base_weight(torch.nn.ReLU()), "ReLU has no weight to decompose; leave it out of target_modules"),
        (lambda: build_config("lorra", {}), "'lorra' is no PEFT method; there are "),
        (
            lambda: disk._check(LlamaConfig()),
            "expected the configuration of a SARA, Mo-SARA or SORSA adapter; got",
        ),
        (
            lambda: vllm.VllmEngine.complete(None, [], 1, Decoding(beams=2), []),
            "vLLM decodes without beams, no_repeat_ngram_size and stop_loops; use --engine transformers",
        ),
        (
            lambda: Decoding(temperature=0.5, stop_loops=True),
            "loops are stopped in greedy decoding alone; leave out stop_loops or the rest",
        ),
        (
            lambda: spectrum(torch.ones(2, 2), dtype=torch.float16),
            r"a spectrum is computed in torch\.float32 or torch\.float64, not torch\.float16",
        ),
    ],
)
def test_values(call, message: str) -> None:
    with pytest.raises(SvdtuneError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: load_recipe(circle(folder)), r"recipe\.yaml extends itself; take the circle out"),
        (lambda folder: read_adapter(adapter_folder(folder)), "has no adapter_model.safetensors; save it again with"),
        (lambda folder: attach_adapter(small(), adapter_folder(folder)), "save it again with save_pretrained"),
        (lambda folder: copied(folder / "new"), r"test_messages\.py became shorter while it was read"),
        (lambda folder: Stored(folder / "gone", "a", "F32", (2,), 0, 8).read(), "a cannot be read from .*gone"),
    ],
)
def test_folders(call, message: str, tmp_path: Path) -> None:
    with pytest.raises(SvdtuneError, match=message):
        call(tmp_path)


def test_plans(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny_folder)
    with pytest.raises(
        SvdtuneError, match=r"r = 99 is larger than layer 'model\S+' \[32, 32\] allows; its rank is at most 32"
    ):
        plan(checkpoint, svdtune.SorsaConfig(r=99))
    with pytest.raises(SvdtuneError, match=r"ranks\.txt is no chart; end it in \.svg, \.png or \.pdf"):
        draw_chart(plan(checkpoint, svdtune.SorsaConfig(r=2)), tmp_path / "ranks.txt")
    for owner in (type(checkpoint.model.config), checkpoint.model.config):  # PEFT asks the first
        monkeypatch.setattr(owner, "model_type", "unheard_of")
    with pytest.raises(SvdtuneError, match="knows no default target_modules for 'unheard_of'; name them, or use"):
        plan(checkpoint, svdtune.SaraConfig(r=2))


def test_a_spectrum_that_ends_too_early() -> None:
    weight = torch.randn(30, 40)
    whole = torch.linalg.svdvals(weight.double())
    short = Spectrum(whole[:2], float(whole.sum()), 0.0, 0.0)
    with pytest.raises(
        SvdtuneError, match=r"holds only the 2 leading values, short of threshold 0\.9; compute the whole"
    ):
        rank_at_threshold(short, 0.9)


def test_a_weight_in_three_places() -> None:
    model = small()
    shared = torch.nn.Parameter(torch.ones(9, 8))
    model.lm_head.weight = model.model.embed_tokens.weight = shared
    model.model.norm.weight = shared
    with pytest.raises(SvdtuneError, match=r"merging would change them too\. Keep the adapter unmerged"):
        merge_checkpoint._twins(
            Checkpoint("small", model, {}, 0, names=match_names(model, model.state_dict())), "lm_head.weight"
        )


def test_a_task_without_items(monkeypatch: pytest.MonkeyPatch) -> None:
    # the package has a function of that name
    routing = importlib.import_module("svdtune.analysis.routing")
    monkeypatch.setattr(routing, "_has_router", lambda _: True)
    layer = SimpleNamespace(name="q", module=None)
    with pytest.raises(SvdtuneError, match="the task letters has no items to put through the model"):
        routing.routing(SimpleNamespace(layers=[layer]), {"letters": []})


def test_a_generator_that_repeats_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    source = pytest.importorskip("reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic")
    same = {"question": "1 + 1?", "answer": "2", "metadata": {"answer_cot": "2"}}
    monkeypatch.setattr(source.GSMSymbolicDataset, "__getitem__", lambda *_: same)
    with pytest.raises(SvdtuneError, match="gave only 1 different problems of 3; ask for fewer"):
        gsm_symbolic.rows("train", 3)


def test_a_layer_that_lacks_a_tensor(tmp_path: Path) -> None:
    get_peft_model(small(), svdtune.SaraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"weights_sha256": None}))
    with pytest.raises(SvdtuneError, match=r"of layer '.*'; it is incomplete, or another method's"):
        read_adapter(tmp_path)


def test_what_peft_refuses(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("not this one")

    monkeypatch.setattr(injection, "get_peft_model", refuse)
    with pytest.raises(SvdtuneError, match="the method lora cannot be put on this model: not this one"):
        method.adapt(small(), "lora", {})
    with pytest.raises(SvdtuneError, match="the method sorsa cannot be put on this model: not this one"):
        plan(open_checkpoint(tiny_folder), svdtune.SorsaConfig(r=2))


def test_an_export_that_vllm_does_not_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "export_lora", lambda *_: SimpleNamespace(notes=["vLLM serves no biases"]))
    with pytest.raises(SvdtuneError, match="vLLM serves no biases; or evaluate the merged model: svdtune merge"):
        vllm._as_lora(adapter_folder(tmp_path), tmp_path / "lora")


def test_gguf_with_older_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf.transformers, "__version__", "4.56.2")
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace())
    with pytest.raises(SvdtuneError, match=r"needs Transformers 5.0 or newer, and 4.56.2 is installed"):
        gguf.check_gguf_support(tmp_path / "model.gguf")


@pytest.mark.parametrize("section", ["bf16", "fp16"])
def test_deepspeed_that_rounds_the_adapter(section: str) -> None:
    args: Any = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config={section: {"enabled": True}}))
    with pytest.raises(SvdtuneError, match=f"DeepSpeed's {section} section rounds the adapter itself to 16 bits"):
        arguments._check_deepspeed(args)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--method.fused_slices", "{c_attn: q}"],
            "`fused_slices['c_attn']` must list slices by name, such as ['q', 'v']; got 'q'",
        ),
    ],
)
def test_words(tiny_folder: Path, words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["plan", str(tiny_folder), *words])
    assert result.exit_code == 2
    assert message in result.stderr
