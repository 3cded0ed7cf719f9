"""The part of an adapter's model card that the run knows: data and training."""

from typing import Any

from svdtune.methods.files.card import table
from svdtune.training.recipe import Recipe
from svdtune.training.sections import DataSource, TrainSource


def training_section(recipe: Recipe, summary: dict[str, Any]) -> str:
    """What the adapter was trained on, and how."""
    settings = recipe.training
    rows = {
        **({"base at commit": f"`{summary['commit']}`"} if summary.get("commit") else {}),
        **({} if settings.task == "sft" else {"task": settings.task}),
        "data": f"{'; '.join(map(_named, recipe.data.train))}, {summary['rows']:,} rows",
        "held out": "; ".join(map(_named, recipe.data.eval.values())) or "nothing",
        "template": f"`{recipe.data.template}`, loss on {recipe.data.loss_on}",
        "steps": f"{summary['steps']:,} of {settings.batch_size * settings.gradient_accumulation} rows a process",
        "learning rate": f"{settings.learning_rate:g}, {settings.schedule}",
        "training loss": f"{summary['loss']:.4f} on average",
        "precision": settings.precision,
        "seed": settings.seed,
    }
    return f"{table(rows)}\n\nBy `svdtune train`; the run folder's `recipe.yaml` repeats it."


def _named(source: DataSource) -> str:
    parts = [f"`{source.source}`", source.config or "", f"split {source.split}" if source.split else ""]
    weight = source.weight if isinstance(source, TrainSource) else 1
    parts.append(f"weight {weight:g}" if weight != 1 else "")
    parts.append(f"{source.only:.1%} of them" if source.only else "")
    parts.append(f"all but {source.without:.1%}" if source.without else "")
    return ", ".join(part for part in parts if part)
