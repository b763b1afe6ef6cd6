"""``polypatch convert``: a checkpoint as safetensors with everything known about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Config, console, read_config


def command(
    file: Annotated[str, typer.Argument(help="A checkpoint, or hub:owner/name.")],
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    config: Config = [],  # noqa: B006  # typer copies it
    labels: Annotated[
        Path | None, typer.Option(help="Names of the classes, a line each, to keep in the file.")
    ] = None,
    push: Annotated[
        str, typer.Option(help="Upload the folder to this Hugging Face repository: owner/name.")
    ] = "",
    private: Annotated[bool, typer.Option("--private", help="Make that repository private.")] = (
        False
    ),
) -> None:
    """Write model.safetensors and config.json: the tensors as they are, the paper, configuration,
    preprocessing and licence beside them. `polypatch apply FOLDER …` needs nothing else."""
    from ..checkpoints import load
    from ..checkpoints.hub import push_to_hub
    from ..checkpoints.saving import convert
    from ..errors import PolypatchError

    names: tuple[str, ...] = ()
    if labels is not None:
        if not labels.is_file():
            raise PolypatchError(f"there is no file {labels}")
        names = tuple(labels.read_text(encoding="utf-8").splitlines())
    convert(file, folder, config=read_config(config), classes=names)
    loaded = load(folder)
    said = f" ({', '.join(loaded.assumed)} assumed)" if loaded.assumed else ""
    print(f"{folder}: {loaded.variant or loaded.paper}{said}")
    if push:
        console().print("Uploading …")
        print(push_to_hub(folder, push, private=private))
