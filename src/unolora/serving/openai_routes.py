"""OpenAI's interface for language models: `model` is the name of a task.

A chat's one user message fills the task's template (a text part for each of its columns where there are several); a
completion's prompt is read as it stands. Decoding is greedy, and what a client asks beyond that is refused rather than
ignored. A streamed answer comes in one piece.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from unolora.errors import InputError
from unolora.serving.predictor import Input, Written
from unolora.serving.problems import ProblemError, described
from unolora.serving.service import Service, filled

router = APIRouter()
RESPONSES: dict[int | str, dict[str, Any]] = {
    **described(404, 408, 413, 500, 503, 504),
    200: {"content": {"text/event-stream": {}}},
}
CHAT_TOKENS, COMPLETION_TOKENS = 64, 16  # by default; the latter as OpenAI's


class Decoding(BaseModel):
    """What both kinds of requests may ask; only what greedy decoding does is accepted."""

    model_config = ConfigDict(extra="forbid")
    model: str = Field(description="name of the task")
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=0, description="decoding is greedy")
    n: int = Field(1, ge=1, le=1)
    stream: bool = False
    seed: int | None = None
    user: str | None = None


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """The message."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["user"]
    content: str | list[TextPart]


class ChatRequest(Decoding):
    """A chat of one message."""

    messages: list[Message] = Field(min_length=1, max_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class CompletionRequest(Decoding):
    """Prompts."""

    prompt: str | list[str]
    echo: Literal[False] = False


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(BaseModel):
    """What was written."""

    role: str
    content: str


class ChatChoice(BaseModel):
    """An answer."""

    index: int
    message: ChatMessage
    finish_reason: str
    logprobs: None = None


class CompletionChoice(BaseModel):
    """An answer."""

    index: int
    text: str
    finish_reason: str
    logprobs: None = None


class ChatResponse(BaseModel):
    """What was written."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionResponse(BaseModel):
    """What was written behind each prompt."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Model(BaseModel):
    """A task, as a model."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "unolora"


class Models(BaseModel):
    """The tasks, as models."""

    object: Literal["list"] = "list"
    data: list[Model]


@router.get("/v1/models", response_model=Models)
async def models(request: Request) -> Models:
    """List the tasks, as models."""
    service: Service = request.app.state.service
    return Models(data=[Model(id=name) for name in service.engine.about.tasks])


@router.post("/v1/chat/completions", response_model=ChatResponse, responses=RESPONSES)
async def chat(request: Request, body: ChatRequest) -> Response:
    """Let the task of this name answer a message."""
    service: Service = request.app.state.service
    _check(service, body.model)
    (content,) = [message.content for message in body.messages]
    parts = [content] if isinstance(content, str) else [part.text for part in content]
    columns = service.task(body.model).columns
    if len(parts) != len(columns):
        raise InputError(
            f"task {body.model!r} reads {len(columns)} columns ({', '.join(columns)}): send a text part for each, got "
            f"{len(parts)}"
        )
    texts = filled(service.task(body.model), dict(zip(columns, parts, strict=True)))
    most = body.max_completion_tokens or body.max_tokens or min(CHAT_TOKENS, service.settings.max_tokens)
    written = await _write(service, request, [(body.model, texts)], most)
    head = _head("chatcmpl", "chat.completion", body.model)
    if body.stream:
        delta = {"role": "assistant", "content": written[0].text}
        pieces = [{"index": 0, "delta": delta, "finish_reason": None}, _finish(written[0], delta={})]
        return _streamed(head | {"object": "chat.completion.chunk"}, pieces)
    message = {"role": "assistant", "content": written[0].text}
    choices = [{"index": 0, "message": message, "finish_reason": _reason(written[0]), "logprobs": None}]
    return JSONResponse({**head, "choices": choices, "usage": _usage(written)})


@router.post("/v1/completions", response_model=CompletionResponse, responses=RESPONSES)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Write on behind prompts as they stand."""
    service: Service = request.app.state.service
    _check(service, body.model)
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not prompts:
        raise InputError("`prompt` is empty; give at least one")
    most = body.max_tokens or min(COMPLETION_TOKENS, service.settings.max_tokens)
    written = await _write(service, request, [(body.model, prompt) for prompt in prompts], most)
    head = _head("cmpl", "text_completion", body.model)
    choices = [
        {"index": place, "text": each.text, "finish_reason": _reason(each), "logprobs": None}
        for place, each in enumerate(written)
    ]
    if body.stream:
        return _streamed(head, choices)
    return JSONResponse({**head, "choices": choices, "usage": _usage(written)})


def _check(service: Service, model: str) -> None:
    if not service.engine.about.writes:
        raise ProblemError(404, "no_generation", "this run has heads, which write nothing; ask /v1/predict")
    if model not in service.engine.about.tasks:
        try:
            service.task(model)
        except InputError as error:
            raise ProblemError(404, "model_not_found", str(error)) from None


async def _write(service: Service, request: Request, inputs: list[Input], most: int) -> list[Written]:
    if most > service.settings.max_tokens:
        raise InputError(f"at most {service.settings.max_tokens} tokens may be asked for, got {most}")
    service.check(inputs)
    request.scope.setdefault("unolora", {})["inputs"] = len(inputs)
    work = service.engine.agenerate(inputs, max_tokens=most, timeout=service.timeout(None), wait=False)
    return await service.until_gone(request, work)


def _head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _reason(written: Written) -> str:
    return "stop" if written.ended else "length"


def _finish(written: Written, **more: Any) -> dict[str, Any]:
    return {"index": 0, "finish_reason": _reason(written), **more}


def _usage(written: list[Written]) -> dict[str, int]:
    read, wrote = sum(each.prompt_tokens for each in written), sum(each.tokens for each in written)
    return {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}


def _streamed(head: dict[str, Any], choices: list[dict[str, Any]]) -> StreamingResponse:
    def lines() -> Iterator[str]:
        for choice in choices:
            yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")
