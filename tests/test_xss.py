"""Text of a stranger, in every field that reaches a report or a terminal: opened in a real browser nothing of it runs or asks the network.

The browser is Chromium without a window, where there is one. A bare page shows first that the payloads would run.
"""

from __future__ import annotations

import csv
import html
import http.server
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Forks
from ran import Ran
from test_report import report_of

from finetune_cli.report import page
from finetune_cli.said import plain

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
MARK = "data-ran"
RUN = f"document.documentElement.setAttribute(`{MARK}`,1)"
"""What a payload does when it runs: it can be seen in the page that Chromium writes out."""
STEERING = [
    "\x1b]0;evil\x07",
    "\x1b[2J\x1b[8m",
    "\x1b[6n\x1b[5i",
    "\x9b2J\x9d0;evil\x9c",
    "\u202egnp.exe\u2066",
    "\x1bPq\x1b\\",
    "\x7f\x08\x08",
    "\x1b]8;;http://evil\x07x",
]


def payloads(address: str) -> list[str]:
    """At least forty; ``address`` is a server that must not be asked."""
    run, url = RUN, f"{address}/asked"
    return [
        f"<script>{run}</script>",
        f"</script><script>{run}</script>",
        f'"><script>{run}</script>',
        f"'><img src=x onerror={run}>",
        f"<img src=x onerror={run}>",
        f"<svg onload={run}>",
        f"<svg><script>{run}</script></svg>",
        f"</svg><img src=x onerror={run}>",
        f"</title><script>{run}</script>",
        f"</style><script>{run}</script>",
        f"</pre><iframe src=javascript:parent.{run}></iframe>",
        f"</textarea><script>{run}</script>",
        f"</td></tr></table><script>{run}</script>",
        f"</bdi></span><svg/onload={run}>",
        f'" onmouseover="{run}" autofocus onfocus="{run}',
        f"' onfocus='{run}' autofocus='",
        f'x" style="animation-name:x" onanimationstart="{run}',
        f"<body onload={run}>",
        f"<input autofocus onfocus={run}>",
        f"<details open ontoggle={run}>",
        f"<video><source onerror={run}></video>",
        f"<audio src=x onerror={run}></audio>",
        f'<object data="javascript:{run}"></object>',
        f'<embed src="javascript:{run}">',
        f"<math><mtext><table><mglyph><style><img src=x onerror={run}>",
        f"<!--><script>{run}</script>-->",
        f"--><script>{run}</script><!--",
        f"<![CDATA[<script>{run}</script>]]>",
        f'<iframe srcdoc="<script>parent.{run}</script>"></iframe>',
        f"<template><script>{run}</script></template><script>{run}</script>",
        f"&lt;script&gt;{run}&lt;/script&gt;",
        f"&#60;script&#62;{run}&#60;/script&#62;",
        f"{{{{ '<script>{run}</script>'|safe }}}}{{% raw %}}",
        f"\\u003cscript\\u003e{run}",
        f"<scr<script>ipt>{run}</scr</script>ipt>",
        f"<img src={url}/img>",
        f"<link rel=stylesheet href={url}/css>",
        f"<script src={url}/js></script>",
        f"<meta http-equiv=refresh content='0;url={url}/refresh'>",
        f"<base href={url}/base/><img src=relative>",
        f"<form action={url}/form><input name=a></form><script>document.forms[0].submit()</script>",
        f"</style><style>@import '{url}/import'; body{{background:url({url}/background)}}</style>",
        f'" style="background:url({url}/style)',
        f"<svg><image href={url}/image /></svg><svg><use href={url}/use#x /></svg>",
        f"<link rel=preconnect href={url}><link rel=prefetch href={url}/prefetch><link rel=dns-prefetch href={url}>",
        f"![x]({url}/markdown) [y](javascript:{run})",
    ]


