"""Finished models as files for strangers: configuration and weights, and nothing that could run.

A bundle is a folder of ``infer.storage`` with one group of tensors, ``weights``, and a record of
class names with the arguments to call them with. A name is looked up in a registry, where a class
stands only if the process that loads has put it there; no name is ever imported.
"""

from __future__ import annotations

import inspect
import itertools
import os
import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple, TypeVar, overload

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.utils import parametrize

from pyro_sparse.infer.storage import read_folder, write_folder

T = TypeVar("T")

_KIND = "pyro_sparse.bundle"
_MAX_RECORD = 2**20  # bytes of configuration
_MAX_OBJECTS = 1000


class _Savable(NamedTuple):
    target: Any
    name: str
    arguments: Callable[[Any], dict[str, Any]]
    build: Callable[..., Any]


_BY_NAME: dict[str, _Savable] = {}
_BY_TARGET: dict[Any, _Savable] = {}


@overload
def register_savable(
    target: T,
    *,
    name: str | None = None,
    arguments: Callable[[Any], dict[str, Any]] | None = None,
    build: Callable[..., Any] | None = None,
) -> T: ...
@overload
def register_savable(
    target: None = None,
    *,
    name: str | None = None,
    arguments: Callable[[Any], dict[str, Any]] | None = None,
    build: Callable[..., Any] | None = None,
) -> Callable[[T], T]: ...
def register_savable(
    target: Any = None,
    *,
    name: str | None = None,
    arguments: Callable[[Any], dict[str, Any]] | None = None,
    build: Callable[..., Any] | None = None,
) -> Any:
    """Let ``save`` and ``load`` handle a class, or a function such as a prior; also a decorator.

    ``load`` calls a registered class with whatever arguments a file holds. Register only what may
    be called with a stranger's numbers; what allocates by them belongs behind a ``build`` that
    takes sizes from tensors, which a file cannot exceed.

    Args:
        target: A class (not its subclasses), or a function, which is then saved by name alone.
        name: What a file calls it; its ``__name__`` by default. Files of old carry it on.
        arguments: From an object to the arguments that make its like: None, bool, int, float, str,
            tensors, registered objects, and lists, tuples and dicts of these. By default the
            attributes with the names of the constructor's parameters (of a distribution, but for
            ``validate_args``).
        build: What to call with them; the class by default.

    Returns:
        ``target``, or a decorator if there was none.

    Raises:
        TypeError: If it is neither a class nor a function, or a lambda.
        ValueError: If something else has the name already.

    Example:
        >>> @register_savable
        ... class Flat(nn.Module):
        ...     def __init__(self, rate: float) -> None:
        ...         super().__init__()
        ...         self.rate = rate
    """
    if target is None:
        return lambda later: register_savable(later, name=name, arguments=arguments, build=build)
    if not isinstance(target, type | FunctionType) or target.__name__ == "<lambda>":
        raise TypeError(f"Expected a class or a function with a name to register, got {target!r}.")
    name = target.__name__ if name is None else name
    other = _BY_NAME.get(name)
    if other is not None and _origin(other.target) != _origin(target):  # else it was defined anew
        raise ValueError(
            f"Expected a name that is free, got {name!r}, which is {_origin(other.target)}. "
            "Pass name=."
        )
    if isinstance(target, FunctionType):
        savable = _Savable(target, name, lambda _: {}, lambda: target)
    else:
        if arguments is None:
            arguments = _attributes(target)
        savable = _Savable(target, name, arguments, target if build is None else build)
    _BY_NAME[name] = _BY_TARGET[target] = savable
    return target


