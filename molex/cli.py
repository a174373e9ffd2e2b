"""The command line:  molex demo | methods | inspect | merge | export | eval | serve   (also python -m molex ...).

Tables for people, `--json` where a script would read; errors of molex are one sentence on stderr and exit code 1.
"""

import sys

import typer
from rich.console import Console
from rich.text import Text

from molex.commands.demo import demo
from molex.commands.eval import eval
from molex.commands.export import export
from molex.commands.inspect import inspect
from molex.commands.merge import merge
from molex.commands.methods import methods
from molex.commands.serve import serve
from molex.errors import MolexError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


@app.callback()
def molex() -> None:
    """Mixtures of LoRA experts, in one library."""


for command in (methods, inspect, merge, export, eval, demo, serve):
    app.command()(command)


def main() -> None:
    """The console script: user errors are one sentence, not a traceback."""
    try:
        app()
    except MolexError as error:
        sentence = Text.assemble(("error: ", "red"), str(error))  # no markup: paths and values may hold brackets
        Console(stderr=True).print(sentence, highlight=False, soft_wrap=True)
        sys.exit(1)
