"""In what sizes weights travel."""

from __future__ import annotations

# Bytes of the pieces in which weights are fetched and delivered, and of those that Flower cuts an array in a message into (its
# own are of 5 MB): each is a request of its own.
CHUNK_BYTES = 16 << 20
# Of small weights that travel together; with NumPy's header they are one piece.
PARCEL_BYTES = CHUNK_BYTES - 4096
