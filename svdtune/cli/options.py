"""What several verbs ask of the machine and the user: where a model computes, and the prompt around
a text."""

from typing import TYPE_CHECKING, Any

from svdtune.errors import SvdtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from svdtune.training.recipe import Recipe


def placement(dtype: str | None, device: str | None) -> dict[str, Any]:
    """Arguments for loading a model: what the user said, and a GPU where there is one and none was
    named."""
    import torch

    if device is not None:
        check_device(device)
    found = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None)
    return {key: value for key, value in {"dtype": dtype, "device": found}.items() if value is not None}


def check_device(device: str) -> None:
    """Make sure that there is such a device.

    Raises:
        SvdtuneError: There is none.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        gpus = torch.cuda.device_count()
        there = ", ".join(["cpu", *(f"cuda:{number}" for number in range(gpus))])
        raise SvdtuneError(f"the device {device!r} is not there; expected one of {there}") from error


def choose_template(recipe: "Recipe | None", tokenizer: "PreTrainedTokenizerBase", given: str | None) -> str:
    """The user's, or the run's, or the chat template where the tokenizer has one."""
    if given is not None:
        return given
    if recipe is not None:
        return recipe.data.template
    return "chat" if tokenizer.chat_template else "plain"
