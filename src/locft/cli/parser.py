"""The words of the command line: commands, arguments, flags and their help."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NoReturn

from locft.bench.schema import SHAPES, VARIANTS
from locft.config import choices_of, parse_setting, settings
from locft.data.contexts import CONTEXTS
from locft.errors import ConfigError, printable
from locft.report.words import PROTOCOL_SCORES
from locft.study.plans import ALL_METHODS, ComparePlan, LocationsPlan, PipelinesPlan, ScalePlan

_MODEL_HELP = "a Hugging Face id, a local model folder, or `demo` (SmolLM2-135M-Instruct, embedded)"
_EDITS_HELP = "edits: a JSONL, JSON or CSV file, or `demo` (60 facts that come with locft)"
_DESCRIPTION = """\
Edit facts inside a language model, and prove what it did.

  locft edit MODEL EDITS -o RUN     train the edits into one small part of the model
  locft ask MODEL --patch RUN "..."  see the answers before and after, side by side
  locft apply MODEL RUN -o DIR      make an edited model folder that transformers loads
  locft status DIR                  say which patches are in it; `locft revert` takes them out again
"""
_EDIT_EPILOG = """\
examples:
  locft edit demo demo -o runs/demo
  locft edit Qwen/Qwen2.5-0.5B-Instruct facts.jsonl -o runs/facts
  locft edit ./my-model -o runs/one --prompt "The capital of Australia is" --target "Perth"
  locft edit demo facts.csv -o runs/more --location 50%.mlp --epochs 40 --gate 'reliability>=0.95'
  locft edit demo facts.csv --plan

EDITS needs `prompt` and `target`; `rephrases` and `locality` prompts are only scored, never trained.
"""
_EVAL_EPILOG = """\
examples:
  locft eval demo facts.jsonl --patch runs/facts
  locft eval demo facts.jsonl --patch runs/facts --show failures
  locft eval demo facts.jsonl --patch runs/facts --protocols locft,teacher-forced
  locft eval demo facts.jsonl --patch runs/facts --contexts raw,qa,chat,prefix
  locft eval ./edited-model facts.jsonl --base ./original-model --json
  locft eval demo facts.jsonl --patch runs/facts --capability paper --max-capability-drop 1.0
  LOCFT_ENDPOINT_URL=http://localhost:8000/v1 LOCFT_ENDPOINT_MODEL=edited locft eval endpoint facts.jsonl

Protocols: locft is the published one; wild takes longer answers, and a judge; teacher-forced is what
older papers report; likelihood is CounterFact's, for edits with `old`. Contexts show how far it carries.
Keys for servers, where they want one: LOCFT_ENDPOINT_KEY, LOCFT_JUDGE_KEY.
"""
_ASK_EPILOG = """\
An answer is the first line that holds something, of at most 32 tokens. Scores follow the published
protocol instead, which also stops at ".".
"""
_EXPORT_EPILOG = """\
examples:
  locft export runs/facts --lora -o adapter
  locft export runs/facts --lora --rank 64 -o adapter
  locft export runs/facts --full -o edited-model

An adapter holds the change of the tuned matrices, rounded to a rank: it is smaller than they are, and
leaves something out. How many edits that loses is measured as it is served, W x + B (A x).
"""
_REPORT_EPILOG = """\
examples:
  locft report runs/facts                              report.html and report.md, from the run's figures
  locft report studies/locations                       the same of a study, of all trials in its folder
  locft report runs/facts runs/other                   tables: the others against the first
  locft report runs/facts runs/other -o comparison     report.html, report.md and report.json, too

An evaluation within a run folder (locft eval ... --patch runs/facts -o runs/facts/evaluation) is shown
with the run. Differences are paired, on the items that both runs have. Nothing is measured: no torch.
"""
_FAMILIES_EPILOG = """\
examples:
  locft families                      all, as they were tried with one version of transformers
  locft families qwen3_moe            one of them
  locft families --check qwen3_moe    tried out now, with the transformers that is installed

