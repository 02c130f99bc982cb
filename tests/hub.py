"""A hub on the loopback interface, and a process with the real clients that talk to nothing else.

It serves from memory what huggingface_hub, transformers, datasets and lm-eval ask for: repositories
with commits, branches and tags, files in git and in LFS, gates, searches. It can cut connections,
damage files, and fall silent.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from ssah_utils.files import ROOT, cache_dir

LARGE = ("*.safetensors", "*.bin", "*.parquet", "*.jsonl")  # in LFS, as .gitattributes would say
TOKEN = "hf_of_somebody_with_access"


@dataclass
class Repository:
    """Files by commit, and which commit a branch or tag means. ``gate``: 401 or 403, else open."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    gate: int = 0

    def commit(self, files: dict[str, bytes], commit: str = "") -> str:
        """Add a commit to main; its name is a hash of what it holds, unless one is given."""
        about = [[name, hashlib.sha256(content).hexdigest()] for name, content in files.items()]
        content = json.dumps([about, len(self.commits)]).encode()
        commit = commit or hashlib.sha1(content).hexdigest()
        self.commits[commit] = files
        self.branches["main"] = commit
        return commit

    def named(self, revision: str) -> str | None:
        known = self.tags | self.branches
        return known.get(revision) or (revision if revision in self.commits else None)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(file: str) -> bool:
    return any(fnmatchcase(file, pattern) for pattern in LARGE)