def save(folder: str | os.PathLike[str], /, **objects: Any) -> None:
    """Save finished objects so that anybody can load them without running a stranger's code.

    What they share (a dictionary, a prior, a tensor) is saved once and comes back shared. Before
    anything is written the objects are built once from what would be, so that a folder that was
    written can be loaded.

    Args:
        folder: The folder to make; it must not exist, or be empty.
        objects: By the names ``load`` will give them: objects of registered classes, tensors,
            numbers, text, and lists, tuples and dicts of these.

    Raises:
        FileExistsError: If there is something in ``folder`` already.
        TypeError: If an object, or something in it, is not registered (a lambda, an autoguide);
            names the argument and the remedy.
        ValueError: If a weight is not finite, or what would be written would not load.
        OSError: If the disk is full or the place cannot be written to.

    Example:
        >>> import tempfile
        >>> from pyro_sparse.dictionaries import Dense
        >>> from pyro_sparse.likelihoods import Gaussian
        >>> dictionary = Dense(num_atoms=4, num_features=3)
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     save(parent + "/run", dictionary=dictionary, mean=torch.zeros(3))
        ...     loaded = load(parent + "/run")
        >>> torch.equal(loaded["dictionary"].atoms, dictionary.atoms)
        True
    """
    if not objects:
        raise ValueError("Expected objects to save, such as model=model, guide=guide; got none.")
    writer = _Writer()
    roots = {name: writer.encode(value, name) for name, value in objects.items()}
    record = {"kind": _KIND, "versions": _versions(), "objects": writer.objects, "roots": roots}
    for index, state in _states(writer.made):
        for key, tensor in state.items():
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                writer.objects[index]["frozen"].append(key)
            if not isinstance(tensor, Tensor):
                name = writer.objects[index]["class"]
                raise TypeError(f"Cannot save a {name}: its state {key} is not a tensor.")
            writer.tensors[f"state:{index}:{key}"] = tensor.detach()
    _build(record, writer.tensors, "This would not load")
    write_folder(folder, {"weights": writer.tensors}, record, max_record=_MAX_RECORD)


def load(
    folder: str | os.PathLike[str], *, finite: bool = True, max_bytes: int = 2**32
) -> dict[str, Any]:
    """Load what ``save`` wrote, also from a stranger.

    Nothing in the folder is run. Classes come from the registry of this process: import
    ``pyro_sparse.models`` and ``pyro_sparse.guides`` for theirs, and register your own. The random
    state of torch is left as it was. Modules come back on the CPU and in training mode; parameters
    that were frozen come back frozen.

    Args:
        folder: The folder.
        finite: Refuse weights that are not finite.
        max_bytes: Largest size of the weights.

    Returns:
        The objects by the names they were saved under.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If a file is damaged or not as it must be, a class is not registered, or a class
            refuses its arguments or weights; says what was expected and what came.

    Example:
        >>> import tempfile
        >>> from pyro_sparse.dictionaries import Dense
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     save(parent + "/run", dictionary=Dense(num_atoms=4, num_features=3))
        ...     load(parent + "/run")["dictionary"].atoms.shape
        torch.Size([4, 3])
    """
    file = str(Path(folder) / "record.json")
    groups, record = read_folder(folder, finite=finite, max_bytes=max_bytes, max_record=_MAX_RECORD)
    if set(groups) != {"weights"}:
        raise ValueError(f"{folder}: expected a bundle with weights.safetensors, got other files.")
    return _build(record, groups["weights"], file)


# Encoding -----------------------------------------------------------------------------------------


