"""The command line: reads the words, calls the recipes, shows what came of it."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from locft.cli.gates import Gate, parse_gate
from locft.cli.parser import parse_words
from locft.cli.say import print_json, print_lines, say
from locft.config import RunConfig, read_config, seconds_of, with_settings
from locft.errors import ConfigError, InputError, LocftError, first_line, printable
from locft.publish import refuse_taken
from locft.report.words import PROTOCOL_SCORES, change_text, some
from locft.types import Edit, Figure

# Recipes are imported where they are called: torch takes seconds to load, and --help, lint and apply
# do without it.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after `locft`; those of the process if None.

    Returns:
        The exit status: 0 done, 1 a gate or the run failed, 2 bad input, 130 interrupted.
    """
    words = parse_words(arguments)
    if threading.current_thread() is threading.main_thread():
        # As an interrupt, so that what is half-made is removed.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    run: Callable[[argparse.Namespace], int] = _COMMANDS[words.command]
    try:
        status = run(words)
        sys.stdout.flush()
        return status
    except InputError as error:
        say(f"error: {error}")
        return error.exit_status
    except BrokenPipeError:
        # Whoever read the result has seen enough. Nor shall Python complain of it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return LocftError.exit_status
    except (LocftError, OSError) as error:
        say(f"error: {error}; {_what_is_kept(words)}")
        return LocftError.exit_status
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        say(
            f"error: out of memory ({first_line(error)}); {_what_is_kept(words)}. Try a smaller "
            "--batch-size or --eval-batch-size, --dtype bfloat16, or another --device"
        )
        return LocftError.exit_status
    except KeyboardInterrupt:
        say(f"interrupted: {_what_is_kept(words)}")
        return 130


def _edit(words: argparse.Namespace) -> int:
    gates = [parse_gate(text) for text in words.gate]
    edits: str | list[Edit]
    if words.prompt is not None or words.target is not None:
        if words.edits is not None or words.prompt is None or words.target is None:
            raise InputError(
                "give either EDITS, or one edit as --prompt TEXT and --target TEXT together"
            )
        edits = [Edit(id="1", prompt=words.prompt, target=words.target, source="--prompt")]
    elif words.edits is None:
        raise InputError("no edits: name a file as EDITS, or give --prompt TEXT and --target TEXT")
    else:
        edits = words.edits
    config = _config(words)
    _refuse_unmeasured(gates, ["locft"])
    _quiet_libraries()
    if words.plan:
        return _plan(words, edits, config)
    from locft.recipe.edit import edit
    from locft.recipe.run_folder import read_run

    report = edit(words.model, edits, words.output, config, say=say)
    if words.json:
        print_json(asdict(report))
    else:
        from locft.cli.show import make_console, show_edit

        show_edit(make_console(), read_run(Path(words.output)), words.output)
    return _pass_gates(gates, vars(report.scores))


def _plan(words: argparse.Namespace, edits: str | list[Edit], config: RunConfig) -> int:
    from locft.recipe.plan import plan

    predicted = plan(words.model, edits, config, output=words.output, say=say)
    if words.json:
        print_json(predicted.to_dict())
    else:
        from locft.cli.show import make_console, show_plan

        show_plan(make_console(), predicted)
    return 0


def _ask(words: argparse.Namespace) -> int:
    config = _config_of_patch(words)
    _quiet_libraries()
    from locft.recipe.inquiry import ask

    answers = ask(words.model, words.prompts, words.patch, config)
    if words.json:
        print_json({"answers": [asdict(answer) for answer in answers]})
    else:
        from locft.cli.show import make_console, show_answers

        rows = [(answer.prompt, answer.before, answer.after) for answer in answers]
        show_answers(make_console(), rows)
    return 0


