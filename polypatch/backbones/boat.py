"""BOAT: attention within windows of the image, then within clusters of similar features.

Yu, Zhao, Li and Yu, *BOAT: Bilateral Local Attention Vision Transformer* (BMVC 2022, arXiv
2201.13027). Windows of the image miss what is similar but far away. So a block's window attention
(ISLA) is followed by attention within clusters of tokens (FSLA,
:class:`~polypatch.backbones.boat_attention.FeatureAttention`), which balanced binary clustering
makes equally large whatever the image shows. It is added to Swin (:mod:`.boat_swin`) and to CSWin
(here)::

    x = x + ISLA(LN(x));    x = x + FSLA(LN(x));    x = x + MLP(LN(x))

FSLA stands in every second block: in CSWin's the first, third, … of each stage, within drop path;
in Swin's the shifted ones, outside of it.

Traps, of CSWin's form: the authors hand ``qkv_bias`` to FSLA as its scale, so that the logits of
FSLA (not those of the stripes) aren't scaled at all wherever projections have a bias; published
weights were trained so. The last stage has one cluster of 49 tokens, which their code pairs with
that of the next image of the batch: ``pair_across_batch`` is off in networks that :func:`build`
makes and in what :func:`recognise` says of a file, and on in :func:`network` with the authors'
words alone, which does what their code does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..nn import KeyMap, Preprocessing
from . import boat_swin, cswin
from .boat_attention import Bilateral, FeatureAttention, feature_rules
from .boat_swin import BoatSwin
from .cswin import CSWin

__all__ = [
    "VARIANTS",
    "BoatCSWin",
    "BoatSwin",
    "Variant",
    "assemble",
    "build",
    "from_official",
    "network",
    "official_config",
    "recognise",
    "to_official",
]


class BoatCSWin(CSWin):
    """CSWin with FSLA in the first, third, … block of every stage. Arguments: those of
    :class:`~polypatch.backbones.cswin.CSWin` and of :class:`FeatureAttention`; ``feature_scale``
    multiplies the logits of FSLA (None: 1 / √head dim)."""

    def __init__(
        self,
        *,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        stripes: tuple[int, ...],
        whole: tuple[bool, ...] = (False, False, False, True),
        classes: int = 1000,
        channels: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        scale: float | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        cluster: int = 49,
        overlap: int = 20,
        feature_scale: float | None = 1.0,
        pair_across_batch: bool = False,
    ) -> None:
        super().__init__(
            dims=dims,
            depths=depths,
            heads=heads,
            stripes=stripes,
            whole=whole,
            classes=classes,
            channels=channels,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            scale=scale,
            dropout=dropout,
            attention_dropout=attention_dropout,
            drop_path=drop_path,
        )
        self.cluster, self.overlap = cluster, overlap
        self.feature_scale, self.pair_across_batch = feature_scale, pair_across_batch
        for dim, head_count, blocks in zip(dims, heads, self.stages):
            for index in range(0, len(blocks), 2):  # type: ignore[arg-type]
                block = blocks[index]  # type: ignore[index]
                feature = FeatureAttention(
                    dim=dim,
                    heads=head_count,
                    cluster=cluster,
                    overlap=overlap,
                    bias=qkv_bias,
                    scale=feature_scale,
                    attention_dropout=attention_dropout,
                    dropout=attention_dropout,  # as the authors wire it
                    pair_across_batch=pair_across_batch,
                )
                blocks[index] = Bilateral(  # type: ignore[index]
                    block=block, feature=feature, dim=dim, drop_path=block.drop_path.rate
                )
        self.channels_last()


@dataclass(frozen=True)
class Variant(cswin.Variant):
    """A variant of CSWin, or with ``window`` above 0 (and no stripes) of Swin; sizes of FSLA."""

    window: int = 0
    cluster: int = 49
    overlap: int = 20


#: table 1 and the authors' recipes; cswin-large is in their code alone, without a recipe. nano is
#: ours, for demonstrations on a CPU: CSWin's form, with smaller clusters.
VARIANTS: dict[str, Variant] = {
    "boat-nano": Variant(
        24, (1, 1, 2, 1), (2, 4, 8, 16), (1, 2, 2, 2), 0.0, 64, cluster=16, overlap=6
    ),
    "boat-swin-tiny": Variant(96, (2, 2, 6, 2), (3, 6, 12, 24), (), 0.2, window=7),
    "boat-swin-small": Variant(96, (2, 2, 18, 2), (3, 6, 12, 24), (), 0.3, window=7),
    "boat-swin-base": Variant(128, (2, 2, 18, 2), (4, 8, 16, 32), (), 0.5, window=7),
    "boat-cswin-tiny": Variant(64, (1, 2, 21, 1), (2, 4, 8, 16), (1, 2, 7, 7), 0.2),
    "boat-cswin-small": Variant(64, (2, 4, 32, 2), (2, 4, 8, 16), (1, 2, 7, 7), 0.4),
    "boat-cswin-base": Variant(96, (2, 4, 32, 2), (4, 8, 16, 32), (1, 2, 7, 7), 0.5),
    "boat-cswin-large": Variant(144, (2, 4, 32, 2), (6, 12, 24, 24), (1, 2, 7, 7), 0.5),
}


def assemble(
    variant: Variant,
    *,
    classes: int = 1000,
    channels: int = 3,
    resolution: int | None = None,
    drop_path: float | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
) -> BoatCSWin | BoatSwin:
    """Wire a network without filling it; the arguments are :func:`build`'s."""
    resolution = variant.resolution if resolution is None else resolution
    drop_path = variant.drop_path if drop_path is None else drop_path
    if variant.window:
        model: BoatCSWin | BoatSwin = BoatSwin(
            dim=variant.dim,
            depths=variant.depths,
            heads=variant.heads,
            window=variant.window,
            grid=(resolution // 4, resolution // 4),
            classes=classes,
            channels=channels,
            dropout=dropout,
            attention_dropout=attention_dropout,
            drop_path=drop_path,
            cluster=variant.cluster,
            overlap=variant.overlap,
        )
        model.preprocessing = Preprocessing(resolution=resolution)
        return model
    model = BoatCSWin(
        dims=tuple(variant.dim << stage for stage in range(cswin.STAGES)),
        depths=variant.depths,
        heads=variant.heads,
        stripes=variant.stripes,
        whole=cswin.whole_at(resolution, variant.stripes),
        classes=classes,
        channels=channels,
        dropout=dropout,
        attention_dropout=attention_dropout,
        drop_path=drop_path,
        cluster=variant.cluster,
        overlap=variant.overlap,
    )
    model.preprocessing = cswin.preprocessing_at(resolution)
    return model


def build(
    variant: str,
    *,
    classes: int = 1000,
    channels: int = 3,
    resolution: int | None = None,
    drop_path: float | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
) -> BoatCSWin | BoatSwin:
    """A named network with fresh weights.

    Args:
        resolution: side of the images that it is made for (default: the variant's). Any size works
            afterwards; this one decides which stages attend over their whole map
            (:func:`cswin.whole_at`), or which shift their windows (:func:`boat_swin.windows_at`)
            and so have FSLA.
        drop_path: default: that of the authors' recipe.
    """
    model = assemble(
        VARIANTS[variant],
        classes=classes,
        channels=channels,
        resolution=resolution,
        drop_path=drop_path,
        dropout=dropout,
        attention_dropout=attention_dropout,
    )
    model.init_weights()
    return model


# ---- authors' weights --------------------------------------------------------------------------

#: what no shape tells; of Swin's form ``img_size``, if its file lacks the masks of shifted windows
ASSUMED = ("img_size", "num_heads", "split_size", "cluster", "overlap", "pair_across_batch")


def keymap(model: BoatCSWin | BoatSwin) -> KeyMap:
    """Their keys of a network of this one's depths."""
    if isinstance(model, BoatSwin):
        return boat_swin.keymap(model)
    rules: list[tuple[str, str]] = []
    for stage, blocks in enumerate(model.stages):
        for index, block in enumerate(blocks):  # type: ignore[arg-type]
            theirs, ours = f"stage{stage + 1}.{index}", f"stages.{stage}.{index}"
            if isinstance(block, Bilateral):
                rules += feature_rules(f"{theirs}.content_attn", f"{theirs}.norm3", ours)
                ours += ".block"
            rules += cswin.block_rules(theirs, ours)
    return KeyMap([*cswin.FRAME, ("norm", "norm"), *rules])


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of :func:`from_official` from names and shapes, None if these are no
    BOAT's.

    Heads and stripes of CSWin's form are chosen as :func:`polypatch.backbones.cswin.recognise`
    does; its ``pair_across_batch`` is False, so that an image's result doesn't depend on the batch
    that it comes in. Swin's form tells everything but the sizes of FSLA.
    """
    found = boat_swin.recognise(shapes)
    if found is not None:
        return found | _sizes_like(found["embed_dim"], found["depths"], swin=True)
    own = {name for name in shapes if ".content_attn." in name}
    if not own or "norm1.weight" in shapes:
        return None
    norms = {name.split(".content_attn.")[0] + ".norm3" for name in own}
    plain = {
        name: shape
        for name, shape in shapes.items()
        if name not in own and name.rpartition(".")[0] not in norms
    }
    found = cswin.configuration(plain, [v for v in VARIANTS.values() if not v.window])
    if found is None:
        return None
    del found["stage_norms"]
    sizes = _sizes_like(found["embed_dim"], found["depth"], swin=False)
    return found | sizes | {"pair_across_batch": False}


def _sizes_like(dim: int, depths: list[int], *, swin: bool) -> dict[str, int]:
    """Sizes of FSLA in the variant of that dim and depth, else the authors'."""
    for variant in VARIANTS.values():
        if (variant.dim, list(variant.depths), variant.window > 0) == (dim, depths, swin):
            return {"cluster": variant.cluster, "overlap": variant.overlap}
    return {"cluster": 49, "overlap": 20}


def network(config: Mapping[str, Any]) -> BoatCSWin | BoatSwin:
    """An unfilled network by the authors' argument names; with ``split_size`` it is of CSWin's
    form.

    CSWin's form takes the words of :func:`polypatch.backbones.cswin.network`, and our
    ``pair_across_batch`` (True, as their code does). Swin's those of
    :func:`polypatch.backbones.boat_swin.network`. Both take our ``cluster`` (49) and ``overlap``
    (20).

    Raises:
        PolypatchError: settings that this network doesn't have.
    """
    if "split_size" not in config:
        return boat_swin.network(config)
    model = BoatCSWin(
        **cswin.arguments(config),
        cluster=config.get("cluster", 49),
        overlap=config.get("overlap", 20),
        # their code hands over qkv_bias in place of the scale: True is 1, False is none
        feature_scale=1.0 if config.get("qkv_bias", True) else None,
        pair_across_batch=config.get("pair_across_batch", True),
    )
    model.preprocessing = cswin.preprocessing_at(config.get("img_size", 224))
    return model.checkpointed(config.get("use_chk", False))


def from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> BoatCSWin | BoatSwin:
    """The authors' state dict in a network of :func:`network`'s configuration, in eval mode.

    Raises:
        PolypatchError: keys or shapes that don't fit, each named.
    """
    model = network(config)
    keymap(model).load(model, state, what="this BOAT")
    return model.eval()


def to_official(model: BoatCSWin | BoatSwin) -> dict[str, Tensor]:
    """The state dict under the authors' keys; of Swin's form with the constants that their code
    wants to find in it."""
    state = keymap(model).to_theirs(model.state_dict())
    return state | (boat_swin.constants(model) if isinstance(model, BoatSwin) else {})


def official_config(model: BoatCSWin | BoatSwin) -> dict[str, Any]:
    """The configuration of :func:`network` that builds this network."""
    if isinstance(model, BoatSwin):
        return boat_swin.official_config(model)
    config = cswin.official_config(model) | {
        "cluster": model.cluster,
        "overlap": model.overlap,
        "pair_across_batch": model.pair_across_batch,
    }
    del config["stage_norms"]
    return config
