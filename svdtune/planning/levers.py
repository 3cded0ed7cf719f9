"""The cheapest setting that fits. Levers save memory; the dearest are pulled only if nothing fits
without them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from svdtune.planning.anatomy import Anatomy
from svdtune.planning.memory import QUANTIZED, Memory, Setting, estimate
from svdtune.planning.speed import LINK, StepTime, step_time

# The part of a device's memory for CUDA's context, NCCL's buffers and fragmentation.
RESERVE = 0.08
# In order of price. Smaller batches and checkpointing cost time alone, so of these two the estimate
# of a step's time decides. Sharding costs communication, offloading waits for the host, and 4 bits
# change the base model itself.
LEVERS = ("batch", "checkpointing", "strategy", "offload", "4-bit")
_STRONGER = {"ddp": ("ddp", "zero2", "fsdp2"), "zero2": ("zero2", "zero3"), "fsdp2": ("fsdp2",), "zero3": ("zero3",)}
_MOST_DEVICES = 4096
_GIB = 2**30


@dataclass(frozen=True)
class Trial:
    """A setting with its estimates. `pulled` says how far each lever is pulled, in the order of
    `LEVERS`."""

    pulled: tuple[int, ...]
    setting: Setting
    memory: Memory
    time: StepTime


@dataclass(frozen=True)
class Choice:
    """The setting chosen.

    Attributes:
        setting: the global batch is the one that was asked for, by accumulation.
        memory: on each device.
        time: of a step.
        why: by lever that is pulled, what it is for.
    """

    setting: Setting
    memory: Memory
    time: StepTime
    why: dict[str, str]


def fits(memory: Memory, capacity: float) -> bool:
    """Whether it fits into a device of `capacity` bytes with `RESERVE` to spare."""
    return memory.total <= (1 - RESERVE) * capacity


def cheapest(sizes: Anatomy, asked: Setting, capacity: float, *, link: float = LINK) -> Choice | None:
    """The cheapest setting that fits; None if none does.

    The last three of `LEVERS` are pulled only if nothing fits without them, the cheaper ones first.
    Then the batch and checkpointing are chosen for the shortest step, with no communication hidden.
    The search starts from the batch, length, strategy and dtype that were asked for, without
    offloading.

    Args:
        sizes: of a plan and its model.
        asked: what to start from.
        capacity: bytes of a device.
        link: bytes a second that a device receives from the others.
    """
    tried: list[Trial] = []
    for tier in _tiers(sizes, asked, link):
        fitting = [trial for trial in tier if fits(trial.memory, capacity)]
        if fitting:
            best = min(fitting, key=lambda trial: (trial.time.high, trial.pulled))
            return Choice(best.setting, best.memory, best.time, _reasons(best, tried, tier, capacity))
        tried += tier
    return None


def least(sizes: Anatomy, asked: Setting) -> tuple[Setting, Memory]:
    """The setting that takes the least memory on a device, whatever it costs."""
    trials = [trial for tier in _tiers(sizes, asked, LINK) for trial in tier]
    best = min(trials, key=lambda trial: trial.memory.total)
    return best.setting, best.memory


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


def _tiers(sizes: Anatomy, asked: Setting, link: float) -> Iterator[list[Trial]]:
    """The trials grouped by how far the last three levers are pulled, cheapest first."""
    dtypes = (asked.dtype,) if asked.dtype in QUANTIZED else (asked.dtype, "int4")
    for d, dtype in enumerate(dtypes):
        for offload in (False, True):
            for s, strategy in enumerate(_STRONGER[asked.strategy]):
                idle = asked.devices == 1 and strategy != asked.strategy and not offload
                if idle or (offload and strategy == "ddp"):
                    continue
                tier = []
                for checkpointing in (False, True):
                    for b, batch in enumerate(_batches(asked.batch_size)):
                        setting = replace(
                            asked,
                            strategy=strategy,
                            batch_size=batch,
                            accumulation=asked.accumulation * asked.batch_size // batch,
                            gradient_checkpointing=checkpointing,
                            offload=offload,
                            dtype=dtype,
                        )
                        pulled = (b, int(checkpointing), s, int(offload), d)
                        times = step_time(sizes, setting, link=link)
                        tier.append(Trial(pulled, setting, estimate(sizes, setting), times))
                yield tier


def _batches(size: int) -> list[int]:
    """Batch sizes that gradient accumulation can make up for: the batch halved as long as it is
    even, then 1."""
    found = [size]
    while found[-1] % 2 == 0:
        found.append(found[-1] // 2)
    return found if found[-1] == 1 else [*found, 1]


def _reasons(best: Trial, before: list[Trial], tier: list[Trial], capacity: float) -> dict[str, str]:
    """For each pulled lever the reason: the time of a step without it, or the memory that it would
    need if that does not fit."""
    why = {}
    for place, lever in enumerate(LEVERS):
        if not best.pulled[place]:
            continue
        dearer = slice(max(place, 1) + 1, None)  # the batch and checkpointing are of one price
        without = [
            trial
            for trial in (*before, *tier)
            if trial.pulled[place] == 0 and trial.pulled[dearer] == best.pulled[dearer]
        ]
        fitting = [trial.time.high for trial in without if fits(trial.memory, capacity)]
        if fitting:
            why[lever] = f"without it a step may take {min(fitting):.3g} s instead of {best.time.high:.3g} s"
        elif not without:
            why[lever] = "offloading needs it"
        else:
            needed = min(trial.memory.total for trial in without) / _GIB
            why[lever] = f"without it {needed:.1f} GiB at least, of {(1 - RESERVE) * capacity / _GIB:.1f} GiB to use"
    return why
