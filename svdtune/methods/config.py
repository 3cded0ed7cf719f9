"""The fields that the three methods' configurations share, and their checks."""

import dataclasses
import math
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from peft import PeftConfig

from svdtune._version import __version__
from svdtune.errors import SvdtuneError
from svdtune.linalg import Components
from svdtune.methods.files.card import write_card
from svdtune.methods.files.integrity import (
    ADAPTER_WEIGHTS,
    check_known_layers,
    check_weights_file,
    file_digest,
    has_any,
    holds,
)
from svdtune.methods.settings import WRITTEN
from svdtune.system import read_json


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class SvdConfig(PeftConfig):
    """What SARA, Mo-SARA and SORSA have in common; use a method's own configuration.

    Args:
        r: the rank of every layer. Excludes `threshold`.
        threshold: sets each layer's rank from its own spectrum instead: the least k whose k largest
            singular values sum to this share of all of them (SARA, Algorithm 1).
        rank_pattern: ranks of single layers, as in LoRA: module names or regular expressions →
            rank. Goes before both.
        dropout: probability with which entries of the adapter's input are zeroed during training.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save, bias:
            as in LoRA.
        target_parameters: parameters [experts, out, in] of fused experts to adapt, by their whole
            names or the last parts of them, as in LoRA: ["experts.gate_up_proj"]. Each expert has a
            rank and factors of its own. Without `target_modules` nothing else is adapted. Not for
            Mo-SARA, whose gate looks at tokens.
        init_weights: True decomposes the weights. False fills the factors at random, so that the
            adapter changes the outputs from the start: for tests.
        compact: save without the frozen factors (SORSA's P₀ and V₀, Mo-SARA's U and V) and
            recompute them on loading; see `svdtune.methods.files.compact`. Set it when the adapter
            is made: its factors are then computed in float64.
        fused_slices: what to adapt of projections that hold several matrices in one weight. None:
            the whole weight, as LoRA does. {"c_attn": ["q", "v"]}: these slices of modules of that
            name, each with a rank and factors of its own; for a model that svdtune does not know,
            {"in_proj": {"q": [groups, width, start, stop]}}, see `svdtune.methods.layers.rows`.
            "auto": of every projection known to be fused, the slices that the paper adapts.
        ranks: the resolved rank of every adapted layer by module name. Written by svdtune; loading
            reads ranks from here.
        slices: [groups, width, start, stop] of every adapted slice, by its name; of fused experts
            rows of their matrices under each other. Written by svdtune.
        kernels: groups, shape [in / groups, k, ...], dilation and padding mode of every adapted
            convolution. Written by svdtune.
        initialized: True in a saved adapter's configuration: factors are loaded, nothing is
            decomposed.
        base_fingerprint: of each adapted layer's base weight, by module name. Written by svdtune;
            loading onto another base is refused. {} does not look.
        weights_sha256: of the saved weights file. Written by svdtune; a file that was altered since
            is refused.
        embeddings: whether the weights file holds embeddings that were resized, as PEFT saves them.
            Written by svdtune.
        svdtune_version: that saved the adapter.

    Raises:
        SvdtuneError: a value outside its range, or settings that exclude each other; all of them in
            one message.
    """

    r: int | None = field(default=None, metadata=_help("Rank of every layer; excludes `threshold`."))
    threshold: float | None = field(
        default=None, metadata=_help("Share of the sum of singular values that sets each layer's rank; excludes `r`.")
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata=_help("Module names or regular expressions to the rank of those layers.")
    )
    dropout: float = field(default=0.0, metadata=_help("Dropout on the adapter's input."))
    target_modules: list[str] | str | None = field(
        default=None, metadata=_help("Names or a regular expression of the modules to adapt, or 'all-linear'.")
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata=_help("Names or a regular expression of modules to leave out.")
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata=_help("Indices of the layers to adapt."))
    layers_pattern: list[str] | str | None = field(
        default=None, metadata=_help("Name of the module list that `layers_to_transform` counts in.")
    )
    target_parameters: list[str] | None = field(
        default=None, metadata=_help("Names of fused experts' parameters to adapt, such as experts.gate_up_proj.")
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata=_help("Modules trained and saved whole beside the adapter.")
    )
    bias: str = field(default="none", metadata=_help("Biases to train: 'none', 'all' or '<method>_only'."))
    init_weights: bool = field(
        default=True, metadata=_help("Decompose the weights (True), or fill the factors at random (False, for tests).")
    )
    fused_slices: dict[str, Any] | str | None = field(
        default=None, metadata=_help("Slices of fused projections to adapt: module name to slices, or 'auto'.")
    )
    compact: bool = field(
        default=False, metadata=_help("Save without the frozen factors and recompute them on loading.")
    )
    ranks: dict[str, int] = field(default_factory=dict, metadata=WRITTEN)
    slices: dict[str, list[int]] = field(default_factory=dict, metadata=WRITTEN)
    kernels: dict[str, dict[str, Any]] = field(default_factory=dict, metadata=WRITTEN)
    initialized: bool = field(default=False, metadata=WRITTEN)
    base_fingerprint: dict[str, str] = field(default_factory=dict, metadata=WRITTEN)
    weights_sha256: str | None = field(default=None, metadata=WRITTEN)
    embeddings: bool | None = field(default=None, metadata=WRITTEN)
    svdtune_version: str | None = field(default=None, metadata=WRITTEN)

    method: ClassVar[str]
    # of an instance: digests of some of the tensors that were last read to be saved
    last_taken: ClassVar[Mapping[str, str]] = {}
    embedding_weights: ClassVar[Collection[str]] = ()  # of an instance: their names in the model last saved
    paper_slices: ClassVar[tuple[str, ...] | None] = None  # of a fused projection; None: all
    paper_threshold: ClassVar[float | None] = None  # taken where neither `r` nor `threshold` is given

    def __post_init__(self) -> None:
        if self.r is None and self.threshold is None:
            self.threshold = self.paper_threshold
        super().__post_init__()
        from peft import PeftType  # resolved late: the member exists once the method is registered

        self.peft_type = PeftType(self.method.upper())
        if self.target_modules is not None and _all_of(self.target_modules, str):
            self.target_modules = as_set(self.target_modules)
        if self.exclude_modules is not None and _all_of(self.exclude_modules, str):
            self.exclude_modules = as_set(self.exclude_modules)
        problems = list(self._kinds()) or list(self._problems())
        if problems:
            raise SvdtuneError(f"{type(self).__name__}: " + "; ".join(problems))
        if self.target_parameters and self.target_modules is None:
            self.target_modules = []  # no method's own default beside what was named

    def _kinds(self) -> Iterator[str]:
        """Yield the fields whose values are of a wrong type. PEFT and `re` would find out only
        while they change a model."""
        for name in ("rank_pattern", "ranks", "slices", "kernels", "base_fingerprint"):
            if not isinstance(value := getattr(self, name), Mapping):
                yield f"`{name}` must be a dict by module name; got {value!r:.60}"
            else:
                yield from (f"`{name}`: {key!r} is no name" for key in value if not isinstance(key, str))
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "target_parameters"):
            value = getattr(self, name)
            if isinstance(value, str) and name not in ("modules_to_save", "target_parameters"):
                yield from _no_expression(name, value)
            elif value is not None and not _all_of(value, str):
                yield f"`{name}` must be a list of names; got {value!r:.60}"
        if not (
            self.layers_to_transform is None
            or _all_of(self.layers_to_transform, int)
            or _is_int(self.layers_to_transform)
        ):
            yield f"`layers_to_transform` must be an index or a list of indices; got {self.layers_to_transform!r:.60}"
        for name in self.rank_pattern if isinstance(self.rank_pattern, Mapping) else ():
            yield from _no_expression(f"rank_pattern[{name!r}]", name)

    def _problems(self) -> Iterator[str]:
        """Yield what is wrong with the values, a sentence each; methods add their own."""
        if self.r is not None and self.threshold is not None:
            yield f"`r` ({self.r}) and `threshold` ({self.threshold}) both set the ranks; give one of them"
        for name, rank in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
                yield f"`{name}` must be a whole number of at least 1; got {rank!r}"
        if self.threshold is not None and not is_number_in(self.threshold, 0, 1, low_open=True):
            yield f"`threshold` must lie in (0, 1], the share of the sum of singular values; got {self.threshold!r}"
        if not is_number_in(self.dropout, 0, 1, high_open=True):
            yield f"`dropout` must lie in [0, 1); got {self.dropout!r}"
        if self.bias not in ("none", "all", f"{self.method}_only"):
            yield f"`bias` must be 'none', 'all' or '{self.method}_only'; got {self.bias!r}"
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            if self.layers_to_transform is not None:
                yield "`layers_to_transform` cannot be used when `target_modules` is a regular expression"
            if self.layers_pattern is not None:
                yield "`layers_pattern` cannot be used when `target_modules` is a regular expression"
        if self.compact and not self.init_weights:
            yield "`compact` needs `init_weights=True`: factors filled at random cannot be recomputed"
        yield from self._problems_with_slices()
        if self.target_parameters and self.dropout > 0:
            yield (
                "`dropout` is on the input of layers, and `target_parameters` changes weights, for which no input is known; "
                "leave one of them out"
            )
        if self.target_parameters and self.layers_to_transform is not None:
            yield (
                "`layers_to_transform` chooses among `target_modules` alone; write out the parameters that `target_parameters` "
                "is to take, as model.layers.0.mlp.experts.gate_up_proj"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            yield "`layers_pattern` needs `layers_to_transform`, the indices it counts"

    def _problems_with_slices(self) -> Iterator[str]:
        asked = self.fused_slices
        if asked is None or asked == "auto":
            return
        if not isinstance(asked, Mapping) or not all(isinstance(parts, Collection) for parts in asked.values()):
            yield f"`fused_slices` must be 'auto' or a dict of module names to lists of slices; got {asked!r}"
            return
        for name, parts in asked.items():
            if isinstance(parts, str) or not parts or not all(str(part).isidentifier() for part in parts):
                yield f"`fused_slices[{name!r}]` must list slices by name, such as ['q', 'v']; got {parts!r}"
            elif isinstance(parts, Mapping) and not all(_is_rows(rows) for rows in parts.values()):
                yield f"`fused_slices[{name!r}]` must give [groups, width, start, stop] for each slice; got {parts!r}"

    def check_layer(self, name: str, layer: Any) -> None:
        """Raise `SvdtuneError` for a layer that these settings cannot work with, adapted already or
        not. Every layer is checked before any is changed."""

    def module_of(self, layer: str) -> str:
        """The base model's module that an adapted layer belongs to: itself, or for a slice the
        fused projection."""
        return layer.rpartition(".")[0] if layer in self.slices else layer

    @property
    def needs_factors(self) -> bool:
        """Whether an adapter starts from the singular vectors of the weights. Their number alone
        needs no vectors."""
        return self.init_weights

    @property
    def triplets(self) -> Components:
        """Which singular triplets those are."""
        return "first"

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json beside the weights, and the model card.

        The file says that the weights exist; this configuration can start anew.
        """
        weights = Path(save_directory) / ADAPTER_WEIGHTS
        # Transformers' own save_pretrained writes the configuration before the weights: then the
        # file there is an older one.
        digest = file_digest(weights) if weights.is_file() and holds(weights, self.last_taken) else None
        saved = dataclasses.replace(
            self,
            initialized=True,
            weights_sha256=digest,
            embeddings=None if digest is None else has_any(weights, self.embedding_weights),
            svdtune_version=__version__,
        )
        PeftConfig.save_pretrained(saved, save_directory, **kwargs)
        if digest is not None:
            write_card(Path(save_directory), saved, weights)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Self:
        """As PEFT's. It also checks that the weights beside the file are whole, before any model is
        touched.

        Raises:
            SvdtuneError: the adapter's files are damaged, or a later version of svdtune wrote them.
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        for warning in caught:
            if str(warning.message).startswith("Unexpected keyword arguments"):
                by = getattr(config, "svdtune_version", None) or "another version"
                raise SvdtuneError(
                    f"{pretrained_model_name_or_path}: the configuration has settings that this svdtune {__version__} does not "
                    f"know ({str(warning.message).split(' for class')[0].removeprefix('Unexpected keyword arguments ')}); "
                    f"it was saved by svdtune {by}. Upgrade svdtune, or remove them if they are a mistake"
                )
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if isinstance(config, SvdConfig):
            check_known_layers(config.base_fingerprint, config.ranks)
            if folder.is_dir():
                check_weights_file(folder, config.weights_sha256)
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **_: Any) -> dict[str, Any]:
        """The settings in a configuration's file. PEFT takes the last of two equal keys; here they
        are refused.

        Raises:
            SvdtuneError: a key stands there twice, or the file is damaged.
        """
        return {key: value for key, value in read_json(Path(path_json_file)).items() if key != "runtime_config"}


