"""The HTTP server's routes. `create_app` puts them behind the layers that guard and observe them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, ConfigDict, Field
from starlette.middleware.cors import CORSMiddleware

from unolora.errors import InputError
from unolora.serving import openai_routes
from unolora.serving.engine_process import EngineProcess
from unolora.serving.limits import Body, Guard
from unolora.serving.logs import fields
from unolora.serving.observed import Observed
from unolora.serving.predictor import Input
from unolora.serving.problems import add_handlers, described
from unolora.serving.service import Service, filled

log = logging.getLogger("unolora.serving")
STATIC = Path(__file__).parent / "static"
COLOURS = Path(__file__).parents[1] / "assets" / "colours.css"  # the reports' too
KEY = [Security(HTTPBearer(auto_error=False))]  # for the OpenAPI document; `Guard` looks at the key
router = APIRouter()

Value = str | int | Annotated[float, Field(allow_inf_nan=False)] | bool
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class OneInput(BaseModel):
    """A text of a task: either as the model reads it, or as columns that fill the task's template."""

    model_config = ConfigDict(extra="forbid")
    task: str = Field(description="name of the task", examples=["mood"])
    text: str | list[str] | None = Field(None, description="the text, or the two texts of a task on pairs")
    columns: dict[str, Value] | None = Field(None, description="values of the columns of the task's template")


class PredictRequest(BaseModel):
    """Inputs of any tasks."""

    model_config = ConfigDict(extra="forbid")
    inputs: list[OneInput] = Field(min_length=1)
    scores: bool = Field(False, description="whether to return the probabilities of all labels")
    timeout: Positive | None = Field(None, description="seconds in which the answer is wanted")


class Answer(BaseModel):
    """Of a classification `label` and `probability`; of a regression `value`."""

    task: str
    label: str | None = None
    probability: float | None = None
    probabilities: dict[str, float] | None = None
    value: float | None = None


class PredictResponse(BaseModel):
    """Answers in the order of the inputs."""

    answers: list[Answer]


class ScalesRequest(BaseModel):
    """Inputs of any tasks."""

    model_config = ConfigDict(extra="forbid")
    inputs: list[OneInput] = Field(min_length=1)


class Scales(BaseModel):
    """How the ranks are scaled for one input."""

    task: str
    scales: list[list[float]] = Field(description="s, a row for each position, a column for each rank")


class ScalesResponse(BaseModel):
    """Answers in the order of the inputs."""

    positions: list[str] = Field(description="the adapted projections")
    answers: list[Scales]


class TaskInfo(BaseModel):
    """A task that can be asked for."""

    name: str
    kind: str
    labels: list[str]
    template: list[str]
    columns: list[str]
    metric: str
    description: str


class TasksResponse(BaseModel):
    """What the server can do."""

    run: str
    method: str
    backbone: str
    version: int = Field(description="how often the adapter was reloaded")
    generates: bool = Field(description="whether the OpenAI-compatible routes are there")
    scales: bool = Field(description="whether /v1/scales is there")
    tasks: list[TaskInfo]


class Health(BaseModel):
    """A yes or a no."""

    ok: bool


class ReloadResponse(BaseModel):
    """What is served now."""

    version: int
    tasks: list[str]


