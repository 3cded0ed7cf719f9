"""Whatever bytes a cache file holds: what was stored comes out, or nothing."""

import json
import struct

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from svdtune.cache import entries
from svdtune.linalg import rank_at_threshold
from svdtune.spectra import ranks, store

VALUES = {"values": torch.arange(9.0), "bound": torch.tensor(1e-9)}
FACTS = {"name": "a layer"}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def stored():
    store.store("spectrum", "key", VALUES, FACTS)
    return next(entry.path for entry in entries())


def is_absent_or_as_stored():
    found = store.load("spectrum", "key")
    same = found and found[1] == FACTS and found[0].keys() == VALUES.keys()
    return found is None or (same and all(torch.equal(found[0][name], VALUES[name]) for name in VALUES))


@given(data=st.binary(max_size=200))
@example(data=b"")
@example(data=struct.pack("<Q", 2**63))
@example(data=struct.pack("<Q", 2) + b"{}")
def test_other_bytes(data):
    stored().write_bytes(data)
    assert store.load("spectrum", "key") is None


@given(data=st.data())
def test_altered_bytes(data):
    path = stored()
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(len(whole), start + 20)))
    path.write_bytes(whole[:start] + data.draw(st.binary(max_size=20)) + whole[stop:])
    assert is_absent_or_as_stored()


@given(header=st.dictionaries(st.sampled_from(["__metadata__", "values", "bound", "x"]), ANYTHING), body=st.binary())
def test_any_header(header, body):
    text = json.dumps(header).encode()
    stored().write_bytes(struct.pack("<Q", len(text)) + text + body)
    assert is_absent_or_as_stored()


@given(metadata=st.dictionaries(st.sampled_from(["version", "key", "facts", "digest"]), st.text(max_size=9) | ANYTHING))
def test_any_metadata(metadata):
    path = stored()
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    header["__metadata__"] |= metadata
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    assert is_absent_or_as_stored()


@given(data=st.binary(max_size=100))
def test_ranks_do_not_depend_on_what_the_cache_holds(data):
    weights = {"layer": torch.arange(30.0).reshape(5, 6).cos()}
    expected = {"layer": rank_at_threshold(torch.linalg.svdvals(weights["layer"].double()), 0.5)}
    assert ranks(weights, 0.5) == expected
    for entry in entries():
        entry.path.write_bytes(data)
    assert ranks(weights, 0.5) == expected
