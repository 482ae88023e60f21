"""What a site may be called: on its own so that supervisors and the SuperLink's process can ask without importing torch."""

from __future__ import annotations

import re

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # it becomes a folder's and a file's, and is logged
