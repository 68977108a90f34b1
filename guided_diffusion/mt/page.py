"""A page to play with a model: what scripts/demo.py serves to a browser.

`Studio` is what the page needs of a model; `PixelStudio` is that of a model of mt_image_train.py. `application` is the web
server's side: the page, its description of the model, and one endpoint that draws. Nothing leaves the machine.
"""

import asyncio
import base64
import binascii
import io
import json
import logging
import queue
import socket
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch as th
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .. import dist_util
from ..errors import UserError, UserValueError, one_line
from ..figures import is_frame, save_film, to_uint8
from ..flags import FEW_SAMPLER, FEW_STEPS, FLAGS, SAMPLERS
from ..image_files import image_size, read_pixels
from . import directions
from .model import JointModel
from .run import Film, read_given, sample_batch

PAGE = Path(__file__).with_suffix(".html")
MOST_SAMPLES = 16
SHOWN_CLASSES = 5
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data: blob:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One thing that a model knows: the image or a modality. kind: image, map (of classes), label, vector or text."""

    name: str
    kind: str
    giveable: bool = True
    drawable: bool = True  # can it be wanted?
    holes: bool = False  # may pixels be missing where it is given?
    height: int = 0
    width: int = 0
    channels: int = 0
    classes: Sequence[str] = field(default_factory=tuple)
    colors: Sequence[Sequence[int]] = field(default_factory=tuple)  # of a map's classes
    numbered: bool = False  # is a map read as numbers of classes, not as colours?


@dataclass(frozen=True)
class Wish:
    """What the page asks for. given: NAME=FILE, as --given has it."""

    given: Sequence[str]
    want: Sequence[str]
    count: int
    steps: int
    sampler: str
    strength: float
    guidance: float
    seed: int
    replace_known: bool


@dataclass(frozen=True)
class Drawn:
    """Images uint8 [N, H, W, C], class probabilities [N, classes] and vectors [N, D], by name."""

    images: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]
    vectors: Mapping[str, np.ndarray]


class Studio(ABC):
    """A model as the page sees it: its parts, the number of its timesteps, the samplers, and `draw`."""

    title: str
    parts: Sequence[Part]
    timesteps: int
    samplers: Sequence[str] = sorted(
        SAMPLERS, key=lambda name: name != FEW_SAMPLER
    )  # the first is the default
    steps = FEW_STEPS  # at first

    @abstractmethod
    def draw(self, wish: Wish, watch: Callable[[int, int, Image.Image | None], None]) -> Drawn:
        """What `wish` asks for. watch(step, steps, frame): called after every step; frame: None where the film
        leaves it out. UserError for what the model cannot do."""


class PixelStudio(Studio):
    """A run of mt_image_train.py; path, weights: as in `JointModel.load`."""

    def __init__(self, path: str, weights: str = "ema"):
        self.model = JointModel.load(path, weights)
        self.model.network.to(dist_util.dev())
        self.title, self.timesteps = Path(path).name, self.model.diffusion.num_timesteps
        channels, height, width = self.model.shape
        self.parts = [Part("image", "image", holes=True, height=height, width=width, channels=channels)]
        for m in self.model.modalities:
            own = m.control(self.model.class_names if m.data_key == "y" else ())
            self.parts.append(Part(m.name, m.kind, drawable=m.head != "none", **own))

    def draw(self, wish, watch):
        """See Studio: as mt_image_sample.py does with the same flags."""
        model, device = self.model, dist_util.dev()
        given, holes, drawn = read_given(wish.given, model, None)
        names = [part.name for part in self.parts if part.drawable]
        wanted = directions.names_wanted(",".join(wish.want), names, given, in_part=holes)
        numbers = list(range(wish.count))
        part, where = (
            {name: value[th.arange(wish.count) % len(value)].to(device) for name, value in some.items()}
            for some in (given, holes)
        )
        film = Film("", model, given)

        def seen(done, total, images, values):
            frame = film.frame(images, values, f"step {done} of {total}") if is_frame(done, total) else None
            watch(done, total, frame)

        times = [t for t in (0, 10, 20) if t < self.timesteps]
        args = SimpleNamespace(
            seed=wish.seed,
            times=times,
            replace_known=wish.replace_known,
            resample=1,
            strength=wish.strength,
            guidance_scale=wish.guidance,
            steps=str(wish.steps),
            sampler=wish.sampler,
            order="posterior",
            clip_denoised=True,
        )
        made = sample_batch(args, model, None, [], drawn, part, where, numbers, seen)
        images, labels, vectors = {}, {}, {}
        exact = {name: where.get(name, th.ones(1, 1, 1, 1, dtype=th.bool)).cpu() for name in given}
        if where:
            exact["image"] = list(where.values())[-1].cpu()
        for name in [n for n in ("image", *model.modalities.names) if n in {*wanted, *given}]:
            value = made[name].float().cpu()
            if not bool(value.isfinite().all()):
                raise UserError(f"the samples of {name} are not finite: the model or the sampler diverged")
            known = exact.get(name)
            pixels = (
                to_uint8(value, known) if name == "image" else model.modalities[name].pixels(value, known)
            )
            if pixels is not None:
                images[name] = pixels
            elif model.modalities[name].classes(value) is not None:
                labels[name] = value.numpy()
            else:
                vectors[name] = value.numpy()
        return Drawn(images, labels, vectors)


# ---------------------------------------------------------------------------------------------------------- the server


def application(
    studio: Studio,
    most_waiting: int = 8,
    max_upload: float = 8.0,  # MiB of one request
    hosts: Collection[str] = ("127.0.0.1", "localhost", "[::1]"),
) -> Starlette:
    """The page of `studio`. One drawing runs at a time; with `most_waiting` others in line, further ones are refused.

    hosts: names under which the page may be asked for ("*": any), so that no other site reaches it by another name.
    """
    desk = Desk(studio, most_waiting)
    described = {
        "title": studio.title,
        "parts": [asdict(part) for part in studio.parts],
        "timesteps": studio.timesteps,
        "steps": min(studio.steps, studio.timesteps),
        "samplers": list(studio.samplers),
        "most_samples": MOST_SAMPLES,
    }

    async def page(_request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(), headers=_HEADERS)

    async def model(_request: Request) -> Response:
        return JSONResponse(described, headers=_HEADERS)

    async def draw(request: Request) -> Response:
        try:
            asked = await _json_of(request, max_upload)
            folder = tempfile.TemporaryDirectory(prefix="demo-")
            try:
                job = desk.take(read_wish(asked, studio, Path(folder.name)), folder)
            except BaseException:
                folder.cleanup()
                raise
        except UserError as error:
            return JSONResponse({"error": one_line(error)}, status_code=400, headers=_HEADERS)
        return StreamingResponse(job.lines(), media_type="application/x-ndjson", headers=_HEADERS)

    return Starlette(
        routes=[Route("/", page), Route("/model", model), Route("/draw", draw, methods=["POST"])],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
    )


def hosts_of(host: str) -> list[str]:
    """The names under which a page that listens on `host` may be asked for: where it is this machine's own, no others."""
    own = ["127.0.0.1", "localhost", "[::1]"]
    return own if host in ("127.0.0.1", "localhost", "::1") else ["*"]


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that listens on `host`:`port` (0: any free port). UserValueError where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise UserValueError(
            f"--host {host} --port {port}: {reason}; give another --port or --host"
        ) from None
    return found


