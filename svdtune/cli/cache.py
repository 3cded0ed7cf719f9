"""`svdtune cache`: what the cache of spectra, factors and encoded rows holds, and clearing it."""

from datetime import datetime
from typing import Annotated

import typer
from rich.table import Table

from svdtune.cli.outcome import for_json
from svdtune.system import open_console

app = typer.Typer(
    name="cache", help="List or clear the cache of spectra, factors and encoded rows.", no_args_is_help=True
)


@app.command("list")
def show() -> None:
    """List what the cache holds, newest last.

    Example:

      svdtune cache list
    """
    from svdtune.cache import cache_dir, cache_limit, entries

    folder = cache_dir()
    for_json({"folder": folder, "entries": list(entries()) if folder else []})
    if folder is None:
        typer.echo("the cache is switched off (SVDTUNE_CACHE=off)")
        return
    found = sorted(entries(), key=lambda entry: entry.used)
    table = Table("kind", "key", "KB", "last used")
    table.columns[2].justify = "right"
    for entry in found:
        used = datetime.fromtimestamp(entry.used).isoformat(" ", "minutes")
        table.add_row(entry.kind, entry.key[:16] + entry.key[64:], f"{entry.size / 1e3:.0f}", used)
    console = open_console()
    if found:
        console.print(table)
    total = sum(entry.size for entry in found)
    limit = cache_limit()
    console.print(f"{folder}: {len(found)} files, {total / 1e6:.1f} MB of at most {limit / 1e9:g} GB", soft_wrap=True)


@app.command()
def clear(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove all that is cached; it is computed again when it is next needed.

    Example:

      svdtune cache clear --yes
    """
    from svdtune.cache import cache_dir, entries, trim

    found = list(entries())
    if not found:
        for_json({"removed": 0})
        typer.echo("the cache is empty")
        return
    if not yes:
        typer.confirm(f"Remove {len(found)} files from {cache_dir()}?", abort=True)
    removed = trim(0)
    for_json({"removed": len(removed)})
    typer.echo(f"removed {len(removed)} files, {sum(entry.size for entry in removed) / 1e6:.1f} MB")
