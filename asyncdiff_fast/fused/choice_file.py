"""The choices of kernels that are kept on disk: one file for each kind of device with certain versions."""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path

from .registry import KERNELS

log = logging.getLogger(__name__)


def path(environment):
    """The file of the choices on one kind of device with certain versions; None where there is no home to keep it."""
    try:
        folder = os.environ.get("ASYNCDIFF_FAST_CACHE") or Path.home() / ".cache" / "asyncdiff_fast"
    except RuntimeError:
        return None
    digest = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:16]
    return Path(folder) / f"kernels-{digest}.json"


def read(file):
    """The choices in a file; none if it is not there or not ours."""
    try:
        found = json.loads(file.read_text())
        return {text: entry for text, entry in found.items() if _holds(text, entry)}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {}


def _holds(text, entry):
    # A choice among other implementations is none among these.
    return {entry["launched"], entry["captured"]} <= set(entry["us"]) == set(KERNELS[text.split()[0]])


def write(file, text, entry):
    """Add one choice to a file, which other processes may do at the same time: the last one wins, whole."""
    if file is None:
        return
    made = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
            made = new.name
            json.dump(read(file) | {text: entry}, new, indent=1)
        os.replace(made, file)
    except OSError as error:
        if made is not None:
            with contextlib.suppress(OSError):
                os.unlink(made)
        log.warning("the choice of kernels is not kept: %s", error)
