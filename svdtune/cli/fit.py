"""What `svdtune plan` says of memory and of devices."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from svdtune.errors import SvdtuneError


def setting_of(
    strategy: str | None,
    devices: int,
    memory: float | None,
    quantize: str | None,
    recipe: Any,
    model: Any,
    **given: Any,
) -> Any:
    """The `Setting` of the options; several devices run DDP where no strategy is named.

    Args:
        strategy, devices, memory, quantize: options.
        recipe: says what the options leave open; None where there is none.
        model: whose stored dtype a recipe's "auto" is.
        given: the other options, None where they are left open.

    Raises:
        SvdtuneError: an option without meaning.
    """
    from svdtune.planning import Setting

    if quantize not in (None, "4bit", "8bit"):
        raise SvdtuneError(f"--quantize takes 4bit or 8bit; got {quantize!r}")
    if memory is not None and not 0 < memory < 1e6:
        raise SvdtuneError(f"--memory is the GiB of one device, such as 80; got {memory}")
    left = _of_recipe(recipe, model) if recipe is not None else {}
    settings = left | {name: value for name, value in given.items() if value is not None}
    if quantize is not None:
        settings["dtype"] = {"4bit": "int4", "8bit": "int8"}[quantize]
    _check_optimizer(settings.get("optimizer"))
    return Setting(strategy=strategy or "ddp", devices=devices, **settings)


def _check_optimizer(name: str | None) -> None:
    from transformers.training_args import OptimizerNames

    if name is not None and name not in [known.value for known in OptimizerNames]:
        raise SvdtuneError(
            f"Transformers knows no optimizer {name!r}; --optimizer and training.optimizer take one of its OptimizerNames, "
            "such as adamw_torch or adamw_bnb_8bit"
        )


def _of_recipe(recipe: Any, model: Any) -> dict[str, Any]:
    stored = str(model.config.dtype or "float32").removeprefix("torch.")
    return {
        "batch_size": recipe.training.batch_size,
        "length": recipe.data.max_length,
        "accumulation": recipe.training.gradient_accumulation,
        "gradient_checkpointing": recipe.training.gradient_checkpointing,
        "dtype": stored if recipe.model.dtype == "auto" else recipe.model.dtype,
        "optimizer": recipe.training.optimizer,
    }


class Fitting:
    """The estimates for one setting, and the cheapest that fits."""

    def __init__(self, made: Any, model: Any, setting: Any, capacity_gib: float | None) -> None:
        from svdtune.methods.config import SvdConfig
        from svdtune.planning import anatomy, cheapest, estimate, initialisation_bytes

        self.setting = setting
        self.capacity = None if capacity_gib is None else capacity_gib * 2**30
        self.sizes = anatomy(made, model)
        self.memory = estimate(self.sizes, setting)
        ours = isinstance(made.config, SvdConfig)
        self.initialisation = initialisation_bytes(made, model) if ours else None
        self.choice = None if self.capacity is None else cheapest(self.sizes, setting, self.capacity)

    def lines(self) -> Iterator[str]:
        """What is printed, a line each."""
        parts = ", ".join(f"{name} {size_text(size)}" for name, size in self.memory.parts.items() if size)
        on = "" if self.setting.devices == 1 else " on each device"
        yield f"memory{on}, about {size_text(self.memory.total)} with {setting_text(self.setting)}: {parts}"
        if self.memory.host:
            host = self.memory.host * self.setting.devices
            yield f"memory of the host, about {size_text(host)} for {self.setting.devices} devices"
        if self.initialisation is not None:
            yield f"initialisation layer by layer (svdtune init), at most {size_text(self.initialisation)} of host memory"
        if self.capacity is not None:
            yield from self._verdict(self.capacity)
        yield from (f"note: {note}" for note in self._notes())

    def _verdict(self, capacity: float) -> Iterator[str]:
        from svdtune.planning import devices_needed, fits, least
        from svdtune.planning.levers import RESERVE

        given = f"{size_text(capacity)} ({RESERVE:.0%} of it kept free)"
        fit = fits(self.memory, capacity)
        yield f"fits into {given}" if fit else f"does not fit into {given}"
        if self.choice is None:
            setting, memory = least(self.sizes, self.setting)
            yield f"nothing does: {setting_text(setting)} still takes {size_text(memory.total)}"
        elif self.choice.setting == self.setting:
            yield "no cheaper setting is needed"
        else:
            yield f"the cheapest that fits: {setting_text(self.choice.setting)}; {size_text(self.choice.memory.total)}"
            yield from (f"  {lever}: {why}" for lever, why in self.choice.why.items())
        if self.choice is None or {"offload", "4-bit"} & set(self.choice.why):
            needed = devices_needed(self.sizes, self.setting, capacity)
            yield (
                f"without offloading and 4 bits: {needed} devices"
                if needed
                else "without offloading and 4 bits it fits on no number of devices"
            )

    def _notes(self) -> Iterator[str]:
        from svdtune.planning.memory import MEASURED, MOMENTS

        if self.sizes.method not in MEASURED:
            yield f"{self.sizes.method} was not measured; its memory is counted as LoRA's"
        if self.setting.optimizer not in MOMENTS:
            yield f"what {self.setting.optimizer} keeps for a number is not known; AdamW's 8 bytes are counted"

    def to_json(self) -> dict[str, Any]:
        """The sections that `svdtune plan --json` adds to a plan's own."""
        found = _as_json(self.setting, self.memory) | {"initialisation_memory": self.initialisation}
        if self.capacity is not None:
            from svdtune.planning import fits

            found["fits"] = fits(self.memory, self.capacity)
            choice = self.choice
            found["cheapest"] = choice and _as_json(choice.setting, choice.memory) | {"why": choice.why}
        return found


def _as_json(setting: Any, memory: Any) -> dict[str, Any]:
    parts = memory.parts | {"total": memory.total}
    return {"setting": asdict(setting), "memory": parts, "host_memory": memory.host}


def setting_text(setting: Any) -> str:
    """A setting in words."""
    words = [f"{setting.batch_size} × {setting.length} tokens"]
    if setting.accumulation > 1:
        words[0] += f" accumulated over {setting.accumulation}"
    if setting.devices > 1 or setting.strategy != "ddp":
        words.append(f"{setting.strategy} on {setting.devices} device{'s' if setting.devices > 1 else ''}")
    words.append(setting.dtype)
    words += [setting.optimizer] * (setting.optimizer != "adamw_torch")
    words += ["gradient checkpointing"] * setting.gradient_checkpointing + ["offload"] * setting.offload
    return ", ".join(words)


def size_text(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
