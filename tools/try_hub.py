"""Start a JupyterHub on this machine, and let many learners run a lesson on it at the same time.

    python tools/try_hub.py                       ten learners, lesson 00
    python tools/try_hub.py --learners 30 --lesson 02

It prints how long each waited and how much memory each took, and fails if a cell failed, if a
learner could reach another's server, or if anybody's files are not their own. It needs Linux, the
extra ``lab``, ``pip install jupyterhub psutil`` and ``npm install -g configurable-http-proxy``. The
figures in docs/teaching/hub.md are from here.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import psutil
from nbformat import NotebookNode
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

from lab import NOTEBOOKS, ROOT, without_outputs

PATIENCE = 900  # seconds that a server may take to start, or a lesson to end
SETTINGS = """
c.JupyterHub.bind_url = "http://127.0.0.1:{port}"
c.JupyterHub.hub_port = {hub_port}
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{proxy_port}"
c.JupyterHub.db_url = "sqlite:///{folder}/hub.sqlite"
c.JupyterHub.cookie_secret_file = "{folder}/cookie_secret"
c.ConfigurableHTTPProxy.pid_file = "{folder}/proxy.pid"
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.JupyterHub.spawner_class = "simple"  # all under one account of the machine
c.SimpleLocalProcessSpawner.home_dir_template = "{folder}/homes/{{username}}"
c.Spawner.args = ["--allow-root"]
c.Spawner.start_timeout = c.Spawner.http_timeout = {patience}
c.Spawner.environment = {{
    "OMP_NUM_THREADS": "1", "COURSE_DEVICES": "virtual", "PYTHONPATH": "{root}",
}}
c.JupyterHub.concurrent_spawn_limit = 0  # all at once, as when a workshop begins
c.JupyterHub.services = [{{"name": "workshop", "api_token": "{token}"}}]
c.JupyterHub.load_roles = [{{
    "name": "workshop", "services": ["workshop"],
    "scopes": ["admin:users", "admin:servers", "access:servers", "tokens"],
}}]
"""


@dataclass
class Learner:
    """One of them, and what became of their session.

    Attributes:
        token: with which this learner, and nobody else, reaches their server.
        wait: seconds until the server answered.
        seconds: that the lesson took.
        peak: bytes of their server and its kernels, at the most.
        failed: ids of cells that ended in an error and should not have.
    """

    name: str
    token: str = ""
    wait: float = 0.0
    seconds: float = 0.0
    peak: int = 0
    failed: list[str] = field(default_factory=list)


class Hub:
    """A JupyterHub that runs, and how to ask it and its learners' servers for something."""

    def __init__(self, address: str, token: str, homes: Path) -> None:
        self.address, self.token, self.homes = address, token, homes

    async def ask(
        self, method: str, path: str, token: str = "", body: object = None
    ) -> dict[str, Any]:
        """Send a request, and read the answer as JSON."""
        request = HTTPRequest(
            self.address + path,
            method,
            headers={"Authorization": f"token {token or self.token}"},
            body=json.dumps(body or {}) if method in ("POST", "PUT") else None,
            request_timeout=PATIENCE,
        )
        answer = await AsyncHTTPClient().fetch(request)
        return json.loads(answer.body or "{}")

    async def ready(self) -> None:
        """Wait until the hub answers."""
        for _ in range(PATIENCE):
            try:
                await self.ask("GET", "/hub/api/")
                return
            except (OSError, HTTPClientError):
                await asyncio.sleep(1)
        raise RuntimeError("the hub did not start; its words are above")


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub of its own, with all that it keeps in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder, token = Path(name), secrets.token_hex()
        port, hub_port, proxy_port = _free_ports(3)
        (folder / "homes").mkdir()
        (folder / "hub.py").write_text(
            SETTINGS.format(
                folder=folder, root=ROOT, patience=PATIENCE, token=token,
                port=port, hub_port=hub_port, proxy_port=proxy_port,
            )
        )  # fmt: skip
        log = open(folder / "log", "w+")  # noqa: SIM115  (the process below writes to it)
        program = [sys.executable, "-m", "jupyterhub", "-f", str(folder / "hub.py")]
        process = subprocess.Popen(program, cwd=folder, stdout=log, stderr=log)
        try:
            yield Hub(f"http://127.0.0.1:{port}", token, folder / "homes")
        except BaseException:
            log.seek(0)
            print(log.read()[-4000:], file=sys.stderr)
            raise
        finally:
            everything = [process, *psutil.Process(process.pid).children(recursive=True)]
            for each in everything:
                each.terminate()
            process.wait()
            log.close()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


# ------------------------------------------------------------------------------ one learner


async def attend(hub: Hub, learner: Learner, lesson: Path) -> None:
    """Start the learner's server, run the lesson on it cell by cell, and save it there."""
    start = time.perf_counter()
    await hub.ask("POST", f"/hub/api/users/{learner.name}")
    made = await hub.ask("POST", f"/hub/api/users/{learner.name}/tokens")
    learner.token = made["token"]
    await hub.ask("POST", f"/hub/api/users/{learner.name}/server")
    while not (await hub.ask("GET", f"/hub/api/users/{learner.name}"))["servers"][""]["ready"]:
        await asyncio.sleep(1)
    learner.wait = time.perf_counter() - start
    notebook = without_outputs(lesson)
    write = f"open('mine.txt', 'x').write({learner.name!r})"  # x: it must not be there yet
    notebook.cells.append(nbformat.v4.new_code_cell(write, id="mine"))
    start = time.perf_counter()
    await _run(hub, learner, notebook)
    learner.seconds = time.perf_counter() - start
    content = {"type": "notebook", "content": notebook}
    await hub.ask("PUT", f"/user/{learner.name}/api/contents/{lesson.name}", learner.token, content)


