"""Finds the checkpoint that a patch was made from. Imports neither torch nor transformers."""

from locft.errors import ModelError
from locft.model.resolve import CheckpointFolder, resolve_checkpoint
from locft.patch.format import Patch


def resolve_base(
    patch: Patch, model: str | None = None, revision: str | None = None
) -> CheckpointFolder:
    """Find the files of the model that a patch was made from, fetching them if need be.

    Args:
        patch: The patch.
        model: Where the model is now; if None, where it was when the patch was made.
        revision: Branch, tag or commit of a Hugging Face id; if None and `model` is None, too, the
            commit that the patch was made from.

    Returns:
        The folder with the files; whether the patch belongs to them is checked by what reads them.

    Raises:
        ModelError: There is no such model.
    """
    if model is not None:
        return resolve_checkpoint(model, revision=revision)
    base = patch.manifest.model
    try:
        return resolve_checkpoint(base.id, revision=revision or base.revision)
    except ModelError as error:
        raise ModelError(f"the patch's own model: {error}; --model says where it is now") from error
