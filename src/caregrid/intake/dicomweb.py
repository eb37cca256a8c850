"""The DICOMweb door: STOW-RS takes studies in; QIDO-RS and WADO-RS give them to viewers, results of ours included.

``router`` is mounted by the site below ``/dicom-web``. Every request passes the ``authorise`` it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, HTTPException, Path, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from caregrid.domain.settings import WebSettings
from caregrid.domain.study import Source
from caregrid.errors import AccessError, QueryInvalid
from caregrid.intake import _dicomweb_index as index
from caregrid.intake import _dicomweb_query as qido
from caregrid.intake import _dicomweb_retrieve as wado
from caregrid.intake._dicomweb_accept import accepted
from caregrid.intake._dicomweb_index import Kept
from caregrid.intake._dicomweb_stow import Receive, Stow
from caregrid.store.database import reading
from caregrid.store.instances import InstanceStore, record_rejection

Authorise = Callable[[Request], Any]

_SERIES = "/studies/{study}/series/{series}"
_INSTANCE = _SERIES + "/instances/{instance}"


def router(engine: sa.Engine, store: InstanceStore, receive: Receive, settings: WebSettings, authorise: Authorise) -> APIRouter:
    """The routes of the door. authorise: who a request comes from (something with a ``name``), or raises AccessError.

    receive: the store's promise (see ``caregrid.store.instances``); an object is answered as stored only after it returned.
    """
    door = _Door(engine, store, receive, settings, authorise)
    routes = APIRouter(include_in_schema=False, dependencies=[Depends(door.admit)])
    routes.add_api_route("/studies", door.store_any, methods=["POST"])
    routes.add_api_route("/studies/{study}", door.store_study, methods=["POST"])
    for path, level in (
        ("/studies", "study"),
        ("/series", "series"),
        ("/instances", "instance"),
        ("/studies/{study}/series", "series"),
        ("/studies/{study}/instances", "instance"),
        (_SERIES + "/instances", "instance"),
    ):
        routes.add_api_route(path, door.searching(level), methods=["GET"])
    for path in ("/studies/{study}", _SERIES, _INSTANCE):
        routes.add_api_route(path + "/metadata", door.metadata, methods=["GET"])
        routes.add_api_route(path + "/rendered", door.rendered, methods=["GET"])
        routes.add_api_route(path + "/thumbnail", door.thumbnail, methods=["GET"])
        routes.add_api_route(path, door.objects, methods=["GET"])
    routes.add_api_route(_INSTANCE + "/frames/{frames}", door.frames, methods=["GET"])
    routes.add_api_route(_INSTANCE + "/frames/{frame}/rendered", door.rendered, methods=["GET"])
    routes.add_api_route(_INSTANCE + "/bulkdata/{place:path}", door.bulk, methods=["GET"])
    return routes


@dataclass(frozen=True)
class _Place:
    """What an address names; empty where it does not go that far down."""

    study: str = ""
    series: str = ""
    instance: str = ""
    frame: str = ""


def _place(request: Request) -> _Place:
    names = request.path_params
    return _Place(**{name: str(names[name]) for name in _Place.__dataclass_fields__ if name in names})


Named = Annotated[_Place, Depends(_place)]


def _root(request: Request) -> str:
    """The address of the service itself, as the client sees it."""
    path = request.url.path
    ends = [path.find(f"/{word}") for word in ("studies", "series", "instances") if f"/{word}" in path]
    return f"{request.url.scheme}://{request.url.netloc}{path[: min(ends)]}"


def _source(request: Request) -> Source:
    name = str(getattr(getattr(request.state, "principal", None), "name", ""))
    return Source("dicomweb", name, "", request.client.host if request.client else "")


class _Door:
    """What the routes share."""

    def __init__(
        self, engine: sa.Engine, store: InstanceStore, receive: Receive, settings: WebSettings, authorise: Authorise
    ) -> None:
        self._engine, self._folder, self._receive = engine, store.folder, receive
        self._settings, self._authorise = settings, authorise

    def admit(self, request: Request) -> None:
        """Let the request in or raise AccessError; who tried to store and may not is kept for the operator."""
        try:
            request.state.principal = self._authorise(request)
        except AccessError as error:
            if request.method == "POST":
                record_rejection(self._engine, _source(request), "STOW-RS", error.message)
            raise

    # storing --------------------------------------------------------------------------------------------------------

    async def store_any(self, request: Request) -> Response:
        """STOW-RS of objects of any study."""
        return await self._store(request, "")

    async def store_study(self, request: Request, study: str) -> Response:
        """STOW-RS of objects of one study; others among them fail."""
        return await self._store(request, study)

    async def _store(self, request: Request, study_uid: str) -> Response:
        source = _source(request)
        stow = Stow(self._receive, source, self._folder / "tmp", self._settings.max_part_bytes, study_uid)
        try:
            answer = await stow.run(request)
        except HTTPException as error:
            await run_in_threadpool(record_rejection, self._engine, source, "STOW-RS", str(error.detail))
            raise
        if stow.broken:
            await run_in_threadpool(record_rejection, self._engine, source, "STOW-RS", f"the body was refused: {stow.broken}")
        return answer

    # searching ------------------------------------------------------------------------------------------------------

    def searching(self, level: str) -> Callable[..., Response]:
        """The endpoint of QIDO-RS at a level: study, series or instance."""

        def search(request: Request, place: Named) -> Response:
            return self._search(level, request, place)

        return search

    def _search(self, level: str, request: Request, place: _Place) -> Response:
        try:
            query = qido.parse(level, request.query_params.multi_items(), place.study, place.series)
            with reading(self._engine) as connection:
                rows = qido.search(connection, query)
        except QueryInvalid as error:
            raise HTTPException(400, error.message) from None
        root = _root(request)
        found = [qido.as_json(query, index.complete(row, self._folder), root) for row in rows]
        answer = JSONResponse(found, media_type=wado.DICOM_JSON)
        for note in query.notes:
            answer.headers.append("Warning", f'299 caregrid "{note}"')
        return answer

    # retrieving -----------------------------------------------------------------------------------------------------

    def objects(self, request: Request, place: Named) -> Response:
        """WADO-RS of a study, series or instance."""
        return wado.objects(self._find(place), self._folder, accepted(request))

    def metadata(self, request: Request, place: Named) -> Response:
        """Metadata of a study, series or instance."""
        return wado.metadata_of(self._find(place), self._folder, _root(request), accepted(request))

    def frames(self, request: Request, place: Named, frames: str) -> Response:
        """Frames of an instance, ``1,2,5``."""
        numbers = frames.split(",")
        if not all(number.isascii() and number.isdigit() and len(number) < 10 for number in numbers):
            raise HTTPException(400, "Frames are numbers from 1, separated by commas")
        return wado.frames(self._find(place)[0], self._folder, [int(number) for number in numbers], accepted(request))

    def bulk(self, request: Request, place: Named, where: Annotated[str, Path(alias="place")]) -> Response:
        """A binary value of an instance."""
        return wado.bulk(self._find(place)[0], self._folder, where, accepted(request))

    def rendered(self, request: Request, place: Named) -> Response:
        """A picture of a frame, or of the middle one; of the middle instance of a series or study."""
        options = request.query_params
        window = _numbers(options.get("window", ""), "window", 2)
        viewport = _numbers(options.get("viewport", ""), "viewport", 2)
        size = (int(min(viewport[0], 8192)), int(min(viewport[1], 8192))) if viewport else None
        if size and min(size) < 1:
            raise HTTPException(400, "viewport is a width and a height in pixels")
        frame = int(place.frame) if place.frame.isascii() and place.frame.isdigit() and len(place.frame) < 10 else 0
        if place.frame and not frame:
            raise HTTPException(404, "The object has no such frame")
        return wado.picture(self._middle(place), self._folder, accepted(request), frame, window, size)

    def thumbnail(self, request: Request, place: Named) -> Response:
        """A small picture of the middle frame of the middle instance."""
        return wado.thumbnail(self._middle(place), self._folder, accepted(request))

    def _find(self, place: _Place) -> list[Kept]:
        with reading(self._engine) as connection:
            kept = index.find(connection, place.study, place.series, place.instance)
        if not kept:
            raise HTTPException(404, "There is no such study, series or instance here")
        return kept

    def _middle(self, place: _Place) -> Kept:
        """The middle instance of the first series found."""
        kept = self._find(place)
        same = [each for each in kept if each.series_instance_uid == kept[0].series_instance_uid]
        return same[len(same) // 2]


def _numbers(text: str, name: str, count: int) -> tuple[float, float] | None:
    """The first two numbers of a comma-separated parameter; None when it is absent. Raises HTTPException 400."""
    if not text:
        return None
    try:
        values = [float(part) for part in text.split(",")[:count]]
    except ValueError:
        values = []
    if len(values) != count or not all(math.isfinite(value) for value in values) or values[1] <= 0:
        raise HTTPException(400, f"{name} begins with two numbers, the second above 0")
    return values[0], values[1]
