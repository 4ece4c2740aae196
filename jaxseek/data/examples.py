"""Parse records as documents, conversations or pairs; ConfigErrors name the record's place.

A conversation is a list of {role, content} in `columns.messages`, or `columns.prompt` (a string or such a
list) with a reply (a string, a message, or a list that ends with one).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from jaxseek.config.model import ConfigError
from jaxseek.config.run import DataConfig
from jaxseek.data.sources import Record
from jaxseek.tokenizer.chat import ROLES

Talk = list[dict[str, Any]]  # {"role", "content"} and, if an assistant calls tools, "tool_calls"


def is_chat(record: Record, data: DataConfig) -> bool:
    """Return whether a record has the columns of a conversation rather than of a document."""
    return data.columns.messages in record or data.columns.prompt in record


def document(record: Record, data: DataConfig, place: str) -> str:
    """Return the text of a pretraining document."""
    text = _column(record, "text", data, place)
    if not isinstance(text, str):
        raise ConfigError(f"{place}: {data.columns.text} is {_brief(text)}, expected a string")
    return text


def conversation(record: Record, data: DataConfig, place: str) -> Talk:
    """Return the messages of a supervised example up to the last assistant message, which is required."""
    if data.columns.messages in record:
        talk = _talk(record[data.columns.messages], data, f"{place}: {data.columns.messages}")
        last = max((i for i, m in enumerate(talk) if m["role"] == "assistant"), default=-1)
        if last < 0:
            raise ConfigError(
                f"{place}: no message in {data.columns.messages} is the assistant's, so there is nothing to "
                f"learn (roles: {', '.join(sorted({m['role'] for m in talk}))})"
            )
        return talk[: last + 1]
    if data.columns.prompt not in record:
        raise _missing(record, "messages", data, place, " and no prompt either")
    return [*prompt(record, data, place), _reply(record, "response", data, place)]


def preference(record: Record, data: DataConfig, place: str) -> tuple[Talk, Talk]:
    """Return (chosen, rejected): two conversations that differ in their last message."""
    replies = [_reply(record, name, data, place) for name in ("chosen", "rejected")]
    chosen = record[data.columns.chosen]
    if not is_chat(record, data) and isinstance(chosen, list) and len(chosen) > 1:  # it includes the prompt
        before = _talk(chosen, data, f"{place}: {data.columns.chosen}")[:-1]
    else:
        before = prompt(record, data, place)
    return [*before, replies[0]], [*before, replies[1]]


def prompt(record: Record, data: DataConfig, place: str) -> Talk:
    """Return the messages before the answer; trailing assistant messages are dropped."""
    name = data.columns.messages if data.columns.messages in record else data.columns.prompt
    if name not in record:
        raise _missing(record, "prompt", data, place)
    value = record[name]
    if isinstance(value, str) and name == data.columns.prompt:
        return [{"role": "user", "content": value}]
    talk = _talk(value, data, f"{place}: {name}")
    while talk and talk[-1]["role"] == "assistant":
        talk.pop()
    if not talk:
        raise ConfigError(f"{place}: {name} holds no message to answer")
    return talk


def _reply(record: Record, name: str, data: DataConfig, place: str) -> dict[str, Any]:
    value = _column(record, name, data, place)
    if isinstance(value, str):
        return {"role": "assistant", "content": value}
    where = f"{place}: {getattr(data.columns, name)}"
    message = _talk(value if isinstance(value, list) else [value], data, where)[-1]
    if message["role"] != "assistant":
        raise ConfigError(f"{where} is by the {message['role']}, expected the assistant's reply")
    return message


def _talk(value: Any, data: DataConfig, where: str) -> Talk:
    """Check a list of messages, and rename its columns and roles to ours."""
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where} is {_brief(value)}, expected a list of messages")
    return [_message(message, data, f"{where}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, data: DataConfig, where: str) -> dict[str, Any]:
    columns = data.columns
    if not isinstance(message, Mapping) or columns.role not in message or columns.content not in message:
        raise ConfigError(
            f"{where} is {_brief(message)}, expected {{{columns.role}, {columns.content}}} (other names go "
            "into [data.columns] as role and content)"
        )
    role, content = message[columns.role], message[columns.content]
    role = data.roles.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ConfigError(
            f"{where} has the role {role!r}, expected one of {', '.join(ROLES)}; say which it is in "
            f'[data.roles], such as {role} = "user"'
        )
    calls = message.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls):
        raise ConfigError(f"{where} has {columns.content} {_brief(content)}, expected a string")
    return {"role": role, "content": content} | ({"tool_calls": calls} if calls else {})


def _column(record: Record, name: str, data: DataConfig, place: str) -> Any:
    if getattr(data.columns, name) not in record:
        raise _missing(record, name, data, place)
    return record[getattr(data.columns, name)]


def _missing(record: Record, name: str, data: DataConfig, place: str, also: str = "") -> ConfigError:
    near = difflib.get_close_matches(getattr(data.columns, name), record, 1, 0.5)
    return ConfigError(
        f"{place} has no column {getattr(data.columns, name)!r}{also} (it has "
        f"{', '.join(map(repr, record))}); "
        f'name the right one in [data.columns]: {name} = "{near[0] if near else "..."}"'
    )


def _brief(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
