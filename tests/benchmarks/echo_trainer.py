"""A site's trainer process that trains nothing, behind the same socket as the real one.

python -m tests.benchmarks.echo_trainer --name N --socket S --state FOLDER ARGUMENTS OF FEDERATE
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from nanofed.federated.site.listener import Listener
from nanofed.federated.site.progress import Progress
from nanofed.federated.site.service import split_arguments


def main(args: Sequence[str]) -> None:
    logging.basicConfig(level=logging.INFO)
    own, rest = split_arguments(args)
    progress = Progress(own.name)
    with Listener(own.socket, progress.answers()) as listener:
        from tests.benchmarks.echo_rounds import EchoTrainer  # torch takes longer than the supervisor waits for a ping

        trainer = EchoTrainer(own.name, rest)
        progress.ready(trainer.hello, 1)
        while True:
            trainer.answer(listener.next())


if __name__ == "__main__":
    main(sys.argv[1:])
