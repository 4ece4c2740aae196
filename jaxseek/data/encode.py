"""Tokenise documents and conversations, and mark the tokens that the model should learn to write.

`Encoded.weights` is 1 for a token that is a target of the loss. Text in the data never becomes a control
token, except thinking tags in assistant messages.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxseek.config.model import ConfigError
from jaxseek.data.examples import Talk
from jaxseek.tokenizer.template import after_prompt, mode_for
from jaxseek.tokenizer.tokenizer import Tokenizer


class Encoded(NamedTuple):
    tokens: np.ndarray  # int32 [n]
    weights: np.ndarray  # float32 [n]

    def cut(self, length: int) -> Encoded:
        return Encoded(self.tokens[:length], self.weights[:length])


def encode_document(text: str, tokenizer: Tokenizer, fim: np.random.Generator | None = None) -> Encoded:
    """Encode a document as BOS text EOS (each if the tokenizer has it), with weight 1 everywhere.

    With `fim`, a generator that draws two split points, encode BOS <fim_begin> prefix <fim_hole> suffix
    <fim_end> middle EOS (DeepSeek-V3 paper, section 4.1).
    """
    if fim is None:
        ids = tokenizer.encode(text)
    else:
        a, b = sorted(fim.integers(0, len(text), 2, endpoint=True))
        ids = tokenizer.render_fim(text[:a], text[b:]) + tokenizer.encode(text[a:b], bos=False)
    ids += tokenizer.eos_ids[:1]
    return _encoded(ids, [(0, len(ids))])


def encode_talk(talk: Talk, tokenizer: Tokenizer) -> Encoded:
    """Encode a conversation that ends with the assistant; its replies, with their EOS, have weight 1.

    The last reply follows the prompt that the model would get at inference. An earlier reply has weight 1
    only if that prompt contains it unchanged; a template that rewrites earlier turns, as R1's drops their
    thoughts, gives it weight 0.
    """
    turns = [i for i, message in enumerate(talk) if message["role"] == "assistant"]
    if tokenizer.template is None:
        prompt, reply = _plain(talk, tokenizer)
        return _encoded(prompt + reply, [(len(prompt), len(prompt + reply))])
    prompt, reply = _turn(talk, turns[-1], tokenizer)
    ids = prompt + reply
    spans = [(len(prompt), len(ids))]
    for i in turns[:-1]:
        before, said = _turn(talk, i, tokenizer)
        if ids[: len(before) + len(said)] == before + said:
            spans.append((len(before), len(before) + len(said)))
    return _encoded(ids, spans)


def _turn(talk: Talk, i: int, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return (prompt, reply) ids of assistant message i: the model's input and its target."""
    template, content = tokenizer.template, talk[i].get("content") or ""
    prompt = tokenizer.render_chat(talk[:i], thinking=mode_for(template, talk[i]))
    if template == "jinja" or talk[i].get("tool_calls"):
        return prompt, _reply_as_rendered(talk[: i + 1], prompt, tokenizer)
    tail = tokenizer.decode(prompt[-16:], skip_special=False)
    return prompt, tokenizer.encode_reply(after_prompt(template, content, tail))


def _reply_as_rendered(talk: Talk, prompt: list[int], tokenizer: Tokenizer) -> list[int]:
    """Return the ids that the template renders after the prompt, up to the end of the turn.

    Raises ConfigError if the rendered conversation does not start with the prompt.
    """
    whole = tokenizer.render_chat(talk, add_generation_prompt=False)
    if whole[: len(prompt)] != prompt:
        at = next((n for n, (a, b) in enumerate(zip(prompt, whole)) if a != b), min(len(prompt), len(whole)))
        raise ConfigError(
            "the chat template does not continue its own prompt, so answers cannot be told from prompts: "
            f"after {tokenizer.decode(prompt[max(at - 8, 0) : at], False)!r} the prompt goes on with "
            f"{tokenizer.decode(prompt[at : at + 8], False)!r}, the conversation with "
            f"{tokenizer.decode(whole[at : at + 8], False)!r}; use another template, or prompt and response "
            "columns with a tokenizer that has none"
        )
    reply = whole[len(prompt) :]
    ends = [n for n, token in enumerate(reply) if token in tokenizer.eos_ids]
    return reply[: ends[-1] + 1] if ends else reply


def _plain(talk: Talk, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return prompt and reply ids for a model without a chat template: the two plain texts."""
    if [message["role"] for message in talk] != ["user", "assistant"]:
        raise ConfigError(
            f"this tokenizer has no chat template, and so no form for {len(talk)} messages; expected a "
            "prompt and a response, or a tokenizer with a template"
        )
    return tokenizer.encode(talk[0]["content"]), tokenizer.encode_reply(talk[1]["content"] or "")


def _encoded(ids: list[int], spans: list[tuple[int, int]]) -> Encoded:
    weights = np.zeros(len(ids), np.float32)
    for begin, end in spans:
        weights[begin:end] = 1
    return Encoded(np.array(ids, np.int32), weights)
