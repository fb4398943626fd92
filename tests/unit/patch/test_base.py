from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from locft.errors import ModelError
from locft.model.resolve import CheckpointFolder
from locft.patch.base import resolve_base
from locft.patch.format import Patch
from locft.patch.manifest import PatchLocation, PatchManifest, PatchModel

PATCH = Patch(
    tensors={},
    manifest=PatchManifest(
        locft_version="0.1.0",
        model=PatchModel(id="some/model", revision="abc"),
        location=PatchLocation(name="1.mlp", layer=1, module="mlp", num_parameters=1),
        dtype="F32",
        settings={},
        num_edits=1,
        edits_sha256="a" * 64,
    ),
)


@pytest.mark.parametrize(
    ("model", "revision", "expected"),
    [
        (None, None, ("some/model", "abc")),
        (None, "main", ("some/model", "main")),
        ("other/model", None, ("other/model", None)),
        ("other/model", "main", ("other/model", "main")),
        ("some/model", None, ("some/model", None)),
    ],
)
def test_the_patchs_own_model_is_taken_at_its_own_commit_unless_another_is_named(
    model: str | None,
    revision: str | None,
    expected: tuple[str, str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def resolve(name: str, *, revision: str | None) -> CheckpointFolder:
        return CheckpointFolder(name=name, folder=Path("/cache"), revision=revision)

    monkeypatch.setattr("locft.patch.base.resolve_checkpoint", resolve)
    found = resolve_base(PATCH, model, revision)
    assert (found.name, found.revision) == expected


def test_a_model_that_is_not_where_it_was_is_told_with_what_to_do(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone" / "away")
    moved: Any = replace(
        PATCH, manifest=replace(PATCH.manifest, model=PatchModel(id=gone, revision=None))
    )
    with pytest.raises(ModelError) as caught:
        resolve_base(moved)
    assert str(caught.value).startswith("the patch's own model: ")
    assert str(caught.value).endswith("; --model says where it is now")
    with pytest.raises(ModelError) as caught:
        resolve_base(moved, gone)
    assert "own model" not in str(caught.value)