def _eval(words: argparse.Namespace) -> int:
    gates = [parse_gate(text) for text in words.gate]
    config = _config_of_patch(words)
    _quiet_libraries()
    from locft.recipe.evaluate import Measures, evaluate
    from locft.recipe.run_folder import Run, save_evaluation

    measures = Measures(
        protocols=words.protocols,
        contexts=words.contexts,
        judge=words.judge,
        capability=words.capability,
        capability_data=None if words.capability_data is None else Path(words.capability_data),
        capability_limit=words.capability_limit,
    )
    _refuse_unmeasured(gates, measures.protocols)
    bound = words.max_capability_drop
    if bound is not None and not (measures.capability and (words.patch or words.base)):
        raise InputError(
            "--max-capability-drop compares two models on tasks: name tasks with --capability, and the "
            "edit with --patch or the unedited model with --base"
        )
    if words.strict and bound is None:
        raise InputError("--strict says what --max-capability-drop POINTS fails: give it, too")
    if words.output is not None:
        refuse_taken(Path(words.output))
    found = evaluate(words.model, words.edits, words.patch, words.base, config, measures, say=say)
    report, records = found.report, found.answers
    if words.output is not None:
        folder = Path(words.output)
        save_evaluation(Run(folder, report, records, found.passages))
    if words.json:
        print_json({**asdict(report), "answers": [asdict(record) for record in records]})
    else:
        from locft.cli.show import make_console, show_evaluation

        show_evaluation(make_console(), report, records, words.show)
    main_scores, *_ = report.protocols.values()
    figures = {**main_scores.after} | {
        f"{name}.{score}": figure
        for name, scores in report.protocols.items()
        for score, figure in scores.after.items()
    }
    if report.drift is not None:
        figures["drift"] = report.drift.overall
    status = _pass_gates(gates, figures)
    if bound is not None and report.capability is not None and report.capability.change is not None:
        status = status or _pass_drop(report.capability.change, bound, strict=words.strict)
    return status


def _refuse_unmeasured(gates: Sequence[Gate], protocols: Sequence[str]) -> None:
    """Refuse gates on scores that no protocol will measure, before anything is loaded."""
    own = PROTOCOL_SCORES.get(protocols[0], ()) if protocols else ()
    named = (f"{name}.{score}" for name in protocols for score in PROTOCOL_SCORES.get(name, ()))
    known = {*own, *named, "drift"}
    for gate in gates:
        if gate.score not in known:
            raise ConfigError(
                f"gate on {gate.score}: protocol {', '.join(protocols)} does not measure it"
            )


def _pass_drop(change: Figure, bound: float, *, strict: bool) -> int:
    """Compare the drop of capability, in points, with the largest that is allowed."""
    from locft.evaluation.capability import drop_verdict

    verdict = drop_verdict(change, bound)
    if verdict == "excluded":
        return 0
    drop = f"a drop of capability by more than {bound:g} points"
    say(f"{drop} {'is certain' if verdict == 'exceeded' else verdict}: {change_text(change)} points")
    return LocftError.exit_status if strict or verdict == "exceeded" else 0


def _lint(words: argparse.Namespace) -> int:
    from locft.data.gather import read_source
    from locft.data.lint import lint
    from locft.data.problems import format_problems

    file = read_source(words.edits)
    if words.model is None:
        problems = lint(file)
    else:
        _quiet_libraries()
        from locft.recipe.inquiry import lint_for_model

        problems = lint_for_model(file, words.model, _config(words))
    if words.json:
        print_json(
            {
                "file": str(file.path),
                "format": file.format,
                "num_edits": len(file.edits),
                "problems": [asdict(problem) for problem in problems],
            }
        )
    else:
        print_lines(printable(f"{file.path}: {file.format} format, {len(file.edits):,} edits"))
        print_lines(format_problems(problems, file.path))
    has_errors = any(problem.level == "error" for problem in problems)
    return InputError.exit_status if has_errors else 0


def _patches(command: str) -> Callable[[argparse.Namespace], int]:
    def run(words: argparse.Namespace) -> int:
        from locft.cli import patches

        done: int = getattr(patches, f"run_{command}")(words)
        return done

    return run


