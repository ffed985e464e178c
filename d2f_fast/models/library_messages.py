"""Turn off the messages of the libraries that load models."""

import os


def silence_libraries() -> None:
    """Turn off the advice and the loading bars of diffusers and transformers, so that a command prints only its own.

    Call it before the pipelines of these libraries are imported: some of the advice is printed during the import.
    """
    # torch reads it when it is imported. Its warnings are of processes that end while they connect.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
