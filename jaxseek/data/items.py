"""The examples of a part of the data, encoded when they are asked for."""

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
    """A sequence of `Item`; index counts within the whole set, of which `part` may be a part."""

    def __init__(self, part: Part, cfg: RunConfig, tokenizer: Tokenizer):
        self._part, self._cfg, self._tokenizer = part, cfg, tokenizer
        self._whole = part.kind == "pretrain" and cfg.data.packing  # documents go on in the next row
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
        except ValueError as error:  # of a template, a text or a column
            place = self._part.place(i)
            raise ConfigError(str(error) if place in str(error) else f"{place}: {error}") from error
        return self._fit(i, parts)

    def _encode(self, i: int) -> tuple[Encoded, ...]:
        record, place, data = self._part[i], self._part.place(i), self._cfg.data
        match self._part.kind:
            case "pretrain":
                # The same documents, split at the same places, each time.
                draw = np.random.default_rng((self._cfg.seed % 2**32, int(self._part.indices[i])))
                fim = draw if draw.random() < data.fim_rate else None
                parts = (encode_document(document(record, data, place), self._tokenizer, fim),)
            case "sft":
                parts = (encode_talk(conversation(record, data, place), self._tokenizer),)
            case _:
                parts = tuple(encode_talk(t, self._tokenizer) for t in preference(record, data, place))
        return parts

    def _fit(self, i: int, parts: tuple[Encoded, ...]) -> Item:
        """Cut or dropped where it is too long; dropped too where nothing is left to learn."""
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
