"""Requests of the OpenAI-compatible interface, checked by pydantic; an unknown field is an error.

Fields beside OpenAI's: `top_k`, `min_p`; `thinking` and `prefix` as in DeepSeek's interface;
`chat_template_kwargs` and `continue_final_message` as in vLLM's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Text = Annotated[str, StringConstraints(max_length=4_000_000)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Whole = Annotated[int, Field(ge=1, le=2**31 - 1)]

MOST_CHOICES = 128


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # of no use here: nothing is padded


class Sampled(Strict):
    """Fields of every request that generates; None leaves a setting to the model's own."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=1000)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    stop: (
        Annotated[str, StringConstraints(min_length=1, max_length=1000)]
        | list[Annotated[str, StringConstraints(min_length=1, max_length=1000)]]
        | None
    ) = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # taken and without effect: they concern the account or the service
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="after")
    def _few_stops(self) -> Sampled:
        if len(self.stops) > 16:
            raise ValueError(f"stop has {len(self.stops)} strings, expected 16 or fewer")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is given without stream")
        return self


class CompletionRequest(Sampled):
    """POST /v1/completions. With a `suffix` the model fills in between prompt and suffix."""

    prompt: Text | list[TokenId] | list[Text] | list[list[TokenId]]
    max_tokens: Whole = 16
    suffix: Text | None = None
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = None

    @model_validator(mode="after")
    def _together(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of is {self.best_of}, expected n ({self.n})")
        if self.echo and self.suffix is not None:
            raise ValueError("echo and suffix are given, expected one of them")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or several."""
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]  # type: ignore[return-value]
        return prompt  # type: ignore[return-value]


class Part(Strict):
    type: Literal["text"]
    text: Text


class Function(Strict):
    name: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    arguments: Text


class ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: Function
    index: int | None = None


class Message(Strict):
    """A message; the text of several parts is put together."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: Text | None = None
    prefix: bool = False
    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None

    def plain(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        found["content"] = content
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                found[name] = value
        if self.tool_calls:
            found["tool_calls"] = [
                c.model_dump(exclude_none=True, exclude={"index"}) for c in self.tool_calls
            ]
        return found


class FunctionSpec(Strict):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"] = "function"
    function: FunctionSpec


class Thinking(Strict):
    type: Literal["enabled", "disabled"]


class ResponseFormat(Strict):
    type: Literal["text"] = "text"


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=100_000)
    max_tokens: Whole | None = None
    max_completion_tokens: Whole | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=1000)
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    thinking: Thinking | bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ, expected one of them")
        if self.tool_choice is not None and not self.tools:
            raise ValueError("tool_choice is given without tools")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is given without logprobs")
        if (
            self.continue_final_message
            and self.add_generation_prompt
            and "add_generation_prompt" in self.model_fields_set
        ):
            raise ValueError(
                "add_generation_prompt and continue_final_message are true, expected one of them"
            )
        if self.continues and self.messages[-1].role != "assistant":
            raise ValueError("the message to continue is the last one, expected an assistant's")
        return self

    @property
    def continues(self) -> bool:
        """True if the reply goes on with the text of the last message."""
        return self.continue_final_message or self.messages[-1].prefix

    @property
    def budget(self) -> int | None:
        """New tokens at most; None is as many as there is room for."""
        return self.max_tokens or self.max_completion_tokens

    @property
    def thinks(self) -> bool | None:
        """The thinking mode asked for; None is the template's own."""
        if isinstance(self.thinking, Thinking):
            return self.thinking.type == "enabled"
        return self.thinking

    @property
    def tool_list(self) -> list[dict[str, Any]] | None:
        """The tools as chat templates take them."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]


class TokenizeRequest(Strict):
    """POST /tokenize: of a text, or of a conversation as it is rendered."""

    model: str | None = None
    prompt: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected one of prompt and messages")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId] = Field(max_length=4_000_000)
