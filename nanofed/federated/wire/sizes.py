"""In what sizes weights travel."""

from __future__ import annotations

# Bytes of the chunks that Flower cuts an array in a message into (its own are of 5 MB): each is an object of its own.
CHUNK_BYTES = 16 << 20
# Of small weights that are put together; in a message, with NumPy's header, they are one chunk.
PARCEL_BYTES = CHUNK_BYTES - 4096
