"""The cache on disk under everything that can go wrong with a disk."""

import errno
import logging
import os
import tempfile
import time

import pytest
import torch

import new_process
from svdtune.cache import cache_dir, cache_limit, entries, trim
from svdtune.errors import SvdtuneError
from svdtune.linalg import rank_at_threshold, top_factors
from svdtune.spectra import decompose, factors, ranked_factors, ranks, spectra, store

THRESHOLD = 0.3


@pytest.fixture
def weights():
    return {f"layer{i}": torch.randn(40 + i, 30) for i in range(4)}


@pytest.fixture
def expected(weights):
    return {n: rank_at_threshold(torch.linalg.svdvals(w.double()), THRESHOLD) for n, w in weights.items()}


@pytest.fixture
def nothing_decomposes(monkeypatch):
    """Call it, and from then on every decomposition fails the test."""

    def forbid():
        for name in ("settled_spectrum", "decompose", "band_factors"):
            original = getattr(decompose, name)
            monkeypatch.setattr(
                decompose, name, lambda *a, name=name, original=original: _only_known(name, original, *a)
            )

    def _only_known(name, original, *arguments):
        if name == "settled_spectrum" and len(arguments) == 3 and arguments[2] is not None:
            found, rank = original(*arguments)
            assert found is arguments[2], "a cached spectrum was not enough"
            return found, rank
        pytest.fail(f"{name} was called although the cache should have answered")

    return forbid


def files():
    return [entry.path for entry in entries()]


def test_a_second_start_decomposes_nothing(weights, expected, nothing_decomposes):
    assert ranks(weights, THRESHOLD) == expected
    first = dict(factors(weights, dict.fromkeys(weights, 3), remember=True))
    nothing_decomposes()
    assert ranks(weights, THRESHOLD) == expected
    assert ranks(weights, 0.77).keys() == weights.keys()
    assert [len(s.values) for _, s in spectra(weights)] == [30] * 4
    second = dict(factors(weights, dict.fromkeys(weights, 3), remember=True))
    for name in weights:
        assert all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True))


def test_factors_are_only_kept_on_request(weights):
    dict(factors(weights, dict.fromkeys(weights, 2)))
    assert not files()


def test_order_of_layers_and_what_else_is_decomposed_do_not_matter(weights):
    forwards = dict(factors(weights, dict.fromkeys(weights, 5)))
    alone = dict(factors({"layer2": weights["layer2"]}, {"layer2": 5}))
    backwards = dict(factors(weights, dict.fromkeys(reversed(weights), 5)))
    for other in (alone, backwards):
        assert all(torch.equal(a, b) for a, b in zip(forwards["layer2"], other["layer2"], strict=True))


def test_content_and_dtype_make_the_key(weights):
    weight = weights["layer0"]
    keys = {
        decompose.content_key(w)
        for w in (weight, weight + 1e-7, weight.bfloat16(), weight.T.contiguous(), weight.reshape(30, 40))
    }
    assert len(keys) == 5
    assert decompose.content_key(weight.T.contiguous().T) == decompose.content_key(weight)


def test_large_weights_are_hashed_in_chunks(monkeypatch):
    from svdtune.spectra import content

    monkeypatch.setattr(content, "_CHUNK", 64)
    weight = torch.randn(20, 30)
    key = content.content_key(weight)
    for at in (0, 299, 599):
        changed = weight.clone().flatten()
        changed[at] += 1
        assert content.content_key(changed.view(20, 30)) != key
    assert content.content_key(weight.clone()) == key


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"\xff" * len(data),
        lambda data: data[:-9] + bytes([data[-9] ^ 0x40]) + data[-8:],
        lambda data: data.replace(b'"version":"1"', b'"version":"0"'),
        lambda data: data.replace(b"total", b"totem"),
        lambda data: data + b"more",
    ],
    ids=[
        "empty",
        "header cut",
        "half",
        "one byte short",
        "noise",
        "flipped bit",
        "other version",
        "other facts",
        "longer",
    ],
)
def test_damaged_files_are_computed_again(weights, expected, damage):
    ranks(weights, THRESHOLD)
    keys = {entry.key for entry in entries()}
    for path in files():
        data = path.read_bytes()
        assert damage(data) != data
        path.write_bytes(damage(data))
    assert not any(store.load("spectrum", key) for key in keys)
    assert ranks(weights, THRESHOLD) == expected
    assert all(store.load("spectrum", key) for key in keys)


def test_a_file_under_another_weights_key_is_not_believed(weights, expected):
    ranks(weights, THRESHOLD)
    first, second, *_ = files()
    first.write_bytes(second.read_bytes())
    assert ranks(weights, THRESHOLD) == expected


def test_a_full_disk_is_reported_once_and_changes_nothing(weights, expected, monkeypatch, caplog):
    class Full:
        def __init__(self, *arguments, **keywords):
            handle, self.name = tempfile.mkstemp(dir=keywords["dir"], suffix=".tmp", prefix=".")
            os.close(handle)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.tempfile, "NamedTemporaryFile", Full)
    with caplog.at_level(logging.WARNING, "svdtune"):
        assert ranks(weights, THRESHOLD) == expected
    assert len([record for record in caplog.records if "No space left" in record.getMessage()]) == 1
    assert "SVDTUNE_CACHE" in caplog.text
    assert not files()
    assert not list(cache_dir().glob("*/.*.tmp"))


