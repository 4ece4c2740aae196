"""Training data: from files of examples to rows of tokens, in a seeded order that can be resumed.

sources.py reads files as records, split.py holds some out for evaluation, examples.py parses records as
documents, conversations or pairs, encode.py and items.py tokenise them, rows.py packs them into rows.
"""

from __future__ import annotations

from pathlib import Path

from jaxseek.config.model import ConfigError
from jaxseek.config.run import RunConfig
from jaxseek.data.items import Items
from jaxseek.data.rows import Rows
from jaxseek.data.split import Prompts, open_split, shuffled, texts
from jaxseek.tokenizer import chat
from jaxseek.tokenizer.tokenizer import Tokenizer, train_sentencepiece

VOCABULARY_TEXT = 1 << 24  # characters to train a new tokenizer on


def open_rows(
    cfg: RunConfig,
    tokenizer: Tokenizer,
    split: str = "train",
    repeat: bool = True,
) -> Rows | None:
    """Open the data of a run as rows of tokens; returns None for split="eval" without evaluation data.

    Every host reads the same rows. Without `repeat` they end after one pass. Raises ConfigError for unusable
    data: here for the first 10,000 records, and for later ones when they are read.
    """
    part = open_split(cfg, split)
    if part is None:
        return None
    packed = {"pretrain": "concatenate", "sft": "fit", "dpo": "pair"}[part.kind]
    layout = packed if cfg.data.packing or part.kind == "dpo" else "single"
    return Rows(
        Items(part, cfg, tokenizer),
        layout,
        cfg.data.length,
        pad=0 if tokenizer.pad_id is None else tokenizer.pad_id,
        seed=cfg.seed,
        shuffle=cfg.data.shuffle and split == "train",
        repeat=repeat,
    )


def open_prompts(cfg: RunConfig, split: str = "train") -> Prompts | None:
    """Open the prompts, the messages of each example before the answer; None as in `open_rows`."""
    part = open_split(cfg, split, kind="prompts")
    return None if part is None else Prompts(part, cfg.data)


def train_tokenizer(cfg: RunConfig, directory: str | Path) -> Tokenizer:
    """Train the tokenizer of `tokenizer = "train:SIZE"` on the training examples and write it to `directory`.

    The same data gives the same file. Data above VOCABULARY_TEXT characters is sampled, always alike.
    Raises ConfigError if the setting is malformed.
    """
    word, _, size = cfg.tokenizer.partition(":")
    if word != "train" or not size.isdecimal():
        raise ConfigError(f"tokenizer is {cfg.tokenizer!r}, expected train:SIZE, such as train:4096")
    part = open_split(cfg, "train")
    assert part is not None
    corpus, total = [], 0
    for i in map(int, shuffled(len(part))):
        corpus += (strings := texts(part[i], part.kind, cfg.data, part.place(i)))
        total += sum(map(len, strings))
        if total >= VOCABULARY_TEXT:
            break
    fim = (chat.FIM_BEGIN, chat.FIM_HOLE, chat.FIM_END) if cfg.data.fim_rate else ()
    control = (chat.USER, chat.ASSISTANT, chat.THINK, chat.THINK_END, *fim)
    return train_sentencepiece(corpus, int(size), directory, control)
