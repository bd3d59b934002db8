"""Array types that every room shares, and the letters that name their dimensions.

Annotations such as `Float[Array, "b h w c"]` use one letter a dimension:

| letter | dimension | letter | dimension |
|---|---|---|---|
| `b` | batch | `n` | attention heads |
| `h w` | latent or feature grid, rows then columns | `d` | width of one head |
| `H W` | pixel grid | `t` | time-embedding width |
| `c c_in c_out` | channels | `e` | context width (2048 for SDXL) |
| `l` | image tokens (queries) | `p` | pooled text width (1280 for SDXL) |
| `s` | text tokens (keys) | `k` | convolution kernel |
| `v` | vocabulary | `*b` | any leading axes |
"""

from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Array, Float, PRNGKeyArray

__all__ = ["Array", "Attend", "DtypeName", "Float", "PRNGKeyArray", "Scalar"]

DtypeName = Literal["float32", "bfloat16", "float16"]

Scalar = Float[Array, ""]


@runtime_checkable  # for beartype, which tests switch on
class Attend(Protocol):
    """Scaled dot-product attention, `softmax(q kᵀ / sqrt(d)) v`, by any implementation.

    `query` is `[b, l, n, d]`, `key` and `value` are `[b, s, n, d]`; the result has the query's shape and dtype.
    """

    def __call__(
        self,
        query: Float[Array, "b l n d"],
        key: Float[Array, "b s n d"],
        value: Float[Array, "b s n d"],
        *,
        causal: bool = False,
    ) -> Float[Array, "b l n d"]: ...
