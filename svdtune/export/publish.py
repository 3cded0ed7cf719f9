"""An adapter or a merged model on the hub, with its card."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from svdtune.errors import SvdtuneError
from svdtune.methods.files.integrity import ADAPTER_CONFIG
from svdtune.names import meant
from svdtune.system import first_line
from svdtune.training.folder import ADAPTER, FULL_MODEL, RECIPE

_CARD = "README.md"
_WEIGHTS = (".safetensors", ".bin")
_KEPT_BACK = ("checkpoint-*", "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin", ".*")


def push(source: str | Path, name: str, *, base: str | None = None, private: bool = False) -> str:
    """Upload a run's result, an adapter folder or a model folder; the folder itself stays as it is.

    Args:
        source: the folder.
        name: owner/name on the hub; made if it is not there.
        base: the base model's name on the hub, where the adapter was trained on a folder of this
            disk, which others do not have.
        private: whether a new repository is to be.

    Returns:
        The address of what was uploaded.

    Raises:
        SvdtuneError: there is no such folder, it holds no weights, its base is on this disk alone,
            or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    folder = _result_of(Path(source).expanduser())
    if not any(path.suffix in _WEIGHTS for path in folder.iterdir()):
        raise SvdtuneError(f"{folder} holds no weights ({', '.join(_WEIGHTS)}), so there is nothing to push")
    with TemporaryDirectory() as place:
        copy = Path(place) / "upload"
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*_KEPT_BACK), copy_function=_linked)
        _name_base(copy, base)
        try:
            api = HfApi()
            api.create_repo(name, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=name, folder_path=copy, commit_message="svdtune push"))
        except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
            raise SvdtuneError(
                f"{folder} cannot be pushed to {name}: {first_line(error)}; expected owner/name, and a login that may "
                "write there (hf auth login)"
            ) from error


def _result_of(folder: Path) -> Path:
    """What of a folder is published."""
    if (folder / RECIPE).is_file():
        folder = next((folder / part for part in (ADAPTER, FULL_MODEL) if (folder / part).is_dir()), folder)
    if not (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        where = "" if folder.exists() else meant(folder, folders=True)
        raise SvdtuneError(f"{folder} is neither a finished run, nor an adapter, nor a model folder{where}")
    return folder


def _name_base(folder: Path, base: str | None) -> None:
    """Name the base model as others find it, in the configuration and in the card."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    named = str(settings.get("base_model_name_or_path") or "")
    if base is None and (not named or Path(named).expanduser().exists()):
        raise SvdtuneError(
            f"the adapter's base model is {named or 'not named'}, which others do not have; name it as it is on the hub: "
            "--base owner/name"
        )
    if base is None or base == named:
        return
    _rewrite(path, json.dumps(settings | {"base_model_name_or_path": base}, indent=2) + "\n")
    card = folder / _CARD
    if named and card.is_file():
        _rewrite(card, card.read_text(encoding="utf-8").replace(named, base))


def _rewrite(path: Path, text: str) -> None:
    path.unlink()  # it may be a link to the file that stays
    path.write_text(text, encoding="utf-8")


def _linked(source: str, target: str) -> None:
    """A link in place of a copy: weights can be large."""
    Path(target).symlink_to(Path(source).resolve())