def create_app(service: Service) -> FastAPI:
    """Build the application around a service; when it stops, what was accepted is answered first."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if isinstance(service.engine, EngineProcess):
            await service.engine.start()
        following = asyncio.create_task(service.follow()) if service.shared else None
        yield
        if following is not None:
            following.cancel()
        all_answered = await asyncio.to_thread(service.engine.close, service.settings.shutdown_timeout)
        log.info("stopped", extra=fields(all_answered=all_answered))

    app: FastAPI = FastAPIOffline(
        redoc_url=None,
        title="unolora",
        description="All tasks of a run, from one adapter.",
        lifespan=lifespan,
        responses=described(400, 401, 422, 429),
    )
    app.state.service = service
    service.metrics.watch_queue(lambda: service.engine.unanswered)
    add_handlers(app)
    app.include_router(router)
    app.include_router(openai_routes.router, dependencies=KEY)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    # The last one added sees a request first.
    app.add_middleware(Body, settings=service.settings, metrics=service.metrics)
    app.add_middleware(Guard, settings=service.settings, keys=lambda: service.keys, metrics=service.metrics)
    if service.settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Observed, metrics=service.metrics)
    return app


@router.post(
    "/v1/predict",
    dependencies=KEY,
    response_model=PredictResponse,
    response_model_exclude_none=True,
    responses=described(408, 413, 500, 503, 504),
)
async def predict(request: Request, body: PredictRequest) -> JSONResponse:
    """Predict one or many inputs of any tasks; they may share a batch with those of other callers."""
    service: Service = request.app.state.service
    inputs = _inputs(service, request, body.inputs)
    work = service.engine.apredict(inputs, timeout=service.timeout(body.timeout), wait=False)
    found = await service.until_gone(request, work)
    return JSONResponse({"answers": [_answer(each, body.scores) for each in found]})


@router.post(
    "/v1/scales",
    dependencies=KEY,
    response_model=ScalesResponse,
    responses=described(408, 413, 500, 503, 504),
)
async def scales(request: Request, body: ScalesRequest) -> JSONResponse:
    """Return s: how each task scales the ranks of each adapted projection for these very inputs."""
    service: Service = request.app.state.service
    inputs = _inputs(service, request, body.inputs)
    positions = service.engine.about.positions
    work = service.engine.ascales(inputs, timeout=service.timeout(None), wait=False)
    found = await service.until_gone(request, work)
    answers = [{"task": task, "scales": s.tolist()} for (task, _), s in zip(inputs, found, strict=True)]
    return JSONResponse({"positions": positions, "answers": answers})


@router.get("/v1/tasks", dependencies=KEY, response_model=TasksResponse)
async def tasks(request: Request) -> TasksResponse:
    """List the tasks."""
    service: Service = request.app.state.service
    about = service.engine.about
    return TasksResponse(
        run=about.run,
        method=about.method,
        backbone=about.backbone,
        version=service.version,
        generates=about.writes,
        scales=bool(about.positions),
        tasks=[
            TaskInfo(
                name=task.name,
                kind=task.kind,
                labels=list(task.labels),
                template=list(task.template),
                columns=list(task.columns),
                metric=task.metrics[0],
                description=task.description,
            )
            for task in about.tasks.values()
        ],
    )


@router.post("/v1/reload", dependencies=KEY, response_model=ReloadResponse, responses=described(403, 409))
async def reload(request: Request) -> ReloadResponse:
    """Read the run's adapter from its folder again, without dropping a request; needs the key of an admin."""
    service: Service = request.app.state.service
    await service.reload()
    return ReloadResponse(version=service.version, tasks=list(service.engine.about.tasks))


@router.get("/healthz", response_model=Health, responses={503: {"model": Health, "description": "It has died"}})
async def healthz(request: Request) -> JSONResponse:
    """Say whether the process is worth keeping."""
    ok = request.app.state.service.engine.alive
    return JSONResponse({"ok": ok}, 200 if ok else 503)


@router.get("/readyz", response_model=Health, responses={503: {"model": Health, "description": "It is stopping"}})
async def readyz(request: Request) -> JSONResponse:
    """Say whether requests should be sent here."""
    service: Service = request.app.state.service
    ok = service.engine.accepts
    return JSONResponse({"ok": ok}, 200 if ok else 503)


@router.get("/metrics", dependencies=KEY, response_class=Response)
async def metrics(request: Request) -> Response:
    """Return the numbers of the server in Prometheus' text format."""
    return Response(request.app.state.service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """Return the page to try the tasks."""
    return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})


@router.get("/static/colours.css", include_in_schema=False)
async def colours() -> FileResponse:
    """Return the colours of the page."""
    return FileResponse(COLOURS)


def _inputs(service: Service, request: Request, given: list[OneInput]) -> list[Input]:
    """Turn a request's inputs into the engine's, within the limits."""
    found: list[Input] = []
    for place, each in enumerate(given):
        try:
            task = service.task(each.task)
            if each.text is not None and each.columns is None:
                found.append((each.task, each.text))
            elif each.columns is not None and each.text is None:
                found.append((each.task, filled(task, each.columns)))
            else:
                raise InputError("give either `text` or `columns`")
        except InputError as error:
            raise InputError(f"input {place + 1}: {error}") from None
    service.check(found)
    request.scope.setdefault("unolora", {})["inputs"] = len(found)
    return found


def _answer(found: dict[str, Any], scores: bool) -> dict[str, Any]:
    if "value" in found:
        return found
    answer = {"task": found["task"], "label": found["label"], "probability": found["probabilities"][found["label"]]}
    return {**answer, "probabilities": found["probabilities"]} if scores else answer
