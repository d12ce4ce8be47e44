"""What a module's forward does with the input of its projections, read from its source.

Merging moves a product to before the forward: ``forward(self, x)`` then gets ``y = x @ (all weights).T`` in place of x, and
each projection returns its rows of y. That is the same function if, and only if, x serves for nothing else, and its gradients
are the same if no rows are changed in place. This file decides it from the syntax tree of the forward, and refuses whatever it
does not understand.
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
_UNSHARED = ("shape", "size", "dim", "ndim", "numel", "dtype", "device", "clone")  # of a tensor, and none of its memory


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
    _check_in_place(function, {id(call) for call in calls.values()})
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


def _check_in_place(function: ast.FunctionDef, calls: set[int]) -> None:
    """Refuse changes of a projection's result in place: autograd would take them for changes of its siblings too.

    Followed are names, items, attributes and methods of the result. What other code returns is taken for new.
    """
    names: set[str] = set()
    bindings = [pair for node in ast.walk(function) for pair in _bindings(node)]
    while found := {
        target.id
        for target, value in bindings
        if isinstance(target, ast.Name) and target.id not in names and _is_part(value, names, calls)
    }:
        names |= found
    for node in ast.walk(function):
        changed: list[ast.expr] = []
        if isinstance(node, ast.AugAssign):
            changed = [node.target]
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            changed = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            method = node.func.attr
            changed = [node.func.value] if method.endswith("_") and not method.endswith("__") else []
        for target in changed:
            if _is_part(target, names, calls):
                raise UnsupportedError(
                    f"its forward changes {ast.unparse(target)} in place (line {target.lineno} of it), which is a part of one "
                    "product with its siblings"
                )


def _bindings(node: ast.AST) -> list[tuple[ast.expr, ast.expr]]:
    """Return the ``(target, value)`` pairs that a node binds; a target unpacked from one value is bound to all of it."""
    if isinstance(node, ast.Assign):
        pairs = [(target, node.value) for target in node.targets]
    elif isinstance(node, (ast.For, ast.comprehension)):
        pairs = [(node.target, node.iter)]
    elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
        pairs = [(node.target, node.value)]
    else:
        return []
    found = []
    while pairs:
        target, value = pairs.pop()
        if isinstance(target, ast.Starred):
            pairs.append((target.value, value))
        elif isinstance(target, (ast.Tuple, ast.List)):
            values = value.elts if isinstance(value, (ast.Tuple, ast.List)) else []
            if len(values) != len(target.elts) or any(isinstance(one, ast.Starred) for one in (*values, *target.elts)):
                values = [value] * len(target.elts)
            pairs += zip(target.elts, values, strict=True)
        else:
            found.append((target, value))
    return found


def _is_part(node: ast.AST, names: set[str], calls: set[int]) -> bool:
    """Return whether an expression is a projection's result, or may be a view of one or hold one.

    Args:
        node: The expression.
        names: Bound to such results.
        calls: Ids of the projections' calls.
    """
    if id(node) in calls:
        return True
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and _is_part(node.func, names, calls)
    if isinstance(node, ast.Attribute) and (node.attr in _UNSHARED or node.attr.startswith("new_")):
        return False
    if isinstance(node, (ast.Attribute, ast.Subscript, ast.Starred, ast.NamedExpr)):
        return _is_part(node.value, names, calls)
    inner: list[ast.expr] = []
    if isinstance(node, (ast.Tuple, ast.List)):
        inner = node.elts
    elif isinstance(node, ast.IfExp):
        inner = [node.body, node.orelse]
    elif isinstance(node, (ast.ListComp, ast.GeneratorExp)):
        inner = [node.elt]
    return any(_is_part(one, names, calls) for one in inner)


def _unpacks_sizes(node: ast.AST, name: str) -> bool:
    """Return whether a statement is ``a, b, _ = name.size()`` or the same of ``name.shape``."""
    if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Tuple):
        return False
    targets = node.targets[0].elts
    last = targets[-1]
    plain = all(isinstance(target, ast.Name) for target in targets) and isinstance(last, ast.Name) and last.id == "_"
    return plain and ast.unparse(node.value) in (f"{name}.size()", f"{name}.shape")
