"""Text encoders: sentences to vectors `[B, C]`, for tasks told in words.

`NgramEncoder` is small, trainable and needs no download: byte n-grams of each word, hashed into a table whose entries
are averaged (Joulin et al. 2017, "Bag of Tricks"; Bojanowski et al. 2017 for the subwords). `SentenceEncoder` wraps a
frozen transformer such as all-MiniLM-L6-v2 (Wang et al. 2020; Reimers & Gurevych 2019): the mean over a sentence's
tokens, scaled to unit length. Its embeddings never change, so they are remembered.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dipole.errors import DipoleError, MissingExtraError, unknown

TextName = Literal["ngram", "transformer"]


@dataclass(frozen=True)
class TextConfig:
    """A text encoder.

    Attributes:
        name: `ngram` (trainable, nothing to download) or `transformer` (pretrained, frozen).
        width: Of the embedding, for `ngram`; a transformer has its own.
        buckets: Rows of the `ngram` table.
        ngrams: Shortest and longest n-gram, in bytes.
        model: Folder, or hub id, of the `transformer`.
    """

    name: TextName = "ngram"
    width: int = 64
    buckets: int = 4096
    ngrams: tuple[int, int] = (3, 5)
    model: str = "sentence-transformers/all-MiniLM-L6-v2"

    def build(self) -> NgramEncoder | SentenceEncoder:
        """Return the encoder, a module from a list of `B` sentences to `[B, out_dim]`.

        Raises:
            DipoleError: The name is unknown, or the model cannot be loaded.
            MissingExtraError: `transformer` without the package `transformers`.
        """
        if self.name == "ngram":
            return NgramEncoder(self)
        if self.name == "transformer":
            return SentenceEncoder(self.model)
        raise unknown("text encoder", self.name, ("ngram", "transformer"))


class NgramEncoder(nn.Module):
    """A trainable bag of hashed words and byte n-grams: a list of `B` sentences -> `[B, width]`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.buckets, self.ngrams, self.out_dim = config.buckets, config.ngrams, config.width
        self.table = nn.EmbeddingBag(config.buckets, config.width, mode="mean")
        self.out = nn.Sequential(
            nn.Linear(config.width, config.width), nn.Mish(), nn.Linear(config.width, config.width)
        )

    def forward(self, sentences: Sequence[str]) -> Tensor:
        """Return the embeddings `[B, width]`; case and punctuation do not matter."""
        bags = [self.tokens(sentence) for sentence in sentences]
        starts = [0]
        for bag in bags[:-1]:
            starts.append(starts[-1] + len(bag))
        device = self.table.weight.device
        ids = torch.tensor([token for bag in bags for token in bag], dtype=torch.long, device=device)
        embedding: Tensor = self.out(self.table(ids, torch.tensor(starts, device=device)))
        return embedding

    def tokens(self, sentence: str) -> list[int]:
        """Return the table rows of a sentence: one per word, one per n-gram of `<word>`."""
        shortest, longest = self.ngrams
        rows = []
        for word in re.findall(r"\w+", sentence.lower()):
            data = f"<{word}>".encode()
            pieces = {data[i : i + n] for n in range(shortest, longest + 1) for i in range(len(data) - n + 1)}
            # crc32 and not hash(): the same row in every process.
            rows += [zlib.crc32(piece) % self.buckets for piece in sorted(pieces | {data})]
        return rows


class SentenceEncoder(nn.Module):
    """A frozen pretrained transformer: a list of `B` sentences -> `[B, out_dim]`, of unit length.

    It has no parameters of its own: a checkpoint names the model instead of carrying it. The model runs on the CPU,
    once per new sentence.

    Args:
        model: Folder in the layout of `transformers` (config, tokenizer, safetensors weights), or hub id.
    """

    placement: Tensor

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model
        self.out_dim = int(_load(model)[1].config.hidden_size)
        self._known: dict[str, Tensor] = {}
        # Holds nothing; it is moved with the module and so tells where results are wanted.
        self.register_buffer("placement", torch.empty(0), persistent=False)

    @torch.no_grad()
    def forward(self, sentences: Sequence[str]) -> Tensor:
        """Return the embeddings `[B, out_dim]`."""
        new = [sentence for sentence in dict.fromkeys(sentences) if sentence not in self._known]
        if new:
            self._known.update(zip(new, self._embed(new), strict=True))
        return torch.stack([self._known[sentence] for sentence in sentences]).to(self.placement)

    def _embed(self, sentences: list[str]) -> Tensor:
        tokenizer, network = _load(self.model)
        batch = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
        hidden = network(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@lru_cache(maxsize=4)
def _load(model: str) -> tuple[Any, Any]:
    """Return (tokenizer, network), shared by all encoders of the process."""
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise MissingExtraError("transformers", "generators") from None
    try:
        # Safetensors only, and no code from the model's folder.
        network = AutoModel.from_pretrained(model, use_safetensors=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DipoleError(
            f"text model '{model}' cannot be loaded ({reason}): give the path of a downloaded folder, or use 'ngram'"
        ) from None
    return tokenizer, network.eval().requires_grad_(False)
