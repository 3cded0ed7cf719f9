"""Whatever an adapter's configuration says: the adapter loads and works, or one SvdtuneError; no
other file is touched."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import get_peft_model

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig
from svdtune.errors import SvdtuneError
from svdtune.export.source import attach_adapter, find_source
from svdtune.methods.files.adapter import read_adapter
from tiny import tiny_llama

CONFIGS = {"sara": SaraConfig(r=2), "mosara": MoSaraConfig(r=2), "sorsa": SorsaConfig(r=2)}
WORDS = [
    "",
    "all-linear",
    "((",
    "*",
    "../../x",
    "/etc/passwd",
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "\0",
    "é" * 99,
]
NUMBERS = [0, -1, 2, 10**6, 10**400, 2.5, 1e308, float("nan"), float("inf")]
VALUES = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(WORDS) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def base():
    return tiny_llama(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)


@pytest.fixture(scope="module", params=CONFIGS)
def adapter(base, request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / request.param
    config = copy.deepcopy(CONFIGS[request.param])
    config.task_type = "CAUSAL_LM"
    get_peft_model(copy.deepcopy(base), config).save_pretrained(folder)
    return folder


def keys():
    names = {field for config in CONFIGS.values() for field in config.to_dict()}
    return (
        st.sampled_from(sorted(names)) | st.sampled_from(["__class__", "layers", "path", "../x"]) | st.text(max_size=5)
    )


def answer(work):
    """What comes of it: the message of a refusal, None where all went well."""
    try:
        work()
    except SvdtuneError as error:
        return str(error)
    return None


@given(changes=st.dictionaries(keys(), VALUES, min_size=1, max_size=3), removed=st.lists(keys(), max_size=2))
@example(changes={"target_modules": "(("}, removed=[])
@example(changes={"modules_to_save": ["../x"]}, removed=[])
@example(changes={"ranks": {"model.layers.0.self_attn.q_proj": 10**400}}, removed=[])
def test_an_altered_configuration(adapter: Path, base, tmp_path: Path, changes, removed) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    for key in removed:
        config.pop(key, None)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for work in (lambda: find_source(folder), lambda: read_adapter(folder)):
        message = answer(work)
        assert message is None or len(message) > 20
    model = copy.deepcopy(base)
    if answer(lambda: attach_adapter(model, folder)) is None:
        assert torch.isfinite(model(torch.arange(5)[None]).logits).all()
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


@given(text=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
@example(text=b"[" * 100_000)
@example(text=b'{"peft_type": "SORSA", "r": ' + b"9" * 5000 + b"}")
@example(text=b'\xff\xfe{"peft_type": "SORSA"}')
def test_another_text(tmp_path: Path, base, text: bytes) -> None:
    (tmp_path / "adapter_config.json").write_bytes(text)
    for work in (
        lambda: find_source(tmp_path),
        lambda: read_adapter(tmp_path),
        lambda: attach_adapter(copy.deepcopy(base), tmp_path),
    ):
        assert str(tmp_path) in (answer(work) or "nothing was refused")
