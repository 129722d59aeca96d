"""A Hugging Face Hub for tests, on loopback: the part of its HTTP API that publishing and loading models takes.

    python tests/hub_server.py STATE [--port 0] [--die-at-upload N]

Prints its address, and then serves until it is killed. The unmodified `huggingface_hub` client and `hf` command talk to
it: before they start, set HF_ENDPOINT to the address, HF_TOKEN to a key of TOKENS, and HF_HUB_DISABLE_XET=1, as it has
Git LFS but no Xet. Everything lies in the folder STATE, so that a killed server goes on where it was: blobs by their
sha256, and per repository a JSON file with its commits and refs.

It shows that the calls on the wire are right. It does not show what huggingface.co would say to them.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

# Token: user, role.
TOKENS = {"hf_write": ("alice", "write"), "hf_read": ("alice", "read")}
NAMESPACES = {"alice": ("alice", "pcdeq-zoo")}  # user: own and organisations
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet")


class RefusalError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class Store:
    """Repositories and blobs on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.RLock()
        (folder / "blobs").mkdir(parents=True, exist_ok=True)

    def _file(self, kind: str, repo: str) -> Path:
        return self.folder / kind / f"{repo}.json"

    def write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{threading.get_ident()}.tmp")
        temporary.write_bytes(content)
        temporary.replace(path)

    def blob(self, sha256: str) -> Path:
        return self.folder / "blobs" / sha256

    def add_blob(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.write(self.blob(digest), content)
        return digest

    def create(self, kind: str, repo: str, private: bool) -> None:
        first = {"oid": new_commit_id("", {}), "title": "initial commit", "date": now(), "files": {}}
        self.save(kind, repo, {"id": repo, "private": private, "tags": {}, "branches": {"main": first["oid"]}}, first)

    def save(self, kind: str, repo: str, state: dict[str, Any], commit: dict[str, Any] | None = None) -> None:
        if commit:
            state.setdefault("commits", {})[commit["oid"]] = commit
        self.write(self._file(kind, repo), json.dumps(state).encode())

    def exists(self, kind: str, repo: str) -> bool:
        return self._file(kind, repo).is_file()

    def load(self, kind: str, repo: str) -> dict[str, Any]:
        if not self.exists(kind, repo):
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        return json.loads(self._file(kind, repo).read_bytes())

    def delete(self, kind: str, repo: str) -> None:
        self.load(kind, repo)
        self._file(kind, repo).unlink()


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


def new_commit_id(parent: str, files: dict[str, Any]) -> str:
    return hashlib.sha1(f"{parent}{json.dumps(files)}{time.time_ns()}".encode()).hexdigest()


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def resolve(state: dict[str, Any], revision: str) -> dict[str, Any]:
    """The commit that a branch, tag or commit id names."""
    oid = state["branches"].get(revision) or state["tags"].get(revision) or revision
    if oid not in state["commits"]:
        raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return state["commits"][oid]


def tree_entry(path: str, file: dict[str, Any]) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": file["size"], "oid": file["git_id"]}
    if file["lfs"]:
        entry["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": 130}
    return entry


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    # --- plumbing ---

    def _serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query, keep_blank_values=True)
        try:
            self.user, self.role = self._who()
            for method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in method.split("|"):
                    with self.server.store.lock:
                        answer = action(self, **{k: unquote(v) if v else v for k, v in match.groupdict().items()})
                    if answer is not None:
                        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
                    return
            raise RefusalError(404, f"no such endpoint: {self.command} {url.path}")
        except RefusalError as error:
            headers = {"X-Error-Message": error.message, "Content-Type": "application/json"}
            if error.code:
                headers["X-Error-Code"] = error.code
            self._send(error.status, json.dumps({"error": error.message, **error.body}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
            if len(content) < int(headers.get("Content-Length", 0)):
                self.close_connection = True  # a damaged blob: the client gets less than it was promised

    def _who(self) -> tuple[str, str]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token, ("", ""))

    def _json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def _may_write(self, repo: str) -> None:
        if not self.user:
            raise RefusalError(401, "Invalid username or password.")
        if self.role != "write" or repo.split("/")[0] not in NAMESPACES[self.user]:
            raise RefusalError(403, f"You don't have the rights to write to {repo}")

    def _state(self, kind: str, repo: str) -> dict[str, Any]:
        state = self.server.store.load(kind, repo)
        if state["private"] and repo.split("/")[0] not in NAMESPACES.get(self.user, ()):
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        return state

    # --- account and repositories ---

    def whoami(self) -> dict[str, Any]:
        if not self.user:
            raise RefusalError(401, "Invalid username or password.")
        organisations = [{"type": "org", "name": name} for name in NAMESPACES[self.user][1:]]
        access = {"accessToken": {"displayName": "test", "role": self.role}, "type": "access_token"}
        return {"type": "user", "name": self.user, "fullname": self.user, "orgs": organisations, "auth": access}

    def create_repo(self) -> dict[str, Any]:
        wanted = self._json()
        kind = f"{wanted.get('type') or 'model'}s"
        if not self.user:
            raise RefusalError(401, "Invalid username or password.")
        repo = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        self._may_write(repo)
        url = f"{self.server.address}/{'' if kind == 'models' else kind + '/'}{repo}"
        if self.server.store.exists(kind, repo):
            raise RefusalError(409, "You already created this model repo", url=url)
        self.server.store.create(kind, repo, wanted.get("private", False) or wanted.get("visibility") == "private")
        return {"url": url, "id": repo, "name": repo}

    def delete_repo(self) -> dict[str, Any]:
        wanted = self._json()
        repo = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        self._may_write(repo)
        self.server.store.delete(f"{wanted.get('type') or 'model'}s", repo)
        return {}

    def validate_yaml(self) -> dict[str, Any]:
        content = self._json()["content"]
        match = re.match(r"---\s*\n(.*?)\n---", content, re.S)
        try:
            metadata = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            raise RefusalError(400, "bad metadata", errors=[{"message": str(error)}], warnings=[]) from error
        errors = []
        for model in metadata.get("model-index", []):
            for result in model["results"]:
                if not all(metric.get("type") and "value" in metric for metric in result["metrics"]):
                    errors.append({"message": "a metric needs type and value"})
                if "source" in result and not result["source"].get("url"):
                    errors.append({"message": "a source needs its url"})
        if errors:
            raise RefusalError(400, "bad metadata", errors=errors, warnings=[])
        return {"errors": [], "warnings": []}

    def info(self, kind: str, repo: str, revision: str | None = None) -> dict[str, Any]:
        state = self._state(kind, repo)
        commit = resolve(state, revision or "main")
        siblings, card = [], {}
        for path, file in commit["files"].items():
            sibling: dict[str, Any] = {"rfilename": path}
            if "blobs" in self.query:
                sibling |= {"size": file["size"], "blobId": file["git_id"]}
                if file["lfs"]:
                    sibling["lfs"] = {"sha256": file["sha256"], "size": file["size"], "pointerSize": 130}
            siblings.append(sibling)
        if "README.md" in commit["files"]:
            text = self.server.store.blob(commit["files"]["README.md"]["sha256"]).read_text(encoding="utf-8")
            if match := re.match(r"---\s*\n(.*?)\n---", text, re.S):
                card = yaml.safe_load(match[1])
        result = {"id": repo, "_id": repo, "sha": commit["oid"], "private": state["private"], "siblings": siblings}
        return result | {"lastModified": commit["date"], "cardData": card, "tags": card.get("tags", [])}

    def tree(self, kind: str, repo: str, revision: str, folder: str | None = None) -> list[dict[str, Any]]:
        files = resolve(self._state(kind, repo), revision)["files"]
        prefix = f"{folder}/" if folder else ""
        return [tree_entry(path, file) for path, file in files.items() if path.startswith(prefix)]

    def paths_info(self, kind: str, repo: str, revision: str) -> list[dict[str, Any]]:
        files = resolve(self._state(kind, repo), revision)["files"]
        wanted = parse_qs(self.body.decode()).get("paths", [])
        return [tree_entry(path, files[path]) for path in wanted if path in files]

    def refs(self, kind: str, repo: str) -> dict[str, Any]:
        state = self._state(kind, repo)
        answer: dict[str, Any] = {"converts": []}
        for name, folder in (("branches", "heads"), ("tags", "tags")):
            answer[name] = [
                {"name": ref, "ref": f"refs/{folder}/{ref}", "targetCommit": oid} for ref, oid in state[name].items()
            ]
        return answer

    def tag(self, kind: str, repo: str, revision: str) -> dict[str, Any]:
        self._may_write(repo)
        state = self._state(kind, repo)
        name = self._json()["tag"]
        if name in state["tags"]:
            raise RefusalError(409, f"Tag {name} exists already")
        state["tags"][name] = resolve(state, revision)["oid"]
        self.server.store.save(kind, repo, state)
        return {}

    # --- upload ---

    def preupload(self, kind: str, repo: str, revision: str) -> dict[str, Any]:
        self._may_write(repo)
        current = resolve(self._state(kind, repo), revision)["files"]
        answers = []
        for file in self._json()["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10_000_000
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if known := current.get(file["path"]):
                answer["oid"] = known["sha256"] if known["lfs"] else known["git_id"]
            answers.append(answer)
        return {"files": answers}

    def lfs_batch(self, repo: str) -> dict[str, Any]:
        self._may_write(repo)
        objects = []
        for wanted in self._json()["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if not self.server.store.blob(wanted["oid"]).is_file():
                href = f"{self.server.address}/_lfs/{wanted['oid']}?key={self.server.sign(wanted['oid'])}"
                entry["actions"] = {
                    "upload": {"href": href, "header": {}},
                    "verify": {"href": f"{self.server.address}/_lfs/verify"},
                }
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str) -> None:
        self.server.uploads += 1
        if self.server.uploads == self.server.die_at_upload:
            os._exit(1)  # as a power cut would
        if self.query.get("key") != [self.server.sign(oid)]:
            raise RefusalError(403, "bad signature")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusalError(400, "content is not what its name says")
        self.server.store.add_blob(self.body)
        self._send(200, b"", {})

    def lfs_verify(self) -> dict[str, Any]:
        wanted = self._json()
        blob = self.server.store.blob(wanted["oid"])
        if not blob.is_file() or blob.stat().st_size != wanted["size"]:
            raise RefusalError(404, "no such object")
        return {}

    def commit(self, kind: str, repo: str, revision: str) -> dict[str, Any]:
        self._may_write(repo)
        state = self._state(kind, repo)
        parent = resolve(state, revision)
        files = dict(parent["files"])
        title = ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, parent["oid"]):
                    raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
            elif entry["key"] == "file":
                content = base64.b64decode(value["content"])
                digest = self.server.store.add_blob(content)
                known = {"git_id": git_blob_id(content), "sha256": digest, "size": len(content), "lfs": False}
                files[value["path"]] = known
            elif entry["key"] == "lfsFile":
                blob = self.server.store.blob(value["oid"])
                if not blob.is_file():
                    raise RefusalError(400, f"{value['path']} was not uploaded")
                size = blob.stat().st_size
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {size}\n"
                known = {"git_id": git_blob_id(pointer.encode()), "sha256": value["oid"], "size": size, "lfs": True}
                files[value["path"]] = known
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
            else:
                raise RefusalError(400, f"unknown operation {entry['key']}")
        new = {"oid": new_commit_id(parent["oid"], files), "title": title, "date": now(), "files": files}
        state["branches"][revision] = new["oid"]
        self.server.store.save(kind, repo, state, new)
        return {
            "success": True,
            "commitOid": new["oid"],
            "commitUrl": f"{self.server.address}/{repo}/commit/{new['oid']}",
        }

    # --- download ---

    def file(self, repo: str, revision: str, path: str, kind: str | None = None) -> None:
        commit = resolve(self._state((kind or "models/").rstrip("/"), repo), revision)
        if path not in commit["files"]:
            self._send(
                404,
                b"",
                {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit["oid"]},
            )
            return
        known = commit["files"][path]
        headers = {"X-Repo-Commit": commit["oid"], "ETag": f'"{known["git_id"]}"', "Accept-Ranges": "bytes"}
        if known["lfs"]:
            # Another host name, as on the real Hub: the client must not send its token along.
            target = f"http://localhost:{self.server.server_port}/_cdn/{known['sha256']}/{known['size']}"
            linked = {"X-Linked-ETag": f'"{known["sha256"]}"', "X-Linked-Size": str(known["size"])}
            self._send(302, b"", {**headers, **linked, "Location": f"{target}?name={quote(path)}"})
        else:
            content = self.server.store.blob(known["sha256"]).read_bytes()
            self._send(200, content, headers)

    def cdn(self, oid: str, size: str) -> None:
        content = self.server.store.blob(oid).read_bytes()
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2] or int(size) - 1)
            if first >= int(size):
                self._send(416, b"", {"Content-Range": f"bytes */{size}"})
                return
            part = {"Content-Range": f"bytes {first}-{last}/{size}", "Content-Length": str(last - first + 1)}
            self._send(206, content[first : last + 1], part)
        else:
            self._send(200, content, {"Content-Length": size, "ETag": f'"{oid}"'})


