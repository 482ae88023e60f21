"""In what sizes weights travel."""

from __future__ import annotations

# Bytes of the pieces that Flower cuts an array into; its own are of 5 MB. Every array of a message and every piece is a request
# of its own on each hop and costs some 10 ms (`bin/bench round`). Two travel at a time, and Flower gives an upload up in which
# none has arrived for three minutes: a link has to make 1.5 Mbit/s.
CHUNK_BYTES = 16 << 20
# Of small weights that travel together; with NumPy's header they are one piece.
PARCEL_BYTES = CHUNK_BYTES - 4096
