"""Tries many families out, in several processes."""

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context

from locft.errors import InputError
from locft.families.records import Families, Verdict, unknown_family
from locft.progress import progress


def check_families(names: Sequence[str] = (), num_processes: int | None = None) -> Families:
    """Try families out on tiny models.

    Args:
        names: Their `model_type`; all that transformers loads for causal language modelling if empty.
        num_processes: How many processes share the work; one for each core if None.

    Returns:
        The verdicts, sorted by name.

    Raises:
        InputError: There is no such family.
    """
    from locft.families.tiny import family_names

    known = family_names()
    for name in names:
        if name not in known:
            raise InputError(unknown_family(name, known))
    chosen = sorted(set(names)) or list(known)
    # Processes of their own, since torch does not survive a fork.
    with (
        ProcessPoolExecutor(
            min(num_processes or os.cpu_count() or 1, len(chosen)), get_context("spawn"), _prepare
        ) as pool,
        progress("trying families", len(chosen), "families") as advance,
    ):
        verdicts = []
        for verdict in pool.map(_check, chosen):
            verdicts.append(verdict)
            advance(1, note=verdict.name)
    return Families(transformers=version("transformers"), families=tuple(verdicts))


def _prepare() -> None:
    """Make a process ready: tiny products gain nothing from threads, and transformers stays quiet."""
    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _check(name: str) -> Verdict:
    from locft.families.check import check_family
    from locft.families.tiny import class_name

    try:
        return check_family(name)
    except Exception as error:  # whatever goes wrong is what is to be found
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Verdict(name=name, class_name=class_name(name), status="failed", reason=reason)