def etag(file: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if is_large(file) else git_hash(content)


class Hub:
    """``models`` and ``datasets`` by their names; ``requests`` is what it was asked."""

    def __init__(self) -> None:
        self.models: dict[str, Repository] = {}
        self.datasets: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str]] = []  # method, path, range
        self.cut_after: dict[str, int] = {}  # by file: the connection breaks after so many bytes
        self.damaged: set[str] = set()  # files that are served with one other byte
        self.broken = 0  # the status with which every request is answered
        self.troubles: dict[str, list[int]] = {}  # by path: statuses of the next requests
        self.loops: set[str] = set()  # files whose address refers to itself
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, kind: str, name: str, files: dict[str, bytes], commit: str = "") -> Repository:
        """A repository with one commit."""
        repository = getattr(self, kind)[name] = Repository()
        repository.commit(files, commit)
        return repository

    def asked(self, part: str) -> list[tuple[str, str, str]]:
        return [request for request in self.requests if part in request[1]]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    return type("Handler", (Handler,), {"hub": hub})


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(is_head=True)

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.answer()

    def answer(self, is_head: bool = False) -> None:
        place = urlsplit(self.path)
        path, self.query = unquote(place.path), parse_qs(place.query)
        self.is_head = is_head
        self.hub.requests.append((self.command, path, self.headers.get("Range") or ""))
        if self.hub.broken:
            return self.refuse(self.hub.broken, "", "Service Unavailable")
        if waiting := next((own for part, own in self.hub.troubles.items() if part in path), []):
            return self.refuse(waiting.pop(0), "", "Try again later")
        if path.rpartition("/")[2] in self.hub.loops:
            return self.send(302, b"", {"Location": self.path})
        if path == "/":
            return self.send(200, b"a hub")
        if self.headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if match := re.fullmatch(r"/api/(models|datasets)", path):
            return self.search(match[1])
        # an encoded slash belongs to the revision
        raw = re.fullmatch(r"(/.+?/(?:resolve|revision|tree|paths-info)/)([^/]+)(/.*)?", place.path)
        if raw:
            before, revision, rest = unquote(raw[1]), unquote(raw[2]), unquote(raw[3] or "")
        else:
            before, revision, rest = path, "main", ""
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/", before):
            kind = "datasets" if match[1] else "models"
            return self.file(kind, match[2], revision, rest.lstrip("/"))
        what = r"(?:/(revision|tree|paths-info|refs)/?)?"
        if match := re.fullmatch(rf"/api/(models|datasets)/([^/]+/[^/]+?){what}", before):
            return self.about(match[1], match[2], match[3] or "revision", revision, rest)
        self.refuse(404, "", "no such page")

    # ------------------------------------------------------------------------------------- answers

    def search(self, kind: str) -> None:
        author = self.query.get("author", [""])[0]
        words = self.query.get("search", [""])[0].lower()
        names = [
            name
            for name in getattr(self.hub, kind)
            if name.startswith(f"{author}/" if author else "") and words in name.lower()
        ]
        self.send_json([{"id": name} for name in names])

    def found(self, kind: str, name: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and its commit; where one is not there, it was said."""
        repository = getattr(self.hub, kind).get(name)
        if repository is None:  # as the hub does for who is not logged in
            self.refuse(401, "RepoNotFound", "Invalid username or password.")
            return None
        commit = repository.named(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, commit

    def about(self, kind: str, name: str, what: str, revision: str, rest: str) -> None:
        if not (found := self.found(kind, name, revision)):
            return
        repository, commit = found
        files = repository.commits[commit]
        if what == "refs":
            listed = {
                group: [
                    {"name": one, "ref": f"refs/{folder}/{one}", "targetCommit": target}
                    for one, target in refs.items()
                ]
                for group, folder, refs in (
                    ("branches", "heads", repository.branches),
                    ("tags", "tags", repository.tags),
                )
            }
            self.send_json(listed | {"converts": []})
        elif what == "revision":
            siblings = [{"rfilename": file} for file in files]
            gated = "manual" if repository.gate else False
            about = {"id": name, "sha": commit, "siblings": siblings, "gated": gated}
            self.send_json(about | {"private": False, "tags": [], "downloads": 0, "likes": 0})
        else:
            self.listing(files, what, rest.strip("/"))

    def listing(self, files: dict[str, bytes], what: str, inside: str) -> None:
        entries = [self.entry(file, content) for file, content in files.items()]
        folders = {
            "/".join(file.split("/")[:n]) for file in files for n in range(1, file.count("/") + 1)
        }
        entries += [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders]
        if what == "paths-info":
            asked = json.loads(self.body) if self.body.startswith(b"{") else {}
            wanted = asked.get("paths") or parse_qs(self.body.decode()).get("paths", [])
            return self.send_json([one for one in entries if one["path"] in wanted])
        start = f"{inside}/" if inside else ""
        entries = [one for one in entries if one["path"].startswith(start)]
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            entries = [one for one in entries if "/" not in one["path"][len(start) :]]
        if inside and not entries:
            return self.refuse(404, "EntryNotFound", f"{inside} does not exist")
        self.send_json(entries)

    def entry(self, file: str, content: bytes) -> dict:
        known = {"type": "file", "path": file, "size": len(content), "oid": git_hash(content)}
        if is_large(file):
            sha256 = hashlib.sha256(content).hexdigest()
            known["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
        return known

    def file(self, kind: str, name: str, revision: str, file: str) -> None:
        if not (found := self.found(kind, name, revision)):
            return
        repository, commit = found
        said = {"X-Repo-Commit": commit}
        if repository.gate and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(
                repository.gate, "GatedRepo", f"Access to {name} is restricted", said
            )
        if file not in repository.commits[commit]:
            return self.refuse(404, "EntryNotFound", "Entry not found", said)
        content = repository.commits[commit][file]
        said |= {"ETag": f'"{etag(file, content)}"', "Accept-Ranges": "bytes"}
        if is_large(file):
            said |= {"X-Linked-Etag": said["ETag"], "X-Linked-Size": str(len(content))}
        if file in self.hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        status, total = 200, len(content)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), min(int(match[2] or total - 1), total - 1)
            status, content = 206, content[first : last + 1]
            said["Content-Range"] = f"bytes {first}-{last}/{total}"
        is_whole = status == 200 and not self.is_head
        self.send(status, content, said, self.hub.cut_after.pop(file, None) if is_whole else None)

    def send_json(self, content: object) -> None:
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str, message: str, said: dict | None = None) -> None:
        codes = {"X-Error-Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        self.send(status, body, {**(said or {}), **codes, "X-Error-Message": message})

    def send(
        self, status: int, content: bytes, said: dict | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (said or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.is_head:
            return
        self.wfile.write(content if cut is None else content[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


# ------------------------------------------------------------------------------------------ clients

LOOP = """
import contextlib, io, json, sys
replies, scope = sys.stdout, {}
for line in sys.stdin:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            exec(json.loads(line), scope)
        reply = {"result": scope.pop("result", None)}
    except BaseException as error:
        reply = {"error": str(error), "kind": type(error).__name__}
        reply["kinds"] = [kind.__name__ for kind in type(error).__mro__]
    replies.write(json.dumps(reply | {"said": said.getvalue()}) + "\\n")
    replies.flush()
"""


class Refused(Exception):
    """What the code in the clients' process raised: ``kinds`` are the names of its classes."""

    def __init__(self, message: str, kinds: list[str]) -> None:
        super().__init__(message)
        self.kinds = kinds


class Clients:
    """One process whose clients know this hub alone, with caches of its own."""

    def __init__(self, endpoint: str, home: Path, **more: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not is_of_clients(name)}
        own = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home / "hf"),
            "SSAH_RUNS": str(home / "runs"),
        }
        own |= {"SSAH_CACHE": str(home / "ssah"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        # whoever asks for anything else meets a proxy that is not there
        nowhere = "http://127.0.0.1:9"
        own |= {"HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere, "NO_PROXY": "127.0.0.1"}
        own |= {name.lower(): own[name] for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")}
        (home / "ssah").mkdir()
        for name in ("models", "wheels"):  # what was fetched already
            (cache_dir() / name).mkdir(exist_ok=True)
            os.symlink(cache_dir() / name, home / "ssah" / name)
        self.home = home
        self.log = open(home / "stderr.txt", "w", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", LOOP],
            env={**kept, **own, **more},
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.said = ""

    def run(self, code: str) -> object:
        """What ``code`` leaves in ``result``; ``Refused`` for what it raises."""
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError((self.home / "stderr.txt").read_text(encoding="utf-8")[-2000:])
        reply = json.loads(line)
        self.said = reply["said"]
        if "error" in reply:
            raise Refused(reply["error"], reply["kinds"])
        return reply["result"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=300)  # a busy machine takes its time
        self.process.stdout.close()
        self.log.close()


def is_of_clients(name: str) -> bool:
    """Whether a variable of the environment tells the clients where to go or what to keep."""
    return name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_")) or name.lower().endswith(
        "_proxy"
    )
