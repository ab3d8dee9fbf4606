"""The command line; the only room that needs the `demo` extra."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from natgrad_array.cli.errors import CommandError

EXTRA = ("matplotlib", "rich", "sklearn", "typer")
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `natgrad-array`; what goes wrong is one line on stderr.

    Parameters
    ----------
    arguments : sequence of str, optional
        What follows the command's name; that of the process when None.

    Returns
    -------
    int
        Exit status: 0, 1 when a claim fails, 2 for bad input, 130 when interrupted.
    """
    try:
        from natgrad_array.cli.app import run

        return run(arguments)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA:
            raise
        return _complain(f'{missing} is missing: python -m pip install "natgrad-array[demo]"')
    except CommandError as error:
        return _complain(str(error))
    except MemoryError as error:
        return _complain(f"not enough memory: {error}")
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED


def _complain(message: str) -> int:
    sys.stderr.write(f"natgrad-array: {' '.join(message.split())}\n")
    return 2
