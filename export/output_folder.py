"""Refuse output folders that cannot be written, and write the others whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d2f_fast.errors import RefusedInputError
from d2f_fast.export.report import REPORT
from d2f_fast.export.verify import VerificationError
from d2f_fast.files.atomic import atomic_folder


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output path that holds something other than an export that may be replaced.

    Args:
        output: path of the output folder.
        overwrite: Whether an earlier export may be replaced.

    Raises:
        RefusedInputError: the path is a file, or a folder with files that may not be replaced.
    """
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise RefusedInputError(f"output folder {output} is not empty: name another, or give --overwrite")
        if not (output / REPORT).is_file():
            raise RefusedInputError(
                f"output folder {output} is not an export ({REPORT} is missing): name another, or remove it yourself"
            )
    elif output.exists() and not output.is_dir():
        raise RefusedInputError(f"output {output} is a file: name a folder")


@contextmanager
def output_folder(output: Path, keep_failed: bool) -> Iterator[Path]:
    """Yield a temporary folder that becomes the output at the end of the block, whole or not at all.

    Args:
        output: path of the output folder; an export there is replaced.
        keep_failed: If the block raises a VerificationError, keep the folder as "<output>-failed" instead of removing
            it.

    Raises:
        RefusedInputError: the output cannot be written.
        VerificationError: the block raised it; with `keep_failed` the message names the folder that is kept.
    """
    try:
        with atomic_folder(output, replace=True) as folder:
            try:
                yield folder
            except VerificationError as error:
                if not keep_failed:
                    raise
                kept = output.with_name(f"{output.name}-failed")
                shutil.rmtree(kept, ignore_errors=True)
                folder.rename(kept)
                raise VerificationError(f"{error}; the graphs are in {kept}") from error
    except OSError as error:
        reason = error.strerror or error
        raise RefusedInputError(f"{output} cannot be written ({reason}): name another folder") from error
