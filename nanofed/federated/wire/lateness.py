"""How long a round's message lives: longer than its answer is waited for, so that a late answer arrives, is named and dropped."""

from __future__ import annotations

LIFE = 2.0  # of a message, over the time that its answer is waited for


def is_over(age: float, life: float) -> bool:
    """Tell whether nobody waits any more for the answer to a message.

    Args:
        age: seconds since it was sent.
        life: seconds that it lives.
    """
    return age > life / LIFE
