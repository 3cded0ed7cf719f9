"""Scores of runs, adapters and models."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from torch import nn

from svdtune.api.inputs import answering

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from svdtune.evaluation.sets import Evaluations
    from svdtune.models import LoadedModel


class DecodingOptions(TypedDict, total=False):
    """How completions are drawn; see `svdtune.evaluation.Decoding`."""

    samples: int
    temperature: float
    top_p: float
    seed: int
    beams: int
    length_penalty: float
    no_repeat_ngram_size: int
    stop_loops: bool


def evaluate(
    source: "str | Path | nn.Module | LoadedModel",
    data: str | Path | None = None,
    *,
    task: str | None = None,
    adapter: str | Path | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    split: str | None = None,
    config: str | None = None,
    limit: int | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    template: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    engine: str = "transformers",
    dtype: str | None = None,
    device: str | None = None,
    output: str | Path | None = None,
    restart: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    **decoding: Unpack[DecodingOptions],
) -> "Evaluations":
    """Score a run, an adapter or a model on held-out items.

    Every prediction is on disk as soon as it is made: after an interruption the same call goes on
    where it stopped, and after a finished one it generates nothing.

    Args:
        source: a run, adapter or model folder, a hub name, or a loaded model with its `tokenizer`.
        data: a file, a generator, a hub data set, or a set or group of the papers; by default the
            sets of the run's evaluation section, or its data.eval.
        task: how to grade ("number", "letter", "choice", "exact", ...), or "lm-eval:NAME,...".
        adapter: an adapter folder to put on a model.
        tokenizer: of a loaded model.
        split, config: of a generator or hub data set.
        limit: take only the first items.
        prompt: field to ask, or a text with {fields}.
        answer: field to grade against.
        template: "plain", "chat", or a text with {prompt}.
        max_new_tokens: length limit of a completion.
        batch_size: completions generated together.
        engine: "transformers" or "vllm".
        dtype, device: of the model; as the run's evaluation section says, else as it was trained,
            and a GPU where there is one.
        output: folder for predictions and results; by default the run's own, or runs/evaluations.
        restart: drop earlier predictions there.
        on_progress: called with (completions done, completions in all), for each set.
        **decoding: how completions are drawn: samples, temperature, top_p, seed, beams,
            length_penalty, no_repeat_ngram_size, stop_loops; greedy, or as the run's recipe
            decodes.

    Returns:
        The outcomes by data set, each with `n`, `strict` and `paper` (`correct`, `accuracy` from 0
        to 1, its 95 % `interval`), `metrics`, `unended`, `seconds`, `settings` and `folder`; over
        all of them `accuracy` and `averages`.

    Raises:
        SvdtuneError: what is asked for is not there, or a setting has no meaning.
        TypeError: an argument that there is not.
    """
    from svdtune.evaluation.sets import evaluate_source

    if unknown := decoding.keys() - DecodingOptions.__annotations__.keys():
        raise TypeError(f"evaluate() got an unexpected keyword argument {min(unknown)!r}")
    form = {"split": split, "config": config, "limit": limit, "prompt": prompt, "answer": answer, "template": template}
    return evaluate_source(
        *answering("evaluate", source, adapter, tokenizer),
        None if data is None else str(data),
        task=task,
        form=form | {"max_new_tokens": max_new_tokens},
        decoding=decoding,
        batch_size=batch_size,
        engine=engine,
        dtype=dtype,
        device=device,
        output=None if output is None else Path(output),
        restart=restart,
        watch=lambda *_: nullcontext(on_progress),
    )
