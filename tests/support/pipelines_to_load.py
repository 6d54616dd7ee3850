"""What workers load: functions that they can import by name."""

import os
import sys

import tiny_pipelines


def sd15():
    """A tiny pipeline of random weights."""
    pipe = tiny_pipelines.build("sd15")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def broken():
    """Raises, as a folder with damaged weights would."""
    raise OSError("damaged weights")


def leave(pipe, step, t, kwargs):
    """A callback of the pipeline that would end the second worker alone."""
    if step == 2 and os.environ["RANK"] == "1":
        sys.exit("enough")
    return kwargs