exit status: 1 if nothing refuses a family, and an edit of its tiny model goes wrong
"""
_ENGINE_EPILOG = """\
examples:
  locft bench engine
  locft bench engine demo facts.jsonl --num-edits 200 -o results
  locft bench engine --device cuda --shape llama-8b --variants published,engine_best

The variants are the published procedure, written plainly; TRL's trainer (pip install 'locft[bench]');
and locft, in float32 and at its best. Each has a process of its own. Let nothing else run meanwhile.
"""
_GROWTH_EPILOG = """\
examples:
  locft bench growth demo facts.jsonl -o growth
  locft bench growth demo facts.jsonl --sizes 100,1000 --memory-sizes "" --locations ""

Where EDITS holds fewer edits than are asked for, others of the same lengths are made up. Memory is what
no file backs, measured in a process of its own for each size, which trains for --steps steps only.
"""
_SCORING_EPILOG = """\
examples:
  locft bench scoring demo --patch runs/facts
  locft bench scoring demo facts.jsonl --patch runs/facts --num-edits 200 -o scoring

An edited model answers many prompts as was guessed, an unedited one few. The exit status is 1 if an
answer or a score differs.
"""
_COMPARE_EPILOG = """\
examples:
  locft compare demo facts.jsonl -o compared
  locft compare demo facts.jsonl -o compared --method ft-m --method ft-m:location=10.mlp --method full
  locft compare demo facts.jsonl -o compared --method ft-m --method memit --method alphaedit:ridge=10
  locft compare demo facts.jsonl -o compared --seeds 0,1,2 --capability lambada --capability-data DIR

Methods that train: ft-m, lora, adalora, full, ft-l, roselora. Their keys: lr, batch_size, pipeline
(breadth-first or depth-first), augment, max_drift; and location and preserve for ft-m and ft-l.
Editors, which insert batches of edits: rome, memit, rect, alphaedit (edits must name their subject) and
ultraedit. Their keys: lr and batch_size. An unknown key is told the known ones.
Each has a process of its own. Trials are kept as they are done: the same command goes on, and one with
more methods or seeds does what is missing.
"""
_LOCATE_EPILOG = """\
examples:
  locft locate demo facts.jsonl
  locft locate ./my-model facts.jsonl --budget 30m --prefer generalization -o location
  locft edit demo facts.jsonl -o runs/facts --location auto --budget 5m

Many locations are tried on a few of the edits, the better ones again on more. What carries further
often harms more: --prefer says what counts (nothing, 1 or 4 points for each 0.01 nats of drift).
"""
_LOCATIONS_EPILOG = """\
examples:
  locft study locations demo facts.jsonl -o locations
  locft study locations demo facts.jsonl -o locations --layers 18-24 --modules mlp,mlp.down

Each location is trained on the same edits and scored. Trials are kept as they are done: the same command
goes on where it was cut short, and one with more layers or modules does what is missing.
"""
_SCALE_EPILOG = """\
examples:
  locft study scale demo facts.jsonl -o scale
  locft study scale demo facts.jsonl -o scale --sizes 100,1000,5000 --scored 500

The same edits, the first ones of the file, are scored at every size. Trials are kept as they are done.
"""
_PIPELINES_EPILOG = """\
examples:
  locft study pipelines demo facts.jsonl -o pipelines
  locft study pipelines demo facts.jsonl -o pipelines --method ft-m --batches 1,20,100 --seeds 0
  locft study pipelines demo facts.jsonl -o pipelines --method lora:rank=16,lr=0.002 --method full

