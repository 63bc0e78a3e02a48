"""Two ranks, started as a user starts them."""

from __future__ import annotations

import subprocess
import sys

from _models import ENVIRONMENT


def torchrun(*arguments: object) -> str:
    """What two ranks of a script, or of a module after ``-m``, print; they must end well."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with subprocess.Popen(
        [*start, *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            output, errors = running.communicate(timeout=400)
        except subprocess.TimeoutExpired:
            # It ends its ranks, which would wait for one another for ever; to kill it would leave them.
            running.terminate()
            raise
    assert running.returncode == 0, errors
    return output
