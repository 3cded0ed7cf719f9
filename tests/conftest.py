"""What every test may use: a fixed seed, repeatable examples, a tiny model, the folder of real data
sets if there is one."""

import gc
import os
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from zlib import crc32

import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from svdtune.evaluation.prompt_methods import refused_peft
from tiny import save_tiny_llama
from torch_state import kept_torch_state

# One thread, here and in the processes that tests start: tests run side by side, and give the same
# on any number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A runner that was started in the background ignores Ctrl-C, and what it starts does likewise; some
# tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time; `--hypothesis-profile=fuzz` draws other ones, and many more.
settings.register_profile(
    "quick",
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    # a busy machine is no fault
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("fuzz", settings.get_profile("quick"), max_examples=1000, derandomize=False)
settings.load_profile("quick")


def pytest_make_parametrize_id(val: object) -> str | None:
    """A long text names a case by its start alone, which not every release of pytest sees to."""
    return f"{val[:40]}…".encode("unicode_escape").decode() if isinstance(val, str) and len(val) > 100 else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse names that a whole object was written into: a set in it has another order in every
    process, and processes that share the tests must agree on their names. Then leave the most of
    each large family to the slow tests."""
    if long := [item.nodeid for item in items if len(item.nodeid) > LONGEST_NAME]:
        raise pytest.UsageError(f"name the cases of {long[0]:.{LONGEST_NAME}}...: its name is written out of an object")
    families: dict[str, list[pytest.Item]] = {}
    for item in items:
        families.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for members in families.values():
        marker = members[0].get_closest_marker("family")
        size = marker.args[0] if marker else FAMILY
        # by names, as if drawn: a stride would take one value of some parameter
        for item in sorted(members, key=lambda item: crc32(item.nodeid.encode()))[size:]:
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Keep Python's collector from what was imported, a few million objects: Accelerate has it run
    at the start of every training."""
    gc.collect()
    gc.freeze()


LONGEST_NAME = 300
FAMILY = 6  # of one test's members, so many run where slow ones are left out
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _torch() -> Iterator[None]:
    """Give every test PyTorch in the same state: seed 0, fp32 products in fp32, nothing that
    another test set or compiled."""
    with kept_torch_state():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Path]]:
    """Folders that are not there yet, without end; the first is the cache of fixtures that several
    tests share."""
    folder = tmp_path_factory.mktemp("caches")
    caches = (folder / str(number) for number in count())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVDTUNE_CACHE", str(next(caches)))
        yield caches


@pytest.fixture(autouse=True)
def _own_cache(_caches: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test a cache folder of its own, so that no test sees what another decomposed."""
    monkeypatch.setenv("SVDTUNE_CACHE", str(next(_caches)))


@pytest.fixture
def transformers_takes_peft() -> None:
    """For tests of what transformers itself does with adapters; skips where it refuses the PEFT
    that is installed."""
    if (refusal := refused_peft()) is not None:
        pytest.skip(f"transformers {transformers.__version__} says of PEFT {peft.__version__}: {refusal}")


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data sets, `../shared/data` beside the checkout; skips where it does not
    exist."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the data sets in {SHARED_DATA}, which is not there")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 258 tokens, `<|end|>`, `<|pad|>` and the 256 bytes: it spells out any text,
    offline."""
    tokens = ["<|end|>", "<|pad|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Transformers folder with a random two-layer Llama and `tiny_tokenizer`; read it, never
    write to it."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer)
