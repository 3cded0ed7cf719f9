"""A model without weights: its modules' classes, and under which names a checkpoint stores its parameters."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from svdtune.errors import SvdtuneError


def build_skeleton(folder: Path, adapter: PeftConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that an adapter was trained on, with every parameter on the meta device.

    Raises:
        SvdtuneError: the folder's configuration cannot be read.
    """
    mapping = adapter.auto_mapping or {}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        named = [mapping.get("base_model_class"), *(config.architectures or [])]
        classes = [getattr(transformers, name) for name in named if name and hasattr(transformers, name)]
        with torch.device("meta"):
            if classes:
                return classes[0]._from_config(config).eval()
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SvdtuneError(f"the model in {folder} cannot be set up: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class StoredNames:
    """Where a model's parameters lie in a checkpoint.

    Attributes:
        model: the model; its parameters may be on the meta device.
        stored: the checkpoint's names.
        groups: by parameter name, all names of that one parameter.
    """

    model: PreTrainedModel
    stored: Collection[str]
    groups: dict[str, list[str]]

    def own(self, parameter: str) -> str | None:
        """The checkpoint's name of a parameter under this very name of it, None where it has none."""
        prefix = self.model.base_model_prefix + "."
        for written in (parameter, parameter.removeprefix(prefix), prefix + parameter):
            if written in self.stored:
                return written
        return None

    def of(self, parameter: str) -> str:
        """The checkpoint's name of a parameter, under whichever of the parameter's names.

        Raises:
            SvdtuneError: it stores none under a name that says so.
        """
        for name in [parameter, *self.groups.get(parameter, [])]:
            if (written := self.own(name)) is not None:
                return written
        raise SvdtuneError(
            f"the base checkpoint stores no {parameter!r} under that name, so it cannot be merged on disk. Merge in memory: "
            "PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True).save_pretrained(folder)"
        )

    def tied(self, parameter: str) -> list[str]:
        """The other names of a parameter that stands in two places.

        Raises:
            SvdtuneError: these are not the input and output embeddings, the only ones that a configuration can untie.
        """
        names = self.groups.get(parameter, [parameter])
        if len(names) == 1:
            return []
        ends = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        modules = {name: self.model.get_submodule(name.rpartition(".")[0]) for name in names}
        if len(names) > 2 or not all(any(module is end for end in ends) for module in modules.values()):
            raise SvdtuneError(
                f"{parameter!r} is one weight with {', '.join(repr(n) for n in names if n != parameter)}: merging would change "
                "them too. Keep the adapter unmerged"
            )
        return [name for name in names if name != parameter]


def stored_names(model: PreTrainedModel, stored: Collection[str]) -> StoredNames:
    """Match a model's parameters with a checkpoint's names."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return StoredNames(model, stored, {name: names for names in by_id.values() for name in names})
