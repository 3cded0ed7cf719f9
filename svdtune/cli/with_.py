"""`svdtune with`: any Python program, which then knows the methods."""

import runpy
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

_ALONE = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


@app.command(name="with", context_settings=_ALONE)
def with_(
    context: typer.Context,
    command: Annotated[str, typer.Argument(help="A Python program by name or path, or python itself.")],
) -> None:
    """Run a Python program that does not import svdtune, with SARA, Mo-SARA and SORSA registered in
    its PEFT.

    \b
    svdtune with -- lm_eval --model hf --model_args pretrained=BASE,peft=RUN/adapter --tasks gsm8k
    svdtune with -- python script.py --its options
    svdtune with -- python -m package
    """
    import svdtune.methods  # noqa: F401  registers them
    from svdtune.errors import SvdtuneError

    words = list(context.args)
    if Path(command).name.startswith("python"):
        if not words:
            raise SvdtuneError("`svdtune with -- python` needs a script or -m MODULE after it")
        if words[0] == "-c":
            raise SvdtuneError("`svdtune with` runs no text (-c); write it into a file, or `import svdtune` in it")
        if words[0] == "-m":
            if len(words) == 1:
                raise SvdtuneError("`svdtune with -- python -m` needs a module's name after it")
            sys.argv = words[1:]
            sys.path.insert(0, "")
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            return
        if words[0].startswith("-"):
            raise SvdtuneError(f"`svdtune with` gives Python no options; got {words[0]!r}: name a script or -m MODULE")
        command, words = words[0], words[1:]
    script = Path(command) if Path(command).is_file() else Path(shutil.which(command) or "")
    if not script.is_file():
        raise SvdtuneError(f"there is no program {command!r}: name a script, or one that is installed beside svdtune")
    head = script.read_bytes()[:200].split(b"\n")[0]
    if script.suffix != ".py" and not (head.startswith(b"#!") and (b"python" in head or b"/bin/sh" in head)):
        raise SvdtuneError(f"{script} is no Python program; only those can be run with the methods registered")
    sys.argv = [str(script), *words]
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")
