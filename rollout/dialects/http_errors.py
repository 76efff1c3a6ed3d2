"""Errors over HTTP: what went wrong in OpenAI's shape, with the status that says whose it is to mend.

See: docs/serving.md, "HTTP dialects".
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from dsec.errors import DsecError
from rollout.dialects.http_guard import error_body, error_headers
from rollout.errors import RolloutError
from toolcall_dsl import DslError
from wal import WalError

STATUS: dict[str, int] = {
    "BAD_REQUEST": 400,
    "BAD_MESSAGES": 400,
    "BAD_TASK": 400,
    "INVALID_ARGUMENT": 400,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "FAILED_PRECONDITION": 409,
    "RESOURCE_EXHAUSTED": 429,
    "ENGINE_ERROR": 503,
    "FOREIGN_WEIGHTS": 503,
    "PREEMPTED": 503,
    "UNREACHABLE": 503,
}
"""Of our error codes; any other is a 500."""
ROUTES: dict[int, str] = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}
"""Of a path that is none, and of a method that it does not take; what else is refused there is REFUSED."""
_log = logging.getLogger(__name__)


def told_of(error: RolloutError | DsecError | WalError | DslError) -> tuple[dict[str, Any], int]:
    """An error of ours as a body, and its status."""
    status = STATUS.get(error.code, 500)
    return error_body(str(error), error.code, status), status


def add_errors(app: FastAPI) -> None:
    """Have the application answer so, whatever is raised in it."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        lines = [_line(each) for each in error.errors()[:5]]
        if "json" not in request.headers.get("content-type", ""):
            lines = ["send the body as JSON, with content-type: application/json"]
        return _error_response(error_body("; ".join(lines), "BAD_REQUEST", 400), 400)

    async def refused(_: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        status = error.status_code
        return _error_response(error_body(str(error.detail), ROUTES.get(status, "REFUSED"), status), status)

    async def broken(_: Request, error: Exception) -> Response:
        _log.error("a request failed", exc_info=error)
        return _error_response(error_body("internal error; the server's log has it", "INTERNAL", 500), 500)

    async def ours(_: Request, error: Exception) -> Response:
        if not isinstance(error, RolloutError | DsecError | WalError | DslError):
            raise error
        return _error_response(*told_of(error))

    for root in (RolloutError, DsecError, WalError, DslError):
        app.add_exception_handler(root, ours)
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(Exception, broken)


def _line(error: dict[str, Any]) -> str:
    if error["type"] == "json_invalid":
        return f"body: no JSON at character {error['loc'][-1]}: {error['ctx']['error']}"
    return f"{'.'.join(map(str, error['loc'][1:])) or 'body'}: {error['msg']}"


def _error_response(body: dict[str, Any], status: int) -> Response:
    return JSONResponse(body, status_code=status, headers=error_headers(status))
