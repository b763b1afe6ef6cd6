"""A file of weights → which paper, which configuration → a model; and back into a file.

Reading executes nothing (``reading.py``). A file's family is recognised by its names and shapes
(``recognising.py``): each paper's module says what its own look like (``recognise``) and rebuilds
the network (``from_official``). Files of ours carry paper and configuration (``saving.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import PolypatchError
from ..hosts import ViT
from ..nn import Preprocessing, Segmenter, check_fit, load_exactly
from .reading import check_values, read_state, unwrap
from .recognising import closest, recognise, recognise_inside, variant_of, weights_module
from .resizing import resize, resized_state

__all__ = [
    "Loaded",
    "check_values",
    "load",
    "load_weights",
    "read_state",
    "recognise",
    "resize",
    "unwrap",
]


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode and what is known about it.

    Attributes:
        paper: its slug; ``"polypatch"`` for what was trained here.
        task: ``"classify"``, ``"segment"`` or ``"forecast"``.
        config: by the authors' argument names, or the run's configuration.
        variant: the authors' name of this network, "" if it has none.
        assumed: what the file doesn't say and the library took from the authors' published
            variants, as ``name=value``.
        left_out: keys of the file that are no part of the network (a detector's heads).
        classes: names of the classes, where the file says them.
        preprocessing: what inputs the weights expect.
        input_range: of the inputs before ``preprocessing``.
        metadata: of the file, as it stands there.
    """

    model: nn.Module
    paper: str
    task: str
    config: dict[str, Any]
    assumed: tuple[str, ...] = ()
    variant: str = ""
    left_out: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    scale: int = 1
    input_range: tuple[float, float] = (0.0, 1.0)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    metadata: Mapping[str, str] = field(default_factory=dict)


def load(
    path: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    patch: int | None = None,
    resolution: int | None = None,
    values: bool = True,
) -> Loaded:
    """Load a checkpoint, whatever paper it is from.

    Args:
        path: a file, a folder with ``model.safetensors`` (a run, a converted checkpoint), or
            ``hub:owner/name`` for a Hugging Face repository.
        config: arguments by the authors' names, where shapes don't tell them.
        patch, resolution: of a plain ViT: resize its weights to these, see :func:`resize`.
        values: if not, names and shapes alone are read and the model stays on the meta device.

    Raises:
        PolypatchError: no such file, an unreadable or unsafe one, weights of no known paper, with
            missing or unexpected tensors, or with NaNs in them.
    """
    given = dict(config or {})
    if isinstance(path, str) and path.startswith("hub:"):
        from .hub import download

        path, hub_config = download(path[4:])
        given = hub_config | given
    path = Path(path)
    if (path / "model.safetensors").is_file():
        path = path / "model.safetensors"
    raw, metadata = read_state(path, values=values)
    own = "polypatch" in metadata
    state = {} if own and not raw else unwrap(raw)  # the simplest forecasters have no weights
    if values:
        check_values(state, what=str(path))
    try:
        loaded = _load_own(state, metadata) if own else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PolypatchError(
            f"{path}: what polypatch wrote about this file has been changed: {error}"
        ) from error
    loaded = loaded or _load_official(state, given, metadata, path=path)
    if patch is not None or resolution is not None:
        if not isinstance(loaded.model, ViT):
            raise PolypatchError(f"only plain ViTs can be resized, this is {loaded.paper}")
        resize(loaded.model, patch=patch, resolution=resolution)
    return loaded