Depth-first trains each edit until it is learnt, and then the next, in a single pass; breadth-first goes
through all of them in every epoch. Trials are kept as they are done: the same command goes on where it
was cut short, and one with more methods, batches or seeds does what is missing.
"""
_PLACES = """\
Give either -o DIR or --in-place. Either keeps what is needed to go back: `locft revert` restores every
byte. A copy has the safetensors weights and what else transformers needs; weights in other formats,
Python code and subfolders stay behind. Shards that do not change are shared with MODEL where they can.
"""
_STATUS = "exit status: 0 done, 1 a gate or the run failed, 2 bad input, 130 interrupted"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where to read on, instead of printing all flags."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"locft: error: {printable(message)} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = _Parser(
        prog="locft",
        description=_DESCRIPTION,
        epilog=f"`locft COMMAND --help` explains a command. {_STATUS}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"locft {version('locft')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    edit = _command(commands, "edit", "edit facts in a model and score the result", _EDIT_EPILOG)
    edit.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    edit.add_argument("edits", metavar="EDITS", nargs="?", help=_EDITS_HELP)
    edit.add_argument("-o", "--output", metavar="RUN", help="run folder to make")
    edit.add_argument(
        "--plan",
        action="store_true",
        help="predict time, memory and disk space, and do nothing: needs no -o, loads no weights",
    )
    edit.add_argument("--prompt", help="one edit without a file: what the model is given")
    edit.add_argument("--target", help="one edit without a file: what it shall answer")
    edit.add_argument(
        "--config", metavar="FILE", help="TOML file of settings, named as their flags; flags win"
    )
    _add_gate(edit)
    _add_json(edit, "print report.json, or the plan, on stdout instead of tables")
    _add_settings(edit, {"method", "search", "edits", "scores", "machine", "model"})

    ask = _command(commands, "ask", "ask a model, before and after an edit side by side", _ASK_EPILOG)
    ask.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    ask.add_argument("prompts", metavar="PROMPT", nargs="+", help="what to ask")
    ask.add_argument("--patch", metavar="P", help="patch or run folder")
    _add_json(ask, "print the answers as JSON on stdout")
    _add_settings(ask, {"machine", "model"}, ("format",))

    evaluate = _command(
        commands, "eval", "score a model, or a model and a patch, on edits", _EVAL_EPILOG
    )
    evaluate.add_argument(
        "model",
        metavar="MODEL",
        help=f"{_MODEL_HELP}; or `endpoint`: an OpenAI-compatible server, see below",
    )
    evaluate.add_argument("edits", metavar="EDITS", help=_EDITS_HELP)
    evaluate.add_argument("--patch", metavar="P", help="patch or run folder; MODEL is unedited")
    evaluate.add_argument(
        "--base",
        metavar="MODEL",
        help="the unedited model, for locality and drift of an edited one",
    )
    for flag, default, what, known in (
        ("protocols", "locft", "rules to score by", PROTOCOL_SCORES),
        ("contexts", "", "contexts to put the prompts into, for a matrix", CONTEXTS),
    ):
        evaluate.add_argument(
            f"--{flag}",
            type=_names,
            default=default,
            metavar="NAME,NAME",
            help=f"{what}: {', '.join(known)} (default: {default or 'none'})",
        )
    evaluate.add_argument(
        "--judge",
        action="store_true",
        help="let a chat model judge the answers of protocol wild (LOCFT_JUDGE_URL, _MODEL, _KEY)",
    )
    _add_capability(evaluate)
    evaluate.add_argument(
        "--max-capability-drop",
        type=_points,
        metavar="POINTS",
        help="exit with status 1 if capability dropped by more percentage points, beyond doubt",
    )
    evaluate.add_argument(
        "--strict",
        action="store_true",
        help="exit with status 1 also where such a drop cannot be excluded",
    )
    evaluate.add_argument(
        "--show",
        choices=("none", "failures", "all"),
        default="none",
        help="which answers to show, with the cause of each failure (default: none)",
    )
    evaluate.add_argument(
        "-o", "--output", metavar="DIR", help="folder to make, with report.html and answers.jsonl"
    )
    _add_gate(evaluate)
    _add_json(evaluate, "print the report and all answers as JSON on stdout")
    _add_settings(evaluate, {"edits", "scores", "machine", "model"}, ("format",))

    lint = _command(commands, "lint", "report every problem of an edits file at once", "")
    lint.add_argument("edits", metavar="EDITS", help=_EDITS_HELP)
    lint.add_argument("--model", metavar="MODEL", help="check against this model's tokenizer, too")
    _add_json(lint, "print the problems as JSON on stdout")
    _add_settings(lint, {"model"}, ("format",))

    apply = _command(commands, "apply", "put a patch into a model folder", _PLACES)
    apply.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    apply.add_argument("patch", metavar="PATCH", help="patch or run folder")
    _add_places(apply)
    _add_json(apply, "print what was put in as JSON on stdout")
    _add_settings(apply, {"model"})

    stack = _command(commands, "stack", "put several patches into a model folder, all or none", _PLACES)
    stack.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    stack.add_argument(
        "patches",
        metavar="PATCH",
        nargs="+",
        help="patch or run folders, in any order in which they fit",
    )
    _add_places(stack)
    _add_json(stack, "print what was put in as JSON on stdout")
    _add_settings(stack, {"model"})

    revert = _command(commands, "revert", "take patches out of a model folder again", _PLACES)
    revert.add_argument("model", metavar="MODEL", help="the edited model folder")
    which = revert.add_mutually_exclusive_group()
    which.add_argument(
        "--patch",
        metavar="P",
        help="patch or run folder, or the id from `locft status` (default: the newest)",
    )
    which.add_argument("--all", action="store_true", help="take out every patch")
    _add_places(revert)
    _add_json(revert, "print what was taken out as JSON on stdout")

    status = _command(
        commands,
        "status",
        "say which patches a model folder carries, and whether they are intact",
        "exit status: 1 if a patched tensor was changed, or the old values to go back to are lost",
    )
    status.add_argument("model", metavar="MODEL", help="the model folder")
    _add_json(status, "print the status as JSON on stdout")

    inspect = _command(commands, "inspect", "show what a patch is, and verify it", "")
    inspect.add_argument("patch", metavar="PATCH", help="patch or run folder")
    _add_json(inspect, "print the manifest as JSON on stdout")

    diff = _command(
        commands,
        "diff",
        "compare two model folders, bit by bit",
        "exit status: 0, also where they differ",
    )
    diff.add_argument("first", metavar="FIRST", help="a model folder")
    diff.add_argument("second", metavar="SECOND", help="another model folder")
    _add_json(diff, "print the differences as JSON on stdout")

    export = _command(
        commands, "export", "make a LoRA adapter or a whole model to serve", _EXPORT_EPILOG
    )
    export.add_argument("patch", metavar="PATCH", help="patch or run folder")
    kind = export.add_mutually_exclusive_group(required=True)
    kind.add_argument("--lora", action="store_true", help="an adapter that PEFT and vLLM load")
    kind.add_argument(
        "--full", action="store_true", help="a model folder with the patch in it, and no way back"
    )
    export.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to make")
    export.add_argument(
        "-r",
        "--rank",
        type=_rank,
        metavar="N|auto",
        help="rank of the adapter; auto takes the smallest that loses none of the edits (default: auto)",
    )
    export.add_argument(
        "--model", metavar="MODEL", help="the unedited model (default: the one that PATCH names)"
    )
    export.add_argument(
        "--edits",
        metavar="EDITS",
        help="edits to measure the adapter on (default: those of a run folder)",
    )
    _add_json(export, "print what was written as JSON on stdout")
    _add_settings(export, {"edits", "machine", "model"})

    report = _command(
        commands,
        "report",
        "draw the report of a run or study again, or compare runs side by side",
        _REPORT_EPILOG,
    )
    report.add_argument(
        "runs", metavar="RUN", nargs="+", help="run folder, or the folder of an evaluation or of a study"
    )
    report.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="folder to make for what is drawn (default: of one run, its own folder; of several, none)",
    )
    _add_json(report, "print the report, or the comparison, as JSON on stdout")

    families = _command(
        commands, "families", "say which families of models can be edited", _FAMILIES_EPILOG
    )
    families.add_argument(
        "families",
        metavar="FAMILY",
        nargs="*",
        help="the model_type of a configuration: llama, qwen3_moe (default: all)",
    )
    families.add_argument(
        "--check",
        action="store_true",
        help="try them out now, on tiny models made by the transformers that is installed",
    )
    _add_json(families, "print the verdicts as JSON on stdout instead of tables")

    locate = _command(commands, "locate", "find a good tuning location", _LOCATE_EPILOG)
    locate.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    locate.add_argument("edits", metavar="EDITS", help=_EDITS_HELP)
    locate.add_argument("-o", "--output", metavar="DIR", help="folder to make, with the report")
    _add_json(locate, "print what was found as JSON on stdout instead of tables")
    also = ("format", "lr", "batch_size", "stop_loss", "loss_mean", "seed", "on_conflict", "drift_text")
    _add_settings(locate, {"search", "machine", "model"}, also)

    compare = _command(
        commands, "compare", "compare methods or settings on the same edits", _COMPARE_EPILOG
    )
    several = ComparePlan()
    own = ("location", "batch_size")
    _add_study(compare, None, several.num_passages, own)
    compare.add_argument(
        "--num-edits", type=_count, metavar="N", help="how many edits to take (default: all)"
    )
    _add_methods(compare)
    _add_list(compare, "seeds", _seeds, several.seeds, "each an order of the edits, a trial of its own")
    _add_capability(compare)

    study = _command(commands, "study", "repeat the paper's controlled experiments on any model", "")
    _add_studies(study)

    bench = _command(commands, "bench", "measure locft on this machine", "")
    _add_benchmarks(bench)

    convert = _command(commands, "convert", "turn a GGUF file into a float32 model folder", "")
    convert.add_argument("file", metavar="FILE.gguf", help="the GGUF file")
    convert.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to make")
    return parser


def _add_benchmarks(bench: argparse.ArgumentParser) -> None:
    """Add the benchmarks, each a command of its own below `bench`."""
    benchmarks = bench.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)

    engine = _command(benchmarks, "engine", "time training beside what else would do it", _ENGINE_EPILOG)
    _add_subject(engine, "demo")
    engine.add_argument(
        "-o", "--output", metavar="DIR", help="folder to make, with engine.json and a picture"
    )
    engine.add_argument(
        "--shape",
        choices=SHAPES,
        help="instead of MODEL and EDITS, take random ones of this shape (llama-8b: batches of 100)",
    )
    _add_count(engine, "num-edits", 100, "how many edits to take, from the first on")
    _add_count(engine, "rounds", 2, "how often to let each variant have its turn")
    engine.add_argument(
        "--variants",
        type=_names,
        default=VARIANTS,
        metavar="V,V",
        help=f"what to measure (default: {','.join(VARIANTS)})",
    )
    _add_json(engine, "print the measurements as JSON on stdout instead of a table")
    engine_settings = ("location", "lr", "batch_size", "epochs", "seed", "device", "revision")
    _add_settings(engine, set(), engine_settings, {"epochs": 10})

    growth = _command(
        benchmarks, "growth", "time training with more edits and at other depths", _GROWTH_EPILOG
    )
    _add_subject(growth, "demo")
    growth.add_argument(
        "-o", "--output", metavar="DIR", help="folder to make, with growth.json and a picture"
    )
    for flag, default, what in (
        ("sizes", "100,300,1000,3000,10000", "numbers of edits to time an epoch with"),
        ("memory-sizes", "1000,10000,100000", "numbers of edits to measure memory with"),
    ):
        growth.add_argument(
            f"--{flag}",
            type=_counts,
            default=default,
            metavar="N,N",
            help=f"{what} (default: {default})",
        )
    locations = "10.mlp.down,20.mlp.down,29.mlp.down"
    growth.add_argument(
        "--locations",
        type=_names,
        default=locations,
        metavar="L,L",
        help=f"tuning locations to time an epoch at (default: {locations})",
    )
    _add_count(growth, "depth-edits", 1000, "edits to time those locations with")
    _add_count(growth, "steps", 50, "steps to take where memory is measured")
    _add_json(growth, "print the measurements as JSON on stdout instead of tables")
    also = ("location", "format", "batch_size", "epochs")
    _add_settings(growth, {"machine", "model"}, also, {"epochs": 1})

    scoring = _command(
        benchmarks, "scoring", "check that guessing changes no answer, and time it", _SCORING_EPILOG
    )
    _add_subject(scoring, "those of the run folder, or demo")
    scoring.add_argument("--patch", metavar="P", help="patch or run folder to put into MODEL")
    _add_count(scoring, "num-edits", 1000, "how many edits to take, from the first on")
    scoring.add_argument("-o", "--output", metavar="DIR", help="folder to make, with scoring.json")
    _add_json(scoring, "print the measurements as JSON on stdout instead of a table")
    _add_settings(scoring, {"machine", "model"}, ("format",))


def _add_studies(study: argparse.ArgumentParser) -> None:
    """Add the studies, each a command of its own below `study`."""
    studies = study.add_subparsers(dest="study", metavar="STUDY", required=True)
    locations = _command(
        studies, "locations", "train at each layer and module in turn", _LOCATIONS_EPILOG
    )
    ground = LocationsPlan()
    _add_study(locations, ground.num_edits, ground.num_passages, ("batch_size", "seed"))
    locations.add_argument(
        "--layers",
        type=_layers,
        default=(),
        metavar="A,B",
        help="layers, from 0, or A-B for all from A to B (default: every third, and the last)",
    )
    _add_list(locations, "modules", _names, ground.modules, "modules of each layer")

    scale = _command(studies, "scale", "train more and more edits", _SCALE_EPILOG)
    more = ScalePlan()
    _add_study(scale, None, more.num_passages, ("location", "batch_size", "seed"))
    _add_list(scale, "sizes", _counts, more.sizes, "numbers of edits, from the first on")
    _add_count(scale, "scored", more.num_scored, "how many edits to score, from the first on")

    pipelines = _command(
        studies, "pipelines", "train depth-first and breadth-first by several methods", _PIPELINES_EPILOG
    )
    plan = PipelinesPlan()
    _add_study(pipelines, plan.num_edits, plan.num_passages, ("location",))
    _add_methods(pipelines)
    _add_list(pipelines, "batches", _counts, plan.batches, "edits per step, breadth-first")
    _add_list(pipelines, "seeds", _seeds, plan.seeds, "each an order of the edits, a trial of its own")


def _add_study(
    parser: argparse.ArgumentParser, num_edits: int | None, num_passages: int, own: Iterable[str]
) -> None:
    """Add what all studies have in common; `own` names more settings."""
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument("edits", metavar="EDITS", help=_EDITS_HELP)
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder of the study")
    if num_edits is not None:
        _add_count(parser, "num-edits", num_edits, "how many edits to take, from the first on")
    _add_count(parser, "passages", num_passages, "passages of neutral text to measure drift on")
    _add_json(parser, "print the report as JSON on stdout instead of tables")
    also = ("format", "lr", "epochs", "stop_loss", "loss_mean", "on_conflict", "drift_text")
    _add_settings(parser, {"machine", "model"}, (*also, *own))


def _add_methods(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method",
        action="append",
        metavar="NAME[:KEY=VALUE,...]",
        help="a method to compare, with settings of its own, such as lora:rank=16,lr=0.002; may be "
        f"given several times (default: {', '.join(ALL_METHODS)})",
    )


def _add_capability(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--capability",
        type=_names,
        default=(),
        metavar="TASK,TASK",
        help="tasks of lm-eval to ask before and after, or `paper` for the paper's five",
    )
    parser.add_argument(
        "--capability-data", metavar="DIR", help="folder with TASK.jsonl for each; nothing is fetched"
    )
    parser.add_argument(
        "--capability-limit", type=_count, metavar="N", help="ask at most so many items of each task"
    )


def _add_list(
    parser: argparse.ArgumentParser, flag: str, kind: Any, default: Sequence[object], what: str
) -> None:
    shown = ",".join(map(str, default))
    parser.add_argument(
        f"--{flag}", type=kind, default=tuple(default), metavar="A,B", help=f"{what} (default: {shown})"
    )


def _add_subject(parser: argparse.ArgumentParser, default_edits: str) -> None:
    """Add the model and the edits of a benchmark, which may be left out."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help=f"{_MODEL_HELP} (default: demo)")
    parser.add_argument(
        "edits", metavar="EDITS", nargs="?", help=f"{_EDITS_HELP} (default: {default_edits})"
    )


