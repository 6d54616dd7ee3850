"""The page of examples/page.py: by HTTP, and as a person sees it in a browser where the machine has one."""

import base64
import importlib.util
import io
import json
import pathlib
import threading
import time
import urllib.error
import urllib.request

import browser
import pytest
import uvicorn
from PIL import Image

import asyncdiff_fast

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = ROOT / "examples" / "shapes" / "unet"
NAMES = ["one process", "2 processes"]
STEPS = 4
MANY_STEPS = 400


@pytest.fixture(scope="module")
def url():
    spec = importlib.util.spec_from_file_location("page", ROOT / "examples" / "page.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    with (
        asyncdiff_fast.Workers(SMALL, nproc=1) as one,
        asyncdiff_fast.Workers(SMALL, nproc=2) as many,
    ):
        server = uvicorn.Server(uvicorn.Config(page.make_app(dict(zip(NAMES, (one, many), strict=True))), port=0))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join(30)


def asked(url, wanted, path="/draw"):
    """The answer to a POST, open."""
    data = json.dumps(wanted).encode()
    request = urllib.request.Request(f"{url}{path}", data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=120)


def drawn(url, steps=STEPS):
    """[message] of a picture by both pipelines."""
    with asked(url, {"prompt": "a red star", "steps": steps}) as answer:
        return [json.loads(line) for line in answer]


def test_both_pictures_come_with_progress_and_times(url):
    messages = drawn(url)
    for name in NAMES:
        own = [m for m in messages if m["pipe"] == name]
        assert [m["step"] for m in own[:-1]] == [1, 2, 3, 4] and own[-1]["seconds"] > 0
        assert Image.open(io.BytesIO(base64.b64decode(own[-1]["png"]))).format == "PNG"
    # One after the other.
    assert [m["pipe"] for m in messages] == sorted((m["pipe"] for m in messages), key=NAMES.index)
    with urllib.request.urlopen(f"{url}/", timeout=20) as answer:
        assert "<!doctype html>" in answer.read().decode()


def test_a_picture_is_cancelled_and_a_second_one_refused_meanwhile(url):
    answer = asked(url, {"prompt": "a red star", "steps": MANY_STEPS})
    assert "step" in json.loads(answer.readline())
    assert "being drawn" in drawn(url)[0]["error"]
    asked(url, {}, "/cancel").close()
    rest = [json.loads(line) for line in answer]
    assert "Cancelled" in rest[-1]["error"] and {m["pipe"] for m in rest} == {NAMES[0]}
    assert "png" in drawn(url)[-1]


def test_a_closed_tab_stops_the_workers(url):
    answer = asked(url, {"prompt": "a red star", "steps": MANY_STEPS})
    answer.readline()
    answer.close()
    ends = time.monotonic() + 60
    while "error" in (messages := drawn(url))[0]:
        assert time.monotonic() < ends, messages
        time.sleep(0.1)
    assert "png" in messages[-1]


def test_bad_input_is_answered(url):
    with pytest.raises(urllib.error.HTTPError) as refused:
        asked(url, {"prompt": "", "steps": 0})
    assert refused.value.code == 422 and b"steps" in refused.value.read()


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "there is one")
def test_a_person_draws_and_cancels(url, tmp_path):
    with browser.started(tmp_path) as tab:
        tab.open(f"{url}/")
        tab.until("return document.querySelectorAll('figure').length == 2")
        tab.run(f"document.getElementById('steps').value = {STEPS}; document.getElementById('draw').click()")
        tab.until("return [...document.images].every(i => i.src.startsWith('data:') && i.naturalWidth > 0)")
        captions = tab.run("return [...document.querySelectorAll('figcaption')].map(c => c.textContent)")
        assert [c.split(":")[0] for c in captions] == NAMES and all(c.endswith(" s") for c in captions)
        assert tab.run("return [...document.querySelectorAll('progress')].map(p => p.value)") == [STEPS, STEPS]
        tab.run(f"document.getElementById('steps').value = {MANY_STEPS}; document.getElementById('draw').click()")
        tab.until("return /step [1-9]/.test(document.querySelector('figcaption').textContent)")
        tab.run("document.getElementById('cancel').click()")
        said = tab.until("return document.getElementById('error').textContent")
        assert "Cancelled" in said
        assert tab.until("return !document.getElementById('draw').disabled")
