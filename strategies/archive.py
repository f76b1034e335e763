"""Models on disk as safetensors, read one tensor at a time.

The server's memory of past rounds and the files that people hand in have one form:
``round-0001/global.safetensors`` is the model that a round started from,
``round-0001/CLIENT.safetensors`` what a client made of it, with its weight in the average as
metadata ``num_examples``.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unlearning.errors import ParametersError
from unlearning.parameters import Parameters, byte_size

SUFFIX = ".safetensors"
GLOBAL = "global"
WEIGHT = "num_examples"
TOTAL = "total_examples"
"""Of a round: the weight of all who were averaged, in the metadata of its ``global``."""
ORDER = "order"


class SavedModel(Mapping[str, Tensor]):
    """A model in a file; every look at a tensor reads it anew, and nothing is kept.

    Tensors come in the order that the file's metadata tell; without any, as modules are usually
    numbered: ``2.weight`` before ``10.weight``.

    Parameters
    ----------
    wide
        Whether to hand over float16 and bfloat16 as float32, which holds both exactly. Sums of
        many models in so few digits are wrong: a hundred ones average to 1.05.

    Raises
    ------
    ParametersError
        If the file cannot be read, or is none.
    """

    def __init__(self, path: Path, *, wide: bool = False) -> None:
        self.path, self.wide = path, wide
        try:
            with safe_open(path, framework="pt") as file:  # checks all that the header says
                self.metadata: Mapping[str, str] = file.metadata() or {}
            places = _places(path)
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            if path.is_dir():
                reason = "it is a folder"
            raise ParametersError(f"{path} cannot be read as safetensors: {reason}") from error
        told = _order(self.metadata.get(ORDER), places)
        self.order_told = told is not None
        """Whether the order of the tensors is the file's own, and not a guess by their names."""
        self._places = {name: places[name] for name in told or sorted(places, key=_natural)}

    @property
    def weight(self) -> float:
        """Return the client's weight in an average; 1 where the file does not say."""
        return self._number(WEIGHT) or 1.0

    @property
    def total(self) -> float | None:
        """Return the weight of all who were averaged in the round that this model started."""
        return self._number(TOTAL)

    def _number(self, key: str) -> float | None:
        """Return a number above 0 of the metadata, or ``None`` where the file does not say."""
        text = self.metadata.get(key)
        if text is None:
            return None
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not 0 < number < float("inf"):
            raise ParametersError(
                f"{self.path}: {key} is {text!r}; it must be a number above 0, or be left out"
            )
        return number

    @property
    def nbytes(self) -> int:
        """Return the bytes of its tensors; reads nothing."""
        return sum(place.size for place in self._places.values())

    @property
    def schema(self) -> Parameters:
        """Return tensors of the file's names, shapes and dtypes, without content; reads nothing."""
        return {
            name: torch.empty(place.shape, dtype=place.dtype, device="meta")
            for name, place in self._places.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        place = self._places[name]
        # Memory of its own: mapped pages would stay for as long as any tensor of the file does.
        content = torch.empty(place.size, dtype=torch.uint8)
        self._read(content, place.start)
        return self._widened(content.view(place.dtype).view(place.shape))

    def form(self, name: str) -> Tensor:
        """Return what one tensor is like, without content; reads nothing."""
        place = self._places[name]
        wide = self.wide and place.dtype in HALVES
        dtype = torch.float32 if wide else place.dtype
        return torch.empty(place.shape, dtype=dtype, device="meta")

    def stretch(self, name: str, start: int, stop: int, scratch: Tensor) -> Tensor:
        """Read some entries of a tensor, flattened, into memory that is there already.

        ``scratch`` is a vector of bytes with room for them; what is returned may lie in it.
        """
        place = self._places[name]
        content = scratch[: (stop - start) * place.dtype.itemsize]
        self._read(content, place.start + start * place.dtype.itemsize)
        return self._widened(content.view(place.dtype))

    def _widened(self, tensor: Tensor) -> Tensor:
        return tensor.float() if self.wide and tensor.dtype in HALVES else tensor

    def _read(self, content: Tensor, start: int) -> None:
        left = content.numpy().data
        try:
            file = os.open(self.path, os.O_RDONLY)
            try:
                while left and (read := os.preadv(file, [left], start)):  # 2 GB at most at a time
                    left, start = left[read:], start + read
            finally:
                os.close(file)
        except OSError as error:
            raise ParametersError(f"{self.path} cannot be read: {error.strerror}") from error
        if left:
            raise ParametersError(f"{self.path} became shorter while it was read; read it again")

    def __contains__(self, name: object) -> bool:
        return name in self._places  # a Mapping's own way is to read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The format's name of a type -> PyTorch's, of those that models have."""
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor is in a file, and what."""

    start: int
    size: int
    """In bytes."""
    dtype: torch.dtype
    shape: tuple[int, ...]


def _places(path: Path) -> dict[str, _Place]:
    """Return where the tensors of a file are, as its header says."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ParametersError(
                f"{path}: tensor {name} is of type {entry['dtype']}; known are {', '.join(DTYPES)}"
            )
        start, end = entry["data_offsets"]
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        places[name] = _Place(8 + length + start, end - start, dtype, shape)
    return places


