"""Examples of a split, encoded on access."""

from __future__ import annotations

import numpy as np

from jaxseek.config.model import ConfigError
from jaxseek.config.run import RunConfig
from jaxseek.data.encode import Encoded, encode_document, encode_talk
from jaxseek.data.examples import conversation, document, preference
from jaxseek.data.rows import Item
from jaxseek.data.split import Part
from jaxseek.tokenizer import chat
from jaxseek.tokenizer.tokenizer import Tokenizer


class Items:
    """Sequence of `Item` over a split; `Item.number` is the index in the whole data set."""

    def __init__(self, part: Part, cfg: RunConfig, tokenizer: Tokenizer):
        self._part, self._cfg, self._tokenizer = part, cfg, tokenizer
        self._whole = part.kind == "pretrain" and cfg.data.packing  # documents continue in the next row
        needed = (chat.FIM_BEGIN, chat.FIM_HOLE, chat.FIM_END) if cfg.data.fim_rate else ()
        if part.kind == "pretrain" and (lacking := [t for t in needed if tokenizer.token_id(t) is None]):
            raise ConfigError(
                f"data.fim_rate is {cfg.data.fim_rate}, but the tokenizer has no {', '.join(lacking)}; set "
                "data.fim_rate = 0, or use a tokenizer with these tokens"
            )

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, i: int) -> Item:
        try:
            parts = self._encode(i)
        except ValueError as error:  # from a template, a text or a column
            place = self._part.place(i)
            raise ConfigError(str(error) if place in str(error) else f"{place}: {error}") from error
        return self._fit(i, parts)

    def _encode(self, i: int) -> tuple[Encoded, ...]:
        record, place, data = self._part[i], self._part.place(i), self._cfg.data
        match self._part.kind:
            case "pretrain":
                # seeded by the document's index: every epoch makes the same splits
                draw = np.random.default_rng((self._cfg.seed % 2**32, int(self._part.indices[i])))
                fim = draw if draw.random() < data.fim_rate else None
                parts = (encode_document(document(record, data, place), self._tokenizer, fim),)
            case "sft":
                parts = (encode_talk(conversation(record, data, place), self._tokenizer),)
            case _:
                parts = tuple(encode_talk(t, self._tokenizer) for t in preference(record, data, place))
        return parts

    def _fit(self, i: int, parts: tuple[Encoded, ...]) -> Item:
        """Cut or drop an example that is too long, and drop one without loss targets.

        Raises ConfigError for one that is too long if data.too_long is "error".
        """
        data = self._cfg.data
        longest = max(len(part.tokens) for part in parts)
        too_long = longest > data.length and not self._whole
        if too_long and data.too_long == "error":
            raise ConfigError(
                f"{self._part.place(i)} has {longest} tokens, data.length is {data.length}; raise it, or set "
                'data.too_long to "drop" or "cut"'
            )
        if too_long:
            parts = tuple(part.cut(data.length) for part in parts) if data.too_long == "cut" else ()
        if not all(len(part.tokens) if self._whole else part.weights[1:].any() for part in parts):
            parts = ()
        return Item(int(self._part.indices[i]), parts, too_long)
