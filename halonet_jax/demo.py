"""Serves a page to try a model on: choose an image, see its classes, click a pixel to see what it attends to.

With a detector, the page shows the image with the objects that were found.

    python -m halonet_jax.demo --model=runs/mine [--port=8000]

It needs two more packages: pip install -e ".[demo]". The page is for this machine alone, unless --host says otherwise: it has no
password. Images stay in memory, the last few of them, and are never written to disk.

In Python, `make_app(loaded)` gives the page as an ASGI application.
"""

import contextlib
import socket
from importlib import resources
from typing import Any

from absl import flags

from halonet_jax import command_line, demo_viewers
from halonet_jax.errors import ConfigError, UserError
from halonet_jax.runtime import workdir as workdir_lib
from halonet_jax.weights import Loaded, load

MAX_UPLOAD_MB = 20
MAX_PIXELS = 50_000_000
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class _Refused(Exception):
    """A request that cannot be served. The page shows the message."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def make_app(
    loaded: Loaded,
    host: str = "localhost",
    max_upload_mb: float = MAX_UPLOAD_MB,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
    min_score: float | None = None,
) -> Any:
    """Returns the page as an ASGI application, for Starlette's test client, uvicorn or another server.

    Args:
        loaded: from `halonet_jax.load`.
        host: name or address that the server is bound to. Bound to this machine alone, it answers requests for that name alone,
            so that no other site can reach it through a name that it points here.
        max_upload_mb: largest file, in millions of bytes.
        max_pixels: most pixels of an image, height times width.
        name: what the page calls the model; None: the name of its folder.
        min_score: of a detector: objects with a lower score are left out; None: 0.5.

    Raises:
        ConfigError: Starlette is not installed, or the model is of another kind.
        DataError: the model is a detector, and pycocotools is not installed.
    """
    try:
        from starlette import applications, concurrency, middleware, responses, routing
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ModuleNotFoundError:
        raise ConfigError("the page needs the package starlette; pip install -e '.[demo]'") from None
    viewer = demo_viewers.make(loaded, max_pixels, min_score)
    page = resources.files("halonet_jax").joinpath("demo_page.html").read_text(encoding="utf-8")
    most = int(max_upload_mb * 1e6)

    async def show_page(request):
        return responses.HTMLResponse(page, headers=_HEADERS)

    def answers(respond):
        """As JSON; what a user can mend is told on the page."""

        async def endpoint(request):
            try:
                return responses.JSONResponse(await respond(request), headers=_HEADERS)
            except _Refused as error:
                return responses.JSONResponse({"error": str(error)}, error.status, headers=_HEADERS)

        return endpoint

    async def about(request):
        return demo_viewers.about(loaded, name)

    async def classify(request):
        encoded = await _body(request, most, max_upload_mb)
        try:
            return await concurrency.run_in_threadpool(viewer.look_at, encoded)
        except UserError as error:
            raise _Refused(400, f"This image cannot be used: {error}.") from None

    async def attention(request):
        query = request.query_params
        try:
            token, row, column = query["token"], float(query["row"]), float(query["column"])
            if not (0 <= row <= 1 and 0 <= column <= 1):
                raise ValueError
        except (KeyError, ValueError):
            raise _Refused(400, "The request needs token, row and column; rows and columns are from 0 to 1.") from None
        try:
            return await concurrency.run_in_threadpool(viewer.attention, token, row, column)
        except KeyError:
            raise _Refused(404, "This image is not in memory any more. Choose it again.") from None

    local = ["localhost", "127.0.0.1"]
    return applications.Starlette(
        routes=[
            routing.Route("/", show_page),
            routing.Route("/about", answers(about)),
            routing.Route("/classify", answers(classify), methods=["POST"]),
            routing.Route("/attention", answers(attention)),
        ],
        middleware=[middleware.Middleware(TrustedHostMiddleware, allowed_hosts=local if host in local else ["*"])],
    )


async def _body(request, most, megabytes):
    """The uploaded file; a larger one is refused before it is read to its end."""
    too_large = _Refused(413, f"This file is larger than {megabytes:g} MB, the most that --max_upload_mb allows.")
    if int(request.headers.get("content-length", 0)) > most:
        raise too_large
    received = bytearray()
    async for part in request.stream():
        received += part
        if len(received) > most:
            raise too_large
    return bytes(received)


def define_flags() -> None:
    """Defines the flags of the command; not on import, so that several entries can be imported together."""
    flags.DEFINE_string("model", None, "A workdir, a folder that halonet_jax.export wrote, or hf://OWNER/NAME[@REVISION].")
    flags.DEFINE_string("step", "latest", "Checkpoint of a workdir: a step number, 'latest' or 'best'.")
    flags.DEFINE_enum("weights", None, ("raw", "ema"), "Of a workdir; default: ema, the moving average, where the run kept it.")
    flags.DEFINE_string(
        "host", "localhost", "Name or address to serve on; 0.0.0.0: all that this machine has, without a password."
    )
    flags.DEFINE_integer("port", 8000, "Port to serve on; 0: any that is free.", 0, 65535)
    flags.DEFINE_float("max_upload_mb", MAX_UPLOAD_MB, "Largest file, in MB.", 0)
    flags.DEFINE_float("min_score", None, "Of a detector: leave out objects with a lower score; default: 0.5.", 0, 1)
    flags.DEFINE_integer("max_pixels", MAX_PIXELS, "Most pixels of an image, height times width.", 1)


def main() -> int:
    """Serves the page until Ctrl-C, and returns the exit code."""
    f = flags.FLAGS
    try:
        import uvicorn
    except ModuleNotFoundError:
        raise ConfigError("the page needs the package uvicorn; pip install -e '.[demo]'") from None
    loaded = load(f.model, f.step, f.weights)
    if (loaded.folder / "checkpoints").exists():
        workdir_lib.use_compile_cache(loaded.folder)
    app = make_app(loaded, f.host, f.max_upload_mb, f.max_pixels, f.model, f.min_score)
    try:
        listening = _listen(f.host, f.port)
    except OSError as error:
        raise ConfigError(f"{f.host}:{f.port} cannot be served on ({error.strerror}); give another --port or --host") from None
    with listening:
        shown = f"[{f.host}]" if ":" in f.host else f.host
        print(
            f"serving {loaded.folder} (step {loaded.step}) on http://{shown}:{listening.getsockname()[1]}; Ctrl-C ends it",
            flush=True,
        )
        with contextlib.suppress(KeyboardInterrupt):  # how the page is meant to end
            uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
    return 0


def _listen(host, port):
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError:
        listening.close()
        raise
    return listening


if __name__ == "__main__":
    define_flags()
    command_line.run(main, required_flags=("model",))
