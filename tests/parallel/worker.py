"""One process of ``pool.Pool``: runs the cases it reads from standard input until that closes."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any

from toolkit.training import device
from toolkit.training.layout import ParallelLayout


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The case's result, or the traceback of its failure."""
    layout = ParallelLayout(**job["layout"])
    try:
        # Patient: a rank that is new imports Megatron first.
        device.initialize(layout, rank=job["rank"], meeting=job["store"], timeout_seconds=600)
        module, function = job["case"].split(":")
        result = getattr(importlib.import_module(module), function)(layout, job["rank"], **job["arguments"])
        device.shutdown()
        return {"result": result}
    except Exception:
        return {"error": traceback.format_exc()}


def main() -> None:
    """Answers go to the original standard output; whatever else is printed, to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    device.prepare()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