def _order(told: str | None, names: Collection[str]) -> list[str] | None:
    """Return the order that metadata tell, or ``None`` if it is none of all these names."""
    try:
        order = json.loads(told or "")
    except ValueError:
        return None
    texts = isinstance(order, list) and all(isinstance(name, str) for name in order)
    return order if texts and set(order) == set(names) else None


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p]


def narrowed(model: Parameters, like: Parameters) -> dict[str, Tensor]:
    """Return a model that was read ``wide`` in the precision of ``like``, which was not."""
    return {
        name: tensor.to(like[name].dtype) if like[name].dtype in HALVES else tensor
        for name, tensor in model.items()
    }


def save_model(
    path: Path,
    model: Parameters,
    *,
    weight: float | None = None,
    total: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model; the file appears complete or not at all.

    Parameters
    ----------
    metadata
        What else the file says; by default, the order of the tensors.

    Raises
    ------
    ParametersError
        If it cannot be written.
    """
    told = dict(metadata) if metadata is not None else {ORDER: json.dumps(list(model))}
    for key, number in ((WEIGHT, weight), (TOTAL, total)):
        if number is not None:
            told[key] = repr(float(number))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.items()}
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            staged = Path(file.name)
        try:
            save_file(_apart(tensors), staged, told)
            os.replace(staged, path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ParametersError(f"{path} cannot be written: {reason}") from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of which no two share memory, which the format refuses."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def file_name(client: str) -> str:
    """Return the name of a client's file; any text is safe in it, and none is taken for another."""
    name = quote(client, safe=" ")
    special = name == GLOBAL or name.startswith(".")  # hidden files are not clients'
    return (f"%{ord(name[0]):02X}{name[1:]}" if special else name) + SUFFIX


def client_of(path: Path) -> str:
    """Return the client whose file this is."""
    return unquote(path.name.removesuffix(SUFFIX))


def saved_clients(folder: Path, *, wide: bool = False) -> dict[str, SavedModel]:
    """Return the models of a folder by client, sorted; ``global`` is none of them."""
    models: dict[str, SavedModel] = {}
    for path in sorted(folder.glob(f"[!.]*{SUFFIX}")):
        if path.stem == GLOBAL:
            continue
        client = client_of(path)
        if client in models:
            raise ParametersError(
                f"{models[client].path} and {path} are both of client {client!r}; keep one"
            )
        models[client] = SavedModel(path, wide=wide)
    return dict(sorted(models.items()))


class Archive:
    """Recorded rounds in a folder: a ``History`` that lives on disk; ``wide`` as its models are."""

    def __init__(self, folder: Path, *, wide: bool = False) -> None:
        self.folder, self.wide = folder, wide

    @property
    def rounds(self) -> Sequence[int]:
        """Return the numbers of the rounds recorded, ascending."""
        found = (re.fullmatch(r"round-(\d+)", path.name) for path in self.folder.glob("round-*"))
        numbers = {int(match[1]) for match in found if match}
        return tuple(sorted(n for n in numbers if self._round(n).exists()))

    def start(self, number: int) -> SavedModel:
        """Return the model that a round started from."""
        return SavedModel(self._round(number) / f"{GLOBAL}{SUFFIX}", wide=self.wide)

    def models(self, number: int) -> Mapping[str, SavedModel]:
        """Return the models that entered a round's aggregate, by client."""
        return saved_clients(self._round(number), wide=self.wide)

    def weights(self, number: int) -> Mapping[str, float]:
        """Return each client's weight in the aggregate."""
        return {client: model.weight for client, model in self.models(number).items()}

    def total(self, number: int) -> float:
        """Return the weight of all who were in the aggregate, also of those deleted since."""
        return self.start(number).total or sum(self.weights(number).values())

    def record(
        self,
        number: int,
        start: Parameters,
        models: Mapping[str, Parameters],
        weights: Mapping[str, float],
    ) -> None:
        """Add a round, whole or not at all; one of the same number is replaced."""
        self.folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=self.folder, prefix=".writing-"))
        try:
            total = sum(weights[client] for client in models)
            save_model(staging / f"{GLOBAL}{SUFFIX}", start, total=total)
            for client, model in models.items():
                save_model(staging / file_name(client), model, weight=weights[client])
            self.drop(number)
            staging.rename(self._round(number))
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise

    def drop(self, number: int) -> None:
        """Delete a round, if it is there."""
        shutil.rmtree(self._round(number), ignore_errors=True)

    def forget(self, clients: Sequence[str]) -> None:
        """Delete whatever clients sent."""
        for number in self.rounds:
            for client in clients:
                (self._round(number) / file_name(client)).unlink(missing_ok=True)

    def bytes_held(self, rounds: Iterable[int] | None = None) -> int:
        """Return the size of the files of some rounds, or of all."""
        folders = [self._round(number) for number in (self.rounds if rounds is None else rounds)]
        return sum(p.stat().st_size for folder in folders for p in folder.glob(f"*{SUFFIX}"))

    def _round(self, number: int) -> Path:
        return self.folder / f"round-{number:04d}"


def size_of(model: Parameters) -> int:
    """Return the bytes of a model's tensors; reads none."""
    return model.nbytes if isinstance(model, SavedModel) else byte_size([model])


def file_bytes(model: Parameters) -> int:
    """Return about how large a model's file will be."""
    return 1024 + size_of(model)