class _Writer:
    """Turns objects into a table of class names and arguments, children before parents."""

    def __init__(self) -> None:
        self.objects: list[dict[str, Any]] = []
        self.made: list[Any] = []  # what they stand for
        self.tensors: dict[str, Tensor] = {}
        self.seen: dict[int, tuple[Any, Any]] = {}  # what stands for an object; None: being made

    def encode(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list | tuple):
            entries = [self.encode(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
            return entries if isinstance(value, list) else tuple(entries)
        if isinstance(value, dict):
            if not all(isinstance(key, str) and key[:1] != "@" for key in value):
                raise TypeError(f"Cannot save {where}: expected keys that are str, without an @.")
            return {key: self.encode(entry, f"{where}[{key!r}]") for key, entry in value.items()}
        if id(value) not in self.seen:
            self.seen[id(value)] = (value, None)
            self.seen[id(value)] = (value, self._reference(value, where))
        reference = self.seen[id(value)][1]
        if reference is None:
            raise TypeError(f"Cannot save {where}: it holds itself.")
        return reference

    def _reference(self, value: Any, where: str) -> dict[str, Any]:
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_meta:
                raise TypeError(f"Cannot save {where}: expected a dense tensor that holds values.")
            name = f"argument:{len(self.tensors)}"
            self.tensors[name] = value.detach()
            return {"@parameter" if isinstance(value, nn.Parameter) else "@tensor": name}
        savable = _BY_TARGET.get(_kind(value))
        if savable is None:
            raise TypeError(_not_registered(value, where))
        arguments = {
            key: self.encode(entry, f"{where}.{key}")
            for key, entry in savable.arguments(value).items()
        }
        self.made.append(value)
        self.objects.append({"class": savable.name, "arguments": arguments, "frozen": []})
        return {"@object": len(self.objects) - 1}


def _kind(value: Any) -> Any:
    if isinstance(value, FunctionType):
        return value
    # A parametrised module has a class made for it alone.
    is_module = isinstance(value, nn.Module)
    return parametrize.type_before_parametrizations(value) if is_module else type(value)


def _not_registered(value: Any, where: str) -> str:
    kind = _kind(value)
    name = getattr(kind, "__name__", type(value).__name__)
    what = "a function" if isinstance(value, FunctionType) else f"an object of class {name}"
    if name == "<lambda>":
        what, name = "a lambda", "a_function_with_a_name"
    return (
        f"Cannot save {where}: expected an object of a registered class, got {what}. Register it "
        f"with pyro_sparse.infer.register_savable({name}), here and wherever it is loaded."
    )


def _states(objects: list[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """For each module in a table, that part of its state which no other module in it has."""
    modules = {id(value) for value in objects if isinstance(value, nn.Module)}
    for index, module in enumerate(objects):
        if isinstance(module, nn.Module):
            parts = module.named_modules(remove_duplicate=False)
            foreign = [path for path, part in parts if part is not module and id(part) in modules]
            prefixes = tuple(f"{path}." for path in foreign)
            state = module.state_dict(keep_vars=True).items()
            yield index, {key: value for key, value in state if not key.startswith(prefixes)}


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "pyro": str(pyro.__version__),
        "pyro_sparse": metadata.version("pyro-sparse"),
    }


# Decoding -----------------------------------------------------------------------------------------


def _build(record: Any, weights: dict[str, Tensor], where: str) -> dict[str, Any]:
    """Objects from a record and weights, neither of which is trusted."""
    keys = {"kind", "versions", "objects", "roots"}
    if not isinstance(record, dict) or record.get("kind") != _KIND or set(record) != keys:
        raise ValueError(f"{where}: expected a record of a {_KIND}, got another.")
    table, roots = record["objects"], record["roots"]
    if not isinstance(table, list) or len(table) > _MAX_OBJECTS or not isinstance(roots, dict):
        raise ValueError(f"{where}: expected a list of at most {_MAX_OBJECTS} objects, and roots.")
    reader = _Reader(weights, where)
    # Classes draw initial weights, which are then replaced.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        for entry in table:
            reader.objects.append(reader.make(entry))
        objects = {name: reader.decode(value) for name, value in roots.items()}
        try:
            reader.restore([entry["frozen"] for entry in table])
        except RecursionError:
            raise ValueError(f"{where}: expected modules nested less deeply.") from None
    if len(reader.used) != len(weights):
        unused = sorted(set(weights) - reader.used)
        raise ValueError(f"{where}: expected no weights that nobody asks for, got {unused[0]!a}.")
    return objects


class _Reader:
    def __init__(self, weights: dict[str, Tensor], where: str) -> None:
        self.weights = weights
        self.where = where
        self.objects: list[Any] = []
        self.used: set[str] = set()
        self.parameters: dict[int, nn.Parameter] = {}
        self.allocated: dict[int, int] = {}
        stored = {id(tensor): tensor.nbytes for tensor in weights.values()}
        self.room = 2**20 + 4 * sum(stored.values())

    def make(self, entry: Any) -> Any:
        if not isinstance(entry, dict) or set(entry) != {"class", "arguments", "frozen"}:
            raise ValueError(f"{self.where}: expected an object with a class and arguments.")
        name, arguments = entry["class"], entry["arguments"]
        if not isinstance(name, str) or name not in _BY_NAME:
            raise ValueError(
                f"{self.where}: expected a registered class, got {ascii(name)[:80]}. Import what "
                "registers it (pyro_sparse.models, pyro_sparse.guides), or register a class of "
                "yours with pyro_sparse.infer.register_savable before loading."
            )
        if not isinstance(arguments, dict):
            raise ValueError(f"{self.where}: expected a table of arguments of {name}.")
        decoded = {key: self.decode(value) for key, value in arguments.items()}
        try:
            made = _BY_NAME[name].build(**decoded)
            self._account(made)
            return made
        except Exception as error:  # whatever a class does with a stranger's arguments
            raise ValueError(
                f"{self.where}: {name} refuses its arguments {ascii(sorted(decoded))[:200]}: "
                f"{type(error).__name__}: {str(error)[:500]}"
            ) from error

    def decode(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            entries = [self.decode(entry) for entry in value]
            return entries if isinstance(value, list) else tuple(entries)
        if not isinstance(value, dict):
            return value
        if not any(key[:1] == "@" for key in value):
            return {key: self.decode(entry) for key, entry in value.items()}
        [(kind, key), *others] = value.items()
        if not others and kind == "@object" and type(key) is int and 0 <= key < len(self.objects):
            return self.objects[key]
        if others or kind not in ("@tensor", "@parameter") or not isinstance(key, str):
            raise ValueError(f"{self.where}: expected an earlier object or a tensor, got another.")
        tensor = self._weight(key)
        if kind == "@tensor":
            return tensor
        if not tensor.is_floating_point():
            raise ValueError(f"{self.where}: expected parameter {key!a} to be floating.")
        return self.parameters.setdefault(id(tensor), nn.Parameter(tensor))

    def restore(self, frozen: list[Any]) -> None:
        """Put the saved states in place, every name, shape and dtype as the modules have them."""
        for index, expected in list(_states(self.objects)):
            module = self.objects[index]
            state = {}
            if not isinstance(frozen[index], list) or not {*map(str, frozen[index])} <= {*expected}:
                raise ValueError(f"{self.where}: expected names that are frozen, got others.")
            for key, own in expected.items():
                given = self._weight(f"state:{index}:{key}")
                if given.shape != own.shape or given.dtype != own.dtype:
                    raise ValueError(
                        f"{self.where}: expected {key} of a {_kind(module).__name__} of shape "
                        f"{tuple(own.shape)}, {own.dtype}, got {tuple(given.shape)}, {given.dtype}."
                    )
                state[key] = given
            try:
                module.load_state_dict(state, strict=False)
            except Exception as error:  # whatever hooks a class has
                raise ValueError(f"{self.where}: weights refused: {str(error)[:500]}") from error
            for key, own in expected.items():
                if isinstance(own, nn.Parameter):
                    own.requires_grad_(key not in frozen[index])

    def _account(self, made: Any) -> None:
        """Hold modules to a small multiple of the file: many could copy one and the same tensor."""
        if isinstance(made, nn.Module):
            for tensor in itertools.chain(made.parameters(), made.buffers()):
                self.allocated.setdefault(id(tensor), tensor.nbytes)
            if sum(self.allocated.values()) > self.room:
                raise ValueError(f"Expected modules of {self.room} bytes in all, got more.")

    def _weight(self, name: str) -> Tensor:
        if name not in self.weights:
            raise ValueError(f"{self.where}: expected weights {name!a}, got none by that name.")
        self.used.add(name)
        return self.weights[name]


# Registering ------------------------------------------------------------------------------------


def _origin(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}"


def _attributes(cls: type) -> Callable[[Any], dict[str, Any]]:
    """The attributes of an object that have the names of its constructor's parameters."""
    init = cls.__init__  # type: ignore[misc]
    parameters = [] if init is object.__init__ else list(inspect.signature(init).parameters)[1:]
    if issubclass(cls, Distribution):  # the switch that all laws have, and none keeps by that name
        parameters = [name for name in parameters if name != "validate_args"]

    def arguments(value: Any) -> dict[str, Any]:
        missing = [name for name in parameters if not hasattr(value, name)]
        if missing:
            raise TypeError(
                f"Cannot save a {cls.__name__}: expected attributes named like its constructor's "
                f"parameters, got none named {missing}. Pass arguments= to register_savable."
            )
        return {name: getattr(value, name) for name in parameters}

    return arguments