def _no_expression(name: str, text: Any) -> list[str]:
    """A one-sentence list if a text is no regular expression; empty if it is one. Every name is
    one."""
    try:
        re.compile(text)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        return [f"`{name}` must be a name or a regular expression; got {text!r:.60}: {error}"]
    return []


def _all_of(values: Any, kind: type) -> bool:
    listed = isinstance(values, Collection) and not isinstance(values, str | bytes | Mapping)
    return listed and all(isinstance(value, kind) for value in values)


def as_set(names: Iterable[str]) -> list[str]:
    """A set of names for a field that PEFT annotates as a list and keeps as a set."""
    return cast(list[str], set(names))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rows(rows: Any) -> bool:
    return isinstance(rows, list | tuple) and len(rows) == 4 and all(isinstance(n, int) and n >= 0 for n in rows)


def is_number_in(value: Any, low: float, high: float, low_open: bool = False, high_open: bool = False) -> bool:
    """Whether `value` is a finite number in the interval, closed unless said otherwise. A bool is
    no number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -math.inf < value < math.inf:
        return False
    return (value > low if low_open else value >= low) and (value < high if high_open else value <= high)


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> list[str]:
    """A one-sentence list if `value` is not among `choices`; empty if it is."""
    if value in choices:
        return []
    return [f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}"]
