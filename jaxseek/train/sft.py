"""Supervised fine-tuning: cross-entropy on the answers of conversations.

The rows make the difference to pretraining: data/items.py gives weight to the tokens of answers alone, and
data/rows.py packs whole conversations.
"""

from jaxseek.train.pretrain import Pretrain


class Sft(Pretrain):
    """Steps on rows of conversations."""