class Browser:
    """Opens pages; ``asked`` are the paths that they asked of the server at ``address``."""

    def __init__(self, address: str, asked: list[str], home: Path) -> None:
        self.address, self.asked, self.home = address, asked, home

    def opens(self, file: Path) -> str:
        """The page as it stands after its scripts, timers and pictures: HTML."""
        assert CHROMIUM is not None
        self.asked.clear()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--virtual-time-budget=3000"]
        command = [CHROMIUM, *flags, f"--user-data-dir={self.home}", "--dump-dom", file.as_uri()]
        done = subprocess.run(command, capture_output=True, timeout=120, check=True)
        return done.stdout.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser, and a server that notes what it is asked."""
    asked: list[str] = []

    class Notes(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Notes)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Browser(f"http://127.0.0.1:{server.server_port}", asked, tmp_path_factory.mktemp("chromium"))
    server.shutdown()
    thread.join()
    server.server_close()


def harmless(browser: Browser, file: Path) -> str:
    """The text of a page in which nothing may have run, loaded or moved."""
    dumped = browser.opens(file)
    assert MARK not in dumped.partition(">")[2].partition("<head")[0], "a payload ran"
    assert re.search(r"<html[^>]*>", dumped)[0].count(MARK) == 0  # type: ignore[index]
    assert browser.asked == []
    assert not re.search(r"<(script|iframe|object|embed|link|form|base|video|audio|img)\b", dumped, re.IGNORECASE)
    return html.unescape(re.sub(r"<[^>]*>", "", dumped))


@in_chromium
def test_the_payloads_run_where_nothing_stops_them(browser: Browser, tmp_path: Path) -> None:
    """Else the tests below could not fail."""
    found = payloads(browser.address)
    assert len(found) >= 40 and len(set(found)) == len(found)
    file = tmp_path / "bare.html"
    file.write_text("<!doctype html><html><head><title>x</title></head><body>" + "\n".join(found[:5]), encoding="utf-8")
    assert MARK in browser.opens(file)[:200]
    file.write_text("<!doctype html><html><body>" + "\n".join(p for p in found if "/img" in p or "/css" in p), encoding="utf-8")
    browser.opens(file)
    assert {"/asked/img", "/asked/css"} <= set(browser.asked)


@in_chromium
def test_no_payload_runs_in_any_field_of_a_report(browser: Browser, tmp_path: Path) -> None:
    """Every field holds all payloads, one behind the other; and once each alone in the places that are shortened."""
    found = payloads(browser.address)
    whole, parts = page(report_of("\n".join(found))), [page(report_of(payload)) for payload in found]
    bodies = [part[part.index("<body>") + 6 : part.index("</body>")] for part in parts]
    head = whole[: whole.index("</body>")]
    file = tmp_path / "report.html"
    file.write_text(head + "".join(bodies) + "</body></html>", encoding="utf-8", errors="replace")
    shown = harmless(browser, file)
    assert all(payload.split("\n")[0][:40] in shown for payload in found), "they are there to read"


def write_csv(path: Path, header: list[str], rows: list[list[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, forks: Forks, browser: Browser) -> Path:
    """A run whose texts, labels, columns, file names and names are payloads and escapes."""
    folder = tmp_path_factory.mktemp("xss")
    found = [*payloads(browser.address), *STEERING]
    text, label = f"<svg onload={RUN}>", f"<img src=x onerror={RUN}>"
    classes = [f"<script>{RUN}</script>", f'" onfocus="{RUN}" autofocus', "\x1b]0;evil\x07\x1b[2J", "\x9b2J\u202e"]
    keys = []
    for number, split in enumerate(("train", "validation", "test")):
        rows = [[f"{payload} {number} {i}", classes[i % 4]] for i, payload in enumerate(found * 2)]
        file = write_csv(folder / f"{split}<img src=x onerror={RUN.replace('/', '')}>.csv", [text, label], rows)
        keys.append(f"data.{split}={file.name}")
    small = [
        "model=tiny",
        "model.shape.layers=1",
        "model.shape.hidden=32",
        "model.shape.heads=2",
        "train.steps=3",
        "train.log_every=1",
        "device=cpu",
    ]
    names = [f"data.text={text}", f"data.label={label}", f"run.name=<img src=x onerror={RUN}>", f"run.root=<svg onload={RUN}>"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    lenient = ["data.max_conflicts=1", "data.max_leaked=1", "data.max_truncated=1", "data.max_unknown=1"]
    with forks.start("train", *keys, *small, *names, *lenient, cwd=folder, **pipes) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err.decode()
    assert err.decode() == plain(err.decode()) and out.decode() == plain(out.decode())
    return Path(out.decode().strip())


@in_chromium
def test_no_payload_runs_in_the_report_of_a_run(browser: Browser, trained: Path) -> None:
    shown = harmless(browser, trained / "report" / "index.html")
    assert f"<script>{RUN}</script>" in shown and f"<img src=x onerror={RUN}>" in shown


@in_chromium
def test_no_payload_runs_in_the_report_of_an_evaluation(browser: Browser, trained: Path, ftune: Callable[..., Ran]) -> None:
    ran = ftune("eval", trained, "split=validation", "device=cpu", cwd=trained.parents[1]).ok()
    assert ran.err == plain(ran.err) and ran.out == plain(ran.out)
    (made,) = [path for path in (trained / "eval").iterdir() if path.name not in ("validation", "test")]
    harmless(browser, made / "index.html")


def test_logs_and_texts_of_a_run_steer_no_terminal(trained: Path) -> None:
    """What a person would ``cat``: of bytes that steer, none; JSON keeps every character, escaped."""
    for name in ("log.txt", "command.txt", "report/report.md", "model/README.md"):
        told = (trained / name).read_text(encoding="utf-8")
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", told), name
    answers = (trained / "eval" / "test" / "predictions.jsonl").read_text(encoding="utf-8")
    assert answers.replace("\n", "") == plain(answers).replace("\n", "") and "\\u009b2J\\u202e" in answers


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_a_table_on_a_terminal_is_not_steered(trained: Path, forks: Forks) -> None:
    """stdout and stderr of ``eval`` and ``predict`` on a terminal: colours and the live bar are ours, and nothing else is there."""
    for verb in (
        ["eval", str(trained), "split=test"],
        ["predict", str(trained), f"input={next(trained.parents[1].glob('test*.csv')).name}"],
    ):
        master, slave = os.openpty()
        with forks.start(*verb, "device=cpu", cwd=trained.parents[1], stdin=slave, stdout=slave, stderr=slave) as process:
            os.close(slave)
            seen = b""
            while chunk := read(master):
                seen += chunk
            os.close(master)
            assert process.wait() == 0, seen.decode("utf-8", "replace")
        shown = seen.decode("utf-8")
        ours = re.sub(r"\x1b\[(\?25[lh]|[0-9;]*m|\d*A|2K|1A|2J(?!.))", "", shown)
        assert not set("\x1b\x07\x9b\x9d\u202e\u2066") & set(ours), ours


def read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other end is closed
        return b""
