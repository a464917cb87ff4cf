"""The `latentcodec` command: one file for each verb. Exit codes and errors are settled here.

Exit codes: 0 done; 3 done, but there is something to look at; 2 a wrong argument or an input that does not fit; 1 any
other failure; 128 + the signal's number.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import TextIOWrapper

import typer

from latentcodec.cli.decode import decode
from latentcodec.cli.encode import encode
from latentcodec.cli.export import export
from latentcodec.cli.finish import finish
from latentcodec.cli.importing import import_caches
from latentcodec.cli.inspect import inspect
from latentcodec.cli.output import DONE, FAILED, INTERRUPTED, WRONG
from latentcodec.cli.reconstruct import reconstruct
from latentcodec.cli.train import train
from latentcodec.cli.verify import verify
from latentcodec.extras import require_docstrings

app = typer.Typer(
    help="""Pictures to latents and back, for diffusion pipelines.

    Encode a folder, look at what was stored, decode it again:

        latentcodec encode photos --codec photo-f8c16 --size 256 --out latents

        latentcodec inspect latents

        latentcodec decode latents --out pictures

    CODEC is a bundled name (photo-f8c4, photo-f8c16), a folder, a .safetensors file or a name on the hub.""",
    epilog="Exit codes: 0 done; 3 done, but there is something to look at (pictures left out, bad shards); 2 a wrong "
    "argument or input; 1 any other failure; 128 + signal.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 110},
)
for verb in (encode, decode, reconstruct, inspect, verify, export, finish):
    app.command()(verb)
app.command("import")(import_caches)
app.command(
    add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)(train)


@app.callback()
def settings() -> None:
    """Nothing is common to all verbs."""


def run(arguments: Sequence[str] | None = None) -> int:
    """The exit code of a command line; what a user can mend is one line on stderr."""
    try:
        require_docstrings()
        code = app(arguments, prog_name="latentcodec", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except (ValueError, ModuleNotFoundError) as error:
        return _failed(error, WRONG)
    except OSError as error:
        is_wrong_path = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        return _failed(error, WRONG if is_wrong_path else FAILED)
    except Exception as error:
        show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
        if show is None or code is None:
            raise
        show()  # what typer says of a wrong option
    return code if isinstance(code, int) else DONE


def _failed(error: Exception, code: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def main() -> None:
    """The entry point."""
    out = sys.stdout
    if isinstance(out, TextIOWrapper) and out.errors == "strict":
        # A console of few characters must not end a long command.
        out.reconfigure(errors="backslashreplace")
    sys.exit(run())