async def _json_of(request: Request, max_upload: float) -> dict:
    """The request's body. UserValueError where it is too large or not JSON; another site's page cannot send JSON here."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise UserValueError("send application/json")
    limit, body = int(max_upload * 2**20), bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise UserValueError(
                f"more than {max_upload:g} MiB were sent: give smaller images, or raise --max_upload"
            )
    try:
        asked = json.loads(body)
    except ValueError:
        raise UserValueError("the request is not JSON") from None
    if not isinstance(asked, dict):
        raise UserValueError("the request is not a JSON object")
    return asked


def read_wish(asked: Mapping, studio: Studio, folder: Path) -> Wish:
    """What the page sent, checked; what is given lies as files in `folder`. UserValueError for what is not allowed."""
    parts = {part.name: part for part in studio.parts}
    given = asked.get("given", {})
    want = asked.get("want", [])
    if not isinstance(given, dict) or not isinstance(want, list):
        raise UserValueError("given must be an object and want a list of names")
    for name in (*given, *map(str, want)):
        directions.known_name("the page", name, parts)
    wish = Wish(
        [f"{name}={_source_of(parts[name], value, folder)}" for name, value in given.items()],
        [str(name) for name in want],
        _number(asked, "count", int, 4, 1, MOST_SAMPLES),
        _number(asked, "steps", int, min(studio.steps, studio.timesteps), 1, studio.timesteps),
        str(asked.get("sampler", studio.samplers[0])),
        _number(asked, "strength", float, 1.0, 0, 1000),
        _number(asked, "guidance", float, 1.0, -1000, 1000),
        _number(asked, "seed", int, 0, 0, FLAGS["seed"].high),
        bool(asked.get("replace_known", False)),
    )
    if wish.sampler not in studio.samplers:
        raise UserValueError(f"unknown sampler {wish.sampler!r}: choose one of {', '.join(studio.samplers)}")
    return wish


def _number(asked, name, kind, default, low, high):
    value = asked.get(name, default)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole or (kind is float and isinstance(value, float))) or not low <= value <= high:
        words = "a whole number" if kind is int else "a number"
        raise UserValueError(f"{name} must be {words} from {low} to {high}")
    return kind(value)


def _source_of(part: Part, value, folder: Path) -> str:
    """The source, as --given has it, of what the page sent for a part: a class, a text, or a file in base64."""
    if not part.giveable or not isinstance(value, str) or not value:
        raise UserValueError(f"{part.name} cannot be given so")
    return _SOURCES[part.kind](part, value, folder)


def _text(part, value, folder):
    path = folder / f"{part.name}.txt"
    path.write_text(" ".join(value.split()))
    return str(path)


def _class(part, value, folder):
    if value == directions.RANDOM:
        return value
    if value not in part.classes:
        raise UserValueError(f"{part.name}: there is no class {value!r}")
    return str(part.classes.index(value))  # a name may hold a comma


def _vector(part, value, folder, suffix=".npy"):
    try:
        content = base64.b64decode(
            value.partition(",")[2] if value.startswith("data:") else value, validate=True
        )
    except (binascii.Error, ValueError):
        raise UserValueError(f"{part.name}: the file did not arrive whole") from None
    path = folder / f"{part.name}{suffix}"
    path.write_bytes(content)
    return str(path)


def _image(part, value, folder):
    path = _vector(part, value, folder, ".png")
    try:
        size = image_size(path)
        if size == (part.width, part.height):
            read_pixels(path)
    except UserError:
        raise UserValueError(f"{part.name}: that is no PNG image that can be read") from None
    if size != (part.width, part.height):
        raise UserValueError(
            f"{part.name} must have {part.width}x{part.height} pixels, not {size[0]}x{size[1]}"
        )
    return path


def _map(part, value, folder):
    """The class of the nearest colour."""
    path = _image(part, value, folder)
    painted = np.asarray(read_pixels(path), np.int64)
    colors = np.asarray(part.colors)
    number = np.abs(painted[..., None, :] - colors).sum(-1).argmin(-1)
    pixels = (
        number.astype(np.uint8 if len(colors) <= 256 else np.uint16)
        if part.numbered
        else colors[number].astype(np.uint8)
    )
    Image.fromarray(pixels).save(path)
    return path


_SOURCES = {"text": _text, "label": _class, "vector": _vector, "image": _image, "map": _map}


class Desk:
    """One drawing at a time, by one thread; the others wait in line."""

    def __init__(self, studio: Studio, most_waiting: int):
        self.studio, self.most_waiting = studio, most_waiting
        self._line: queue.Queue[Job] = queue.Queue()
        self._lock, self.unfinished = threading.Lock(), 0
        threading.Thread(target=self._work, daemon=True, name="draw").start()

    def take(self, wish: Wish, folder: tempfile.TemporaryDirectory) -> "Job":
        """Put a wish in line. UserError where the line is full."""
        with self._lock:
            if self.unfinished > self.most_waiting:
                raise UserError(f"{self.unfinished} drawings are in line: try again in a moment")
            job = Job(wish, folder, ahead=self.unfinished)
            self.unfinished += 1
        self._line.put(job)
        return job

    def _work(self):
        while True:
            job = self._line.get()
            try:
                job.run(self.studio)
            finally:
                job.folder.cleanup()
                with self._lock:
                    self.unfinished -= 1


class _Left(Exception):
    """Whoever asked has gone."""


class Job:
    """A wish, and the messages about it that go to the page: {"waiting"}, {"step", "steps", "frame"}, then {"results",
    "film"} or {"error"}."""

    def __init__(self, wish: Wish, folder: tempfile.TemporaryDirectory, ahead: int):
        self.wish, self.folder = wish, folder
        self._messages: queue.Queue[dict | None] = queue.Queue()
        self._left = False
        self._messages.put({"waiting": ahead})

    def run(self, studio: Studio) -> None:
        """Draw, and tell the page."""
        frames: list[Image.Image] = []

        def watch(done, total, frame):
            if self._left:
                raise _Left
            if frame is not None:
                frames.append(frame)
            self._messages.put({"step": done, "steps": total, "frame": frame and as_url(frame)})

        try:
            if not self._left:
                drawn = studio.draw(self.wish, watch)
                film = None
                if frames:
                    save_film(frames, content := io.BytesIO())
                    film = _url(content, "gif")
                self._messages.put({"results": results(drawn, self.wish, studio), "film": film})
        except _Left:
            pass
        except UserError as error:
            folder = (
                f"{self.folder.name}/" if self.folder else ""
            )  # the page knows files by their part's name
            self._messages.put({"error": one_line(error).replace(folder, "")})
        except Exception as error:  # the page says so, and serves on
            _logger.exception("a drawing failed")
            self._messages.put(
                {"error": f"{type(error).__name__}: {one_line(error)} (the terminal says more)"}
            )
        finally:
            self._messages.put(None)

    async def lines(self) -> AsyncIterator[bytes]:
        """The messages as lines of JSON. Where nobody reads on, the drawing ends."""
        try:
            while True:
                try:
                    message = self._messages.get_nowait()
                except queue.Empty:
                    await asyncio.sleep(0.05)
                    continue
                if message is None:
                    return
                yield json.dumps(message).encode() + b"\n"
        finally:
            self._left = True


def results(drawn: Drawn, wish: Wish, studio: Studio) -> list[dict]:
    """What was drawn for the page: by part its name, whether it was given, and `count` images as data URLs, likeliest
    classes with their probabilities, or lines about vectors."""
    given = {spec.partition("=")[0] for spec in wish.given}
    found = []
    for part in studio.parts:
        one = {"name": part.name, "given": part.name in given and part.name not in wish.want}
        if part.name in drawn.images:
            pixels = [p[..., 0] if p.shape[-1] == 1 else p for p in drawn.images[part.name]]
            found.append(one | {"images": [as_url(Image.fromarray(p)) for p in pixels]})
        elif part.name in drawn.labels:
            found.append(one | {"labels": [likeliest(row, part.classes) for row in drawn.labels[part.name]]})
        elif part.name in drawn.vectors:
            rows = drawn.vectors[part.name]
            found.append(
                one
                | {"vectors": [{"rms": float(np.sqrt((r**2).mean())), "values": r.tolist()} for r in rows]}
            )
    return found


def likeliest(probabilities: np.ndarray, classes: Sequence[str]) -> list[tuple[str, float]]:
    """The first SHOWN_CLASSES classes by probability [classes], each with it."""
    order = np.argsort(-probabilities, kind="stable")[:SHOWN_CLASSES]
    return [(classes[k] if k < len(classes) else str(k), float(probabilities[k])) for k in order]


def as_url(image: Image.Image) -> str:
    """An image as a data URL, PNG."""
    image.save(content := io.BytesIO(), "PNG")
    return _url(content, "png")


def _url(content, kind):
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
