"""The entry point `glm`: the commands, and how errors, interrupts and closed pipes end the program."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from openglm.cli import bench, console, convert, data, estimate, fill, generate, info, plan, quantize, report, tokenizer, train
from openglm.errors import InputError, OpenGLMError, StorageError
from openglm.storage import is_refusal, storage_error

#: The parser's own errors: a wrong option, a missing argument.
_UsageError = typer.BadParameter.__mro__[1]
#: As the shell reports a program that SIGPIPE ended.
_CLOSED_PIPE = 141


class Commands(TyperGroup):
    """Turns what a user can mend into one sentence and exit code 2; a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was chosen."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except OpenGLMError as error:
            console.show_error(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as interrupt:
            console.note("interrupted")
            raise typer.Exit(130) from interrupt
        except BrokenPipeError as error:  # the reader, `head` for one, has seen enough
            _drop_stdout()
            raise typer.Exit(_CLOSED_PIPE) from error

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Parse, run, exit. Raises ``SystemExit``."""
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except Exception as error:
            if isinstance(error, OSError) and is_refusal(error):
                console.show_error(_refused(error))
            elif isinstance(error, _UsageError):
                path = getattr(getattr(error, "ctx", None), "command_path", "glm")
                console.show_error(InputError(_sentence(error), hint=f"`{path} --help` shows what is possible"))
            else:
                raise
            code = 2
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)


def _sentence(error: Any) -> str:
    message = error.format_message().strip().removesuffix(".")
    if message.startswith("Got unexpected extra argument"):
        message += "; put a text that has blanks in quotes"
    return message[:1].lower() + message[1:]


def _refused(error: OSError) -> StorageError:
    """What the disk refused where no room had foreseen it: a path that may not be looked at, or help to a full disk."""
    if error.filename is not None:
        return storage_error(os.fsdecode(error.filename), error, "use")
    _drop_stdout()
    return console.output_error(error)


def _drop_stdout() -> None:
    # What is still buffered must not fail again when Python exits.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _version(value: bool) -> None:
    if value:
        from openglm.version import __version__

        console.write(f"openglm {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    name="glm",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _glm(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    r"""A bilingual (English and Chinese) language model that fills blanks.

    Example: [bold]glm fill "The capital of France is \[MASK]."[/bold]
    """
    if context.invoked_subcommand is None:
        console.write(context.get_help())


app.command("fill", epilog=fill.EXAMPLES)(fill.fill)
app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
app.command("info", epilog=info.EXAMPLES)(info.info)
app.command("convert", epilog=convert.EXAMPLES)(convert.convert)
app.command("quantize", epilog=quantize.EXAMPLES)(quantize.quantize)
app.command("estimate", epilog=estimate.EXAMPLES)(estimate.estimate)
app.command("bench", epilog=bench.EXAMPLES)(bench.bench)
app.command("train", epilog=train.EXAMPLES)(train.train)
app.command("report", epilog=report.EXAMPLES)(report.report)
app.command("plan", epilog=plan.EXAMPLES)(plan.plan)
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(data.app, name="data")


def main() -> None:
    """Run `glm` with the arguments of the process."""
    console.open_closed()
    console.use_utf8()
    # Threads of torch wait for each other by spinning; on a busy machine that takes ten times as long as the work.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app(prog_name="glm")
    except SystemExit as exit_:
        try:
            sys.stdout.flush()
        except OSError as error:
            _drop_stdout()
            if not isinstance(error, BrokenPipeError):
                console.show_error(console.output_error(error))
                raise SystemExit(2) from error
        raise exit_


if __name__ == "__main__":
    main()
