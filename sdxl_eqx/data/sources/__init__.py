"""Where samples come from: random access to pictures and captions, before any picture is decoded."""

from sdxl_eqx.data.sources.source import Conditioned, Source, texts, texts_or

__all__ = ["Conditioned", "Source", "texts", "texts_or"]
