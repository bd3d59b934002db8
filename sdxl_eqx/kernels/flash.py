"""Flash attention: no score matrix in memory, forward or backward, by the Pallas kernels that ship with JAX."""

from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Array, Float

from sdxl_eqx.config import FlashBlockSizes
from sdxl_eqx.kernels.splash import splash, splash_blocks
from sdxl_eqx.kernels.triton import triton, triton_blocks


@dataclass(frozen=True)
class Flash:
    """Attention by one of the kernels, for any lengths: splash for a TPU, triton for a GPU.

    Sequences are padded up to blocks. `mask_padding` keeps attention off the padding of the keys; without it, zeros
    are attended to, as MaxDiffusion does. `interpret` runs the kernel in JAX's interpreter: any device, and very slow.
    """

    kernel: Literal["splash", "triton"]
    block_sizes: FlashBlockSizes = field(default_factory=FlashBlockSizes)
    mask_padding: bool = True
    interpret: bool = False

    def __post_init__(self) -> None:
        """Says at once what is wrong with the blocks, not when a model is traced."""
        if self.kernel == "splash":
            splash_blocks(self.block_sizes, 4096, 4096, 1024)
        else:
            triton_blocks(self.block_sizes, 4096, 4096, 64)

    def __call__(
        self,
        query: Float[Array, "b l n d"],
        key: Float[Array, "b s n d"],
        value: Float[Array, "b s n d"],
        *,
        causal: bool = False,
    ) -> Float[Array, "b l n d"]:
        attend = splash if self.kernel == "splash" else triton
        return attend(
            query,
            key,
            value,
            causal=causal,
            block_sizes=self.block_sizes,
            mask_padding=self.mask_padding,
            interpret=self.interpret,
        )
