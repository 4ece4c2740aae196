"""The OpenAI-compatible application: routes, errors, streams."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from importlib import resources
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

import jaxseek
from jaxseek.engine.engine import Engine
from jaxseek.engine.generate import request as engine_request
from jaxseek.engine.generate import seed_for, settings
from jaxseek.engine.request import PROMPT, TOPS
from jaxseek.engine.sampling import Sampling
from jaxseek.serve.engine_thread import Job, Update, Worker
from jaxseek.serve.figures import Figures
from jaxseek.serve.limits import Limits, error_body
from jaxseek.serve.replies import Chat, Choice, Completion
from jaxseek.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampled,
    TokenizeRequest,
)
from jaxseek.tokenizer.chat import ASSISTANT, THINK, THINK_END, TokenizerError
from jaxseek.tokenizer.tokenizer import Tokenizer

SETTINGS = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """How the application serves. `queue` requests may wait for a slot; `timeout` is in seconds, of a whole
    answer; `body_bytes` and `body_seconds` limit what a client sends."""

    name: str
    keys: tuple[str, ...] = ()
    queue: int = 256
    timeout: float = 3600.0
    body_bytes: int = 16 << 20
    body_seconds: float = 30.0


def create(engine: Engine, tokenizer: Tokenizer, options: Options) -> FastAPI:
    """The application, which serves one engine with a thread of its own from start-up to shut-down."""
    figures = Figures()
    server = Server(engine, tokenizer, options, figures)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.start()
        yield
        await asyncio.to_thread(server.worker.close)

    app = FastAPI(
        title="jaxseek", version=jaxseek.__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        openapi_url="/openapi.json",
    )  # fmt: skip
    limits = {"most": options.body_bytes, "seconds": options.body_seconds, "keys": options.keys}
    app.add_middleware(Limits, figures=figures, **limits)  # type: ignore[arg-type]
    app.state.server = server

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(x) for x in first["loc"] if x != "body")
        said = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            said = "is not a field of this request; leave it out"
        return refusal(400, f"{where}: {said}" if where else said, param=where or None)

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> JSONResponse:
        said = str(error.detail)
        if said == "Not Found":  # the router's
            said = f"there is no {request.url.path}"
        elif said == "Method Not Allowed":
            said = f"{request.url.path} does not take {request.method}"
        return refusal(error.status_code, said, headers=error.headers)

    @app.exception_handler(TokenizerError)
    async def untokenizable(_: Request, error: TokenizerError) -> JSONResponse:
        return refusal(400, str(error))

    def refusal(status: int, message: str, param: str | None = None, headers: Any = None) -> JSONResponse:
        figures.refused.labels(str(status)).inc()
        kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        return JSONResponse(error_body(message, kind, param, status), status, headers)

    @app.post("/v1/chat/completions", responses={400: {}, 429: {}})
    async def chat(body: ChatRequest, http: Request) -> Any:
        return await server.chat(body, http)

    @app.post("/v1/completions", responses={400: {}, 429: {}})
    async def completions(body: CompletionRequest, http: Request) -> Any:
        return await server.completions(body, http)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [server.card()]}

    @app.get("/v1/models/{name:path}", responses={404: {}})
    async def model(name: str) -> dict[str, Any]:
        server.check_model(name)
        return server.card()

    @app.post("/tokenize", responses={400: {}})
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        server.check_model(body.model)
        if body.messages is not None:
            messages = [m.plain() for m in body.messages]
            ids = await asyncio.to_thread(
                tokenizer.render_chat, messages, add_generation_prompt=body.add_generation_prompt
            )
        else:
            ids = await asyncio.to_thread(tokenizer.encode, body.prompt or "", bos=body.add_special_tokens)
        return {"tokens": ids, "count": len(ids), "max_model_len": server.context}

    @app.post("/detokenize", responses={400: {}})
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        server.check_model(body.model)
        server.check_ids(body.tokens)
        return {"prompt": tokenizer.decode(body.tokens, skip_special=False)}

    @app.get("/health", response_class=PlainTextResponse, responses={503: {}})
    async def health() -> str:
        if not server.worker.alive:
            raise HTTPException(503, "the engine's thread has ended")
        return "ok"

    @app.get("/ready", response_class=PlainTextResponse, responses={503: {}})
    async def ready() -> str:
        if not server.ready:
            raise HTTPException(503, "warming up")
        return "ready"

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(figures.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return (resources.files("jaxseek.serve") / "page.html").read_text(encoding="utf-8")

    return app


class Server:
    """The state that the routes share: the model's name and tokenizer, and the engine's thread."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, options: Options, figures: Figures):
        self.engine, self.tokenizer, self.options, self.figures = engine, tokenizer, options, figures
        self.context = engine.model.cfg.max_position_embeddings
        self.ready, self.created, self.open = False, int(time.time()), 0
        self.worker: Worker

    def start(self) -> None:
        """Start the worker, and compile what most requests need before saying that all is ready."""
        self.worker = Worker(self.engine, self.figures)
        ends, loop = [], asyncio.get_running_loop()
        for prompt in warm_up_prompts(self.context):
            sampling = Sampling(max_new_tokens=2, temperature=1.0, top_p=0.9)
            done = asyncio.Event()

            def told(update: Update, done: asyncio.Event = done) -> None:
                if update.last:
                    loop.call_soon_threadsafe(done.set)

            self.worker.submit(Job(engine_request(self.engine.model, self.tokenizer, prompt, sampling), told))
            ends.append(done.wait())

        async def warm() -> None:
            await asyncio.gather(*ends)
            self.ready = True

        self._warming = asyncio.create_task(warm())

    # ---------------------------------------------------------------- checks

    def card(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        made = {"object": "model", "created": self.created, "owned_by": "jaxseek"}
        return {"id": self.options.name, **made, "max_model_len": self.context}

    def check_model(self, name: str | None) -> None:
        """Raise 404 for another model than the one that is served."""
        if name not in (None, "", self.options.name):
            raise HTTPException(404, f"the model {name!r} is not here, but {self.options.name!r}")

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise 400 for tokens that the model does not have."""
        try:
            self.engine.model.check_tokens([list(ids)])
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

    # ---------------------------------------------------------------- what is generated

    async def chat(self, body: ChatRequest, http: Request) -> Any:
        """Answer POST /v1/chat/completions."""
        self.check_model(body.model)
        messages, tools = [m.plain() for m in body.messages], body.tool_list
        ids = await asyncio.to_thread(
            self.tokenizer.render_chat,
            messages, thinking=body.thinks, tools=tools, continue_final_message=body.continues,
            add_generation_prompt=body.add_generation_prompt and not body.continues,
            chat_template_kwargs=body.chat_template_kwargs,
        )  # fmt: skip
        opened = self.tokenizer.opened_think(ids)
        if body.continues:  # perhaps within a thought
            reply = self.tokenizer.decode(ids, skip_special=False).rpartition(ASSISTANT)[2]
            opened = reply.rfind(THINK) > reply.rfind(THINK_END)
        top = (body.top_logprobs or 0) if body.logprobs else None
        choices: list[Choice] = [
            Chat(i, self.tokenizer, top, opened=opened, with_tools=bool(tools)) for i in range(body.n)
        ]
        jobs = self.jobs(body, [ids], body.budget, special=bool(tools))
        return await self.reply(body, http, "chat.completion", choices, jobs, len(ids))

    async def completions(self, body: CompletionRequest, http: Request) -> Any:
        """Answer POST /v1/completions."""
        self.check_model(body.model)
        prompts, heads = await asyncio.to_thread(self._read_prompts, body)
        echoed = [prompts[i // body.n] if body.echo else None for i in range(len(prompts) * body.n)]
        choices: list[Choice] = [
            Completion(i, self.tokenizer, body.logprobs, echoed=prompt) for i, prompt in enumerate(echoed)
        ]
        jobs = self.jobs(body, prompts, body.max_tokens)
        if body.echo:
            for choice in choices:
                choice.text = heads[choice.index // body.n]
        used = sum(map(len, prompts))
        return await self.reply(body, http, "text_completion", choices, jobs, used, echo=body.echo)

    def _read_prompts(self, body: CompletionRequest) -> tuple[list[list[int]], list[str]]:
        """Tokens and text of each prompt. Raises 400 for none, and tokens that the model does not have."""
        prompts, heads = list[list[int]](), list[str]()
        for prompt in body.prompts:
            if not isinstance(prompt, str):
                self.check_ids(prompt)
                prompts.append(prompt)
                heads.append(self.tokenizer.decode(prompt, skip_special=False))
                continue
            suffix = body.suffix
            encode = self.tokenizer.encode
            prompts.append(encode(prompt) if suffix is None else self.tokenizer.render_fim(prompt, suffix))
            heads.append(prompt)
        if not prompts:
            raise HTTPException(400, "prompt: is empty")
        return prompts, heads

    def jobs(
        self, body: Sampled, prompts: Sequence[list[int]], budget: int | None, special: bool = False
    ) -> list[Any]:
        """The engine's requests for n answers to each prompt. Raises 400 for what it cannot answer, 429 where
        too many wait."""
        given = {name: getattr(body, name) for name in SETTINGS}
        given["stop"] = body.stops or None
        seed = secrets.randbits(62) if body.seed is None else body.seed
        tells = body.top_logprobs if isinstance(body, ChatRequest) else body.logprobs  # type: ignore[attr-defined]
        echoes = isinstance(body, CompletionRequest) and body.echo and body.logprobs is not None
        record = (TOPS,) * bool(tells) + (PROMPT,) * echoes
        found = []
        try:
            base, _ = settings(self.engine.model.cfg.generation, given)
            if body.logit_bias:
                self.check_ids(list(body.logit_bias))
                base = dataclasses.replace(base, logit_bias=tuple(body.logit_bias.items()))
            for ids in prompts:
                self.engine.check(ids)
                new = self.context - len(ids) if budget is None else budget
                for i in range(body.n):
                    own = (seed + i) % 2**63
                    sampling = dataclasses.replace(base, max_new_tokens=new, seed=seed_for(own, ids))
                    one = engine_request(self.engine.model, self.tokenizer, ids, sampling)
                    found.append(dataclasses.replace(one, special=special, record=record))
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        if self.open + len(found) > self.options.queue + len(self.engine.scheduler.seats):
            raise HTTPException(429, f"{self.open} answers are under way or wait", {"Retry-After": "1"})
        return found

    async def reply(
        self,
        body: Sampled,
        http: Request,
        kind: str,
        choices: list[Choice],
        requests: list[Any],
        prompt_tokens: int,
        echo: bool = False,
    ) -> Any:
        """The reply, whole or streamed."""
        ident = f"{'chatcmpl' if kind.startswith('chat') else 'cmpl'}-{uuid.uuid4().hex}"
        head = {"id": ident, "object": kind, "created": int(time.time()), "model": self.options.name}

        def usage() -> dict[str, int]:
            new = sum(choice.tokens for choice in choices)
            return {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": new,
                "total_tokens": prompt_tokens + new,
            }

        updates = self.updates(requests)
        if body.stream:
            if kind.startswith("chat"):
                head["object"] = f"{kind}.chunk"
            wants = body.stream_options is not None and body.stream_options.include_usage
            lines = self._events(head, choices, updates, usage if wants else None, echo)
            return StreamingResponse(
                lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        async with contextlib.aclosing(updates), gone(http) as left:
            async for index, update in until(updates, left):
                if update.error is not None:
                    raise HTTPException(update.status, update.error)
                choices[index].take(update)
        return head | {"choices": [choice.whole() for choice in choices], "usage": usage()}

    async def _events(
        self, head: dict[str, Any], choices: list[Choice], updates: Any, usage: Any, echo: bool
    ) -> AsyncIterator[str]:
        def event(data: dict[str, Any]) -> str:
            return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

        extra = {"usage": None} if usage else {}
        for choice in choices:
            if isinstance(choice, Chat):
                first = {"index": choice.index, "delta": {"role": "assistant", "content": ""}}
                yield event(head | {"choices": [first | {"logprobs": None, "finish_reason": None}]} | extra)
            elif echo:
                first = {"index": choice.index, "text": choice.text, "logprobs": None, "finish_reason": None}
                yield event(head | {"choices": [first]} | extra)
        async with contextlib.aclosing(updates):
            async for index, update in updates:
                if update.error is not None:
                    yield event(error_body(update.error, "server_error"))
                    return
                if (shown := choices[index].take(update)) is not None:
                    yield event(head | {"choices": [shown]} | extra)
        if usage:
            yield event(head | {"choices": [], "usage": usage()})
        yield "data: [DONE]\n\n"

    async def updates(self, requests: list[Any]) -> AsyncGenerator[tuple[int, Update]]:
        """(index, update) of all requests as they come; a reader that leaves cancels what has not ended."""
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Update]]()

        def teller(index: int) -> Any:
            def tell(update: Update) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(inbox.put_nowait, (index, update))

            return tell

        jobs = [Job(request, teller(i)) for i, request in enumerate(requests)]
        left, self.open = set(range(len(jobs))), self.open + len(jobs)
        for job in jobs:
            self.worker.submit(job)
        end = loop.time() + self.options.timeout
        try:
            while left:  # each turn may run in another task, which asyncio.timeout does not allow
                index, update = await asyncio.wait_for(inbox.get(), max(0.0, end - loop.time()))
                if update.last:
                    left.discard(index)
                yield index, update
        except TimeoutError:
            late = f"the answer was not whole within {self.options.timeout:g} s"
            yield min(left), Update(error=late, status=504)
        finally:
            self.open -= len(jobs)
            for index in left:
                self.worker.cancel(jobs[index])


@contextlib.asynccontextmanager
async def gone(http: Request) -> AsyncIterator[asyncio.Task]:
    """A task that ends when the client has left."""

    async def watch() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(watch())
    try:
        yield task
    finally:
        task.cancel()


async def until(items: Any, stop: asyncio.Task) -> AsyncIterator[Any]:
    """Items as they come, until `stop` is done, which ends the request."""
    while True:
        following = asyncio.ensure_future(anext(items, None))
        await asyncio.wait({following, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not following.done():
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await following
            raise HTTPException(499, "the client has left")
        if (item := following.result()) is None:
            return
        yield item


def warm_up_prompts(context: int) -> list[list[int]]:
    """Prompts of the lengths that are read in one chunk, as far as the context has room."""
    return [[3] * n for n in (2, 60, 120, 250, 1000) if n + 2 < context]
