"""A file written tensor by tensor is the safetensors file that a reader expects, with sizes known
beforehand or not."""

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svdtune.checkpoint.tensors import read_shard
from svdtune.checkpoint.writer import Computed, TensorWriter


def test_a_safetensors_file_whatever_the_sizes(tmp_path):
    tensors = {
        "odd": torch.randn(3),
        "one byte more": torch.randn(5, 3).half(),
        "wide": torch.randn(4, 3, dtype=torch.float64),
        "even": torch.randn(2, 4),
        "wider": torch.randn(7, dtype=torch.float64),
        'a "name" of its own é': torch.randn(2, 2).bfloat16(),
    }
    with TensorWriter(tmp_path / "file.safetensors", dict.fromkeys(tensors), {"format": "pt"}) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
    found = load_file(tmp_path / "file.safetensors")
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in tensors.items())
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_known_sizes_give_the_layout_that_was_asked_for(tmp_path):
    """Copied as bytes or computed: where nothing changes, the file is the one that safetensors
    wrote, to the byte."""
    tensors = {
        "odd": torch.randn(3),
        "count": torch.arange(5),
        "flags": torch.tensor([True, False, True]),
        "even": torch.randn(2, 4).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    shard = read_shard(tmp_path, "a.safetensors")
    written = dict(shard.tensors)
    for name in ("odd", "even"):
        written[name] = Computed(tensors[name].dtype, tuple(tensors[name].shape), tensors[name].double)
    with TensorWriter(tmp_path / "b.safetensors", written, shard.metadata) as file:
        for name, tensor in written.items():
            file.write(name, tensor)
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    for name, tensor in tensors.items():
        assert torch.equal(shard.tensors[name].read(), tensor)
