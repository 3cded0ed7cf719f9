"""Spectra, ranks and factors of many weights: one at a time, with progress, looked up on disk
before they are computed."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from svdtune import processes
from svdtune.cache import cache_dir, trim
from svdtune.errors import SvdtuneError
from svdtune.linalg import Components, Factors, Spectrum, band_factors, band_of, factors_at_threshold, settled_spectrum
from svdtune.linalg import spectrum as decompose
from svdtune.spectra import store
from svdtune.spectra.content import content_key
from svdtune.spectra.devices import CPU, devices_for_work, on_device
from svdtune.system import without_bar

Weights = Mapping[str, Tensor | Callable[[], Tensor]]
Result = TypeVar("Result")
Compute = Callable[[str, Tensor, torch.device], Result]  # of a weight's name, itself, and where to work on it
# Weights in work at once on each GPU, each by operations of its own: batched products may sum in
# another order, and a result would depend on what else is in work.
_AT_ONCE = 4
# Up to this short side a weight keeps one core of a CPU busy, and threads inside a decomposition
# mostly wait for each other.
_ONE_CORE = 1024
# Each worker thread's stream, by device.
_thread = threading.local()


def spectra(
    weights: Weights, *, device: str | None = None, progress: bool | None = None
) -> Iterator[tuple[str, Spectrum]]:
    """Yield (name, whole float64 spectrum) of each weight, in order.

    Args:
        weights: by name, a weight [out, in] or a function that reads it; one is held at a time, a
            few where they are small or on a GPU.
        device: where those that lie on the CPU are decomposed; the fastest there is by default (see
            `svdtune.spectra.devices`). Results lie where their weights do.
        progress: show a bar once this has taken a second; by default where stderr is a terminal.

    Raises:
        SvdtuneError: a weight is not a finite matrix; the message names it.
    """

    def one(name: str, weight: Tensor, where: torch.device) -> Spectrum:
        key = _key(weight)
        found = _load_spectrum(key)
        if found is None or not found.exact or len(found.values) < min(weight.shape):
            found = named(name, lambda: on_device(decompose, weight, where))
            _store_spectrum(key, found)
        return found

    return _each(weights, one, "spectra", device, progress)


def ranks(
    weights: Weights, threshold: float, *, device: str | None = None, progress: bool | None = None
) -> dict[str, int]:
    """The rank at `threshold` of each weight (SARA Algorithm 1), by name, equal to what its float64
    SVD gives.

    Args:
        weights, device, progress: as for `spectra`.
        threshold: θ in (0, 1].

    Raises:
        SvdtuneError: `threshold` outside (0, 1], or a weight is not a finite matrix; the message
            names it.
    """
    return dict(_each(weights, _settling(settled_spectrum, threshold), "ranks", device, progress))


def ranked_factors(
    weights: Weights, threshold: float, *, device: str | None = None, progress: bool | None = None
) -> Iterator[tuple[str, Factors]]:
    """Yield (name, leading factors) of each weight, as many as its rank at `threshold`.

    Args:
        weights, device, progress: as for `spectra`.
        threshold: θ in (0, 1].

    Raises:
        SvdtuneError: `threshold` outside (0, 1], or a weight is not a finite matrix; the message
            names it.
    """
    return _each(weights, _settling(factors_at_threshold, threshold), "factors", device, progress)


def _settling(
    settle: Callable[[Tensor, float, Spectrum | None], tuple[Spectrum, Result]], threshold: float
) -> Compute[Result]:
    """What `settle` gives beside a spectrum, which is looked up before and kept afterwards."""

    def one(name: str, weight: Tensor, where: torch.device) -> Result:
        key = _key(weight)
        known = _load_spectrum(key)
        used, result = named(name, lambda: on_device(lambda there: settle(there, threshold, known), weight, where))
        if used is not known:
            _store_spectrum(key, used)
        return result

    return one


def factors(
    weights: Weights,
    ranks: Mapping[str, int],
    *,
    components: Components = "first",
    exact: bool = False,
    remember: bool = False,
    device: str | None = None,
    progress: bool | None = None,
) -> Iterator[tuple[str, Factors]]:
    """Yield (name, factors) of each weight in `ranks`, in the order of `ranks`: the leading ones,
    or those of another band.

    Args:
        weights, device, progress: as for `spectra`.
        ranks: how many triplets, by name.
        components: which: "first", "middle", "last", or a band (start, stop) of that many.
        exact: in float64, so that they come out the same on every machine; see
            `svdtune.linalg.top_factors`.
        remember: keep the factors in the cache too, r(out + in + 1) fp32 numbers a weight.

    Raises:
        SvdtuneError: a rank without a weight, a rank outside 1 … min(out, in), or a weight that is
            not a finite matrix.
    """
    missing = [name for name in ranks if name not in weights]
    if missing:
        raise SvdtuneError(f"ranks name weights that were not given: {', '.join(missing)}")

    def one(name: str, weight: Tensor, where: torch.device) -> Factors:
        start, stop = band_of(components, ranks[name], min(weight.shape, default=0))

        def found_anew() -> Factors:
            return named(
                name, lambda: on_device(lambda there: band_factors(there, start, stop, exact=exact), weight, where)
            )

        if not remember or cache_dir() is None:
            return found_anew()
        band = str(stop) if start == 0 else f"{start}-{stop}"
        key = f"{content_key(weight)}-{band}{'-exact' if exact else ''}"
        found = store.load("factors", key)
        if found is not None:
            return Factors(*(found[0][part].to(weight.device) for part in Factors._fields))
        result = found_anew()
        store.store("factors", key, result._asdict(), {})
        return result

    return _each({name: weights[name] for name in ranks}, one, "factors", device, progress)


def _each(
    weights: Weights, compute: Compute[Result], what: str, device: str | None, progress: bool | None
) -> Iterator[tuple[str, Result]]:
    """Yield (name, compute(name, weight, where)) in order, reading one weight after the other; trim
    the cache at the end.

    A few weights are worked on at once, each on a thread of its own. On a GPU also on a stream of
    its own: the small steps of one (launches, eigenvalues on a few multiprocessors, hashing on the
    host) hide behind another's. Weights on the CPU go to the GPUs in turn. Where there is none,
    small weights take one core each, and large ones all cores, one after the other. It changes no
    result.
    """
    # of several processes that share standard error, the main one has the bar
    disable = without_bar(progress) or (progress is None and not processes.is_main())
    devices = devices_for_work(device)
    crew, turns = _Crew(_AT_ONCE * len(devices)), cycle(devices)
    try:
        for name, weight in tqdm(weights.items(), desc=f"svdtune {what}", unit="weight", delay=1.0, disable=disable):
            matrix = weight if isinstance(weight, Tensor) else named(name, weight)
            where = next(turns) if matrix.device == CPU else matrix.device
            if where.type == "cuda" or min(matrix.shape, default=0) <= _ONE_CORE:
                crew.begin(name, compute, matrix, where)
                while crew.is_full:
                    yield crew.next()
                continue
            while crew.waiting:
                yield crew.next()
            crew.dismiss()
            yield name, compute(name, matrix, where)
        while crew.waiting:
            yield crew.next()
    finally:
        crew.dismiss()
        trim()


class _Crew:
    """Threads that work on a few weights at once and give the results in the order in which the
    weights came.

    Args:
        on_gpus: how many weights may be in work at once where the first is worked on by a GPU.
    """

    def __init__(self, on_gpus: int) -> None:
        self.waiting: deque[tuple[str, Future[Any]]] = deque()
        self._on_gpus = on_gpus
        self._pool: ThreadPoolExecutor | None = None
        self._size, self._threads = 0, 0
        self._gpus: set[torch.device] = set()

    @property
    def is_full(self) -> bool:
        """Whether a result should be taken before the next weight is read."""
        return len(self.waiting) > self._size

    def begin(self, name: str, compute: Compute[Result], matrix: Tensor, where: torch.device) -> None:
        """Have compute(name, matrix, where) done."""
        on_gpu = where.type == "cuda"
        if on_gpu and where not in self._gpus:
            # torch loads its solver at the first call, which no two threads may do at once.
            torch.linalg.eigh(torch.eye(2, device=where))
            self._gpus.add(where)
        if self._pool is None:
            if on_gpu:
                self._size = self._on_gpus
            else:
                self._size = self._threads = torch.get_num_threads()
                torch.set_num_threads(1)
            self._pool = ThreadPoolExecutor(self._size)
        if on_gpu:
            future = self._pool.submit(_on_own_stream, compute, name, matrix, where, torch.cuda.current_stream(where))
        else:
            future = self._pool.submit(compute, name, matrix, where)
        self.waiting.append((name, future))

    def next(self) -> tuple[str, Result]:
        """The oldest weight's name and result."""
        name, future = self.waiting.popleft()
        return name, future.result()

    def dismiss(self) -> None:
        """Stop what has not begun, and leave threads and memory as they were."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self.waiting.clear()
            self._pool = None
        if self._threads:
            torch.set_num_threads(self._threads)
            self._threads = 0
        if self._gpus:
            # cuBLAS keeps some 32 MiB of workspace for each stream that it ever ran on; ours are
            # done.
            torch._C._cuda_clearCublasWorkspaces()
            self._gpus.clear()


def _on_own_stream(
    compute: Compute[Result], name: str, weight: Tensor, where: torch.device, caller: torch.cuda.Stream
) -> Result:
    """compute(name, weight, where) on this thread's stream, started after what `caller` has queued
    and finished on return."""
    streams = _thread.__dict__.setdefault("streams", {})
    if where not in streams:
        streams[where] = torch.cuda.Stream(where)
    stream = streams[where]
    stream.wait_stream(caller)
    with torch.cuda.device(where), torch.cuda.stream(stream):
        result = compute(name, weight, where)
        stream.synchronize()
    for part in result if isinstance(result, Factors) else ():
        if part.is_cuda:
            # the allocator must not hand its memory out while the caller still reads it
            part.record_stream(caller)
    return result


def named(name: str, compute: Callable[[], Result]) -> Result:
    """compute(); an error's message begins with the weight's name."""
    try:
        return compute()
    except SvdtuneError as error:
        raise SvdtuneError(f"{name}: {error}") from error


def _key(weight: Tensor) -> str | None:
    """The cache key of a weight; None if the cache is off, so that nothing is hashed for
    nothing."""
    return None if cache_dir() is None else content_key(weight)


def _load_spectrum(key: str | None) -> Spectrum | None:
    found = None if key is None else store.load("spectrum", key)
    if found is None:
        return None
    tensors, facts = found
    return Spectrum(tensors["values"], **facts)


def _store_spectrum(key: str | None, spectrum: Spectrum) -> None:
    if key is not None:
        facts = {name: getattr(spectrum, name) for name in ("total", "error", "squared_error", "reference")}
        store.store("spectrum", key, {"values": spectrum.values}, facts)
