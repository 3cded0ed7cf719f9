"""`svdtune study`: files of studies are run; `svdtune study new` writes one."""

from typing import Any

import typer
from typer.core import TyperGroup

from svdtune.lab.cli.study import study
from svdtune.lab.cli.study_new import new


class _RunsFiles(TyperGroup):
    """A group whose word that is no command begins those of `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunsFiles,
    no_args_is_help=True,
    add_completion=False,
    help="Compare methods: svdtune study STUDY... runs studies, svdtune study new writes one for your rows.",
)
app.command("run")(study)
app.command("new")(new)
