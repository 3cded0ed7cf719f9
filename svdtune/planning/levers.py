"""The cheapest setting that fits. Levers save memory; the dearest are pulled only if nothing fits
without them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from svdtune.planning.anatomy import Anatomy
from svdtune.planning.memory import QUANTIZED, SHARDED, Memory, Setting, estimate

# The part of a device's memory for CUDA's context, NCCL's buffers and fragmentation.
RESERVE = 0.08
# By lever, what it sets; in order of price. Smaller batches and checkpointing cost time alone.
# Sharding costs communication, offloading waits for the host, and 4 bits change the base model
# itself.
LEVERS = {
    "batch": "batch_size",
    "checkpointing": "gradient_checkpointing",
    "strategy": "strategy",
    "offload": "offload",
    "4-bit": "dtype",
}
_STRONGER = {"ddp": ("ddp", "zero2", "fsdp2"), "zero2": ("zero2", "zero3"), "fsdp2": ("fsdp2",), "zero3": ("zero3",)}
_MOST_DEVICES = 4096
_GIB = 2**30


@dataclass(frozen=True)
class Choice:
    """The setting chosen.

    Attributes:
        setting: the global batch is the one that was asked for, by accumulation.
        memory: on each device.
        why: by lever that is pulled, what it is for.
    """

    setting: Setting
    memory: Memory
    why: dict[str, str]


def fits(memory: Memory, capacity: float) -> bool:
    """Whether it fits into a device of `capacity` bytes with `RESERVE` to spare."""
    return memory.total <= (1 - RESERVE) * capacity


def cheapest(sizes: Anatomy, asked: Setting, capacity: float) -> Choice | None:
    """The cheapest setting that fits; None if none does.

    The search starts from the batch, length, strategy and dtype that were asked for, without
    offloading.

    Args:
        sizes: of a plan and its model.
        asked: what to start from.
        capacity: bytes of a device.
    """
    for setting in _settings(asked):
        memory = estimate(sizes, setting)
        if fits(memory, capacity):
            return Choice(setting, memory, _reasons(sizes, asked, setting, capacity))
    return None


def least(sizes: Anatomy, asked: Setting) -> tuple[Setting, Memory]:
    """The setting that takes the least memory on a device, whatever it costs."""
    found = ((setting, estimate(sizes, setting)) for setting in _settings(asked))
    return min(found, key=lambda pair: pair[1].total)


def devices_needed(sizes: Anatomy, asked: Setting, capacity: float) -> int | None:
    """The least power of two of devices, above the number asked for, that needs neither offloading
    nor 4 bits; None if none suffices."""
    devices = 1
    while devices <= _MOST_DEVICES:
        choice = cheapest(sizes, replace(asked, devices=devices), capacity) if devices > asked.devices else None
        if choice and not choice.setting.offload and choice.setting.dtype == asked.dtype:
            return devices
        devices *= 2
    return None


def _settings(asked: Setting) -> Iterator[Setting]:
    """Every setting of the levers, the cheapest first."""
    batches = _batches(asked.batch_size)
    for dtype in dict.fromkeys((asked.dtype, asked.dtype if asked.dtype in QUANTIZED else "int4")):
        for offload in (False, True):
            for strategy in _STRONGER[asked.strategy]:
                if (offload and strategy == "ddp") or (
                    asked.devices == 1 and strategy != asked.strategy and not offload
                ):
                    continue
                pairs = [(batch, again) for again in (False, True) for batch in batches]
                if strategy in SHARDED:  # each batch gathers the weights anew, which costs more than to compute again
                    pairs.sort(key=lambda pair: -pair[0])
                for batch, again in pairs:
                    yield replace(
                        asked,
                        strategy=strategy,
                        batch_size=batch,
                        accumulation=asked.accumulation * asked.batch_size // batch,
                        gradient_checkpointing=again,
                        offload=offload,
                        dtype=dtype,
                    )


def _batches(size: int) -> list[int]:
    """Batch sizes that gradient accumulation can make up for: the batch halved as long as it is
    even, then 1."""
    found = [size]
    while found[-1] % 2 == 0:
        found.append(found[-1] // 2)
    return found if found[-1] == 1 else [*found, 1]


def _reasons(sizes: Anatomy, asked: Setting, chosen: Setting, capacity: float) -> dict[str, str]:
    """For each pulled lever the memory that is needed without it, however far cheaper ones are
    pulled."""
    why = {}
    start, fields = next(_settings(asked)), list(LEVERS.values())
    for place, (lever, field) in enumerate(LEVERS.items()):
        if getattr(chosen, field) == getattr(start, field):
            continue
        kept = fields[:2] if place < 2 else []  # the batch and checkpointing are of one price
        kept = [other for other in (*kept, *fields[max(place, 1) + 1 :]) if other != field]
        without = [
            estimate(sizes, setting).total / _GIB
            for setting in _settings(asked)
            if getattr(setting, field) == getattr(start, field)
            and all(getattr(setting, other) == getattr(chosen, other) for other in kept)
        ]
        usable = (1 - RESERVE) * capacity / _GIB
        why[lever] = (
            f"without it {min(without):.1f} GiB at least, of {usable:.1f} GiB to use"
            if without
            else "offloading needs it"
        )
    return why
