"""A web page: a prompt in, the picture of one process and of several out, side by side, with their times.

    pip install fastapi uvicorn
    python examples/page.py [FOLDER] --nproc 2

The server is a plain process; the pipelines run in the workers of two `asyncdiff_fast.Workers`, one after the other, so
that neither slows the other down. Progress comes step by step; Cancel, or a closed tab, stops the workers within a
block of steps and two more.
"""

import argparse
import base64
import io
import json
import queue
import threading
import time
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, Field

import asyncdiff_fast

HERE = Path(__file__).resolve().parent


class Wanted(BaseModel):
    """What the page asks for."""

    prompt: str = Field(min_length=1)
    steps: int = Field(50, ge=1, le=1000)
    seed: int = 0


class Artist:
    """Draws one picture at a time, by each of some pipelines in turn. `pipes`: {name: `Workers`}."""

    def __init__(self, pipes):
        self._pipes, self._busy, self._stopped = pipes, threading.Lock(), False

    def cancel(self):
        """Stop what is being drawn."""
        self._stopped = True
        for pipe in self._pipes.values():
            pipe.cancel()

    def draw(self, wanted):
        """Yields dicts: `step` and `total` of a pipeline named, its `png` and `seconds`, or an `error`."""
        if not self._busy.acquire(blocking=False):
            yield {"error": "another picture is being drawn: wait until it is done, or cancel it"}
            return
        try:
            self._stopped = False
            for name, pipe in self._pipes.items():
                yield from self._one(name, pipe, wanted)
                if self._stopped:
                    return
        finally:
            # The tab may have been closed: a generator ends where it waits.
            self.cancel()
            self._busy.release()

    def _one(self, name, pipe, wanted):
        told = queue.SimpleQueue()
        thread = threading.Thread(target=self._call, args=(pipe, wanted, told), daemon=True)
        thread.start()
        try:
            while True:
                message = told.get()
                yield message | {"pipe": name}
                if "step" not in message:
                    return
        finally:
            if thread.is_alive():
                pipe.cancel()
            thread.join()

    def _call(self, pipe, wanted, told):
        import torch

        began = time.perf_counter()
        try:
            image = pipe(
                wanted.prompt,
                num_inference_steps=wanted.steps,
                generator=torch.Generator().manual_seed(wanted.seed),
                progress=lambda step, total: told.put({"step": step, "total": total}),
            ).images[0]
        except Exception as error:
            self._stopped = True
            told.put({"error": f"{type(error).__name__}: {error}"})
            return
        seconds, png = time.perf_counter() - began, io.BytesIO()
        image.save(png, "png")
        told.put({"seconds": seconds, "png": base64.b64encode(png.getvalue()).decode()})


def make_app(pipes):
    """The page and what it asks: POST /draw, answered by one JSON a line as it comes, and POST /cancel."""
    app, artist = FastAPI(), Artist(pipes)

    @app.get("/")
    def page():
        return FileResponse(HERE / "page.html")

    @app.get("/pipes")
    def names():
        return list(pipes)

    @app.post("/draw")
    def draw(wanted: Wanted):
        lines = (json.dumps(message) + "\n" for message in artist.draw(wanted))
        return StreamingResponse(lines, media_type="application/x-ndjson")

    @app.post("/cancel")
    def cancel():
        artist.cancel()
        return {}

    return app


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=HERE / "shapes" / "unet", help="a pipeline's (default: the small)")
    parser.add_argument("--nproc", type=int, default=2, help="processes that share a picture (default: 2)")
    parser.add_argument("--port", type=int, default=8000, help="of this machine only (default: 8000)")
    args = parser.parse_args()
    with asyncdiff_fast.Workers(args.folder, nproc=1) as one, asyncdiff_fast.Workers(args.folder, args.nproc) as many:
        pipes = {"one process": one, f"{args.nproc} processes": many}
        uvicorn.run(make_app(pipes), host="127.0.0.1", port=args.port)


if __name__ == "__main__":
    main()
