"""What a docstring must say, by rules that are read off the code: over every public name of every package.

1. Every module, public class and function, and every public method of them begins with one sentence.
2. `Args:` names exactly the parameters there are. Results (named tuples) and protocols name every field instead.
3. What takes or gives tensors or arrays has `Shape:`, and every `nn.Module` has.
4. What gives an `Estimate` or `Bounds` has `Units:` and `Source:`, and every `nn.Module` has `Source:`.
5. What raises has `Raises:`; a `raise` or a check in a function's own body, or a class's constructor or call, counts.
6. Everything that computes has a doctest. Results, errors and protocols are shown where they come from.

`EXCEPT` holds what a rule does not fit, each with its reason; an entry that is no longer needed fails.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from torch import nn

import tinyalign

PACKAGES = ("connectors", "memory", "perceiver", "theory", "data", "models", "training", "evaluation")
PACKAGE = Path(tinyalign.__file__).parent
SECTIONS = ("Args", "Attributes", "Shape", "Units", "Returns", "Raises", "Source", "Example")
CHECKS = re.compile(r"^_?(check|require)_?\w*$")
EXCEPT: dict[tuple[str, str], str] = {
    ("memory.MilvusMemoryBank", "example"): "needs the extra [milvus]: docs/how-to/bank-beyond-one-machine.md",
    ("memory.SentenceTransformerKey", "example"): "needs a model's weights: tests/memory/test_sentence.py makes one",
    ("models.AttachedVLM", "example"): "made by attach_memory, which has one",
    ("models.TowerQuery", "example"): "needs a vision-language model: docs/how-to/attach-llava-like.md",
    ("models.TinyAlignConfig", "args"): "the other parameters are those of every transformers config",
    ("models.load_attached", "example"): "needs a saved adapter: docs/tutorials/align-your-own-vlm.md",
    ("training.StageTrainer", "example"): "a training run: examples/pretrain.py",
    ("training.collator_for", "example"): "needs a saved model and bank: examples/pretrain.py",
    ("training.compose", "example"): "needs saved parts: examples/pretrain.py",
    ("training.find_neighbours", "example"): "needs a model with a bank: examples/pretrain.py",
    ("evaluation.local_task", "example"): "needs the extra [eval]: docs/how-to/evaluate.md",
}


def public() -> Iterator[tuple[str, Any]]:
    for package in PACKAGES:
        module = importlib.import_module(f"tinyalign.{package}")
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, type) or inspect.isfunction(value):
                yield f"{package}.{name}", value


def is_result(value: Any) -> bool:
    """A named tuple, a protocol or a plain record: it holds, and computes nothing."""
    if not isinstance(value, type):
        return False
    if issubclass(value, (tuple, OrderedDict)) or getattr(value, "_is_protocol", False):
        return True
    computes = any(isinstance(each, (FunctionType, property)) for name, each in vars(value).items() if name[0] != "_")
    return dataclasses.is_dataclass(value) and not computes


def fields_of(value: Any) -> list[str]:
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    return list(getattr(value, "_fields", ()))


def sections(value: Any) -> dict[str, str]:
    """The sections of a docstring by name."""
    text = inspect.cleandoc(value.__doc__ or "")
    parts = re.split(rf"^({'|'.join(SECTIONS)}):", text, flags=re.MULTILINE)
    return {name: body for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def parameters(value: Any) -> dict[str, inspect.Parameter]:
    function = value.__init__ if isinstance(value, type) else value
    kept = {n: p for n, p in inspect.signature(function).parameters.items() if n != "self"}
    return {n: p for n, p in kept.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def own_functions(value: Any) -> list[Any]:
    """The function itself; of a class what it defines itself and a user runs by making and calling it."""
    if not isinstance(value, type):
        return [value]
    return [vars(value)[name] for name in ("__init__", "__post_init__", "__call__", "forward") if name in vars(value)]


def raises(function: Any) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError):  # made by a decorator such as dataclass
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and CHECKS.match(node.func.id):
            return True
    return False


def hints(value: Any) -> str:
    """Annotations as they are written, of what goes in and what comes out."""
    found = [
        str(each) for function in own_functions(value) for each in getattr(function, "__annotations__", {}).values()
    ]
    return " ".join(found) + " ".join(str(each) for each in vars(value).get("__annotations__", {}).values())


def faults(name: str, value: Any) -> set[str]:
    """Return the rules that a public name breaks."""
    said, broken = sections(value), set()
    text = inspect.cleandoc(value.__doc__ or "")
    is_error = isinstance(value, type) and issubclass(value, Exception)
    is_module = isinstance(value, type) and issubclass(value, nn.Module)
    first = text.split("\n\n")[0]
    if not first or "\n" in first or first[-1] not in ".:":
        broken.add("sentence")
    if is_error:
        return broken
    if is_result(value):
        if any(not re.search(rf"\b{field}\b", text) for field in fields_of(value)):
            broken.add("fields")
    else:
        listed = said.get("Args", "") or said.get("Attributes", "")
        names = set(re.findall(r"^ {4}((?:\*{0,2}\w+(?:, )?)+):", listed, flags=re.MULTILINE))
        names = {one.strip("* ") for group in names for one in group.split(",")}
        needed = set(parameters(value))
        optional = {"device", "dtype"}
        if not needed - optional <= names or (not needed and names - set(dir(value))):
            broken.add("args")
        if names - needed and "Attributes" not in said and not has_variable_keywords(value):
            broken.add("args")
    tensors = bool(re.search(r"\b(Tensor|NDArray|ArrayLike)\b", hints(value)))
    if (tensors or is_module) and "Shape" not in said:
        broken.add("shape")
    gives = "" if isinstance(value, type) else str(value.__annotations__.get("return", ""))
    if re.search(r"\b(Estimate|Bounds)\b", gives) and "Units" not in said:
        broken.add("units")
    if (re.search(r"\b(Estimate|Bounds)\b", gives) or is_module) and "Source" not in said:
        broken.add("source")
    if not is_result(value) and any(map(raises, own_functions(value))) and "Raises" not in said:
        broken.add("raises")
    if not is_result(value) and ">>>" not in said.get("Example", ""):
        broken.add("example")
    return broken


def has_variable_keywords(value: Any) -> bool:
    function = value.__init__ if isinstance(value, type) else value
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


@pytest.mark.parametrize(("name", "value"), list(public()), ids=lambda each: each if isinstance(each, str) else "")
def test_a_public_name_says_what_it_must(name, value):
    excused = {rule for who, rule in EXCEPT if who == name}
    found = faults(name, value)
    assert found == excused, (
        f"{name}: missing {sorted(found - excused)}, excused without need {sorted(excused - found)}"
    )


def test_every_module_begins_with_a_sentence():
    for path in PACKAGE.glob("**/*.py"):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert text.split("\n\n")[0].endswith((".", ":")), path


def test_every_public_method_begins_with_a_sentence():
    without = []
    for name, value in public():
        if isinstance(value, type):
            for attribute, member in vars(value).items():
                function = member if isinstance(member, property) else getattr(member, "__func__", member)
                if not isinstance(function, (FunctionType, property)) or attribute == "forward":
                    continue
                if attribute.startswith("_") or getattr(function, "__name__", "").startswith("_"):
                    continue  # private, or a refusal under a public name
                if not (function.__doc__ or "").strip():
                    without.append(f"{name}.{attribute}")
    assert not without


def test_the_rules_notice_what_is_missing():
    def silent(x: Tensor, scale: float) -> Tensor:  # noqa: F821
        if scale < 0:
            raise ValueError
        return x

    assert faults("silent", silent) == {"sentence", "args", "shape", "raises", "example"}

    def renamed(scale: float) -> Estimate:  # noqa: F821
        """Scale.

        Args:
            factor: what it was called before.
        """

    assert faults("renamed", renamed) == {"args", "units", "source", "example"}
