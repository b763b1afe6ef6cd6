"""Masked autoencoding: hide most patches, encode the rest, predict the pixels of the hidden ones.

He, Chen, Xie, Li, Dollár, Girshick: *Masked Autoencoders Are Scalable Vision Learners*, CVPR 2022,
arXiv 2111.06377. For an image of N patches, of which keep = int(N (1 - mask_ratio)) stay::

    visible    = masking(tokens, keep)                       per image, here: random
    latent     = norm(blocks([class token | visible tokens + position]))
    decoded    = decoder([latent | mask token elsewhere] + fixed sine-cosine position)
    prediction = linear(decoded)                             (batch, N, p·p·channels)
    loss       = mean over hidden patches of mean((prediction - target)²)

With ``norm_pix`` a patch's target is brought to mean 0 and variance 1 (unbiased, + 1e-6), the
paper's better setting for large patches. **It makes no sense for a patch of a few values** (a pixel
has three): switch it off there.

The encoder is any ViT host with a grid of patches; it is changed by training alone, so what was
pre-trained is used as it is. Which patches stay is a function passed in (:data:`Masking`): other
strategies replace it and change nothing else.

Differences from the authors' code: the encoder keeps its own position code (theirs is fixed
sine-cosine); hosts that norm behind the pooling (mean pooling) have that norm applied to the
latent.
Patches are flattened as (row, column, channel), as theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from ..errors import PolypatchError
from ..hosts.vit import Block, Context, ViT
from ..nn import Attention, Mlp, SinCosPosition, patchify, unpatchify
from ..tokens import Tokens

__all__ = [
    "Decoder",
    "Masked",
    "MaskedAutoencoder",
    "Masking",
    "normalised_patches",
    "random_masking",
]

#: (tokens, how many to keep, generator) → indices of the kept placed tokens, (batch, keep).
Masking = Callable[[Tokens, int, torch.Generator | None], Int64[Tensor, "batch keep"]]


def random_masking(
    tokens: Tokens, keep: int, generator: torch.Generator | None = None
) -> Int64[Tensor, "batch keep"]:
    """A uniformly random subset per image, drawn as the paper does: sort noise, take the first."""
    count = tokens.x.shape[1] - tokens.prefix
    device = tokens.x.device if generator is None else generator.device
    noise = torch.rand(tokens.batch, count, generator=generator, device=device)
    return noise.argsort(dim=1)[:, :keep].to(tokens.x.device)


def normalised_patches(
    patches: Float[Tensor, "batch patches values"], *, eps: float = 1e-6
) -> Float[Tensor, "batch patches values"]:
    """Each patch with mean 0 and (unbiased) variance 1."""
    centred = patches - patches.mean(-1, keepdim=True)
    return centred * (patches.var(-1, keepdim=True) + eps).rsqrt()


@dataclass(frozen=True)
class Masked:
    """What a forward pass gives.

    Fields:
        loss: scalar, mean over the hidden patches of the batch.
        prediction: (batch, patches, p·p·channels), of all patches, in the target's scale.
        mask: (batch, patches), True where a patch was hidden.
        per_patch: (batch, patches), each patch's own loss, hidden or not.
    """

    loss: Float[Tensor, ""]
    prediction: Float[Tensor, "batch patches values"]
    mask: Bool[Tensor, "batch patches"]
    per_patch: Float[Tensor, "batch patches"]


class Decoder(nn.Module):
    """A narrow ViT over all places: latents where patches were visible, a mask token elsewhere.

    Args:
        dim: the encoder's width.
        patch: the encoder's patch in pixels, unit of the position code.
        values: numbers to predict for each patch.
        width, depth, heads: the decoder's own size.
    """

    def __init__(
        self, *, dim: int, patch: int, values: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = SinCosPosition(dim=width, patch=float(patch))
        self.blocks = nn.ModuleList(
            Block(
                dim=width,
                mixing=Attention(dim=width, heads=heads),
                mlp=Mlp(dim=width, hidden=4 * width),
                norm=lambda size: nn.LayerNorm(size, eps=1e-6),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, values)

    def init_weights(self) -> None:
        """Xavier for matrices, std 0.02 for the mask token, as the authors."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.LayerNorm):
                nn.init.ones_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, latent: Tokens, places: Tokens, visible: Int64[Tensor, "batch keep"]
    ) -> Float[Tensor, "batch patches values"]:
        """Predictions at all of ``places``; ``latent`` holds a prefix and those at ``visible``."""
        x = self.embed(latent.x)
        prefix = latent.prefix
        count = places.x.shape[1] - places.prefix
        full = self.mask_token.to(x.dtype).expand(len(x), count, -1)
        index = visible[..., None].expand(-1, -1, x.shape[-1])
        tokens = Tokens(
            x=full.scatter(1, index, x[:, prefix:]),
            centre=places.centre[:, places.prefix :],
            extent=places.extent[:, places.prefix :],
            canvas=places.canvas,
        )
        tokens = self.position(tokens)
        if prefix:
            tokens = tokens.with_prefix(x[:, :prefix])
        context = Context(None, None, None)
        for block in self.blocks:
            tokens = block(tokens, context)
        return self.head(self.norm(tokens.x))[:, prefix:]