def _export(words: argparse.Namespace) -> int:
    if words.full:
        return _export_full(words)
    config = _config_of_patch(words)
    _quiet_libraries()
    from locft.recipe.export import export_lora

    report = export_lora(
        words.patch,
        words.output,
        model=words.model,
        edits=words.edits,
        rank="auto" if words.rank is None else words.rank,
        config=config,
        say=say,
    )
    if words.json:
        print_json({"output": words.output, **asdict(report)})
    else:
        from locft.cli.show import make_console, show_lora

        show_lora(make_console(), report, words.output)
    return 0


def _export_full(words: argparse.Namespace) -> int:
    from locft.patch.apply import write_plain
    from locft.patch.base import resolve_base
    from locft.patch.format import open_patch

    if words.rank is not None or words.edits is not None:
        raise InputError("--rank and --edits are for --lora: with --full nothing is lost")
    patch = open_patch(Path(words.patch))
    base = resolve_base(patch, words.model, _config(words).revision)
    write_plain(base.folder, patch, Path(words.output))
    num_edits = patch.manifest.num_edits
    if words.json:
        print_json({"output": words.output, "model": base.name, "num_edits": num_edits})
    else:
        say(f"wrote {words.output}: {base.name} with {num_edits:,} edits in it")
    return 0


def _convert(words: argparse.Namespace) -> int:
    _quiet_libraries()
    from locft.model.gguf import convert_gguf
    from locft.publish import staged_folder

    with staged_folder(Path(words.output)) as staged:
        convert_gguf(Path(words.file), staged)
    say(f"wrote {words.output}: float32, dequantised from {words.file}")
    return 0


def _report(words: argparse.Namespace) -> int:
    from locft.recipe.reporting import compare_runs, redraw
    from locft.study.store import is_study

    if words.output is not None:
        refuse_taken(Path(words.output))
    studies = [run for run in words.runs if is_study(Path(run))]
    if studies and len(words.runs) > 1:
        raise InputError(
            f"{studies[0]}: is a study: expected runs to compare, or a single study to draw again"
        )
    if studies:
        return _report_study(words)
    if len(words.runs) == 1:
        redrawn, files = redraw(words.runs[0], words.output, say=say)
        if words.json:
            print_json(asdict(redrawn))
        else:
            say(f"wrote {some(list(map(str, files)))}")
        return 0
    report, page = compare_runs(words.runs, words.output)
    if words.json:
        print_json(asdict(report))
    else:
        from locft.cli.show import make_console, show_page

        show_page(make_console(), page)
    if words.output is not None:
        say(f"wrote {Path(words.output) / 'report.html'}, with report.md and report.json")
    return 0


def _report_study(words: argparse.Namespace) -> int:
    from locft.cli.show import make_console, show_page
    from locft.study.redraw import redraw_study

    report, page, files = redraw_study(words.runs[0], words.output)
    if words.json:
        print_json(asdict(report))
    else:
        show_page(make_console(), page)
    say(f"wrote {some(list(map(str, files)))}")
    return 0


def _families(words: argparse.Namespace) -> int:
    from locft.families.page import describe_families
    from locft.families.records import read_families

    if words.check:
        _quiet_libraries()
        from locft.families.suite import check_families

        found = check_families(words.families)
    else:
        found = read_families().choose(tuple(words.families))
    if words.json:
        print_json(asdict(found))
    else:
        from locft.cli.show import make_console, show_page

        show_page(make_console(), describe_families(found))
    has_failed = any(one.status == "failed" for one in found.families)
    return LocftError.exit_status if has_failed else 0