def test_a_folder_that_cannot_be_made_is_reported_and_changes_nothing(weights, expected, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SVDTUNE_CACHE", str(tmp_path / "file" / "below"))
    with caplog.at_level(logging.WARNING, "svdtune"):
        assert ranks(weights, THRESHOLD) == expected
    assert "cannot write" in caplog.text


def test_off_keeps_nothing(weights, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("SVDTUNE_CACHE", "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ranks(weights, THRESHOLD) == expected
    assert not files()
    assert not list(tmp_path.iterdir())


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("SVDTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "svdtune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "svdtune"


def test_the_files_unused_for_longest_go_first(weights):
    ranks(weights, THRESHOLD)
    found = sorted(entries(), key=lambda entry: entry.path.name)
    for age, entry in enumerate(found):
        os.utime(entry.path, (1000 + age, 1000 + age))
    ranks({"layer": weights["layer0"]}, THRESHOLD)  # a look-up is a use
    used = next(e for e in entries() if e.used > 2000)
    removed = trim(2 * found[0].size + 100)
    assert len(files()) == 2
    assert used.path in files()
    assert used.path not in [entry.path for entry in removed]


def test_the_cache_is_trimmed_to_its_limit_after_a_run(weights, expected, monkeypatch):
    monkeypatch.setenv("SVDTUNE_CACHE_GB", "0.0000015")
    assert ranks(weights, THRESHOLD) == expected
    assert 0 < sum(entry.size for entry in entries()) <= 1500


@pytest.mark.parametrize("text", ["many", "-1", "nan"])
def test_a_limit_that_is_no_size_is_refused(monkeypatch, text):
    monkeypatch.setenv("SVDTUNE_CACHE_GB", text)
    with pytest.raises(SvdtuneError, match="SVDTUNE_CACHE_GB"):
        cache_limit()


def test_what_a_killed_writer_left_is_removed_and_what_a_live_one_writes_is_not(weights):
    ranks(weights, THRESHOLD)
    folder = files()[0].parent
    stale, fresh = folder / ".stale.tmp", folder / ".fresh.tmp"
    stale.write_bytes(b"x")
    fresh.write_bytes(b"x")
    os.utime(stale, (time.time() - 7200,) * 2)
    trim()
    assert not stale.exists()
    assert fresh.exists()


def test_trimming_leaves_other_files_in_the_folder_alone(weights):
    ranks(weights, THRESHOLD)
    other = cache_dir() / "models" / "mine.safetensors"
    other.parent.mkdir()
    other.write_bytes(b"x")
    trim(0)
    assert other.exists()
    assert not files()


def fill_the_cache():
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(5)
    weights = {str(i): torch.randn(50, 40, generator=generator) for i in range(12)}
    for _ in range(3):
        found = ranks(weights, 0.4)
    return found


def test_two_processes_may_fill_the_cache_at_once(tmp_path):
    running = [new_process.start(fill_the_cache, SVDTUNE_CACHE=str(tmp_path)) for _ in range(2)]
    first, second = (process.result() for process in running)
    assert len(first) == 12
    assert first == second
    assert len(list(tmp_path.glob("spectrum/*.safetensors"))) == 12
    assert not list(tmp_path.glob("*/.*"))


def test_errors_name_the_weight():
    bad = {"good": torch.eye(3), "model.layers.7.q_proj": torch.full((3, 3), float("nan"))}
    for call in (
        lambda: ranks(bad, 0.5),
        lambda: dict(spectra(bad)),
        lambda: dict(factors(bad, {"model.layers.7.q_proj": 1})),
    ):
        with pytest.raises(SvdtuneError, match=r"model\.layers\.7\.q_proj: .*NaN"):
            call()
    with pytest.raises(SvdtuneError, match="not given: other"):
        dict(factors(bad, {"other": 1}))


@pytest.mark.parametrize("threads", [1, 2])
def test_weights_may_be_functions_and_few_are_read_ahead(threads):
    read = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        functions = {str(i): lambda i=i: read.append(i) or torch.eye(4 + i) for i in range(9)}
        found = factors(functions, dict.fromkeys(functions, 2))
        assert next(found)[0] == "0"
        assert len(read) <= threads + 1
        assert [name for name, _ in found] == [str(i) for i in range(1, 9)]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_small_and_large_weights_keep_their_order(monkeypatch):
    monkeypatch.setattr("svdtune.spectra.decompose._ONE_CORE", 20)
    weights = {str(n): torch.randn(n, 30, generator=torch.Generator().manual_seed(n)) for n in (8, 25, 9, 10, 26, 11)}
    found = dict(factors(weights, dict.fromkeys(weights, 3)))
    assert list(found) == list(weights)
    for name, weight in weights.items():
        assert torch.equal(found[name].U, top_factors(weight, 3).U)


def test_ranks_and_factors_in_one_go_fill_the_cache_for_both(weights):
    together = dict(ranked_factors(weights, 0.5))
    assert {name: len(found.s) for name, found in together.items()} == ranks(weights, 0.5)
    again = dict(ranked_factors(weights, 0.5))
    for name, found in together.items():
        assert torch.allclose(again[name].s, found.s, rtol=1e-5)
