"""How this package's commands end: with what they return, or with a line about a path that is not there."""

import sys
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[[], int | None]) -> NoReturn:
    """Exits with what `main` returns, with 2 where a file or folder that it reads is missing."""
    try:
        sys.exit(main())
    except (FileNotFoundError, NotADirectoryError) as error:
        print(f"{error.filename or error}: not there; --help says what each path must hold", file=sys.stderr)
        sys.exit(2)
