"""Turn off the messages of the libraries that models are loaded with."""


def silence_libraries() -> None:
    """Turn off the advice and the loading bars of diffusers and transformers: a command has its own.

    Before their pipelines are imported, which is when some of the advice is given.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
