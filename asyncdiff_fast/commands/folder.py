"""Folders that hold a diffusers pipeline, and the small trained one of the checkout."""

import warnings
from pathlib import Path

from .launch import UsageError


def shapes_folder():
    """Where the small trained pipeline lies in a checkout."""
    return Path(__file__).resolve().parents[2] / "examples" / "shapes" / "unet"


def checked(path=None):
    """The folder of a pipeline as a Path; without `path` the small trained pipeline's.

    Raises: UsageError if it is not there, or holds no pipeline.
    """
    folder = shapes_folder() if path is None else Path(path).expanduser()
    if path is None and not folder.is_dir():
        raise UsageError(
            f"the small trained pipeline belongs to the checkout and is not installed: no folder {folder}; "
            "work in a checkout (pip install -e .), or name a pipeline's folder"
        )
    if not folder.is_dir():
        raise UsageError(
            f"PATH must be the folder of a diffusers pipeline: there is no folder {folder}; check the spelling"
        )
    if not (folder / "model_index.json").is_file():
        raise UsageError(
            f"PATH must be the folder of a diffusers pipeline: {folder} has no model_index.json; "
            "give the folder that save_pretrained() wrote"
        )
    return folder.resolve()


def load(folder, device, dtype):
    """The pipeline in a folder, on `device` in `dtype`, without progress bars and notices.

    Raises: UsageError if diffusers cannot load it.
    """
    import diffusers
    import transformers

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    with warnings.catch_warnings():
        # The name of the argument changes between versions of diffusers; all of them know this one.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
        except Exception as error:
            raise UsageError(
                f"PATH must be the folder of a diffusers pipeline: {folder} cannot be loaded, {type(error).__name__}: "
                f"{' '.join(str(error).split())}; save the pipeline anew, or install what it needs"
            ) from error
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe
