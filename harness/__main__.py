"""``python -m harness``: the command, where it is not on the path."""

from __future__ import annotations

from harness.cli.main import main

if __name__ == "__main__":
    main()
