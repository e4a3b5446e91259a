"""Errors that a user can act on: one line, non-zero exit, no traceback."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable

from workflow_src.common.progress import say


class UserError(Exception):
    """Something the user can mend. The message is one line: file, field, value, remedy."""


def disk_full(error: BaseException) -> bool:
    """Whether a full disk or an exhausted quota lies behind `error`; some libraries say so in words only."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    words = str(error)
    return any(os.strerror(number) in words for number in (errno.ENOSPC, errno.EDQUOT)) or bool(
        re.search(r"\d+ requested and \d+ written", words)  # numpy
    )


def run_cli(main: Callable[[], None]) -> None:
    """Run a command-line entry point; turn expected failures into one clear line.

    Exit codes: 2 for a `UserError` or a full disk, 130 for Ctrl-C. Anything else is a defect and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`… | head`); a flush at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if not disk_full(error):
            raise
        where = error.filename or "the results folder"
        say(f"error: no space left on the device that holds {where}: free some and start again; "
            "finished work is kept")  # fmt: skip
        sys.exit(2)
