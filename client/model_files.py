"""A model from a file, held to the form of the task's own."""

from pathlib import Path

from torch import Tensor

from strategies.archive import SavedModel
from unlearning.errors import ParametersError
from unlearning.parameters import Parameters, check_alike, check_finite


def read_model(path: Path, like: Parameters) -> dict[str, Tensor]:
    """Return the model in a safetensors file.

    Parameters
    ----------
    like
        Any model of the task.

    Raises
    ------
    ParametersError
        If the file cannot be read, or holds another model, or one that is not finite.
    """
    found = SavedModel(path, wide=True)
    if found.keys() != like.keys():
        differing = sorted(found.keys() ^ like.keys())
        raise ParametersError(
            f"{path} is not of the task's model, they differ in {len(differing)} tensors, such as "
            f"{', '.join(differing[:3])}; name the task and model that it was made with"
        )
    model = {name: found[name] for name in like}
    try:
        check_alike(like, model)
        check_finite(model)
    except ParametersError as error:
        raise ParametersError(
            f"{path} cannot be used: {error}; name the task and model that it was made with"
        ) from error
    return model
