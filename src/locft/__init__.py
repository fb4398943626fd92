"""locft: edit facts inside language models by fine-tuning done right, and prove what it did.

The public names are loaded when they are first used, so that `import locft`, and the commands that
only copy or check files, need neither torch nor transformers.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from locft.config import RunConfig as RunConfig
    from locft.data.edits import read_edits as read_edits
    from locft.errors import InputError as InputError
    from locft.errors import LocftError as LocftError
    from locft.errors import TrainingError as TrainingError
    from locft.patch.apply import apply_patch as apply_patch
    from locft.patch.apply import revert_patches as revert_patches
    from locft.patch.apply import stack_patches as stack_patches
    from locft.patch.compare import compare_checkpoints as compare_checkpoints
    from locft.patch.format import read_patch as read_patch
    from locft.patch.status import read_status as read_status
    from locft.recipe.edit import edit as edit
    from locft.recipe.evaluate import Measures as Measures
    from locft.recipe.evaluate import evaluate as evaluate
    from locft.recipe.export import export_lora as export_lora
    from locft.recipe.inquiry import ask as ask
    from locft.recipe.plan import Plan as Plan
    from locft.recipe.plan import plan as plan
    from locft.types import Edit as Edit
    from locft.types import Figure as Figure
    from locft.types import Scores as Scores

__version__ = version("locft")

_HOME = {
    "Edit": "locft.types",
    "Figure": "locft.types",
    "InputError": "locft.errors",
    "LocftError": "locft.errors",
    "Measures": "locft.recipe.evaluate",
    "Plan": "locft.recipe.plan",
    "RunConfig": "locft.config",
    "Scores": "locft.types",
    "TrainingError": "locft.errors",
    "apply_patch": "locft.patch.apply",
    "ask": "locft.recipe.inquiry",
    "compare_checkpoints": "locft.patch.compare",
    "edit": "locft.recipe.edit",
    "evaluate": "locft.recipe.evaluate",
    "export_lora": "locft.recipe.export",
    "plan": "locft.recipe.plan",
    "read_edits": "locft.data.edits",
    "read_patch": "locft.patch.format",
    "read_status": "locft.patch.status",
    "revert_patches": "locft.patch.apply",
    "stack_patches": "locft.patch.apply",
}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'locft' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