async def _run(hub: Hub, learner: Learner, notebook: NotebookNode) -> None:
    path = f"/user/{learner.name}/api/kernels"
    kernel = await hub.ask("POST", path, learner.token)
    address = hub.address.replace("http", "ws", 1) + f"{path}/{kernel['id']}/channels"
    headers = {"Authorization": f"token {learner.token}"}
    channel = await websocket_connect(HTTPRequest(address, headers=headers))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            status, cell.outputs = await _execute(channel, cell.source)
            if status != "ok" and "raises-exception" not in cell.metadata.get("tags", []):
                learner.failed.append(cell.id)
    channel.close()


async def _execute(channel: WebSocketClientConnection, code: str) -> tuple[str, list[NotebookNode]]:
    """Run a cell; returns whether it was ok, and what it shows."""
    number = secrets.token_hex()
    header = {"msg_id": number, "msg_type": "execute_request", "username": "", "session": number,
              "date": "", "version": "5.3"}  # fmt: skip
    content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False,
               "user_expressions": {}, "stop_on_error": False}  # fmt: skip
    await channel.write_message(
        json.dumps({"channel": "shell", "header": header, "parent_header": {}, "metadata": {},
                    "content": content})
    )  # fmt: skip
    status, is_idle, outputs = "", False, []
    while not (status and is_idle):
        said = await asyncio.wait_for(channel.read_message(), PATIENCE)
        if said is None:
            raise RuntimeError("a kernel died")
        message = json.loads(said)
        kind = message["header"]["msg_type"]
        if message["parent_header"].get("msg_id") != number:
            continue
        if kind == "execute_reply":
            status = message["content"]["status"]
        elif kind == "status":
            is_idle = message["content"]["execution_state"] == "idle"
        elif kind in ("stream", "display_data", "execute_result", "error"):
            outputs.append(nbformat.v4.output_from_msg(message))
    return status, outputs


# ------------------------------------------------------------------------------ all of them


async def workshop(hub: Hub, learners: list[Learner], lesson: Path) -> None:
    """All attend at the same time, while their memory is watched."""
    await hub.ready()
    watch = asyncio.create_task(_watch_memory(learners))
    await asyncio.gather(*(attend(hub, learner, lesson) for learner in learners))
    watch.cancel()
    await _nobody_reaches_another(hub, learners)


async def _watch_memory(learners: list[Learner]) -> None:
    """Note the most that each one's server and kernels hold together, once a second."""
    while True:
        for process in psutil.process_iter(["cmdline", "environ"]):
            name = (process.info["environ"] or {}).get("JUPYTERHUB_USER")
            for learner in learners:
                if name == learner.name and "singleuser" in " ".join(process.info["cmdline"] or []):
                    learner.peak = max(learner.peak, _held(process))
        await asyncio.sleep(1)


def _held(process: psutil.Process) -> int:
    """Bytes of a process and all below it; a page that several share is divided among them."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total


async def _nobody_reaches_another(hub: Hub, learners: list[Learner]) -> None:
    for learner, other in itertools.pairwise(learners):
        try:
            await hub.ask("GET", f"/user/{other.name}/api/contents", learner.token)
        except HTTPClientError as refused:
            if refused.code == 403:
                continue
        raise SystemExit(f"{learner.name} reaches the files of {other.name}")


def files_are_their_own(hub: Hub, learners: list[Learner], lesson: Path) -> bool:
    """Whether each one's folder has their lesson, with outputs, and their own mark."""
    for learner in learners:
        home = hub.homes / learner.name
        shown = [path.name for path in home.iterdir() if not path.name.startswith(".")]
        if sorted(shown) != sorted([lesson.name, "mine.txt"]):
            return False
        if (home / "mine.txt").read_text() != learner.name:
            return False
        saved = nbformat.read(home / lesson.name, as_version=4)
        if not any(cell.get("outputs") for cell in saved.cells):
            return False
    return len(list(hub.homes.iterdir())) == len(learners)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--learners", type=int, default=10)
    parser.add_argument("--lesson", default="00", help="its number")
    wanted = parser.parse_args(arguments)
    if not shutil.which("configurable-http-proxy"):
        raise SystemExit("configurable-http-proxy is not there: npm install -g it")
    (lesson,) = NOTEBOOKS.glob(f"{wanted.lesson}_*.ipynb")
    learners = [Learner(f"learner{number:02d}") for number in range(wanted.learners)]
    before = os.getloadavg()[0]
    with hub() as running:
        asyncio.run(workshop(running, learners, lesson))
        apart = files_are_their_own(running, learners, lesson)
    _report(learners, before)
    failed = {cell for learner in learners for cell in learner.failed}
    if failed or not apart:
        raise SystemExit(f"cells that failed: {sorted(failed)}; files are their own: {apart}")
    print("no cell failed; each one's files are their own, and nobody reaches another's server")


def _report(learners: list[Learner], load_before: float) -> None:
    def spread(values: list[float], unit: str) -> str:
        return f"{statistics.median(values):.0f} {unit} (at the most {max(values):.0f})"

    print(f"{len(learners)} learners on {os.cpu_count()} cores; load before: {load_before:.1f}")
    print("until the server answered:", spread([each.wait for each in learners], "s"))
    print("the lesson, all cells:    ", spread([each.seconds for each in learners], "s"))
    print("memory of one learner:    ", spread([each.peak / 1e6 for each in learners], "MB"))
    print(f"memory of all:             {sum(each.peak for each in learners) / 1e9:.1f} GB")


if __name__ == "__main__":
    main(sys.argv[1:])
