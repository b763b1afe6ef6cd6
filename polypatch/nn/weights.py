"""Filling networks: with weights from elsewhere, which must fit exactly, and with fresh ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ..errors import PolypatchError

__all__ = ["check_fit", "init_parts", "load_exactly"]


def load_exactly(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    what: str,
    names: Mapping[str, str] | None = None,
    unknown: Iterable[str] = (),
) -> None:
    """Load ``state`` into ``model``: all of its tensors, nothing else, every shape as it is.

    Args:
        what: the network, to end "these weights don't fit …".
        names: by our names, what the file called them; the error speaks of these.
        unknown: keys of the file that no key map knew, and that ``state`` lacks therefore.

    Raises:
        PolypatchError: missing, unexpected or misfitting tensors, at most six of each named.
    """
    check_fit(model.state_dict(), state, what=what, names=names, unknown=unknown)
    model.load_state_dict(state)


def check_fit(
    wanted: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    *,
    what: str,
    names: Mapping[str, str] | None = None,
    unknown: Iterable[str] = (),
) -> None:
    """The comparison in :func:`load_exactly`, of two states in any one layout."""

    def named(keys: Iterable[str]) -> list[str]:
        return sorted({(names or {}).get(key, key) for key in keys})

    misfits = [
        f"{named([key])[0]}: {tuple(given[key].shape)} for {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in given and given[key].shape != value.shape
    ]
    kinds = [
        f"{named([key])[0]}: {given[key].dtype} for {value.dtype}"
        for key, value in wanted.items()
        if key in given and value.is_floating_point() and not given[key].is_floating_point()
    ]
    differences = {
        "missing keys": named(wanted.keys() - given.keys()),
        "unexpected keys": [*unknown, *named(given.keys() - wanted.keys())],
        "misfitting shapes": misfits,
        "misfitting types": kinds,
    }
    said = [
        f"{kind} {', '.join(listed[:6])}{', …' if len(listed) > 6 else ''}"
        for kind, listed in differences.items()
        if listed
    ]
    if said:
        raise PolypatchError(f"these weights don't fit {what}: {'; '.join(said)}")


def init_parts(module: nn.Module) -> None:
    """Call ``init_weights`` of every part of ``module`` that has one, outer parts first."""
    for part in module.modules():
        if part is not module and callable(getattr(part, "init_weights", None)):
            part.init_weights()  # type: ignore[operator]
