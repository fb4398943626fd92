"""Nothing in the sources could run code out of a file: no pickles, no evaluated text."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "bench", "fuzz")

# What unpickles, or runs what it unpickles.
BANNED_MODULES = frozenset(
    {
        *("pickle", "_pickle", "cPickle", "pickletools", "jsonpickle", "cloudpickle"),
        *("marshal", "shelve", "dill", "joblib"),
    }
)
# Builtins that take text for code. Methods of these names (a model's eval, re.compile) are others.
BANNED_BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})
BANNED_CALLS = frozenset(
    {
        *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__"),
        *("torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"),
        *("torch.serialization.load", "torch._weights_only_unpickler.load"),
        *("transformers.modeling_utils.load_state_dict", "transformers.pytorch_utils.load_state_dict"),
        *("numpy.lib.format.read_array", "pandas.read_pickle", "runpy.run_path", "runpy.run_module"),
        *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all"),
        *("code.interact", "imp.load_source", "importlib.util.spec_from_file_location"),
    }
)
# Keyword arguments that let a library do the same, and may only be the constant False.
BANNED_KEYWORDS = frozenset({"allow_pickle", "trust_remote_code"})


def violations(source: str) -> list[str]:
    """List what a source does that could run code out of a file, with its lines."""
    tree = ast.parse(source)
    names = dict(_imported(tree))
    found = [
        f"{line}: imports {module}"
        for line, module in _modules(tree)
        if module.partition(".")[0] in BANNED_MODULES
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            origins = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [f"{node.lineno}: imports {one}" for one in origins if one in BANNED_CALLS]
        elif (
            isinstance(node, ast.Name)
            and isinstance(node.ctx, ast.Load)  # a field may have the name
            and node.id in BANNED_BUILTINS
            and node.id not in names
        ):
            found.append(f"{node.lineno}: uses {node.id}")
        elif isinstance(node, ast.Attribute) and (name := _full_name(node, names)) in BANNED_CALLS:
            found.append(f"{node.lineno}: uses {name}")
        elif isinstance(node, ast.keyword) and node.arg in BANNED_KEYWORDS:
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append(f"{node.value.lineno}: passes {node.arg}")
        elif isinstance(node, ast.Constant) and node.value in BANNED_KEYWORDS:
            found.append(f"{node.lineno}: names {node.value}")  # for a dict of keyword arguments
    return found


def _modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Find the modules that are imported, by statement or by a call with a constant name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.Call) and node.args:
            name = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            )
            [first, *_] = node.args
            is_named = isinstance(first, ast.Constant) and isinstance(first.value, str)
            if name in ("import_module", "find_spec", "__import__") and is_named:
                yield node.lineno, str(getattr(first, "value", ""))


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Find what each name that an import binds stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (
                    alias.asname or alias.name.partition(".")[0],
                    (alias.name if alias.asname else alias.name.partition(".")[0]),
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _full_name(node: ast.expr, names: dict[str, str]) -> str:
    """Spell out a dotted name, with the module that an import bound its first part to."""
    if isinstance(node, ast.Attribute):
        return f"{_full_name(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_source_runs_code_out_of_files(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = [
        f"{file.relative_to(ROOT)}:{each}"
        for file in files
        for each in violations(file.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        *(f"import {module}" for module in sorted(BANNED_MODULES)),
        "import pickle as p",
        "import os, marshal",
        "from pickle import loads",
        "from pickle import loads as parse",
        "import joblib.numpy_pickle",
        "from cloudpickle.cloudpickle import dumps",
        "def f():\n    import dill",
        "import importlib\nimportlib.import_module('pickle')",
        "from importlib import import_module\nimport_module('shelve')",
        "__import__('os')",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=True)",
        "import torch as t\nt.load(path)",
        "from torch import load",
        "from torch import load as read",
        "import torch.jit\ntorch.jit.load(path)",
        "from torch import jit\njit.load(path)",
        "import torch\nread = torch.load",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy\nnumpy.load(path, allow_pickle=flag)",
        "import numpy as np\nnp.load(path, **{'allow_pickle': True})",
        "import pandas as pd\npd.read_pickle(path)",
        "eval(text)",
        "exec(text)",
        "exec(compile(text, name, 'exec'))",
        "run = eval",
        "list(map(eval, texts))",
        "import builtins\nbuiltins.eval(text)",
        "from builtins import exec",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=settings.trust)",
        "AutoModel.from_pretrained(path, **{'trust_remote_code': True})",
        "options = dict(trust_remote_code=True)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load",
        "import runpy\nrunpy.run_path(path)",
    ],
)
def test_what_could_run_code_is_found(source: str) -> None:
    assert violations(f"import json\n{source}\njson.loads(text)\n") != []


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "model.train().eval()",
        "import re\nre.compile(pattern)",
        "import re\npattern = re.compile('eval(x)')",
        "import torch\ntorch.compile(model)",
        "AutoModel.from_pretrained(path, trust_remote_code=False)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import json\njson.load(file)",
        "import tomllib\ntomllib.loads(text)",
        "import yaml\nyaml.safe_load(text)",
        "from safetensors.torch import load",
        "from importlib import import_module\nimport_module('locft.recipe')",
        "'import pickle; eval(x)'",
        "from . import pickle_free",
        "self.exec(command)",
    ],
)
def test_what_only_looks_like_it_is_not_found(source: str) -> None:
    assert violations(source) == []
