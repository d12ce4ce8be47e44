"""What a module's forward does with the input of its projections, read from its source.

Merging moves a product to before the forward: ``forward(self, x)`` then gets ``y = x @ (all weights).T`` in place of x, and
each projection returns its rows of y. That is the same function if, and only if, x serves for nothing else. This file
decides it from the syntax tree of the forward, and refuses whatever it does not understand.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lq_formats import UnsupportedError

_NAMELESS = ("vars", "locals", "globals", "eval", "exec")  # what they read, and write, is not in the syntax tree


@dataclass(frozen=True)
class SharedInput:
    """The argument of a forward that only its projections read.

    Attributes:
        name: Of the argument.
        position: Among positional arguments after ``self``; -1 if it can only be passed by name.
    """

    name: str
    position: int


def shared_input(forward: Any, members: Sequence[str]) -> SharedInput:
    """Return the argument that the projections ``self.<member>`` share, having shown that nothing else reads its values.

    Raises:
        UnsupportedError: With the reason why the source does not show it.
    """
    function = _parse(forward)
    positional = [arg.arg for arg in (*function.args.posonlyargs, *function.args.args)]
    if not positional:
        raise UnsupportedError("its forward has no self")
    owner, *positional = positional
    calls = _calls(function, owner, members)
    (name, *other) = {call.args[0].id for call in calls.values() if isinstance(call.args[0], ast.Name)}
    if other:
        raise UnsupportedError(f"{', '.join(members)} take different inputs: {', '.join(sorted([name, *other]))}")
    if name not in (*positional, *(arg.arg for arg in function.args.kwonlyargs)):
        raise UnsupportedError(f"the input {name!r} of {', '.join(members)} is not an argument of its forward")
    _check_uses(function, name, {id(call.args[0]) for call in calls.values()})
    return SharedInput(name, positional.index(name) if name in positional else -1)


@dataclass(frozen=True)
class Gate:
    """The names in ``self.down(self.activation(self.gate(x)) * self.up(x))`` that are not projections of x.

    Attributes:
        activation: Of the gate.
        down: What takes the product.
    """

    activation: str
    down: str


def gate_of(forward: Any, members: Sequence[str]) -> Gate | None:
    """Return the names of a gated MLP if the forward is one, to the letter, with the members as gate and up."""
    if len(members) != 2:
        return None
    function = _parse(forward)
    owner, x = ([arg.arg for arg in function.args.args] + ["", ""])[:2]
    lines = [ast.unparse(node) for node in function.body if not _is_docstring(node)]
    gate, up = members
    product = rf"{owner}\.(\w+)\({owner}\.(\w+)\({owner}\.{gate}\({x}\)\) \* {owner}\.{up}\({x}\)\)"
    match = re.fullmatch(rf"return {product}", "\n".join(lines))
    match = match or re.fullmatch(rf"(?P<y>\w+) = {product}\nreturn (?P=y)", "\n".join(lines))
    if match is None:
        return None
    down, activation = [name for key, name in enumerate(match.groups(), 1) if key != match.re.groupindex.get("y")]
    return Gate(activation, down)


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _parse(forward: Any) -> ast.FunctionDef:
    if hasattr(forward, "__wrapped__"):
        raise UnsupportedError("its forward is wrapped by a decorator, which may use the input")
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError) as error:
        raise UnsupportedError(f"the source of its forward cannot be read ({error})") from None
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        raise UnsupportedError("its forward is not a plain method")
    return function


def _calls(function: ast.FunctionDef, owner: str, members: Sequence[str]) -> dict[str, ast.Call]:
    """Return the one call ``self.<member>(name)`` of each member; anything else that touches a member is refused."""
    calls: dict[str, ast.Call] = {}
    accepted: set[int] = set()
    for node in _straight(function):
        if not isinstance(node, ast.Call) or not _is_member(node.func, owner, members):
            continue
        assert isinstance(node.func, ast.Attribute)
        member = node.func.attr
        if member in calls:
            raise UnsupportedError(f"its forward calls {member} twice")
        if node.keywords or len(node.args) != 1 or not isinstance(node.args[0], ast.Name):
            raise UnsupportedError(f"its forward calls {member} with more than the name of its input")
        calls[member] = node
        accepted.add(id(node.func))
    for node in ast.walk(function):
        if _is_member(node, owner, members) and id(node) not in accepted:
            assert isinstance(node, ast.Attribute)
            raise UnsupportedError(
                f"its forward uses {node.attr} in a loop, under with or try, in a nested function, or not as a call"
            )
    if missing := [member for member in members if member not in calls]:
        raise UnsupportedError(f"its forward does not call {', '.join(missing)}")
    return calls


def _straight(node: ast.AST) -> "list[ast.AST]":
    """Return the nodes below that run at most once and in the context (autocast, gradients) of the forward itself."""
    found = []
    repeated = (ast.For, ast.While, ast.With, ast.Try, ast.TryStar, ast.FunctionDef, ast.Lambda, ast.ClassDef)
    comprehensions = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (*repeated, *comprehensions)):
            found += [child, *_straight(child)]
    return found


def _is_member(node: ast.AST, owner: str, members: Sequence[str]) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr in members
        and isinstance(node.value, ast.Name)
        and node.value.id == owner
    )


def _check_uses(function: ast.FunctionDef, name: str, inputs: set[int]) -> None:
    """Refuse every use of ``name`` but as the projections' input and for what x and y have in common.

    That is ``x.shape[:-1]``, ``x.device`` and ``a, b, _ = x.size()`` with ``_`` never read. The dtype is not: under autocast
    y has another one.
    """
    harmless = set(inputs)
    names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    for use in names:
        if use.id in _NAMELESS:
            raise UnsupportedError(
                f"its forward uses {use.id}, which may reach {name} unseen (line {use.lineno} of it)"
            )
    last_size_is_read = any(node.id == "_" and isinstance(node.ctx, ast.Load) for node in names)
    for node in ast.walk(function):
        if _unpacks_sizes(node, name) and not last_size_is_read:
            assert isinstance(node, ast.Assign)
            harmless |= {id(inner) for inner in ast.walk(node.value)}
        if isinstance(node, ast.Attribute) and node.attr == "device":
            harmless.add(id(node.value))
        elif isinstance(node, ast.Subscript) and ast.unparse(node) == f"{name}.shape[:-1]":
            assert isinstance(node.value, ast.Attribute)
            harmless.add(id(node.value.value))
    for use in names:
        if use.id == name and (not isinstance(use.ctx, ast.Load) or id(use) not in harmless):
            raise UnsupportedError(f"its forward uses {name} for something else too (line {use.lineno} of it)")
    for node in ast.walk(function):
        if node is not function and name in (getattr(node, "name", None), getattr(node, "asname", None)):
            raise UnsupportedError(f"its forward gives the name {name} to something else")
        nested = isinstance(node, (ast.FunctionDef, ast.Lambda)) and node is not function
        if nested and any(isinstance(inner, ast.arg) and inner.arg == name for inner in ast.walk(node)):
            raise UnsupportedError(f"a function inside its forward has an argument {name} as well")


def _unpacks_sizes(node: ast.AST, name: str) -> bool:
    """Return whether a statement is ``a, b, _ = name.size()`` or the same of ``name.shape``."""
    if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Tuple):
        return False
    targets = node.targets[0].elts
    last = targets[-1]
    plain = all(isinstance(target, ast.Name) for target in targets) and isinstance(last, ast.Name) and last.id == "_"
    return plain and ast.unparse(node.value) in (f"{name}.size()", f"{name}.shape")