def _locate(words: argparse.Namespace) -> int:
    config = _config(words)
    if words.output is not None:
        refuse_taken(Path(words.output))
    _quiet_libraries()
    from locft.recipe.locate import locate
    from locft.recipe.locate_page import describe_found, save_found

    budget_s = seconds_of(config.budget)
    found = locate(words.model, words.edits, budget_s, config.prefer, config, say=say)
    if words.output is not None:
        save_found(found, Path(words.output))
    if words.json:
        print_json(asdict(found))
    else:
        from locft.cli.show import make_console, show_page

        show_page(make_console(), describe_found(found))
    if words.output is not None:
        say(f"wrote {Path(words.output) / 'report.html'}, with report.md and report.json")
    return 0


def _compare(words: argparse.Namespace) -> int:
    _quiet_libraries()
    from locft.cli.study import run_compare

    # Read by the libraries in each process.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return run_compare(words, _config(words))


def _study(words: argparse.Namespace) -> int:
    _quiet_libraries()
    from locft.cli import study

    done: int = getattr(study, f"run_{words.study}")(words, _config(words))
    return done


def _bench(words: argparse.Namespace) -> int:
    _quiet_libraries()
    from locft.cli import bench

    done: int = getattr(bench, f"run_{words.benchmark}")(words, _config_of_patch(words))
    return done


_COMMANDS = {
    "edit": _edit,
    "ask": _ask,
    "eval": _eval,
    "lint": _lint,
    **{name: _patches(name) for name in ("apply", "stack", "revert", "status", "inspect", "diff")},
    "export": _export,
    "report": _report,
    "locate": _locate,
    "compare": _compare,
    "study": _study,
    "bench": _bench,
    "convert": _convert,
    "families": _families,
}


def _config(words: argparse.Namespace) -> RunConfig:
    """Put the settings together: defaults, then the run file, then flags."""
    file = getattr(words, "config", None)
    config = RunConfig() if file is None else read_config(Path(file))
    given = {
        key.removeprefix("setting_"): value
        for key, value in vars(words).items()
        if key.startswith("setting_")
    }
    return with_settings(config, given)


def _config_of_patch(words: argparse.Namespace) -> RunConfig:
    """Put the settings together; a patch is asked in the format that it was trained in."""
    config = _config(words)
    if getattr(words, "patch", None) is None or hasattr(words, "setting_format"):
        return config
    from locft.patch.format import open_patch

    return with_settings(config, {"format": open_patch(Path(words.patch)).manifest.format})


def _pass_gates(gates: Sequence[Gate], figures: Mapping[str, Figure]) -> int:
    failures = [failure for gate in gates if (failure := gate.failure(figures)) is not None]
    for failure in failures:
        say(failure)
    return LocftError.exit_status if failures else 0


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's own class would have to be imported; on a CPU it raises a plain RuntimeError.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def _what_is_kept(words: argparse.Namespace) -> str:
    if getattr(words, "in_place", False):
        return f"`locft status {words.model}` says what the folder holds now"
    output = getattr(words, "output", None)
    if words.command in ("study", "compare"):
        is_begun = (Path(words.output) / "trials.jsonl").exists()
        kept = f"the trials that are done are kept in {words.output}, and the same command goes on"
        return kept if is_begun else "no trial was done"
    # It appears when it is whole, so only telling of it went wrong.
    whole = "report.json" if words.command == "edit" else "*"
    if output is not None and any(Path(output).glob(whole)):
        return f"{output} was written, and is whole"
    if words.command == "eval" and (words.model == "endpoint" or words.judge):
        return "no scores were taken"  # answers may be kept, and whoever kept them says so
    if words.command != "edit" or words.plan:
        return "nothing was kept"
    patch = Path(words.output) / "patch"
    if not patch.exists():
        return "training was not done, and nothing was kept"
    return (
        f"the finished patch is kept in {patch}, without scores "
        f"(locft eval {words.model} {patch.parent / 'edits.jsonl'} --patch {patch} takes them)"
    )


def _quiet_libraries() -> None:
    """Keep other libraries' notices off stderr, and their bars, too, where it is no terminal."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    from transformers.utils import logging

    logging.set_verbosity_error()
