"""A site's worker that trains nothing, behind the same SuperNode as the real one.

python -m tests.benchmarks.echo_worker OPTIONS ARGUMENTS OF FEDERATE
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any, cast

from nanofed.federated.site.inbox import Inbox
from nanofed.federated.site.options import WorkerOptions
from nanofed.federated.site.progress import Progress
from nanofed.federated.site.worker import lead
from tests.benchmarks.echo_rounds import EchoTrainer


def main(args: Sequence[str]) -> None:
    logging.basicConfig(level=logging.INFO)
    options = WorkerOptions.from_json(args[0])
    progress = Progress(options.progress)
    trainer = EchoTrainer(args[1:])
    progress.say(state="idle", ranks=1)
    inbox = Inbox(options.supernode, options.secret.read_bytes())
    lead(options, inbox, cast(Any, trainer), progress)


if __name__ == "__main__":
    main(sys.argv[1:])
