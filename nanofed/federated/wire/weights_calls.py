"""The two calls by which a site fetches weights from its server and delivers its own: paths, headers, and the files behind."""

from __future__ import annotations

import re

PULL, PUSH = "/v1/fleet/nanofed-pull", "/v1/fleet/nanofed-push"  # the calls: a piece down, a piece up
OBJECT, OFFSET = "nanofed-object", "nanofed-offset"  # their headers: a ticket, and the first byte of the piece
LENGTH = "nanofed-length"  # bytes of a piece that is pulled
OCTETS = "application/octet-stream"
PIECE_BYTES = 16 << 20  # of one call
DOWN, UP = "down", "up"  # a store's folders: of weights to be pulled, of files that take what is pushed
TICKET = re.compile(r"[0-9a-f]{32}")  # 128 random bits: who has it may make the call, once the perimeter knows the site
