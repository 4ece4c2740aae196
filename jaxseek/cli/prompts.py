"""Prompts of the command line: read and checked before the model is loaded, encoded before it runs.

A prompt keeps where it comes from, so that an error names the file and the line.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxseek.cli.shared import WrongUse, unicode
from jaxseek.storage.place import place
from jaxseek.storage.untrusted import parse_json


@dataclass(frozen=True)
class Prompt:
    """Text, token ids, or a chat as engine.text has it, with the place where it was given."""

    content: Any
    where: str


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Declare what `read_prompts` reads."""
    parser.add_argument(
        "-p",
        "--prompt",
        action="append",
        type=unicode,
        default=[],
        help="repeatable; - reads standard input",
    )
    parser.add_argument(
        "-f", "--file", help='prompts: a line each, or .jsonl with "prompt" or "messages" (also "tools")'
    )


def read_prompts(given: Sequence[str], file: str | None) -> list[Prompt]:
    """Return the prompts given, of which - is standard input, then those of a file.

    Raises ValueError for a line that is no prompt, WrongUse where there is no prompt at all.
    """
    prompts = []
    for number, text in enumerate(given, 1):
        where = "-p" if len(given) == 1 else f"-p, number {number}"
        prompts.append(_standard_input() if text == "-" else Prompt(text, where))
    if file:
        prompts += _file(file)
    if not prompts:
        also = f"{file} has none; " if file else ""
        raise WrongUse(f'no prompt: {also}give -p "text", -p - for standard input, or -f FILE')
    return prompts


def as_chats(prompts: Sequence[Prompt], chat: bool, system: str | None, more: object = None) -> list[Prompt]:
    """Make texts the user's message of a chat, where asked, and put a system message before every chat.

    Raises ValueError for a chat that has one of its own, and WrongUse for a system message or `more`, which
    are other options of chats, where there is no chat.
    """
    found = []
    for prompt in prompts:
        content = prompt.content
        if chat and isinstance(content, str):
            content = [{"role": "user", "content": content}]
        if system and is_chat(content):
            talk = messages(content)
            if talk[0]["role"] == "system":
                raise ValueError(f"{prompt.where}: has a system message of its own; leave --system out")
            talk = [{"role": "system", "content": system}, *talk]
            content = content | {"messages": talk} if isinstance(content, dict) else talk
        found.append(Prompt(content, prompt.where))
    if (system or more) and not any(is_chat(prompt.content) for prompt in found):
        raise WrongUse(
            "--system, templates, tools and --no-think are for chats, and there is none; add --chat"
        )
    return found


def is_chat(content: Any) -> bool:
    """Return whether a prompt is a conversation."""
    return isinstance(content, dict) or (isinstance(content, list) and isinstance([*content, 0][0], dict))


def messages(content: Any) -> list[dict[str, Any]]:
    """Return the messages of a conversation."""
    return content["messages"] if isinstance(content, dict) else content


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Any, vocab_size: int, rendering: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """Return the token ids of every prompt; without a tokenizer, texts are ids.

    `rendering` is for chats. Raises ValueError, which tells the place of a prompt that cannot be encoded.
    """
    from jaxseek.engine.text import encode

    found, rendering = [], rendering or {}
    for prompt in prompts:
        content = prompt.content
        try:
            if tokenizer is None and isinstance(content, str):
                content = [_id(word) for word in content.split()]
            ids = encode(tokenizer, content, **(rendering if is_chat(content) else {}))
            if not ids:
                raise ValueError("the prompt is empty, expected one token or more")
            if wrong := [i for i in ids if not 0 <= i < vocab_size]:
                raise ValueError(
                    f"token id {wrong[0]} is outside the vocabulary, expected 0 to {vocab_size - 1}"
                )
        except ValueError as e:
            raise ValueError(f"{prompt.where}: {e}") from None
        found.append(ids)
    return found


def _id(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise ValueError(
            f"{word[:60]!r} is no token id: the model has no tokenizer, so a prompt is ids such as 5 17 3"
        ) from None


def _standard_input() -> Prompt:
    if sys.stdin is None:
        raise ValueError("-p -: standard input is closed")
    try:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(newline="")  # keep carriage returns
        text = sys.stdin.read()
        text.encode()
    except UnicodeError as e:
        raise ValueError(f"-p -: standard input is not text in {sys.stdin.encoding}: {e}") from None
    return Prompt(text, "-p -")


def _file(file: str) -> Iterator[Prompt]:
    try:
        text = place(file).read_bytes().decode("utf-8-sig")
    except UnicodeError as e:
        raise ValueError(f"{file}: not a text file in UTF-8 ({e})") from None
    # Only a newline ends a line: str.splitlines would split at U+2028, form feeds and carriage returns too.
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip(" \t"):
            where = f"{file}, line {number}"
            yield Prompt(_row(line, where) if file.endswith(".jsonl") else line, where)


def _row(line: str, where: str) -> Any:
    """Return the prompt or the messages of a line of JSON, the latter with tools where it has such keys."""
    from jaxseek.engine.text import CHAT
    from jaxseek.tokenizer.chat import check_messages, check_tables

    try:
        row = parse_json(line, where)
    except ValueError as e:
        why = str(e).removeprefix(f"{where}: ")
        raise ValueError(
            f'{where}: expected JSON with "prompt" or "messages", found {_brief(line)} ({why})'
        ) from None
    if not {"prompt", "messages"} & row.keys():
        raise ValueError(f'{where}: expected JSON with "prompt" or "messages", found {_brief(row)}')
    name = "messages" if "messages" in row else "prompt"
    content = row[name]
    more = {key: row[key] for key in CHAT if row.get(key) is not None}
    if name == "prompt" and (isinstance(content, str) or _are_ids(content)):
        if more:
            raise ValueError(f"{where}: {', '.join(more)} belong to messages, and this prompt has none")
        return content
    if not isinstance(content, list):
        forms = "a list of messages" if name == "messages" else "text, token ids or a list of messages"
        raise ValueError(f"{where}: {name} is {_brief(content)}, expected {forms}")
    try:
        check_messages(content)
        for key in more.keys() & {"tools", "documents"}:
            check_tables(key, more[key])
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None
    if not isinstance(more.get("chat_template_kwargs", {}), dict):
        raise ValueError(
            f"{where}: chat_template_kwargs is {_brief(more['chat_template_kwargs'])}, expected an object"
        )
    return {"messages": content, **more} if more else content


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