_KIND = r"(?P<kind>models|datasets)"
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_REV = r"(?P<revision>[^/]+)"
ROUTES = (
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create_repo),
    ("DELETE", r"/api/repos/delete", Handler.delete_repo),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"/api/{_KIND}/{_REPO}/preupload/{_REV}", Handler.preupload),
    ("POST", rf"/api/{_KIND}/{_REPO}/commit/{_REV}", Handler.commit),
    ("POST", rf"/api/{_KIND}/{_REPO}/tag/{_REV}", Handler.tag),
    ("POST", rf"/api/{_KIND}/{_REPO}/paths-info/{_REV}", Handler.paths_info),
    ("GET|HEAD", rf"/api/{_KIND}/{_REPO}/refs", Handler.refs),
    ("GET|HEAD", rf"/api/{_KIND}/{_REPO}/tree/{_REV}(?:/(?P<folder>.+))?", Handler.tree),
    ("GET|HEAD", rf"/api/{_KIND}/{_REPO}(?:/revision/{_REV})?", Handler.info),
    ("POST", rf"/(?:datasets/)?{_REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("POST", r"/_lfs/verify", Handler.lfs_verify),
    ("GET|HEAD", r"/_cdn/(?P<oid>[0-9a-f]{64})/(?P<size>\d+)", Handler.cdn),
    ("GET|HEAD", rf"/(?P<kind>datasets/)?{_REPO}/resolve/{_REV}/(?P<path>.+)", Handler.file),
)


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path, port: int, die_at_upload: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.store = Store(folder)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.uploads, self.die_at_upload = 0, die_at_upload
        self._secret = os.urandom(16)

    def sign(self, oid: str) -> str:
        return hmac.new(self._secret, oid.encode(), "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", type=Path)
    parser.add_argument("--port", type=int, default=0, help="default: any free one")
    parser.add_argument("--die-at-upload", type=int, default=0, metavar="N", help="exit at the N-th LFS upload")
    args = parser.parse_args()
    server = HubServer(args.state, args.port, args.die_at_upload)
    print(server.address, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
