"""E5, E8: nothing that is shipped can run code from a file, unpack an archive or hand a string to a shell.

A look at the syntax trees of every shipped file, and of the scripts that make the shipped models: what a name in a
comment or a docstring says does not count, what an alias hides does.
"""
# ruff: noqa: N802 - the ids of faults in names of tests are upper case

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WHEEL = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"][
    "wheel"
]
# Modules that read code or objects out of bytes, or unpack archives.
MODULES = frozenset(
    {
        "pickle",
        "_pickle",
        "cPickle",
        "pickletools",
        "copyreg",
        "marshal",
        "shelve",
        "dill",
        "cloudpickle",
        "joblib",
        "yaml",
        "ruamel",
        "zipfile",
        "tarfile",
        "zipimport",
        "imp",
        "code",
        "codeop",
        "jsonpickle",
        "hickle",
        "pty",
    }
)
# Calls, by the full name that imports give them; "*" stands for any object.
CALLS = frozenset(
    {
        "eval",
        "exec",
        "compile",
        "__import__",
        "builtins.eval",
        "builtins.exec",
        "builtins.compile",
        "builtins.__import__",
        "torch.load",
        "torch.jit.load",
        "torch.hub.load",
        "torch.package.PackageImporter",
        "numpy.lib.format.read_array",
        "os.system",
        "os.popen",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
        "asyncio.create_subprocess_shell",
        "runpy.run_path",
        "shutil.unpack_archive",
        "shutil.register_unpack_format",
        "importlib.util.spec_from_file_location",
        "importlib.machinery.SourceFileLoader",
        "pandas.read_pickle",
        "pandas.eval",
        "*.extractall",
        "*.read_pickle",
    }
)
# Keyword arguments that are refused unless they are the constant that is given here.
KEYWORDS = {"shell": False, "allow_pickle": False, "trust_remote_code": False, "weights_only": True}
BUILTINS_BY_NAME = frozenset({"eval", "exec", "compile", "__import__"})
ENDINGS = frozenset(
    {
        ".py",
        ".pyi",
        ".json",
        ".jinja",
        ".safetensors",
        ".onnx",
        ".proto",
        ".html",
        ".css",
        ".js",
        ".svg",
        ".typed",
        ".md",
        ".txt",
    }
)


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The full name of an expression: imports and aliases resolved, `*` for what is no plain name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return "*"


