"""A small W&B server: what the real agent and SDK ask during a sweep, over HTTP on this machine.

It answers the GraphQL calls of `wandb sweep`, `wandb agent` and `wandb.init`, takes the file stream (metrics, summary,
exit code) and uploaded files, and holds everything for a test to look at. One agent runs one trial at a time, as with
the real one. A run that ends as preempting with an exit code other than 0 is given out again under its own id.
"""

from __future__ import annotations

import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789" * 4  # any 40 characters are a W&B key
ENTITY, PROJECT = "tester", "irkd"


@dataclass
class Run:
    """A trial as the server knows it."""

    name: str  # W&B calls a run's id its name
    args: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    sweep: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)  # one for each time that it ended
    preempting: bool = False
    inits: int = 0  # times that a process opened it
    stop: bool = False  # what the server tells the agent and the SDK


class WandbServer:
    """The server; use it as a context manager, hand `env` to the processes."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.sweeps: dict[str, str] = {}  # id -> YAML
        self.trials: list[dict[str, Any]] = []  # parameters still to be tried
        self.again: list[str] = []  # preempted runs waiting for an agent
        self.runs: dict[str, Run] = {}
        self.agents: dict[str, str] = {}  # agent id -> sweep id
        self.calls: list[str] = []  # names of the GraphQL operations, in order
        self._http = _Quiet(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """Stop listening: from now on every connection is refused."""
        self._http.shutdown()
        self._http.server_close()

    @property
    def env(self) -> dict[str, str]:
        """What points the real client to this server, and keeps it off anything else."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_ENTITY": ENTITY,
            "WANDB_PROJECT": PROJECT,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_SILENT": "false",
        }

    # ---- GraphQL

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """The `data` of one operation; None for one that this server does not know."""
        named = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = named.group(1) if named else ""
        with self.lock:
            self.calls.append(operation)
            method = getattr(self, f"_on_{operation}", None)
            return None if method is None else method(variables)

    def _on_ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _on_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "u", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer, "serverInfo": {"latestLocalVersionInfo": None}}

    def _on_UpsertSweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        sweep = variables.get("id") or f"sweep{len(self.sweeps)}"
        self.sweeps[sweep] = variables["config"]
        project = {"id": "p", "name": PROJECT, "entity": {"id": "e", "name": ENTITY}}
        return {"upsertSweep": {"sweep": {"name": sweep, "project": project}, "configValidationWarnings": []}}

    def _on_SweepWithRuns(self, variables: dict[str, Any]) -> dict[str, Any]:
        text = self.sweeps.get(variables["sweep"])
        if text is None:
            return {"project": {"sweep": None}}
        return {
            "project": {
                "sweep": {"id": "s", "name": variables["sweep"], "config": text, "runs": {"edges": []}}
            }
        }

    def _on_CreateAgent(self, variables: dict[str, Any]) -> dict[str, Any]:
        agent = f"agent{len(self.agents)}"
        self.agents[agent] = variables["sweep"]
        return {"createAgent": {"agent": {"id": agent}}}

    def _on_Heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:
        running = [r for r, alive in json.loads(variables.get("runState") or "{}").items() if alive]
        sweep = self.agents[variables["id"]]
        if running:
            commands = [{"type": "stop", "run_id": r} for r in running if self.runs[r].stop]
        elif self.again:
            run = self.runs[self.again.pop(0)]
            commands = [self._start(sweep, run, "resume")]
        elif self.trials:
            run = Run(f"trial{len(self.runs)}", self.trials.pop(0), sweep=sweep)
            self.runs[run.name] = run
            commands = [self._start(sweep, run, "run")]
        else:
            commands = [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}}

    def _start(self, sweep: str, run: Run, kind: str) -> dict[str, Any]:
        found = re.search(r"^program: (.*)$", self.sweeps[sweep], re.M)
        program = found.group(1) if found else ""
        args = {k: {"value": v} for k, v in run.args.items()}
        return {"type": kind, "run_id": run.name, "program": program, "args": args}

    def _on_RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        bucket = None
        if run is not None and run.inits:
            tail = [json.dumps(line) for line in run.history[-1:]]
            bucket = {
                "name": run.name, "displayName": run.name, "summaryMetrics": json.dumps(run.summary),
                "logLineCount": 0, "historyLineCount": len(run.history), "eventsLineCount": 0,
                "historyTail": json.dumps(tail), "eventsTail": "[]", "config": json.dumps(run.config), "tags": [],
                "notes": None, "wandbConfig": json.dumps({"t": 1}),
            }  # fmt: skip
        return {"model": {"name": PROJECT, "entity": {"name": ENTITY}, "bucket": bucket}}

    def _on_UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        inserted = name not in self.runs or not self.runs[name].inits
        run = self.runs.setdefault(name, Run(name))
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        if variables.get("state") is None and variables.get("host"):
            run.inits += 1
        bucket = {
            "id": f"id-{name}", "name": name, "displayName": variables.get("displayName") or name, "description": "",
            "config": json.dumps(run.config), "sweepName": run.sweep, "historyLineCount": len(run.history),
            "project": {"id": "p", "name": PROJECT, "entity": {"id": "e", "name": ENTITY}},
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _on_RunStoppedStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"stopped": self.runs[variables["runId"]].stop}}}

    def _on_CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [
            {"name": f, "uploadUrl": f"{self.url}/upload/{urllib.parse.quote(f)}"} for f in variables["files"]
        ]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    # ---- file stream

    def stream(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Take a piece of a run's file stream; the answer says whether the run shall stop."""
        with self.lock:
            run = self.runs.setdefault(name, Run(name))
            files = body.get("files") or {}
            history = files.get("wandb-history.jsonl")
            if history:
                run.history[history["offset"] :] = [json.loads(line) for line in history["content"]]
            summary = files.get("wandb-summary.json")
            if summary:
                run.summary = json.loads(summary["content"][-1])
            run.preempting = run.preempting or bool(body.get("preempting"))
            if body.get("complete"):
                run.exit_codes.append(body["exitcode"])
                if run.preempting and body["exitcode"] != 0:
                    self.again.append(name)
                run.preempting = False
            return {"exitcode": None, "limits": {}, "stopped": run.stop}


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none of the test's business."""


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(404, {})

        def do_PUT(self) -> None:
            self._body()
            self._reply(200, {})

        def do_POST(self) -> None:
            body = json.loads(self._body() or b"{}")
            if self.path.endswith("/file_stream"):
                self._reply(200, server.stream(self.path.split("/")[-2], body))
                return
            data = server.answer(body.get("query", ""), body.get("variables") or {})
            if data is None:
                self._reply(200, {"errors": [{"message": f"unknown here: {body.get('query', '')[:60]}"}]})
            else:
                self._reply(200, {"data": data})

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _reply(self, code: int, value: dict[str, Any]) -> None:
            text = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
