"""Two ranks, started as a user starts them."""

from __future__ import annotations

import subprocess
import sys

from _models import ENVIRONMENT


def torchrun(*arguments: object) -> str:
    """What two ranks of a script, or of a module after ``-m``, print; they must end well."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*start, *map(str, arguments)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
