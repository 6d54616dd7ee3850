"""What workers load: functions that they can import by name."""

import tiny_pipelines


def sd15():
    """A tiny pipeline of random weights."""
    pipe = tiny_pipelines.build("sd15")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def broken():
    """Raises, as a folder with damaged weights would."""
    raise OSError("damaged weights")
