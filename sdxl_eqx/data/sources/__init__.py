"""Where samples come from: random access to pictures and captions, before any picture is decoded."""

from sdxl_eqx.data.sources.source import Source, texts

__all__ = ["Source", "texts"]