def _load_official(
    state: Mapping[str, Tensor],
    given: Mapping[str, Any],
    metadata: Mapping[str, str],
    *,
    path: Path,
) -> Loaded:
    """A network from the authors' keys."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    found = recognise_inside(shapes)
    if found is None:
        names = ", ".join(list(shapes)[:5])
        raise PolypatchError(
            f"{path} holds the weights of no network that polypatch knows; its first keys are "
            f"{names}{closest(shapes)}; `polypatch papers` lists what is known"
        )
    slug, inferred, prefix = found
    inner = {n[len(prefix) :]: v for n, v in state.items() if n.startswith(prefix)}
    left_out = tuple(n for n in state if not n.startswith(prefix))
    return build_official(slug, inner, inferred, given=given, metadata=metadata, left_out=left_out)


def build_official(
    slug: str,
    state: Mapping[str, Tensor],
    inferred: Mapping[str, Any],
    *,
    given: Mapping[str, Any],
    metadata: Mapping[str, str],
    left_out: tuple[str, ...] = (),
) -> Loaded:
    """A paper's network from its authors' state dict; ``given`` overrules what was inferred."""
    module = weights_module(slug)
    used = {**inferred, **given}
    # What recognising had to take from the authors' variants and the caller didn't say.
    hidden = getattr(module, "ASSUMED", None)
    assumed = tuple(
        f"{name}={value}"
        for name, value in inferred.items()
        if name not in given
        and (name in hidden if hidden is not None else name not in ("layout", "class", "cls"))
    )
    try:
        model = module.from_official(used, state)
    except KeyError as error:
        raise PolypatchError(f"the configuration of this {slug} lacks {error}") from error
    except (RuntimeError, IndexError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PolypatchError(f"these weights don't fit any {slug}: {reason}") from error
    return Loaded(
        model,
        slug,
        "classify",
        used,
        assumed,
        variant=variant_of(slug, used),
        left_out=left_out,
        preprocessing=getattr(model, "preprocessing", Preprocessing()),
        metadata=metadata,
    )


def _load_own(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Loaded:
    """A file that polypatch wrote: a run's model, or a converted checkpoint."""
    about = json.loads(metadata["polypatch"])
    if "paper" in about:
        from .saving import facts_of

        facts = facts_of(about)
        loaded = build_official(facts.paper, state, {}, given=facts.config, metadata=metadata)
        return Loaded(
            loaded.model,
            facts.paper,
            facts.task,
            loaded.config,
            tuple(facts.assumed),
            variant=facts.variant,
            classes=tuple(facts.classes),
            preprocessing=facts.preprocessing,
            metadata=metadata,
        )
    task = about.get("task", "classify")
    if task == "forecast":
        from ..forecasters import create_forecaster

        sizes = {word: about[word] for word in ("lookback", "horizon", "series", "season")}
        model = create_forecaster(about["spec"], **sizes)
        load_exactly(model, state, what=about["spec"])
        return Loaded(model.eval(), "polypatch", task, about, metadata=metadata)
    from ..spec import create

    segment = task == "segment"
    model = create(
        about["spec"], classes=0 if segment else about["classes"], resolution=about["resolution"]
    )
    if segment:
        model = Segmenter(model, classes=about["classes"])
    load_exactly(model, state, what=about["spec"])
    extra = json.loads(metadata.get("data", "{}"))
    usual = Preprocessing()
    return Loaded(
        model.eval(),
        "polypatch",
        task,
        about,
        classes=tuple(extra.get("classes", ())),
        preprocessing=Preprocessing(
            resolution=about["resolution"],
            mean=tuple(extra.get("mean", usual.mean)),
            std=tuple(extra.get("std", usual.std)),
            crop=1.0,
        ),
        metadata=metadata,
    )


def load_weights(model: nn.Module, path: Path) -> list[str]:
    """Put a run's or a checkpoint's weights into a model of the same architecture.

    Foreign weights are renamed, a plain ViT's patch embedding and positions resized to the
    model's; a classifier of another size keeps its fresh weights. Returns what was left fresh.

    Raises:
        PolypatchError: anything but the classifier doesn't fit.
    """
    if path.is_dir():
        path = path / "model.safetensors"
    raw, metadata = read_state(path)
    state = unwrap(raw)
    about = json.loads(metadata.get("polypatch", "{}"))
    if "paper" in about:
        state = dict(load(path).model.state_dict())
    elif "spec" not in about:
        found = recognise_inside({name: tuple(value.shape) for name, value in state.items()})
        if found is not None:
            slug, config, prefix = found
            inner = {n[len(prefix) :]: v for n, v in state.items() if n.startswith(prefix)}
            state = dict(weights_module(slug).from_official(config, inner).state_dict())
    if isinstance(model, Segmenter) and not any(n.startswith("backbone.") for n in state):
        # An encoder's weights: its classifier, if it has one, stays behind.
        state = {f"backbone.{n}": v for n, v in state.items() if not n.startswith("head")}
    own = model.state_dict()
    state = resized_state(state, own)
    fresh = [
        name
        for name, value in own.items()
        if name.startswith("head") and (name not in state or state[name].shape != value.shape)
    ]
    left = {n: v for n, v in state.items() if n in own or not n.startswith("head")}
    check_fit(
        {name: value for name, value in own.items() if name not in fresh},
        {name: value for name, value in left.items() if name not in fresh},
        what=f"the model to start ({path} is of another architecture)",
    )
    model.load_state_dict({n: v for n, v in left.items() if n not in fresh}, strict=False)
    return fresh
