"""Errors as they go over the wire: OpenAI's error object under /v1, one line elsewhere."""

import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An answer other than what was asked for. `param` names the field that is wrong, `code` the kind of error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.param, self.code = param, code


class Json(Response):
    """JSON in ASCII, so that any text fits in it, lone surrogates too."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_object(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """{"error": …} as OpenAI's clients read it."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_answer(path: str, error: HTTPException) -> Response:
    """The answer to a request for `path`."""
    message = str(error.detail)
    if path.startswith("/v1/") or path == "/v1":
        content = error_object(
            error.status_code, message, getattr(error, "param", None), getattr(error, "code", None)
        )
    else:
        content = {"detail": message}
    return Json(content, status_code=error.status_code, headers=dict(error.headers or {}))