def imported(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """(line, name in the file, full name) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                yield node.lineno, each.asname or each.name.split(".")[0], each.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for each in node.names:
                yield node.lineno, each.asname or each.name, f"{node.module}.{each.name}"


def findings(source: str) -> list[str]:
    """What is forbidden in a file: `line: what`."""
    tree, found = ast.parse(source), []
    names: dict[str, str] = {}
    for line, local, full in imported(tree):
        names[local] = full if local != full.split(".")[0] else local
        if full.split(".")[0] in MODULES or full in CALLS:
            found.append(f"{line}: imports {full}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += call_findings(node, names)
        elif isinstance(node, ast.Name | ast.Attribute) and dotted(node, names) in CALLS:
            found.append(f"{node.lineno}: names {dotted(node, names)}")
        elif "trust_remote_code" in source and "trust_remote_code" in (
            getattr(node, field, None) for field in ("value", "id", "arg", "attr")
        ):
            found.append(f"{getattr(node, 'lineno', 0)}: names trust_remote_code")
    return found


def call_findings(node: ast.Call, names: dict[str, str]) -> Iterator[str]:
    name = dotted(node.func, names)
    last = name.rpartition(".")[2]
    if f"*.{last}" in CALLS:
        yield f"{node.lineno}: calls {name}"
    if last in ("getattr", "attrgetter", "methodcaller", "import_module"):
        for argument in node.args:
            text = argument.value if isinstance(argument, ast.Constant) else ""
            if text in BUILTINS_BY_NAME or (isinstance(text, str) and text.split(".")[0] in MODULES):
                yield f"{node.lineno}: {last} of {text!r}"
    for keyword in node.keywords:
        if keyword.arg in KEYWORDS:
            allowed = isinstance(keyword.value, ast.Constant) and keyword.value.value is KEYWORDS[keyword.arg]
            if not allowed:
                yield f"{node.lineno}: {name}({keyword.arg}={ast.unparse(keyword.value)})"


def shipped() -> list[Path]:
    """Every file of the folders that the wheel is built from."""
    return sorted(
        path
        for folder in WHEEL["only-include"]
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )


BAD = {
    "import pickle": "imports pickle",
    "from marshal import loads": "imports marshal.loads",
    "import shelve as s": "imports shelve",
    "import yaml": "imports yaml",
    "import tarfile, os": "imports tarfile",
    "from zipfile import ZipFile": "imports zipfile.ZipFile",
    "def f():\n    import dill": "imports dill",
    "eval('1')": "names eval",
    "x = exec": "names exec",
    "from builtins import eval as e\ne('1')": "imports builtins.eval",
    "import builtins\nbuiltins.exec('1')": "names builtins.exec",
    "import builtins as b\nb.eval('1')": "names builtins.eval",
    "getattr(__builtins__, 'eval')('1')": "getattr of 'eval'",
    "import importlib\nimportlib.import_module('pickle')": "import_module of 'pickle'",
    "__import__('pickle')": "names __import__",
    "import torch\ntorch.load('x')": "names torch.load",
    "import torch as t\nt.load('x', weights_only=True)": "names torch.load",
    "from torch import load": "imports torch.load",
    "import subprocess\nsubprocess.run('x', shell=True)": "shell=True",
    "import subprocess\nsubprocess.run('x', shell=flag)": "shell=flag",
    "import os\nos.system('x')": "names os.system",
    "from os import popen as p": "imports os.popen",
    "import asyncio\nasyncio.create_subprocess_shell('x')": "names asyncio.create_subprocess_shell",
    "import shutil\nshutil.unpack_archive('x')": "names shutil.unpack_archive",
    "archive.extractall('x')": "calls archive.extractall",
    "open_it()[0].extractall()": "extractall",
    "import numpy as np\nnp.load('x', allow_pickle=True)": "allow_pickle=True",
    "AutoModel.from_pretrained('x', trust_remote_code=True)": "trust_remote_code=True",
    "f(**{'trust_remote_code': True})": "names trust_remote_code",
    "def f(trust_remote_code): pass": "names trust_remote_code",
}
GOOD = [
    "import subprocess\nsubprocess.run(['x'], shell=False)",
    "import re\nre.compile('x')",
    "'''no pickle, eval or torch.load here'''",
    "model.eval()",
    "import json\njson.load(open('x'))",
    "def loads(pickle): return pickle",
    "import numpy as np\nnp.load('x', allow_pickle=False)",
]


@pytest.mark.parametrize("source", BAD)
def test_the_scan_finds(source: str) -> None:
    assert any(BAD[source] in each for each in findings(source)), findings(source)


@pytest.mark.parametrize("source", GOOD)
def test_the_scan_passes_over(source: str) -> None:
    assert findings(source) == []


def test_E8_no_shipped_file_can_run_code_from_data() -> None:
    scripts = [path for path in shipped() if path.suffix in (".py", ".pyi")]
    assert len(scripts) > 100
    scripts += sorted((ROOT / "models").glob("*.py"))
    found = {
        str(path.relative_to(ROOT)): hits for path in scripts if (hits := findings(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_E5_what_is_shipped_is_text_weights_and_graphs() -> None:
    odd = [str(path.relative_to(ROOT)) for path in shipped() if path.suffix not in ENDINGS]
    assert odd == []
    linked = [str(path.relative_to(ROOT)) for path in shipped() if path.is_symlink()]
    assert linked == []


def test_E8_the_wheel_holds_these_files_and_no_others() -> None:
    builders = pytest.importorskip(
        "hatchling.builders.wheel", reason="hatchling, which builds the wheel, is not installed"
    )
    builder = builders.WheelBuilder(str(ROOT))
    built = {Path(included.path).resolve() for included in builder.recurse_included_files()}
    assert built == {path.resolve() for path in shipped()}
