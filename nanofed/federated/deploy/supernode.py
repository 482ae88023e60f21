"""A site's SuperNode: `flower-supernode` with nanofed's patches, and the same arguments."""

from __future__ import annotations

import sys

from nanofed.federated import flower_patches


def main() -> None:
    """Run `flower-supernode`."""
    from flwr.supercore.corestate import in_memory_corestate
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli.flower_supernode import flower_supernode

    flower_patches.look_sooner(start_client_internal)
    flower_patches.ask_again_soon(start_client_internal)
    flower_patches.give_up_unfinished_answers(start_client_internal)
    flower_patches.answer_at_any_time(start_client_internal)
    flower_patches.notice_dead_workers_sooner(in_memory_corestate)
    sys.argv[0] = "flower-supernode"
    flower_supernode()


if __name__ == "__main__":
    main()
