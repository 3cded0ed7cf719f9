"""The task catalogue of EleutherAI's lm-evaluation-harness (`lm-eval`), run on a model with its
adapter."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdtune.errors import SvdtuneError
from svdtune.evaluation.tasks import HARNESSES
from svdtune.models import LoadedModel
from svdtune.system import needs, write_text

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM


def harness_model(loaded: LoadedModel, batch_size: int | str = 16, **options: Any) -> "HFLM":
    """Wrap a loaded model, with or without an adapter on it, as the harness's `HFLM`.

    Args:
        loaded: Model and tokenizer, as `svdtune.export.open_source` gives them.
        batch_size: Requests computed together, or "auto".
        **options: Passed on to `HFLM`, such as `max_length`.

    Raises:
        SvdtuneError: If lm-eval is not installed.
    """
    lm_eval = _import_harness()
    from lm_eval.models.huggingface import HFLM

    quiet = logging.getLogger(lm_eval.__name__)
    level = quiet.level
    # it warns that a model object takes no loading options: none are meant
    quiet.setLevel(logging.ERROR)
    try:
        return HFLM(
            pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal", batch_size=batch_size, **options
        )
    finally:
        quiet.setLevel(level)


def run_harness(
    loaded: LoadedModel,
    tasks: Sequence[str | dict[str, Any]],
    output: Path,
    *,
    batch_size: int | str = 16,
    limit: int | None = None,
    **options: Any,
) -> str:
    """Run tasks of the harness and keep everything it reports.

    Args:
        loaded: Model and tokenizer.
        tasks: Names from `lm_eval --tasks list`, or task configurations.
        output: Folder for `results.json`.
        batch_size: Requests computed together, or "auto".
        limit: Items of each task; None for all.
        **options: Passed on to `lm_eval.simple_evaluate`, such as `num_fewshot`.

    Returns:
        The harness's own table of scores and their standard errors.

    Raises:
        SvdtuneError: If lm-eval is not installed, does not know a task, or cannot get its data.
    """
    lm_eval = _import_harness()
    from lm_eval.utils import make_table

    model = harness_model(loaded, batch_size)
    try:
        results = lm_eval.simple_evaluate(model=model, tasks=list(tasks), limit=limit, **options)
    except (KeyError, ValueError, OSError) as error:
        raise SvdtuneError(f"lm-eval could not run {', '.join(map(str, tasks))[:200]}: {error}") from error
    write_text(output / "results.json", json.dumps(results, indent=2, default=str, ensure_ascii=False) + "\n")
    return make_table(results)


def _import_harness() -> Any:
    with needs("tasks of lm-eval need it", "lm-eval"):
        import lm_eval
    return lm_eval


HARNESSES.add("lm-eval", run_harness)