class MaskedAutoencoder(nn.Module):
    """A host and a decoder, trained together; afterwards the host is used alone.

    Args:
        encoder: a ViT host whose tokenizer gives a grid of patches.
        mask_ratio: share of the patches that is hidden.
        norm_pix: normalise each patch's target; off for patches of a few values.
        masking: which patches stay visible.
        width, depth, heads: the decoder's size (the paper's default: 512, 8, 16).

    Raises:
        PolypatchError: a ratio that hides nothing or everything, a width that doesn't fit.
    """

    def __init__(
        self,
        *,
        encoder: ViT,
        mask_ratio: float = 0.75,
        norm_pix: bool = True,
        masking: Masking = random_masking,
        width: int = 512,
        depth: int = 8,
        heads: int = 16,
    ) -> None:
        super().__init__()
        if not 0 < mask_ratio < 1:
            raise PolypatchError(f"mask_ratio lies between 0 and 1, got {mask_ratio}")
        if width % 4 or width % heads:
            raise PolypatchError(
                f"the decoder's width must divide by 4 and by its heads, got {width} and {heads}"
            )
        self.encoder = encoder
        self.mask_ratio, self.norm_pix, self.masking = mask_ratio, norm_pix, masking
        values = encoder.patch**2 * _channels(encoder)
        self.decoder = Decoder(
            dim=encoder.dim,
            patch=encoder.patch,
            values=values,
            width=width,
            depth=depth,
            heads=heads,
        )
        if not self.decoder.mask_token.is_meta:
            reference = next(encoder.parameters())
            self.decoder.to(device=reference.device, dtype=reference.dtype)
            self.decoder.init_weights()

    def no_decay(self) -> set[str]:
        """Names of parameters without weight decay: the host's, biases, gains, the mask token."""
        names = {f"encoder.{name}" for name in self.encoder.no_decay()}
        return names | {
            f"decoder.{name}"
            for name, value in self.decoder.named_parameters()
            if value.ndim <= 1 or name == "mask_token"
        }

    def padded(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels tall wide"]:
        """The images with zeros at the bottom and on the right, as the host's patches see them."""
        patch = self.encoder.patch
        return F.pad(images, (0, -images.shape[-1] % patch, 0, -images.shape[-2] % patch))

    def target(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch patches values"]:
        """What is predicted: the pixels of each patch, normalised with ``norm_pix``."""
        patch = self.encoder.patch
        patches = patchify(self.padded(images), (patch, patch))
        return normalised_patches(patches) if self.norm_pix else patches

    def encode(self, places: Tokens, visible: Int64[Tensor, "batch keep"]) -> Tokens:
        """The host's normed features of the visible tokens, its prefix in front."""
        host = self.encoder
        tokens = places.keep(visible)
        if host.prefix is not None:
            tokens = host.prefix(tokens)
        latent = host.encode(tokens.with_x(host.norm_in(tokens.x)))
        norm = getattr(host.pooling, "norm", None)
        if isinstance(host.norm, nn.Identity) and isinstance(norm, nn.Module):
            latent = latent.with_x(norm(latent.x))
        return latent

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        generator: torch.Generator | None = None,
        *,
        masking: Masking | None = None,
    ) -> Masked:
        """One step: mask, encode, predict.

        Args:
            generator: from which the mask is drawn; default: torch's global one.
            masking: another strategy than the module's, for this call.

        Raises:
            PolypatchError: the host's tokens are no grid of patches, or a masking keeps nothing.
        """
        host = self.encoder
        places = host.position(host.patching(images))
        patch = host.patch
        grid = (-(-images.shape[-2] // patch), -(-images.shape[-1] // patch))
        if places.grid != grid:
            raise PolypatchError(
                "masked autoencoding predicts the pixels of a regular grid of patches; this host's "
                f"tokenizer ({type(host.patching).__name__}) gives no such grid"
            )
        count = grid[0] * grid[1]
        keep = int(count * (1 - self.mask_ratio))
        if keep < 1:
            raise PolypatchError(
                f"of {count} patches, mask_ratio={self.mask_ratio} leaves none to see; "
                "use larger images or smaller patches"
            )
        visible = (masking or self.masking)(places, keep, generator)
        prediction = self.decoder(self.encode(places, visible), places, visible)
        hidden = torch.ones(len(visible), count, dtype=torch.bool, device=visible.device)
        hidden = hidden.scatter(1, visible, False)
        # The loss in float32: bfloat16 would round a mean of small squares away.
        error = prediction.float() - self.target(images).float()
        per_patch = error.square().mean(-1)
        loss = (per_patch * hidden).sum() / hidden.sum()
        return Masked(loss=loss, prediction=prediction, mask=hidden, per_patch=per_patch)

    def picture(
        self, images: Float[Tensor, "batch channels height width"], result: Masked
    ) -> Float[Tensor, "batch channels height width"]:
        """The images with hidden patches replaced by their predictions, for looking at."""
        patch = self.encoder.patch
        whole = self.padded(images)
        patches = patchify(whole, (patch, patch))
        predicted = result.prediction.to(patches.dtype)
        if self.norm_pix:
            spread = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
            predicted = predicted * spread + patches.mean(-1, keepdim=True)
        mixed = torch.where(result.mask[..., None], predicted, patches)
        grid = (whole.shape[-2] // patch, whole.shape[-1] // patch)
        return unpatchify(mixed, (patch, patch), grid)[..., : images.shape[-2], : images.shape[-1]]


def _channels(host: ViT) -> int:
    """How many channels the host's images have."""
    projection = getattr(host.patching, "proj", None)
    if isinstance(projection, nn.Conv2d):
        return projection.in_channels
    return int(getattr(host.patching, "channels", 3))
