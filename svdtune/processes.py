"""The processes of a distributed run: how many there are, what they tell each other, and what they
must agree on.

In a run of one process everything here does nothing and costs nothing. Messages go through
torch.distributed's default group, over the host or the GPU as its backend asks.
"""

import datetime
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from svdtune.errors import SvdtuneError

Result = TypeVar("Result")
_HOST = torch.device("cpu")
# What launchers tell a process beside WORLD_SIZE.
_PLACE = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What gloo says of a connection that is gone, in a plain RuntimeError.
_LOST = "gloo|Connection (closed|reset|refused)|Timed out waiting|Broken pipe"


def count() -> int:
    """How many processes there are; 1 where torch.distributed has not been started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def index() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """Whether this process looks after files and prints: the first, also before torch.distributed
    has been started."""
    return index() == 0 if count() > 1 else launched() == 1 or os.environ.get("RANK", "0") == "0"


def launched() -> int:
    """How many processes the launcher started; 1 where there was none. Schedulers set RANK for runs
    of one process too."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def under_deepspeed() -> bool:
    """Whether Accelerate was started with DeepSpeed, whose configuration then says in what to
    compute."""
    return _says_yes("ACCELERATE_USE_DEEPSPEED")


def under_fsdp() -> bool:
    """Whether Accelerate was started with FSDP."""
    return _says_yes("ACCELERATE_USE_FSDP")


def main_alone_loads() -> bool:
    """Whether the first process of a host alone loads the model: FSDP's RAM-efficient loading."""
    return count() > 1 and under_fsdp() and _says_yes("FSDP_CPU_RAM_EFFICIENT_LOADING")


def _says_yes(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("1", "true", "yes", "on", "y", "t")


def device(near: torch.device = _HOST) -> torch.device:
    """Where tensors must lie to be sent: on `near`'s kind of device if the default group can, else
    where it can."""
    if count() == 1:
        return near
    able = dist.get_backend_config(dist.group.WORLD)
    kind = near.type if f"{near.type}:" in able else "cpu" if "cpu:" in able else None
    if kind == "cpu":
        return _HOST
    return accelerator()


def accelerator() -> torch.device:
    """The accelerator that this process uses; there is one."""
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return torch.device(kind.type, torch.accelerator.current_device_index())


def gather(value: Any) -> list[Any]:
    """Every process's value, by index, in every process. Values are pickled: small ones."""
    if count() == 1:
        return [value]
    values = [None] * count()
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """The main process's value in every process. Values are pickled: small ones."""
    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def jointly(work: Callable[[], Result]) -> Result:
    """work() in every process. Where it fails in one, it fails in all, so that none waits for a
    process that is gone.

    Raises:
        SvdtuneError: with `everywhere` set where every process raises it; what else work() raised
            goes on in its process.
    """
    if count() == 1:
        return work()
    result: Result | None = None
    caught: Exception | None = None
    try:
        result = work()
    except Exception as error:  # whatever it is, the others must hear of it
        caught = error
    told = gather(None if caught is None else _sentence(caught))
    failed = {number: sentence for number, sentence in enumerate(told) if sentence is not None}
    if not failed:
        return cast(Result, result)  # work() came to its end here too
    if caught is not None and not isinstance(caught, SvdtuneError):
        raise caught
    number, sentence = next(iter(failed.items()))
    alike = len(failed) == count() and len(set(failed.values())) == 1
    raise everywhere(sentence if alike else f"process {number} of {count()}: {sentence}") from caught


def everywhere(message: str) -> SvdtuneError:
    """An error that every process raises, of which the main process tells."""
    error = SvdtuneError(message)
    error.everywhere = True
    return error


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, SvdtuneError) else f"{type(error).__name__}: {str(error)[:300]}"


def agree(facts: Mapping[str, Any], advice: str) -> None:
    """Make sure that every process has the same facts.

    Args:
        facts: by what they are called in the message, values that JSON can hold (sets too).
        advice: what to do, the end of the message.

    Raises:
        SvdtuneError: in every process, naming the processes that differ from most.
    """
    if count() == 1:
        return
    own = {what: _digest(value) for what, value in facts.items()}
    told = gather(own)
    for what in own:
        digests = [other[what] for other in told]
        usual, _ = Counter(digests).most_common(1)[0]
        if odd := [str(number) for number, digest in enumerate(digests) if digest != usual]:
            named = f"process {odd[0]} differs" if len(odd) == 1 else f"processes {', '.join(odd)} differ"
            raise everywhere(
                f"the {count()} processes disagree on {what}: {named} from the {'others' if count() > 2 else 'first'}. "
                f"{advice}"
            )


class Question:
    """Whether any process says yes, asked without waiting. All must ask.

    Args:
        own: what this process says.
    """

    def __init__(self, own: bool):
        self._votes = torch.tensor([int(own)])
        self._work = dist.all_reduce(self._votes, dist.ReduceOp.MAX, _host_group(), async_op=True)

    def answer(self) -> bool:
        """Whether any process said yes; waits until all have been asked."""
        self._work.wait()
        return bool(self._votes)


_host_groups: dict[Any, Any] = {}


def _host_group() -> Any:
    """A group that talks over the host's network, so that no GPU is waited for."""
    world = dist.group.WORLD
    if world not in _host_groups:
        _host_groups.clear()
        _host_groups[world] = dist.new_group(backend="gloo")
    return _host_groups[world]


def start(on_cpu: bool, timeout: datetime.timedelta) -> bool:
    """Join the processes that torchrun or Accelerate started; whether that was still to be done.

    Both the host and the GPUs get a backend: control messages and parameters that are offloaded
    travel over the host.

    Raises:
        SvdtuneError: the launcher did not say all that a process must know. Without LOCAL_RANK
            Accelerate would take each process for one that runs alone.
    """
    if launched() == 1 or dist.is_initialized():
        return False
    if missing := [name for name in _PLACE if name not in os.environ]:
        raise SvdtuneError(
            f"WORLD_SIZE is {launched()}, which says that this is one of several processes, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set; start the run with torchrun or accelerate launch, which set all "
            "of them, or unset WORLD_SIZE to run alone"
        )
    backend = "gloo"
    if not on_cpu:
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
        backend = f"cpu:gloo,{kind.type}:{dist.get_default_backend_for_device(kind.type)}"
    dist.init_process_group(backend, timeout=timeout)
    return True


def stop() -> None:
    """Leave the other processes."""
    _host_groups.clear()
    dist.destroy_process_group()


@contextmanager
def explain_loss(advice: str) -> Iterator[None]:
    """Turn what torch.distributed says of a process that ended, or does not answer, into one
    sentence.

    Raises:
        SvdtuneError: with `advice` as the end of the message.
    """
    try:
        yield
    except RuntimeError as error:
        if count() == 1 or not (isinstance(error, dist.DistError) or re.search(_LOST, str(error))):
            raise
        raise everywhere(
            f"another of the {count()} processes ended or did not answer in time; the launcher's report says which. {advice}"
        ) from error


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=lambda other: sorted(map(str, other)))
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def same_draws() -> Iterator[None]:
    """Draw the main process's random numbers (torch's, on the CPU) in every process.

    Afterwards a process that was in another state is in it again.
    """
    if count() == 1:
        yield
        return
    own = torch.get_rng_state()
    first = from_main(own)
    torch.set_rng_state(first)
    try:
        yield
    finally:
        if not torch.equal(own, first):
            torch.set_rng_state(own)
