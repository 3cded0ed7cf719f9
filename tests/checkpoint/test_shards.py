"""An index of shards is a text of somebody else's: it names files of its folder, or is refused by
every reader."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdtune.checkpoint import open_checkpoint
from svdtune.checkpoint.shards import INDEX, PICKLED_INDEX, SINGLE, shard_names
from svdtune.errors import SvdtuneError
from svdtune.models import load

NAMES = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(["..", "../a", "/etc/passwd", "a/../../b"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


def write(folder: Path, text: str) -> Path:
    (folder / INDEX).write_text(text, encoding="utf-8")
    return folder


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    (tmp_path / SINGLE).touch()
    assert shard_names(write(tmp_path, "{")) == [SINGLE]
    assert shard_names(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{",
            r"index\.json is damaged: it has no weight_map from tensors to files \(Expecting .*download the model again",
        ),
        ("[" * 100_000, "is damaged"),
        ("[]", "is damaged"),
        ('{"weight_map": 3}', "is damaged"),
        ('{"weight_map": {"a": [1]}}', "is damaged"),
        ('{"weight_map": {"a": 3}}', "names 3, which is no file of its folder; do not use this model"),
        ('{"weight_map": {}}', "names no files; download the model again"),
        ('{"weight_map": {"a": "b.safetensors"}}', r"lacks b\.safetensors, which its index names; download it again"),
        ('{"weight_map": {"a": "../b"}}', r"names '\.\./b', which is no file of its folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names '/etc/passwd', which is no file of its folder"),
        (r'{"weight_map": {"a": "x\\..\\b"}}', "which is no file of its folder"),
        (r'{"weight_map": {"a": "C:\\b"}}', "which is no file of its folder"),
    ],
)
def test_what_is_said(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    write(tmp_path, text)
    for reader in (shard_names, open_checkpoint, load):
        with pytest.raises(SvdtuneError, match=message):
            reader(tmp_path)


@given(weight_map=ANYTHING)
def test_whatever_it_names_lies_in_the_folder(tmp_path: Path, weight_map: object) -> None:
    (tmp_path / "a.safetensors").touch()
    write(tmp_path, json.dumps({"weight_map": weight_map}))
    for name in names_or_refusal(tmp_path):
        assert tmp_path.resolve() in (tmp_path / name).resolve().parents


def names_or_refusal(folder: Path) -> list[str]:
    try:
        return shard_names(folder) or []
    except SvdtuneError:
        return []


@pytest.mark.parametrize(
    "named", ["../elsewhere/model.safetensors.index.json", "/etc/weights.safetensors", "other.safetensors", 3]
)
def test_a_configuration_that_names_other_weights(tmp_path: Path, tiny_folder: Path, named: object) -> None:
    """Transformers 5 would train on what lies there."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"transformers_weights": named}))
    for read in (load, open_checkpoint, shard_names):
        with pytest.raises(
            SvdtuneError, match=r"names .* as its weights .*svdtune reads model\.safetensors and .* alone"
        ):
            read(folder)
    (folder / "config.json").write_text(json.dumps(settings | {"transformers_weights": SINGLE}))
    assert shard_names(folder) == [SINGLE]


def test_a_pickled_index_is_read_with_the_same_eyes(tmp_path: Path) -> None:
    (tmp_path / PICKLED_INDEX).write_text(json.dumps({"weight_map": {"a": "../elsewhere.bin"}}))
    with pytest.raises(SvdtuneError, match="no file of its folder"):
        shard_names(tmp_path)


def test_a_key_that_stands_twice_in_an_index(tmp_path: Path) -> None:
    with pytest.raises(SvdtuneError, match="the key 'a' stands there twice"):
        shard_names(write(tmp_path, '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'))