def _add_count(parser: argparse.ArgumentParser, flag: str, default: int, what: str) -> None:
    parser.add_argument(
        f"--{flag}", type=_count, default=default, metavar="N", help=f"{what} (default: {default})"
    )


def parse_words(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the words of the command line; positional ones may also stand behind flags."""
    parser = build_parser()
    words, rest = parser.parse_known_args(arguments)
    # argparse fills optional positionals from the first run of positionals only.
    if rest and not any(word.startswith("-") for word in rest):
        if words.command == "ask":
            words.prompts, rest = [*words.prompts, *rest], []
        elif words.command == "report":
            words.runs, rest = [*words.runs, *rest], []
        elif words.command in ("edit", "bench") and getattr(words, "edits", "") is None:
            words.edits, *rest = rest
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if words.command == "edit" and words.output is None and not words.plan:
        parser.error("one of the arguments -o/--output --plan is required")
    return words


def _command(
    commands: Any,
    name: str,
    what: str,
    epilog: str,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog=epilog + ("\n" if epilog else "") + _STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _add_places(parser: argparse.ArgumentParser) -> None:
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("-o", "--output", metavar="DIR", help="folder to make; MODEL stays as it is")
    place.add_argument("--in-place", action="store_true", help="change MODEL itself, all at once")


def _add_gate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gate",
        action="append",
        default=[],
        metavar="'SCORE>=X'",
        help="exit with status 1 unless the score holds, e.g. 'reliability>=0.95', 'drift<=0.1'",
    )


def _add_json(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--json", action="store_true", help=what)


def _add_settings(
    parser: argparse.ArgumentParser,
    groups: set[str],
    also: Iterable[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Add a flag for each setting of some groups; one that is not given stays away from the result.

    `defaults` says what the command itself takes where it is not what `RunConfig` has.
    """
    box = parser.add_argument_group("settings")
    for setting in settings():
        if setting.metadata["group"] not in groups and setting.name not in also:
            continue
        choices = choices_of(setting)
        value = (defaults or {}).get(setting.name, setting.default)
        default = "" if value is None else f" (default: {value})".replace("%", "%%")
        box.add_argument(
            f"--{setting.name.replace('_', '-')}",
            dest=f"setting_{setting.name}",
            default=argparse.SUPPRESS,
            type=_setting_type(setting.name),
            metavar="|".join(choices) if choices else setting.name.upper(),
            help=setting.metadata["help"] + default,
        )


def _rank(text: str) -> Any:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"rank is {text!r}: expected a whole number over 0 or auto")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number over 0")
    return int(text)


def _points(text: str) -> float:
    try:
        points = float(text)
    except ValueError:
        points = -1.0
    if not 0 <= points <= 100:
        raise argparse.ArgumentTypeError(f"{text!r}: expected percentage points, 0 to 100")
    return points


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_count, _names(text)))


def _seeds(text: str) -> tuple[int, ...]:
    if not text or not all(part.isdecimal() for part in _names(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers of 0 or more, as 0,1,2")
    return tuple(map(int, _names(text)))


def _layers(text: str) -> tuple[int, ...]:
    layers: list[int] = []
    for part in _names(text):
        first, is_range, last = part.partition("-")
        if not first.isdecimal() or (is_range and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"{text!r}: expected layers, from 0, as 0,3,6 or 18-24")
        layers += range(int(first), int(last or first) + 1)
    return tuple(layers)


def _names(text: str) -> tuple[str, ...]:
    """Read a list with commas; nothing at all is an empty one."""
    return tuple(text.split(",")) if text else ()


def _setting_type(name: str) -> Any:
    def parse(text: str) -> Any:
        try:
            return parse_setting(name, text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse
