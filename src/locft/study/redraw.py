"""Draws the report of a study again, of all the trials that its folder holds."""

from collections.abc import Callable, Mapping
from pathlib import Path

from locft.recipe.reporting import write_into
from locft.recipe.run_folder import REPORT_FILE, draw, write_folder
from locft.report.page import Page
from locft.report.schema import to_bytes
from locft.study.compare_page import describe_compare
from locft.study.locations_page import describe_locations
from locft.study.pipelines_page import describe_pipelines
from locft.study.records import StudyReport
from locft.study.scale_page import describe_scale
from locft.study.store import read_topic, read_trials

_DESCRIBE: Mapping[str, Callable[[StudyReport], Page]] = {
    "compare": describe_compare,
    "locations": describe_locations,
    "pipelines": describe_pipelines,
    "scale": describe_scale,
}


def redraw_study(
    folder: str | Path, output: str | Path | None = None
) -> tuple[StudyReport, Page, list[Path]]:
    """Draw the report of a study again, of all its trials, whichever commands did them.

    Args:
        folder: The study's folder.
        output: A folder to make for what is drawn; if None, it is drawn into the study's own.

    Returns:
        The report, the page that shows it, and the files that were written.

    Raises:
        RunError: The folder is damaged, or another version of locft wrote it.
        InputError: `output` is taken, or cannot be written to.
    """
    folder = Path(folder)
    topic, trials = read_topic(folder), read_trials(folder)
    report = StudyReport(topic=topic, trials=tuple(trials))
    page = _DESCRIBE[topic.study](report)
    files = {**draw(page), REPORT_FILE: to_bytes(report)}
    if output is None:
        return report, page, write_into(folder, files)
    write_folder(Path(output), files)
    return report, page, [Path(output) / name for name in files]
