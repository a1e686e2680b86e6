"""What a tool prints in the end, which is not to cost the user what it has computed."""

from __future__ import annotations

import os
import sys


def show(text: str) -> None:
    """Print to standard output, as far as it can be read there.

    Characters that its encoding lacks are written out (`\\xe9`). Where nobody reads on (`| head`),
    this ends quietly.

    Raises:
        OSError: it cannot be written, say to a full disk.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        # What is left in the buffer would be written once more at the exit, and fail there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise
