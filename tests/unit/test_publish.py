import stat
from pathlib import Path

import pytest

from locft.errors import InputError
from locft.publish import staged_folder


def test_folder_appears_only_when_the_body_is_done(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged_folder(target) as staging:
        (staging / "file").write_text("content")
        assert not target.exists()
        assert staging.parent == tmp_path
        assert staging.name.startswith(".locft-")
    assert (target / "file").read_text() == "content"
    assert list(tmp_path.iterdir()) == [target]


def test_missing_parents_are_created_and_kept_on_failure(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "a" / "b" / "out"):
        raise ZeroDivisionError
    assert (tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_folder_has_the_mode_of_any_new_folder(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with staged_folder(tmp_path / "out"):
        pass
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "out")}
    assert len(modes) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_nothing_is_left_behind_when_the_body_is_stopped(
    tmp_path: Path, error: type[BaseException]
) -> None:
    def build() -> None:
        with staged_folder(tmp_path / "out") as staging:
            (staging / "deep").mkdir()
            (staging / "deep" / "file").touch()
            raise error

    with pytest.raises(error):
        build()
    assert list(tmp_path.iterdir()) == []


def test_empty_target_is_filled(tmp_path: Path) -> None:
    with staged_folder(tmp_path) as staging:
        (staging / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_target_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("link", "dangling"):
        with pytest.raises(InputError, match="is a link"), staged_folder(tmp_path / name):
            pytest.fail("the body ran")
    assert list((tmp_path / "real").iterdir()) == []


def test_parents_may_be_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with staged_folder(tmp_path / "link" / "out"):
        pass
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["out"]


def test_relative_target_survives_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with staged_folder(Path("out")):
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert (tmp_path / "out").is_dir()


def test_target_that_is_not_empty_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with (
        pytest.raises(InputError, match="not empty; name another"),
        staged_folder(tmp_path / "out"),
    ):
        pytest.fail("the body ran")
    assert (tmp_path / "out" / "mine").exists()


def test_target_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match="not a folder"), staged_folder(tmp_path / "out"):
        pytest.fail("the body ran")


def test_target_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="cannot be created"),
        staged_folder(tmp_path / "file" / "out"),
    ):
        pytest.fail("the body ran")


@pytest.mark.parametrize("taken_by", ["file", "folder"])
def test_target_taken_meanwhile_is_refused_and_kept(tmp_path: Path, taken_by: str) -> None:
    target = tmp_path / "out"
    theirs = target if taken_by == "file" else target / "file"

    def build() -> None:
        with staged_folder(target):
            theirs.parent.mkdir(exist_ok=True)
            theirs.write_text("theirs")

    with pytest.raises(InputError):
        build()
    assert list(tmp_path.iterdir()) == [target]
    assert theirs.read_text() == "theirs"


def test_failing_rename_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("no")

    monkeypatch.setattr("os.rename", fail)
    with pytest.raises(OSError, match="no"), staged_folder(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []
